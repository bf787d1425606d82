"""Perturbed inputs: tokens whose embeddings are replaced, and what the model makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlrp.errors import InputError
from attnlrp.evaluation.samples import Sample

__all__ = ["BASELINES", "Perturbation", "expand"]

_WORTH_SHARING = 0.1  # part of the tokens below which a shared prefix saves less than a pass of its own costs

BASELINES = ("zero", "mean", "unknown", "mask")
"""What takes the place of an embedding: zeros (the authors' choice), the mean of the table, or that of a token."""


@dataclass(frozen=True)
class Perturbation:
    """Runs a model on inputs of which some tokens are taken away.

    Args:
        model: a model of `transformers` with `get_input_embeddings()`.
        tokenizer: its tokenizer; needed for the baselines "unknown" and "mask" only.
        baseline: what takes the place of an embedding, one of `BASELINES`.
        batch_size: perturbed inputs in one forward pass.
    """

    model: Any
    tokenizer: Any = None
    baseline: str = "zero"
    batch_size: int = 32

    @property
    def settings(self) -> dict[str, Any]:
        """What results depend on."""
        return {"baseline": self.baseline}

    def pool(self, values: Tensor) -> Tensor:
        """Values of what is taken away at once: those of the tokens, as they are."""
        return values

    def scores(self, sample: Sample, kept: Tensor) -> Tensor:
        """Logit and probability of the explained output for each variant (variant, 2), on the CPU in float32.

        Args:
            sample: the input.
            kept: which tokens keep their embedding (variant, token).
        """
        table = self.model.get_input_embeddings()
        with torch.no_grad():
            embeddings = table(sample.inputs["input_ids"])  # (1, token, hidden)
            other = self._other(table, embeddings)
            kept = kept.to(embeddings.device)
            # inputs that begin alike go together, so that what they share is computed once
            begins = torch.where(kept.all(dim=1), kept.shape[1], (~kept).int().argmax(dim=1))
            ranked = begins.argsort(descending=True, stable=True)
            found = torch.empty(len(kept), 2)
            for chunk in ranked.split(self.batch_size):
                changed = torch.where(kept[chunk, :, None], embeddings, other)
                found[chunk.cpu()] = self._chunk(sample, changed, int(begins[chunk].min())).cpu()
        return found

    def _chunk(self, sample: Sample, embeddings: Tensor, prefix: int) -> Tensor:
        """Logit and probability of inputs (variant, token, hidden) whose first `prefix` tokens are the same."""
        inputs = expand(sample.inputs, len(embeddings))
        del inputs["input_ids"]
        prefix = min(prefix, embeddings.shape[1] - 1)
        if len(embeddings) > 1 and prefix >= _WORTH_SHARING * embeddings.shape[1] and self._caches(sample):
            shared = self.model(inputs_embeds=embeddings[:1, :prefix], use_cache=True).past_key_values
            layers = getattr(shared, "layers", [None])
            if all(hasattr(layer, "batch_repeat_interleave") for layer in layers):  # not those of linear attention
                shared.batch_repeat_interleave(len(embeddings))
                inputs |= {"past_key_values": shared, "use_cache": True}
                embeddings = embeddings[:, prefix:]
        return sample.output.both(self.model(**inputs, inputs_embeds=embeddings))

    def _caches(self, sample: Sample) -> bool:
        """Whether the model can go on after a prefix: a decoder whose every input is a token."""
        accepted = inspect.signature(self.model.forward).parameters
        alone = set(sample.inputs) <= {"input_ids", "logits_to_keep"}
        return (
            alone and sample.output.last and "past_key_values" in accepted and not self.model.config.is_encoder_decoder
        )

    def _other(self, table: Any, embeddings: Tensor) -> Tensor:
        if self.baseline == "zero":
            return torch.zeros_like(embeddings[:, :1])
        if self.baseline == "mean":
            every = torch.arange(table.weight.shape[0], device=embeddings.device)
            parts = torch.stack([table(part).double().sum(dim=0) for part in every.split(8192)])
            return (parts.sum(dim=0) / len(every)).to(embeddings.dtype)
        name = {"unknown": "unk_token_id", "mask": "mask_token_id"}.get(self.baseline)
        if name is None:
            raise InputError(f"baseline: got {self.baseline!r}, expected one of {', '.join(BASELINES)}")
        token = getattr(self.tokenizer, name, None)
        if token is None:
            raise InputError(f"baseline: this tokenizer has no {self.baseline} token; use zero or mean")
        found: Tensor = table(torch.tensor([[token]], device=embeddings.device))
        return found


def expand(inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Inputs of one sample, repeated; without a cache, which perturbed inputs do not share."""

    def row(name: str, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1 and name != "logits_to_keep"

    rows = {k: v.expand(count, *v.shape[1:]) if row(k, v) else v for k, v in inputs.items()}
    return rows | {"use_cache": False} if "logits_to_keep" in inputs or "decoder_input_ids" in inputs else rows

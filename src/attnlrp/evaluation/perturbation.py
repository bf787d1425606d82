"""Perturbed inputs: tokens whose embeddings are replaced, and what the model makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlrp.errors import InputError
from attnlrp.evaluation.samples import Sample

__all__ = ["BASELINES", "Perturbation", "expand"]

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
            found = []
            for chunk in kept.to(embeddings.device).split(self.batch_size):
                inputs = expand(sample.inputs, len(chunk))
                inputs["inputs_embeds"] = torch.where(chunk[..., None], embeddings, other)
                del inputs["input_ids"]
                found.append(sample.output.both(self.model(**inputs)).cpu())
        return torch.cat(found)

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
    rows = {
        k: v.expand(count, *v.shape[1:]) if isinstance(v, Tensor) and v.dim() and v.shape[0] == 1 else v
        for k, v in inputs.items()
    }
    return rows | {"use_cache": False} if "logits_to_keep" in inputs or "decoder_input_ids" in inputs else rows

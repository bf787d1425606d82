"""AtMan: attention scores of one token suppressed at a time, in all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlrp.baselines.maps import Scores, placed, prefix_length
from attnlrp.baselines.sample import Sample, Score, opened, require_positive
from attnlrp.eager import eager_attention
from attnlrp.errors import InputError, ModelError

__all__ = ["AtMan"]


@dataclass(frozen=True)
class AtMan:
    """R_t = f(x) - f(x with token t suppressed): its attention scores, before the softmax, in every layer and head.

    "multiplicative", the published form, scales the scores to key t, counted from the lowest one that the query sees,
    by 1 - f, f the factor. "additive" adds log(1 - f): the weight of key t is scaled by 1 - f, then weights are
    normalised again. Of an encoder-decoder, suppressed is token t of the encoder, in the encoder and in cross
    attention; of an image, a patch. The authors take the change of the cross entropy; with the log-probability as
    score, that is the same. Costs 1 forward for each token or patch, and 1 for the whole. No code of the model is
    changed or copied: the scores are met at the softmax of eager attention.

    Reference: Deb et al., "AtMan: understanding transformer predictions through memory efficient attention
    manipulation", NeurIPS 2023.

    Args:
        factor: f, between 0 and 1; 0.9 in the authors' code.
        similarity: also suppress tokens whose embedding has at least this cosine similarity to that of t, by f times
            the similarity; None for t alone.
        form: "multiplicative" or "additive".
        batch_size: suppressed tokens in one pass.
    """

    factor: float = 0.9
    similarity: float | None = None
    form: Literal["multiplicative", "additive"] = "multiplicative"
    batch_size: int = 16

    def __post_init__(self) -> None:
        require_positive(batch_size=self.batch_size, factor=self.factor)
        if not self.factor < 1:
            raise InputError(f"factor: got {self.factor}, expected a number between 0 and 1")
        if self.form not in ("multiplicative", "additive"):
            raise InputError(f"form: got {self.form!r}, expected 'multiplicative' or 'additive'")

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> Tensor:
        with opened(model, inputs, target) as sample, torch.no_grad(), eager_attention(model):
            met = _Met()
            with Scores(met):
                output = sample.output(sample.features, output_hidden_states=self.similarity is not None)
            whole = sample.value(output, 1)
            keys = _key_count(sample, met.lengths)
            first = prefix_length(sample, keys)
            kept = self._kept(sample, output, keys)[first:]
            parts = [self._suppressed(sample, rows) for rows in kept.split(self.batch_size)]
            return placed(sample, torch.cat([whole.new_zeros(first), whole - torch.cat(parts)]))

    def _kept(self, sample: Sample, output: Any, keys: int) -> Tensor:
        """1 - f of each key (columns), for each suppressed token (rows)."""
        chosen = torch.eye(keys, dtype=torch.float64, device=sample.features.device)
        if self.similarity is not None:
            unit = F.normalize(_entry(sample, output, keys).double(), dim=-1)
            cosine = (unit @ unit.T).clamp(0, 1)
            chosen = torch.where(cosine >= self.similarity, cosine, 0.0).fill_diagonal_(1)
        return 1 - self.factor * chosen

    def _suppressed(self, sample: Sample, kept: Tensor) -> Tensor:
        """The score of each row of suppressed keys (row,)."""

        def change(scores: Tensor) -> Tensor:
            if scores.shape[-1] != factors.shape[-1] or _is_of_decoder(sample, scores):
                return scores
            return self._change(scores, factors.to(scores.dtype))

        factors = kept[:, None, None]
        features = sample.features.expand(len(kept), *sample.features.shape[1:])
        with Scores(change):
            return sample.score(features)

    def _change(self, scores: Tensor, factors: Tensor) -> Tensor:
        if self.form == "additive":
            return scores + factors.log()
        seen = ~_masked(scores)
        lowest = scores.masked_fill(~seen, torch.inf).amin(dim=-1, keepdim=True)
        return torch.where(seen, (scores - lowest) * factors, scores)


class _Met:
    """Notes how many keys the attention of a model has, and changes nothing."""

    def __init__(self) -> None:
        self.lengths: set[int] = set()

    def __call__(self, scores: Tensor) -> Tensor:
        self.lengths.add(scores.shape[-1])
        return scores


def _key_count(sample: Sample, lengths: set[int]) -> int:
    """Keys of an attention to the whole input: its tokens; patches with class and register tokens."""
    keys = max(lengths, default=0) if sample.is_image else sample.size
    if keys not in lengths:
        raise ModelError(
            f"{type(sample.model).__name__} runs no softmax over its {sample.size} tokens: AtMan needs such attention"
        )
    return keys


def _entry(sample: Sample, output: Any, keys: int) -> Tensor:
    """Embeddings of the keys (key, hidden), as they enter the first layer."""
    states = getattr(output, "encoder_hidden_states" if sample.encoder_decoder else "hidden_states", None)
    if not states or states[0].shape[-2] != keys:
        raise ModelError(f"{type(sample.model).__name__} does not return the embeddings that enter its first layer")
    first: Tensor = states[0][0]
    return first


def _masked(scores: Tensor) -> Tensor:
    return scores <= torch.finfo(scores.dtype).min / 2


def _is_of_decoder(sample: Sample, scores: Tensor) -> bool:
    """Whether a decoder beside an encoder looks at its own tokens: the first of them does not see the last."""
    return sample.encoder_decoder and bool(_masked(scores[0, 0, 0, -1]))

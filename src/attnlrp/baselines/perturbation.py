"""Baselines that switch one token or patch off at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnlrp.baselines.libraries import captum_module
from attnlrp.baselines.sample import Sample, Score, as_result, opened, require_positive
from attnlrp.errors import InputError

__all__ = ["LeaveOneOut"]

_ALIGNED = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # one number for each token
_INSIDE = (
    "it names a position inside the text, which is another one in a shorter text; expected the first, or the last "
    "counted from the end, for replacement='delete'; use 'zero' or 'unk'"
)


@dataclass(frozen=True)
class LeaveOneOut:
    """R_t = f(x) - f(x without token t). Pixels are left out in squares; each gets an equal part of its square.

    captum's `FeatureAblation` for "zero". Costs 1 forward for each token or square, and 1 for the whole.

    Reference: Zeiler & Fergus, "Visualizing and understanding convolutional networks", ECCV 2014 (zero); Li, Monroe &
    Jurafsky, "Understanding neural networks through representation erasure", 2016 (delete).

    Args:
        replacement: what is in the place of the token: "zero" for an embedding of zeros (black pixels), "unk" for
            another token, "delete" for nothing: the text is one token shorter, so the explained position must be the
            first or the last, counted from its end.
        token: index of the token for "unk"; None for the unknown or mask token that the config of the model names.
        patch: edge of the squares of an image, in pixels.
        batch_size: perturbed inputs in one pass.
    """

    replacement: Literal["zero", "unk", "delete"] = "zero"
    token: int | None = None
    patch: int = 16
    batch_size: int = 16

    def __post_init__(self) -> None:
        require_positive(patch=self.patch, batch_size=self.batch_size)
        if self.replacement not in ("zero", "unk", "delete"):
            raise InputError(f"replacement: got {self.replacement!r}, expected 'zero', 'unk' or 'delete'")

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> Tensor:
        with opened(model, inputs, target) as sample, torch.no_grad():
            if self.replacement == "zero":
                return self._zeroed(sample)
            if sample.is_image:
                raise InputError(f"replacement: {self.replacement!r} is for texts, expected 'zero' for an image")
            changed = self._replaced(sample) if self.replacement == "unk" else _shortened(sample)
            output = sample.output(sample.features)
            if self.replacement == "delete":
                sample.inputs |= _moved(sample)
                _require_no_positions(sample, output, sample.model(**sample.inputs | _row(changed, 0)))
            starts = range(0, sample.size, self.batch_size)
            return as_result(sample.value(output, 1) - torch.cat([self._scores(sample, changed, k) for k in starts]))

    def _zeroed(self, sample: Sample) -> Tensor:
        groups = sample.groups(self.patch)
        method = captum_module("attr").FeatureAblation(sample.score)
        settings = {"feature_mask": groups, "perturbations_per_eval": self.batch_size}
        drops = method.attribute(sample.features, baselines=0.0, **settings)[0]
        if not sample.is_image:
            return as_result(drops[:, 0])
        firsts = [int((groups.flatten() == k).nonzero()[0]) for k in range(int(groups.max()) + 1)]
        return sample.spread(drops[0].flatten()[firsts], self.patch)

    def _scores(self, sample: Sample, changed: dict[str, Tensor], start: int) -> Tensor:
        rows = {name: value[start : start + self.batch_size] for name, value in changed.items()}
        count = len(rows["input_ids"])
        return sample.value(sample.model(**sample.expanded(count) | rows), count)

    def _replaced(self, sample: Sample) -> dict[str, Tensor]:
        """Row t has another token at t."""
        config = getattr(sample.model, "config", None)
        named = [self.token, *(getattr(config, name, None) for name in ("unk_token_id", "mask_token_id"))]
        token = next((t for t in named if t is not None), None)
        if token is None:
            raise InputError("token: the config of the model names no unknown or mask token; give the index of a token")
        ids = sample.inputs["input_ids"].repeat(sample.size, 1)
        return {"input_ids": ids.fill_diagonal_(token)}


def _shortened(sample: Sample) -> dict[str, Tensor]:
    """Row t lacks token t."""
    size = sample.size
    if size < 2:
        raise InputError("replacement: got a text of one token, of which 'delete' leaves nothing; expected two or more")
    kept = torch.tensor([[k for k in range(size) if k != t] for t in range(size)], device=sample.features.device)
    changed = {name: sample.inputs[name][0] for name in _ALIGNED if isinstance(sample.inputs.get(name), Tensor)}
    return {
        name: value[: size - 1].expand(size, -1) if name == "position_ids" else value[kept]
        for name, value in changed.items()
    }


def _row(changed: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in changed.items()}


def _moved(sample: Sample) -> dict[str, Any]:
    """The input that names positions, for texts that are one token shorter: the last is one less."""
    kept, last = sample.inputs.get("logits_to_keep"), sample.size - 1
    if not isinstance(kept, Tensor):
        return {}
    if ((kept > 0) & (kept < last)).any():
        raise InputError(f"logits_to_keep: {_INSIDE}")
    return {"logits_to_keep": torch.where(kept == last, last - 1, kept)}


def _require_no_positions(sample: Sample, output: Any, shorter: Any) -> None:
    """Refuse a target inside the text: in a shorter text its index is that of another token.

    Outputs that have a row for each token are those that are shorter for a shorter text; of these, the target may
    depend on the first row or on the last.
    """
    size = sample.size
    try:
        sample.value(shorter, 1)
        for name in [
            n
            for n, v in getattr(output, "items", tuple)()
            if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1
        ]:
            if (output[name].shape[1], shorter[name].shape[1]) != (size, size - 1):
                continue
            with torch.enable_grad():
                leaf = output[name].detach().requires_grad_()
                value = sample.value(type(output)(**{**output, name: leaf}), 1).sum()
                if not value.requires_grad:
                    continue
                (gradient,) = torch.autograd.grad(value, leaf)
            positions = gradient[0].reshape(size, -1).abs().sum(dim=-1).nonzero().flatten().tolist()
            if any(0 < p < size - 1 for p in positions):
                raise IndexError(positions)
    except IndexError as error:
        raise InputError(f"target: {_INSIDE}") from error

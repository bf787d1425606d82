"""Localisation: is the relevance of an image on the object that the model names?

A model may look at something else than the object, so these figures measure the model and the explanation together;
they are meant to compare explanations of one model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnlrp.errors import InputError
from attnlrp.evaluation.samples import Sample

__all__ = ["locating"]


def locating(sample: Sample, relevance: Tensor, *, k: int = 1000) -> dict[str, float]:
    """Agreement of relevance with the object in an image. Each figure is between 0 and 1, more is better.

    - mass: share of the positive relevance that is on the object (relevance mass accuracy; Arras et al., 2022); 0 if
      there is no positive relevance;
    - pointing: whether the pixel of the largest relevance is on the object (pointing game; Zhang et al., 2018, here
      without a tolerance around the object);
    - iou: intersection over union of the object with as many of the most relevant pixels as it has (the binarisation);
    - top_k: share of the k most relevant pixels that is on the object (Theiner et al., 2021); of an object of fewer
      than k pixels, the share of it that they cover.

    Equally relevant pixels, such as those of a patch or of a map of zeros, are taken in random order: the figures hold
    the mean intersection over these orders.

    Args:
        sample: with `mask`.
        relevance: signed relevance (height, width).
        k: pixels of the model's input for top_k.
    """
    mask = sample.mask
    if mask is None or not bool(mask.any()):
        raise InputError(f"sample {sample.name} has no object in the part of its image that the model reads")
    if relevance.shape != mask.shape:
        raise InputError(f"relevance: got shape {tuple(relevance.shape)}, expected {tuple(mask.shape)}")
    if k < 1:
        raise InputError(f"k: got {k}, expected a number above 0")
    values, inside = relevance.detach().double().cpu().flatten(), mask.cpu().flatten()
    if not torch.isfinite(values).all():
        raise InputError(f"relevance of sample {sample.name} holds NaN or infinite values")
    size = int(inside.sum())
    k = min(k, len(values))
    shared = _intersection(values, inside, size)
    positive = values.clamp(min=0)
    total = positive.sum().item()
    return {
        "mass": positive[inside].sum().item() / total if total else 0.0,
        "pointing": _intersection(values, inside, 1),
        "iou": shared / (2 * size - shared),
        "top_k": _intersection(values, inside, k) / min(k, size),
    }


def _intersection(values: Tensor, inside: Tensor, count: int) -> float:
    """How many of the `count` largest values are inside; of those that are equal to the last, their expected share."""
    last = values.topk(count).values[-1]
    above, equal = values > last, values == last
    chosen = (count - above.sum().item()) / equal.sum().item()
    return (above & inside).sum().item() + chosen * (equal & inside).sum().item()

"""Question answering: does the explanation of an answer point at the answer in the context?"""

from __future__ import annotations

import torch
from torch import Tensor

from attnlrp.errors import InputError
from attnlrp.evaluation.samples import Sample

__all__ = ["pointing"]


def pointing(sample: Sample, relevance: Tensor) -> dict[str, float]:
    """Top-1 and IoU of relevance with the tokens of the answer.

    - top1: 1 if the token of the largest signed relevance belongs to the answer;
    - iou: intersection over union of the answer with the k most relevant tokens, k = tokens of the answer (the
      binarisation);
    - mass: share of the positive relevance that is on the answer.

    Special tokens take no part: the answer never holds them.

    Args:
        sample: with `answer`.
        relevance: signed relevance (token,).
    """
    if sample.answer is None or not bool(sample.answer.any()):
        raise InputError(f"sample {sample.name} has no token of an answer in its context")
    if relevance.shape != sample.answer.shape:
        raise InputError(f"relevance: got shape {tuple(relevance.shape)}, expected {tuple(sample.answer.shape)}")
    scores = relevance.detach().float().cpu().masked_fill(sample.special, -torch.inf)
    size = int(sample.answer.sum())
    chosen = torch.zeros_like(sample.answer)
    chosen[scores.topk(size).indices] = True
    positive = scores.clamp(min=0)
    total = positive.sum().item()
    return {
        "top1": float(sample.answer[int(scores.argmax())]),
        "iou": (chosen & sample.answer).sum().item() / (chosen | sample.answer).sum().item(),
        "mass": positive[sample.answer].sum().item() / total if total else 0.0,
    }

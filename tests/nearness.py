"""Comparisons up to rounding: the same sum in another order, or at another address, differs in its last bits."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnlrp import Explanation


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to 1e-5, relative to the larger of 1 and the largest value."""
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, b.abs().max().item()))


def same(a: Explanation, b: Explanation) -> bool:
    """Equal but for rounding of relevance and logits."""
    if not close(a.relevance, b.relevance) or a.relevance.dtype != b.relevance.dtype:
        return False
    return _exact(a) == _exact(b) and close(_logits(a), _logits(b))


def _exact(explanation: Explanation) -> Explanation:
    targets = tuple(dataclasses.replace(t, logit=0.0, candidates=()) for t in explanation.targets)
    return dataclasses.replace(explanation, relevance=torch.zeros_like(explanation.relevance), targets=targets)


def _logits(explanation: Explanation) -> Tensor:
    values = [[t.logit, *(c.logit for c in t.candidates)] for t in explanation.targets]
    return torch.tensor(values, dtype=torch.float64)

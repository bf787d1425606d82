"""Means with their standard errors, and the confidence of a difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from attnlrp.errors import InputError

__all__ = ["Difference", "Mean", "compare", "mean"]


@dataclass(frozen=True)
class Mean:
    """Args: mean and its standard error (None for fewer than two values), over `count` samples."""

    mean: float
    standard_error: float | None
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """A paired difference a - b over the same samples.

    Args:
        mean: of the differences.
        low: lower end of the confidence interval of that mean.
        high: its upper end.
        confidence: coverage of the interval.
        count: samples.
    """

    mean: float
    low: float
    high: float
    confidence: float
    count: int

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"decided": self.decided}


def mean(values: Sequence[float]) -> Mean:
    """Mean and standard error of the mean."""
    if not values:
        raise InputError("mean: got no values, expected at least one sample")
    x = torch.tensor(values, dtype=torch.float64)
    error = (x.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return Mean(x.mean().item(), error, len(values))


def compare(
    a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Difference:
    """Paired percentile bootstrap of the mean of a - b (Efron and Tibshirani, 1993).

    Args:
        a: values of one method.
        b: values of the other on the same samples, in the same order.
        confidence: coverage of the interval.
        resamples: how often samples are drawn with replacement.
        seed: of the draws.
    """
    if len(a) != len(b) or not a:
        raise InputError(f"compare: got {len(a)} and {len(b)} values, expected as many, of the same samples")
    d = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    draws = torch.randint(len(d), (resamples, len(d)), generator=torch.Generator().manual_seed(seed))
    means = d[draws].mean(dim=1)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Difference(d.mean().item(), low, high, confidence, len(d))

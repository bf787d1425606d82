"""The order that knows nothing: what every method has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlrp.baselines.sample import Score, as_result, opened

__all__ = ["Random"]


@dataclass(frozen=True)
class Random:
    """Relevance drawn from a normal distribution.

    The same input and seed give the same numbers, whatever the model and the state of the generators. Costs nothing.

    Args:
        seed: another one gives another order.
    """

    seed: int = 0

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> Tensor:
        with opened(model, inputs, target) as sample:
            generator = torch.Generator().manual_seed(sample.number(self.seed))
            shape = sample.features.shape[-2:] if sample.is_image else (sample.size,)
            return as_result(torch.randn(shape, generator=generator))

"""What a method costs: passes of the model, seconds, memory, measured while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["Cost", "Method", "measured", "peak_memory"]

Method = Callable[[Any, Mapping[str, Any], Callable[[Any], Tensor]], Tensor]
"""(model, inputs, target) -> relevance (token,) of one sample; target: model output -> scalars (batch,)."""


@dataclass(frozen=True)
class Cost:
    """Args: passes of single inputs forwards and backwards (a batch of 8 counts 8), and seconds of wall clock."""

    forwards: int
    backwards: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measured(
    method: Method, model: Any, inputs: Mapping[str, Any], target: Callable[[Any], Tensor]
) -> tuple[Tensor, Cost]:
    """Run a method and count: a pass forwards for each explained scalar, one backwards for each gradient of it."""
    passes = {"forwards": 0, "backwards": 0}

    def counted(output: Any) -> Tensor:
        scores = target(output)
        passes["forwards"] += len(scores)
        if scores.requires_grad:
            scores.register_hook(lambda gradient: backwards(len(gradient)))
        return scores

    def backwards(rows: int) -> None:
        passes["backwards"] += rows

    start = time.perf_counter()
    relevance = method(model, inputs, counted)
    return relevance, Cost(passes["forwards"], passes["backwards"], time.perf_counter() - start)


def peak_memory(method: Method, model: Any, inputs: Mapping[str, Any], target: Callable[[Any], Tensor]) -> int:
    """The most bytes that tensors occupy at once beyond the model, as torch's allocator sees it."""
    device = torch.device(model.device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        method(model, inputs, target)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        method(model, inputs, target)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return int(max(accumulate((e.nbytes() for e in events), initial=0)))

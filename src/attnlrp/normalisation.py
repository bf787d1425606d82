"""Prop. 3.4: normalisation layers, whose statistics are constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlrp.backward import Normalise, deviation, per_channel, wide

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


def layer_norm(
    op: Callable[..., Any],
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **_: Any,
) -> Tensor:
    """y = (x - mean) / sigma * w + b with sigma a constant: the mean is linear, the bias absorbs."""

    def forward(t: Tensor) -> tuple[Tensor, Tensor]:
        y, _, rstd = torch.native_layer_norm(t, list(normalized_shape), weight, bias, eps)
        return y, rstd

    dims = tuple(range(-len(normalized_shape), 0))
    return Normalise.on(x, forward, weight, x.shape, dims, True)


def rms_norm(
    op: Callable[..., Any], x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """y = x / RMS(x) * w with RMS(x) a constant: relevance is conserved."""
    dims = tuple(range(-len(normalized_shape), 0))

    def forward(t: Tensor) -> tuple[Tensor, Tensor]:
        mean = wide(t).square().mean(dims, keepdim=True)
        return op(t, normalized_shape, weight, eps), (mean + (torch.finfo(t.dtype).eps if eps is None else eps)).rsqrt()

    return Normalise.on(x, forward, weight, x.shape, dims, False)


def group_norm(
    op: Callable[..., Any],
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    **_: Any,
) -> Tensor:
    """As layer_norm, over groups of channels; x is (batch, channel, ...)."""
    grouped = (x.shape[0], num_groups, -1)

    def forward(t: Tensor) -> tuple[Tensor, Tensor]:
        return op(t, num_groups, weight, bias, eps), deviation(t.reshape(grouped), (2,), eps)

    return Normalise.on(x, forward, per_channel(weight, x), grouped, (2,), True)


def batch_norm(
    op: Callable[..., Any],
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    **_: Any,
) -> Tensor:
    """With running statistics an affine map; with those of the batch, as layer_norm over batch and space."""
    args = (running_mean, running_var, weight, bias, training, momentum, eps)
    dims = (0, *range(2, x.dim()))

    def forward(t: Tensor) -> tuple[Tensor, Tensor]:
        if training or running_var is None:
            return F.batch_norm(t, *args), deviation(t, dims, eps)
        rstd = (running_var + eps).rsqrt()
        return F.batch_norm(t, *args), rstd.view(1, -1, *[1] * (t.dim() - 2))

    # not torch's own gradient: for running statistics it is wrong on a CPU if the gradient is in channels-last order
    return Normalise.on(x, forward, per_channel(weight, x), x.shape, dims, training or running_var is None)


def instance_norm(
    op: Callable[..., Any],
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """With running statistics an affine map; with its own, as layer_norm over the space of each channel."""
    args = (running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if not use_input_stats:
        return F.instance_norm(x, *args)
    dims = tuple(range(2, x.dim()))

    def forward(t: Tensor) -> tuple[Tensor, Tensor]:
        return F.instance_norm(t, *args), deviation(t, dims, eps)

    return Normalise.on(x, forward, per_channel(weight, x), x.shape, dims, True)

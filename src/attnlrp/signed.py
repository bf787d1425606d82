"""Rules that tell positive from negative contributions z_ij = w_ji x_i of a layer that is linear in one live input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlrp.backward import Split, count_live, live, wide

__all__ = ["alpha_beta", "gamma", "zplus"]


@dataclass(frozen=True)
class gamma:
    """R_i = sum_j (z_ij + gamma z_ij+) R_j / (z_j + gamma z_j+) where z_j > 0, with z- where z_j < 0 (eq. 24).

    Contributions that agree with the sign of the output count 1 + gamma times: noise that cancels is damped, and no
    denominator is smaller than |z_j|. gamma = 0 is the plain gradient.

    With m_j = sum_i |z_ij|, biases included, sums over one sign are z+- = (z +- m) / 2, and m is the layer itself at
    |x|, |w|, |b|, with the gradient sign(x) |w|^T. So relevance is x (w^T a g + sign(x) |w|^T b g) with two factors a
    and b of the gradient g behind the layer: one more product forwards and one backwards than the layer has, where
    clamped weights need four.

    Args:
        value: gamma >= 0.
    """

    value: float

    def __post_init__(self) -> None:
        if not self.value >= 0:
            raise ValueError(f"gamma: got {self.value}, expected a number of at least 0")

    def __call__(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        _require_one(args, kwargs)
        z, m = op(*args, **kwargs), _magnitude(op, args, kwargs)
        with torch.no_grad():
            factors = self._factors(z, m)
        return Split.on(z.detach(), z, m, *factors)

    def constant_part(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """What the bias keeps of each output, in units of its gradient: a b + b |b|."""
        a, b = self._factors(op(*args, **kwargs), _at(_absolute, op, args, kwargs))
        bias = _at(lambda v: torch.zeros_like(v) if live(v) else v, op, args, kwargs)
        kept: Tensor = a * bias + b * bias.abs()
        return kept

    def _factors(self, z: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        half, size = self.value / 2, wide(z).abs()
        share = _ratio(size, (1 + half) * size + half * wide(m))
        return (1 + half) * share, half * share * z.sign()


@dataclass(frozen=True)
class alpha_beta:
    """R_i = sum_j (alpha z_ij+ / z_j+ - beta z_ij- / z_j-) R_j, alpha - beta = 1 (Bach et al., 2015).

    Biases count by their sign. Where an output has no contribution of one sign, the part of that sign is absorbed.

    Args:
        alpha: weight of the positive contributions.
        beta: weight of the negative ones.
    """

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        if not (self.beta >= 0 and abs(self.alpha - self.beta - 1) < 1e-9):
            raise ValueError(f"alpha_beta: got {self.alpha} and {self.beta}, expected alpha - beta = 1 and beta >= 0")

    def __call__(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        _require_one(args, kwargs)
        with torch.no_grad():
            z = op(*args, **kwargs)
        up = _at(_part(1, 1, 1), op, args, kwargs) + _at(_part(-1, -1, 0), op, args, kwargs)
        down = _at(_part(1, -1, -1), op, args, kwargs) + _at(_part(-1, 1, 0), op, args, kwargs)
        with torch.no_grad():
            factors = self.alpha * _ratio(wide(z), wide(up)), -self.beta * _ratio(wide(z), wide(down))
        return Split.on(z, up, down, *factors)


zplus = alpha_beta(1.0, 0.0)
"""R_i = sum_j z_ij+ R_j / z_j+: positive contributions alone (Montavon et al., 2017)."""


def _require_one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    count = sum(count_live(a) for a in (*args, *kwargs.values()))
    if count != 1:
        raise ValueError(f"a rule that tells signs apart is for layers with one live input, got {count} live operands")


def _at(change: Callable[[Any], Any], op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return op(*map(change, args), **{k: change(v) for k, v in kwargs.items()})


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))


def _absolute(value: Any) -> Any:
    return value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value


def _magnitude(op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The layer at absolute values; those of its weight are computed again in the backward pass instead of kept."""
    if torch.compiler.is_compiling():  # the compiler decides what is kept
        return _at(_absolute, op, args, kwargs)  # type: ignore[no-any-return]
    weights: dict[int, Tensor] = {}

    def absolute(value: Any) -> Any:
        made = _absolute(value)
        if made is not value and not live(value):
            weights[made.data_ptr()] = value
        return made

    def pack(saved: Tensor) -> Any:
        weight = weights.get(saved.data_ptr())
        if weight is None or saved.numel() != weight.numel():
            return saved
        return weight, saved.shape, saved.stride()  # such as its transpose

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        weight, shape, stride = kept
        return weight.abs().as_strided(shape, stride)  # type: ignore[no-any-return]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return _at(absolute, op, args, kwargs)  # type: ignore[no-any-return]


def _part(of_input: int, of_weight: int, of_bias: int) -> Callable[[Any], Any]:
    """Keeps what has this sign; of a bias, the constant in one dimension, 0 keeps nothing."""

    def part(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        sign = of_input if live(value) else of_weight if value.dim() > 1 else of_bias
        return value.clamp(min=0) if sign > 0 else value.clamp(max=0) if sign < 0 else torch.zeros_like(value)

    return part

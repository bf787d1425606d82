"""Backward passes: what the rules do to a gradient on its way back through one operation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = [
    "Epsilon",
    "Identity",
    "Normalise",
    "Product",
    "RuleFunction",
    "Scale",
    "Softmax",
    "Split",
    "Substitution",
    "count_live",
    "live",
    "scale_gradient",
    "scaled",
    "stabilise",
    "wide",
]


def live(value: object) -> bool:
    """Whether relevance flows into `value`."""
    return isinstance(value, Tensor) and value.requires_grad


def stabilise(z: Tensor, eps: float | None = None) -> Tensor:
    """z + eps * sign(z), with sign(0) = 1: the one stabiliser of a denominator.

    Without `eps` it is scaled to the precision: sqrt(machine epsilon) of z's dtype.
    """
    eps = math.sqrt(torch.finfo(z.dtype).eps) if eps is None else eps
    return z + torch.where(z < 0, -eps, eps)


class RuleFunction(Function):
    """Base of the backward passes of this library, so that the engine can tell them from a model's own functions."""

    @classmethod
    def on(cls, *args: Any) -> Tensor:
        """The output of the forward pass."""
        return cls.apply(*args)  # type: ignore[no-any-return, no-untyped-call]


class Scale(RuleFunction):
    """Identity whose gradient is multiplied by a factor; only ever used at the input of an operation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factor, None


class Product(RuleFunction):
    """op(a, b), an element-wise product, whose gradients are halved; both factors are live."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, op: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(a, b)
        return op(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b = ctx.saved_tensors
        return _half(grad * b.conj(), a), _half(grad * a.conj(), b), None


def _half(product: Tensor, factor: Tensor) -> Tensor:
    """Half of a fresh tensor, in the shape and the type of a factor that was broadcast."""
    half = product.mul_(0.5).sum_to_size(factor.shape)
    return (half if factor.is_complex() or not half.is_complex() else half.real).to(factor.dtype)


class Epsilon(RuleFunction):
    """z, whose gradient is multiplied by z / (z + eps sign z)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.eps = eps
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (z,) = ctx.saved_tensors
        z = wide(z)
        return (grad * (z / stabilise(z, ctx.eps))).to(grad.dtype), None


class Identity(RuleFunction):
    """op(x), whose gradient is multiplied by ratio(x), computed in float32 or better."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: Callable[[Tensor], Tensor], ratio: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ratio = ratio
        return op(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return (grad * ctx.ratio(wide(x))).to(grad.dtype), None, None


class Normalise(RuleFunction):
    """A normalisation op(x) -> (y, 1 / statistic), whose statistic is a constant and whose mean, if any, is linear."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        op: Callable[[Tensor], tuple[Tensor, Tensor]],
        weight: Tensor | None,
        grouped: Any,
        dims: tuple[int, ...],
        centred: bool,
    ) -> Tensor:
        y, rstd = op(x)
        ctx.save_for_backward(rstd, weight)
        ctx.grouped, ctx.dims, ctx.centred = grouped, dims, centred
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rstd, weight = ctx.saved_tensors
        g = wide(grad) if weight is None else wide(grad) * weight
        g = g.reshape(ctx.grouped) * rstd
        if ctx.centred:
            g.sub_(g.mean(ctx.dims, keepdim=True))
        return g.reshape(grad.shape).to(grad.dtype), None, None, None, None, None


class Split(RuleFunction):
    """value, whose gradient goes to p and q, multiplied by a and b."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, p: Tensor, q: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b = ctx.saved_tensors
        return None, (grad * a).to(grad.dtype), (grad * b).to(grad.dtype), None, None


class Softmax(RuleFunction):
    """op(x), whose gradient is rule(x, s, R, masked, dim) with R the relevance of s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: Callable[[Tensor], Tensor], dim: int, rule: Callable[..., Tensor]) -> Tensor:
        s = op(x)
        ctx.save_for_backward(x, s)
        ctx.dim, ctx.rule = dim, rule
        return s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, s = ctx.saved_tensors
        masked = torch.isneginf(x)
        x = wide(x).masked_fill(masked, 0)
        gradient = ctx.rule(x, wide(s), wide(s * grad), masked, ctx.dim)
        return gradient.masked_fill(masked, 0).to(grad.dtype), None, None, None


class Substitution(RuleFunction):
    """x = op(a, b) with a x = b, a triangular: substitution step by step, x_i = (b_i - sum_j a_ij x_j) / a_ii.

    Each product a_ij x_j is shared in halves if both are live, each a_ii is a constant denominator. The gradient h
    of b then solves (diagonal of a + half of the rest)^T h = g.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, op: Callable[..., Tensor], options: dict[str, Any]) -> Tensor:
        x = op(a, b, **options)
        ctx.save_for_backward(a, x)
        ctx.options = options
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, x = ctx.saved_tensors
        upper, share = ctx.options["upper"], 0.5 if ctx.needs_input_grad[0] else 1.0

        def part(m: Tensor) -> Tensor:
            return m.triu(1) if upper else m.tril(-1)

        shared = torch.diag_embed(a.diagonal(dim1=-2, dim2=-1)) + share * part(a)
        h = torch.linalg.solve_triangular(shared.mT, grad, **{**ctx.options, "upper": not upper})
        return part(-share * h @ x.mT) if ctx.needs_input_grad[0] else None, h, None, None


def distributed(x: Tensor, s: Tensor, r: Tensor, masked: Tensor, dim: int) -> Tensor:
    mean = (s * x).sum(dim, keepdim=True)
    bias = ((1 - x + mean) * r).sum(dim, keepdim=True) / (~masked).sum(dim, keepdim=True)
    return (x * (r - s * r.sum(dim, keepdim=True)) + bias) / stabilise(x)


def omitted(x: Tensor, s: Tensor, r: Tensor, masked: Tensor, dim: int) -> Tensor:
    r = r / stabilise(x - (s * x).sum(dim, keepdim=True))
    return x * (r - s * r.sum(dim, keepdim=True)) / stabilise(x)


def positive(x: Tensor, s: Tensor, r: Tensor, masked: Tensor, dim: int) -> Tensor:
    # (J_ji x_i)+ / s_j is (1 - s_i) x_i for i = j and x_i > 0, and s_i |x_i| for i != j and x_i < 0
    own, other = torch.where(x > 0, 1 - s, 0), torch.where(x < 0, s, 0)
    below = -other * x
    below_sum = below.sum(dim, keepdim=True)
    total = own * x + below_sum - below
    some = total > 8 * torch.finfo(x.dtype).eps * below_sum  # what is less is the rounding error of nothing
    r = torch.where(some, r / torch.where(some, total, 1), 0)
    return own * r - other * (r.sum(dim, keepdim=True) - r)


def scale_gradient(x: Any, factor: float) -> Any:
    """x, with its gradient multiplied by `factor`; 0 makes it a constant."""
    if factor == 1 or not live(x):
        return x
    return x.detach() if factor == 0 else Scale.on(x, factor)


def scaled(value: Any, factor: float) -> Any:
    """`scale_gradient` of an operand, or of each in a list of operands."""
    if isinstance(value, (list, tuple)):
        return type(value)(scale_gradient(v, factor) for v in value)
    return scale_gradient(value, factor)


def count_live(value: Any) -> int:
    """How many operands are live, in one operand or a list of them."""
    return sum(map(live, value)) if isinstance(value, (list, tuple)) else int(live(value))


def wide(x: Tensor) -> Tensor:
    """x in float32 or better, where ratios and sums are computed."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def deviation(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    return (wide(x).var(dims, correction=0, keepdim=True) + eps).rsqrt()


def per_channel(weight: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weight is None else weight.view(1, -1, *[1] * (x.dim() - 2))

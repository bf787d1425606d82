"""Relevance of the operands of a function, as the engine propagates it: what the tests of rules compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnlrp import ATTNLRP, propagate
from attnlrp.rules import Rules


class Explained(NamedTuple):
    """Args: y and g: output and the gradient put on it; relevance and gradients: one per live operand."""

    y: Tensor
    g: Tensor
    relevance: list[Tensor]
    gradients: list[Tensor]

    @property
    def total(self) -> Tensor:
        return (self.y * self.g).sum()

    @property
    def received(self) -> Tensor:
        return sum((r.sum() for r in self.relevance), torch.zeros(()))


def explain(
    function: Callable[..., Tensor],
    *operands: Tensor,
    rules: Rules = ATTNLRP,
    g: Tensor | None = None,
    module: nn.Module | None = None,
) -> Explained:
    """Propagate a random gradient through a function of live operands; an operand that gets nothing gets zeros."""
    leaves = [x.clone().requires_grad_() for x in operands]
    with propagate(module or nn.Identity(), rules):
        y = function(*leaves)
    if g is None:
        g = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, g, allow_unused=True, materialize_grads=True)
    return Explained(y.detach(), g, [x * d for x, d in zip(operands, gradients, strict=True)], list(gradients))


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

"""The rule for triangular systems against the substitution itself, written out step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnlrp


def substitute(a: Tensor, b: Tensor, *, unit: bool) -> Tensor:
    rows: list[Tensor] = []
    for i in range(len(b)):
        rest = b[i] - sum((a[i, j] * rows[j] for j in range(i)), torch.zeros_like(b[i]))
        rows.append(rest if unit else rest / a[i, i])
    return torch.stack(rows)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("live", ["b", "ab"])
@pytest.mark.parametrize("form", ["lower", "upper", "right"])
def test_a_triangular_system_is_solved_step_by_step(unit: bool, live: str, form: str) -> None:
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(5, 5, generator=generator, dtype=torch.float64) + 3 * torch.eye(5)
    b = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    given = {"a": a.requires_grad_("a" in live), "b": b.requires_grad_("b" in live)}
    leaves = [given[name] for name in live]
    with attnlrp.propagate(torch.nn.Identity()):
        expected = substitute(a, b, unit=unit)
        if form == "lower":
            found = torch.linalg.solve_triangular(a, b, upper=False, unitriangular=unit)
        elif form == "upper":
            found = torch.linalg.solve_triangular(a.flip(0, 1), b.flip(0), upper=True, unitriangular=unit).flip(0)
        else:
            found = torch.linalg.solve_triangular(a.mT, b.mT, upper=True, left=False, unitriangular=unit).mT
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    for ours, naive in zip(*(torch.autograd.grad((x * weight).sum(), leaves) for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, naive)


def test_the_inverse_of_a_system_is_a_constant() -> None:
    a = torch.eye(3, requires_grad=True)
    with attnlrp.propagate(torch.nn.Identity()):
        x = torch.linalg.solve_triangular(a * 2, torch.eye(3), upper=False)
    assert not x.requires_grad

"""What has no rule is named, never given the plain gradient in silence; activations written in Python are one function."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.activations import ACT2CLS, NewGELUActivation, QuickGELUActivation

from attnlrp import ATTNLRP, UnknownOperationError, audit, propagate
from attnlrp.rules import constant, identity, uniform
from explained import explain, randn


class Body(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def model(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), Body(function))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


@torch.library.custom_op("attnlrp_tests::tripled", mutates_args=())
def tripled(x: Tensor) -> Tensor:
    return x * 3


tripled.register_autograd(lambda ctx, grad: grad * 3)

UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.linalg.inv": lambda x: torch.linalg.inv(torch.diag(x) + torch.eye(3).roll(1, 0)),
    "torch.functional.cdist": lambda x: torch.cdist(x[None], torch.zeros(1, 3, dtype=x.dtype)),
    "torch.special.i0e": torch.special.i0e,
    "torch.prod": lambda x: torch.prod(x),
    "torch.Tensor.prod": lambda x: x.prod(),
    "torch.nn.functional.gumbel_softmax": lambda x: F.gumbel_softmax(x, dim=-1),
    "torch.Tensor.remainder": lambda x: x % 2,
    "attnlrp_tests.tripled": lambda x: tripled(x),
    "Doubled": lambda x: Doubled.apply(x) + 1,
    "torch.vmap": lambda x: torch.vmap(lambda row: row * row)(x[None])[0],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_operation_is_refused_by_name_and_module(name: str) -> None:
    module, x = model(UNKNOWN[name]), randn(3).requires_grad_()
    with pytest.raises(UnknownOperationError) as error, propagate(module):
        module(x)
    message = str(error.value)
    assert message.startswith("no rule for operation ")
    assert name in message
    assert "in module 1 (Body)" in message
    assert "rules=attnlrp.ATTNLRP | {function: rule}" in message
    assert "on_unknown='warn' or 'gradient'" in message
    assert isinstance(error.value, NotImplementedError)


@pytest.mark.parametrize("name", [n for n in UNKNOWN if n not in ("torch.nn.functional.gumbel_softmax", "torch.vmap")])
def test_an_unknown_operation_may_keep_its_plain_gradient(name: str) -> None:
    module, x = model(UNKNOWN[name]), randn(3).requires_grad_()
    expected = torch.autograd.grad(module(x).sum(), x)[0]
    with pytest.warns(UserWarning, match=r"no rule for operation .* in module 1 \(Body\)"):
        with propagate(module, on_unknown="warn"):
            y = module(x)
    assert_close(torch.autograd.grad(y.sum(), x)[0], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rules, on_unknown in ((ATTNLRP, "gradient"), ({}, "error")):
            with propagate(module, rules, on_unknown=on_unknown):
                y = module(x)
            assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


def test_constants_may_go_through_any_operation() -> None:
    w = torch.eye(3, dtype=torch.float64) * 2
    result = explain(lambda x: x @ torch.linalg.inv(w) * torch.vmap(torch.prod)(w)[0].add(1), randn(3))
    assert_close(result.received, result.total)


def test_results_that_carry_no_gradient_are_not_reported() -> None:
    def function(x: Tensor) -> Tensor:
        if torch.isfinite(x).all() and x.shape == (3,) and (x == x).any() and x.argmax() >= 0 and len(x) == x.numel():
            return x + torch.zeros_like(x) + x.new_ones(3) + torch.histc(x.detach()).sum() * 0 + x.to(torch.long)
        raise AssertionError

    result = explain(function, randn(3))
    assert_close(result.gradients[0], result.g)


def test_on_unknown_takes_three_values() -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # which in these tests would object first
    try:
        with pytest.raises(ValueError, match=r"on_unknown: got 'ignore', expected 'error', 'warn' or 'gradient'"):
            with propagate(nn.Identity(), on_unknown="ignore"):  # type: ignore[arg-type]
                pass
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


# --- rules of one's own -----------------------------------------------------------------------------------------


def test_a_rule_for_a_function() -> None:
    x = randn(5)
    rule = identity(lambda x: torch.special.bessel_j1(x) / x)
    result = explain(torch.special.bessel_j1, x, rules=ATTNLRP | {torch.special.bessel_j1: rule})
    assert_close(result.relevance[0], result.y * result.g)


def test_a_rule_for_a_custom_autograd_function_accepts_its_gradient() -> None:
    result = explain(lambda x: Doubled.apply(x) + 1, randn(3), rules=ATTNLRP | {Doubled: None})  # type: ignore[dict-item]
    assert_close(result.gradients[0], 2 * result.g)


def test_a_rule_for_a_function_wins_over_the_table_and_over_composites() -> None:
    q, k, v = randn(1, 4, 3), randn(1, 4, 3, seed=1), randn(1, 4, 3, seed=2)
    only_values = lambda op, q, k, v, **kw: op(q.detach(), k.detach(), v, **kw)  # noqa: E731
    result = explain(
        F.scaled_dot_product_attention, q, k, v, rules=ATTNLRP | {F.scaled_dot_product_attention: only_values}
    )
    assert (result.relevance[0] == 0).all()
    assert_close(result.relevance[2].sum(), result.total)
    result = explain(lambda x, y: torch.mul(x, y) + x * y, q, k, rules=ATTNLRP | {torch.mul: constant})
    assert_close(result.relevance[0], q * k * result.g / 2)


def test_a_rule_that_counts_factors_takes_lists_and_keywords() -> None:
    x, y = randn(2, 2), randn(2, 2, seed=1)
    result = explain(
        lambda x, y: torch.linalg.multi_dot([x, y, x]), x, y, rules=ATTNLRP | {torch.linalg.multi_dot: uniform}
    )
    assert_close(result.received, result.total)
    assert_close(result.relevance[1].sum(), result.total / 3)


# --- activations written out in Python --------------------------------------------------------------------------


class MyGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class OwnSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.sigmoid(self.beta * hidden)


@pytest.mark.parametrize("activation", [NewGELUActivation, QuickGELUActivation, MyGELU, OwnSwish])
def test_a_written_out_activation_conserves_exactly(activation: type[nn.Module]) -> None:
    module = activation()
    keyword = "hidden" if activation is OwnSwish else "x" if activation is MyGELU else "input"
    for call in (module, lambda x: module(**{keyword: x})):
        result = explain(call, randn(50), module=module)
        assert_close(result.y, module(randn(50)).detach(), rtol=0, atol=0)
        assert_close(result.relevance[0], result.y * result.g, rtol=1e-12, atol=1e-14)
    zero = explain(module, torch.zeros(1, dtype=torch.float64), module=module, g=torch.ones(1, dtype=torch.float64))
    assert_close(zero.gradients[0], torch.full((1,), 0.5, dtype=torch.float64))


def test_operation_by_operation_the_same_activation_leaks() -> None:
    """Why modules are looked at: outside of a module the `1 +` absorbs."""
    result = explain(lambda x: MyGELU()(x), randn(50))
    assert (result.relevance[0] - result.y * result.g).abs().max() > 0.05


@pytest.mark.parametrize("name", sorted(ACT2CLS))
def test_every_activation_of_transformers_propagates_and_most_conserve(name: str) -> None:
    kind = ACT2CLS[name]
    kind, options = kind if isinstance(kind, tuple) else (kind, {})
    module = kind(**options).double()
    x = randn(60)
    result = explain(module, x, module=module)
    assert_close(result.y, module(x).detach(), rtol=0, atol=0)
    if name not in ("laplace", "sigmoid", "sqrtsoftplus"):  # not 0 at 0
        assert_close(result.relevance[0], result.y * result.g, rtol=1e-6, atol=1e-7)


def test_an_activation_that_is_in_place_or_half_precision() -> None:
    module = nn.Sequential(nn.SiLU(inplace=True), nn.Hardtanh(inplace=True), nn.ELU(inplace=True))
    result = explain(lambda x: module(x.clone()), randn(20), module=module)
    assert_close(result.relevance[0], result.y * result.g)
    module = MyGELU()
    result = explain(module, randn(20).bfloat16(), module=module)
    assert_close(result.relevance[0], result.y * result.g, rtol=2e-2, atol=1e-3)


# --- what users do around a model -------------------------------------------------------------------------------


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), MyGELU(), nn.Linear(4, 2))


def total(module: nn.Module, x: Tensor | None = None) -> Tensor:
    x = (torch.ones(3, 4) if x is None else x).detach().clone().requires_grad_()
    with propagate(module):
        module(x).sum().backward()
    return (x.detach() * x.grad).sum()


def test_backward_hooks_and_saved_tensor_hooks_do_not_disturb() -> None:
    module, seen = small(), []
    expected = total(module)
    for part in (module, *module):
        part.register_full_backward_hook(lambda *_: seen.append(1))
    with torch.autograd.graph.save_on_cpu():
        assert torch.equal(total(module), expected)
    assert len(seen) == 4


def test_other_modes_and_tensor_subclasses_do_not_disturb() -> None:
    class Marked(Tensor):
        pass

    module, x = small(), torch.ones(3, 4)
    expected = total(module)
    with torch.device("cpu"):
        assert torch.equal(total(module), expected)
    leaf = x.clone().requires_grad_()
    with propagate(module), torch.device("cpu"):
        module(leaf).sum().backward()
    assert torch.equal((leaf.detach() * leaf.grad).sum(), expected)
    marked = x.as_subclass(Marked).requires_grad_()
    with propagate(module):
        y = module(marked)
    y.sum().backward()
    assert isinstance(y, Marked)
    assert torch.equal((marked.detach() * marked.grad).sum().as_subclass(Tensor), expected)


def test_a_copy_made_inside_the_block_is_a_model_of_its_own() -> None:
    module = small()
    expected = total(module)
    with propagate(module):
        other = copy.deepcopy(module)
    assert torch.equal(other(torch.ones(3, 4)), module(torch.ones(3, 4)))
    assert torch.equal(total(other), expected)
    assert "forward" not in vars(other[1])


def test_a_block_may_be_entered_again() -> None:
    module = small()
    with propagate(module) as propagation:
        pass
    x = torch.ones(3, 4, requires_grad=True)
    with propagation:
        module(x).sum().backward()
    assert torch.equal((x * x.grad).sum(), total(module))


def test_parametrised_weights_are_constants() -> None:
    module = small()
    nn.utils.parametrizations.weight_norm(module[0])
    nn.utils.parametrizations.spectral_norm(module[2])
    total(module)
    assert all(p.grad is None for p in module.parameters())
    assert audit(module.double(), {"input": randn(3, 4)}, target=lambda y: y.sum()).closes


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_modules_are_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.GELU()))
    with pytest.raises(UnknownOperationError, match=r"ScriptModule 1 .*use the module that it was made from"):
        total(module)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_transformer_of_torch_is_accounted_for(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu", norm_first=norm_first)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    ledger = audit(module, {"src": randn(1, 3, 4)}, target=lambda y: (y * torch.arange(4)).sum())
    assert ledger.closes
    assert ledger.error < 1e-9

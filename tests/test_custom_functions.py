"""Custom autograd functions, custom operators and functions shown by hand: their rules, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import wrap_torch_function
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import SqrtBoundDerivative

from attnlrp import ATTNLRP, CP_LRP, GRADIENT, UnknownOperationError, audit, propagate
from attnlrp.backward import scale_gradient
from attnlrp.rules import Rules, constant, epsilon, gelu_ratio, gradient, identity, uniform
from explained import explain, randn


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Weighted(torch.autograd.Function):
    """scale * q * m * k beside a second output, with a number first and a string last."""

    @staticmethod
    def forward(ctx: Any, scale: float, q: Tensor, m: Tensor, k: Tensor, name: str) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, m, k)
        ctx.scale = scale
        return scale * q * m * k, k * 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor, other: Tensor) -> Any:
        q, m, k = ctx.saved_tensors
        return None, grad * ctx.scale * m * k, grad * ctx.scale * q * k, grad * ctx.scale * q * m + other * 3, None


class Attention(torch.autograd.Function):
    """A fused kernel: softmax(q k^T) v with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.softmax(q @ k.mT, -1) @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        p = F.softmax(q @ k.mT, -1)
        s = p * (grad @ v.mT - (p * (grad @ v.mT)).sum(-1, keepdim=True))
        return s @ k, s.mT @ q, p.mT @ grad


class GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (gelu_ratio(x) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi))


class Shifted(torch.autograd.Function):
    """A view of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def attention_rule(op: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return op(scale_gradient(q, 1 / 4), scale_gradient(k, 1 / 4), scale_gradient(v, 1 / 2))


def weighted(q: Tensor, k: Tensor, *, m: float = 2.0) -> Tensor:
    return Weighted.apply(3.0, q, torch.full_like(q.detach(), m), k, "name")[0] + 0


class Body(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def error_of(function: Callable[[Tensor], Tensor], rules: Rules) -> float:
    return audit(
        Body(function), {"x": randn(4, 3)}, target=lambda y: (y * randn(*y.shape, seed=1)).sum(), rules=rules
    ).error


# --- custom autograd functions ----------------------------------------------------------------------------------


def test_a_linear_function_takes_gradient() -> None:
    result = explain(lambda x: Doubled.apply(x) + 0, randn(5), rules=ATTNLRP | {Doubled: gradient})
    assert_close(result.relevance[0], result.y * result.g)
    assert error_of(lambda x: Doubled.apply(x).sin(), ATTNLRP | {Doubled: gradient}) < 1e-9


def test_a_product_takes_uniform_over_its_live_inputs() -> None:
    result = explain(weighted, randn(5), randn(5, seed=1), rules=ATTNLRP | {Weighted: uniform})
    for relevance in result.relevance:
        assert_close(relevance, result.y * result.g / 2)
    one = explain(
        lambda q: weighted(q, torch.full_like(q.detach(), 2.0)), randn(5), rules=ATTNLRP | {Weighted: uniform}
    )
    assert_close(one.relevance[0], one.y * one.g)
    assert error_of(lambda x: weighted(x, x.tanh()), ATTNLRP | {Weighted: uniform}) < 1e-9
    assert error_of(lambda x: weighted(x, x.tanh()), ATTNLRP | {Weighted: gradient}) > 0.1


def test_a_rule_of_ones_own_scales_the_gradient_of_each_tensor_input() -> None:
    shares: Any = lambda op, q, m, k: op(scale_gradient(q, 0.25), m, scale_gradient(k, 0.75))  # noqa: E731
    result = explain(weighted, randn(5), randn(5, seed=1), rules=ATTNLRP | {Weighted: shares})
    assert_close(result.relevance[0], result.y * result.g * 0.25)
    assert_close(result.relevance[1], result.y * result.g * 0.75)


def test_outputs_that_are_used_several_times_are_scaled_once() -> None:
    half: Any = lambda op, x: op(scale_gradient(x, 0.5))  # noqa: E731
    result = explain(lambda x: (y := Doubled.apply(x)) + y.mean() + y[0], randn(5), rules=ATTNLRP | {Doubled: half})
    assert_close(result.relevance[0].sum(), result.total / 2)

    def both(q: Tensor, k: Tensor) -> Tensor:
        first, second = Weighted.apply(3.0, q, torch.ones_like(q.detach()), k, "")
        return first + second

    shares: Any = lambda op, q, m, k: op(scale_gradient(q, 0.5), m, scale_gradient(k, 0.5))  # noqa: E731
    q, k = randn(5), randn(5, seed=1)
    result = explain(both, q, k, rules=ATTNLRP | {Weighted: shares})
    assert_close(result.relevance[1], 0.5 * (3 * q * k + 3 * k) * result.g)


def test_a_statistic_takes_constant_and_its_partner_everything() -> None:
    result = explain(lambda x: x * Doubled.apply(x.abs()), randn(5), rules=ATTNLRP | {Doubled: constant})
    assert_close(result.relevance[0], result.y * result.g)
    alone = explain(lambda x: x + Doubled.apply(x), randn(5), rules=ATTNLRP | {Doubled: constant})
    assert_close(alone.gradients[0], alone.g)
    assert error_of(lambda x: x * Doubled.apply(x.abs()), ATTNLRP | {Doubled: constant}) < 1e-9


def test_a_fused_attention_kernel_takes_the_shares_of_softmax_and_products() -> None:
    operands = [randn(2, 4, 3, seed=k) for k in range(3)]
    expected = explain(lambda q, k, v: F.softmax(q @ k.mT, -1) @ v, *operands)
    found = explain(lambda *qkv: Attention.apply(*qkv) + 0, *operands, rules=ATTNLRP | {Attention: attention_rule})
    for a, b in zip(found.relevance, expected.relevance, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("rule", [identity(), epsilon(1e-3), lambda op, x, flag: op(x), lambda op, x: op(x) * 2])
def test_a_rule_that_does_more_than_scale_is_refused(rule: Any) -> None:
    x = randn(3).requires_grad_()
    with pytest.raises(
        UnknownOperationError, match=r"Doubled \(custom autograd function with rule .*wrap_torch_function"
    ):
        with propagate(nn.Identity(), ATTNLRP | {Doubled: rule}):
            Doubled.apply(x) + 1


def test_a_view_cannot_be_made_a_constant_afterwards() -> None:
    x = randn(3).requires_grad_()
    with pytest.raises(UnknownOperationError, match="Shifted"), propagate(nn.Identity(), ATTNLRP | {Shifted: constant}):
        Shifted.apply(x) * x


def test_a_function_whose_output_is_explained_directly_is_seen_inside_the_block() -> None:
    x = randn(1).requires_grad_()
    with pytest.raises(UnknownOperationError, match="Doubled"), propagate(nn.Identity()):
        Doubled.apply(x).backward()
    half: Any = lambda op, x: op(scale_gradient(x, 0.5))  # noqa: E731
    with propagate(nn.Identity(), ATTNLRP | {Doubled: half}):
        (grad,) = torch.autograd.grad(Doubled.apply(x), x)
    assert grad.item() == 1


def test_no_rule_at_all_keeps_every_gradient() -> None:
    result = explain(lambda x: SqrtBoundDerivative.apply(x.square() + 1) * Doubled.apply(x), randn(3), rules=GRADIENT)
    x = randn(3).requires_grad_()
    assert_close(result.gradients[0], torch.autograd.grad(((x.square() + 1).sqrt() * x * 2 * result.g).sum(), x)[0])


@pytest.mark.parametrize("rules", [ATTNLRP, CP_LRP])
def test_the_bounded_square_root_of_recurrent_gemma_conserves_as_the_square_root_does(rules: Rules) -> None:
    x = randn(20).abs() + 0.01
    result = explain(lambda x: SqrtBoundDerivative.apply(x) + 0, x, rules=rules)
    assert_close(result.relevance[0], result.y * result.g)
    tiny = explain(
        lambda x: SqrtBoundDerivative.apply(x) + 0, torch.full((3,), 1e-12, dtype=torch.float64), rules=rules
    )
    assert (tiny.gradients[0].abs() <= 2000 * tiny.g.abs() * (1 + 1e-9)).all()


class Recorded(torch.autograd.Function):
    """Differentiates in its backward pass what it recorded in its forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = F.gelu(ctx.x) * ctx.x
        return ctx.y.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.autograd.grad(ctx.y, ctx.x, grad)


def test_what_a_function_records_has_the_rules_already() -> None:
    result = explain(lambda x: Recorded.apply(x) + 0, randn(5), rules=ATTNLRP | {Recorded: gradient})
    assert_close(result.relevance[0], result.y * result.g)


# --- functions shown by hand ------------------------------------------------------------------------------------


@wrap_torch_function(lambda x: (x,))
def written_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


@wrap_torch_function(lambda x: (x,))
def fused_gelu(x: Tensor) -> Tensor:
    return GELU.apply(x)


@wrap_torch_function(lambda q, k, v: (q, k, v))
def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Attention.apply(q, k, v)


@pytest.mark.parametrize("rule", [identity(), identity(gelu_ratio)])
@pytest.mark.parametrize("function", [written_gelu, fused_gelu])
def test_a_wrapped_function_is_one_operation(function: Callable[[Tensor], Tensor], rule: Any) -> None:
    result = explain(function, randn(30), rules=ATTNLRP | {function: rule})
    assert_close(result.y, F.gelu(randn(30)))
    assert_close(result.relevance[0], result.y * result.g)
    assert error_of(function, ATTNLRP | {function: rule}) < 1e-9


def test_a_wrapped_function_without_a_row_is_refused_by_its_name() -> None:
    with pytest.raises(UnknownOperationError, match="written_gelu"), propagate(nn.Identity()):
        written_gelu(randn(3).requires_grad_())


def test_a_wrapped_function_needs_no_row_for_the_autograd_function_inside() -> None:
    operands = [randn(2, 4, 3, seed=k) for k in range(3)]
    expected = explain(lambda q, k, v: F.softmax(q @ k.mT, -1) @ v, *operands)
    table = ATTNLRP | {fused_attention: attention_rule}
    found = explain(lambda *qkv: fused_attention(*qkv) + 0, *operands, rules=table)
    for a, b in zip(found.relevance, expected.relevance, strict=True):
        assert_close(a, b)


# --- custom operators -------------------------------------------------------------------------------------------


@torch.library.custom_op("attnlrp_tests::fused_silu", mutates_args=())
def fused_silu(x: Tensor) -> Tensor:
    return F.silu(x)


fused_silu.register_autograd(
    lambda ctx, grad: grad * torch.sigmoid(ctx.x) * (1 + ctx.x * (1 - torch.sigmoid(ctx.x))),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0]),
)
PACKET = torch.ops.attnlrp_tests.fused_silu


@pytest.mark.parametrize("key", [fused_silu, PACKET, PACKET.default], ids=["custom_op", "packet", "overload"])
@pytest.mark.parametrize("call", [fused_silu, PACKET, PACKET.default], ids=["custom_op", "packet", "overload"])
def test_a_custom_operator_has_one_row_under_any_spelling(key: Any, call: Any) -> None:
    result = explain(lambda x: call(x) + 0, randn(30), rules=ATTNLRP | {key: identity(torch.sigmoid)})
    assert_close(result.relevance[0], result.y * result.g)
    assert error_of(lambda x: call(x) + 0, ATTNLRP | {key: identity(torch.sigmoid)}) < 1e-9
    plain = explain(lambda x: call(x) + 0, randn(30), rules=ATTNLRP | {key: gradient})
    assert (plain.relevance[0] - plain.y * plain.g).abs().max() > 0.01


def test_a_row_for_one_overload_of_several_is_for_that_one() -> None:
    add = torch.ops.aten.add
    result = explain(lambda x: add.Scalar(x, 1.0), randn(3), rules=ATTNLRP | {add.Tensor: constant})
    assert_close(result.gradients[0], result.g)


# --- around them ------------------------------------------------------------------------------------------------


def test_rows_hold_in_vectorised_and_in_recomputed_backward_passes() -> None:
    shares: Any = lambda op, q, m, k: op(scale_gradient(q, 0.25), m, scale_gradient(k, 0.75))  # noqa: E731
    table, x = ATTNLRP | {Weighted: shares}, randn(5).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return weighted(x.sin(), x.tanh()).exp()

    with propagate(nn.Identity(), table):
        y = function(x)
        z = checkpoint(function, x, use_reentrant=False)
    rows = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in torch.eye(5, dtype=torch.float64)]
    (batched,) = torch.autograd.grad(y, x, torch.eye(5, dtype=torch.float64), is_grads_batched=True)
    assert_close(batched, torch.stack(rows))
    assert_close(torch.autograd.grad(z.sum(), x)[0], batched.sum(0))


def test_functions_and_tables_are_as_before() -> None:
    table = ATTNLRP | {Doubled: uniform, fused_silu: identity(torch.sigmoid)}
    before = dict(table), dict(vars(Doubled)), dict(vars(fused_silu))
    with propagate(nn.Identity(), table):
        fused_silu(Doubled.apply(randn(3).requires_grad_())).sum().backward()
    assert (dict(table), dict(vars(Doubled)), dict(vars(fused_silu))) == before
    x = randn(3).requires_grad_()
    assert_close(torch.autograd.grad(Doubled.apply(x).sum(), x)[0], torch.full((3,), 2.0, dtype=torch.float64))

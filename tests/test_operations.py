"""Every spelling of an operation is the same operation, and the table knows only operations that exist."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from attnlrp import ATTNLRP
from attnlrp.operations import COMPOSITES, NEUTRAL, OPERATIONS, RULED, VIEWS, find
from explained import explain, randn

# names of rows that stand for a group of functions, or for modules that the engine shows as one function
GROUPS = {"conv", "loss"}
MODULES = {"activation", "gelu_tanh", "quick_gelu"}
NAMESPACES = (torch, Tensor, F, torch.special, torch.linalg, torch.fft, torch._C._nn)


# --- the table --------------------------------------------------------------------------------------------------


def test_every_name_exists_in_torch() -> None:
    names = {alias for name, aliases in RULED.items() for alias in (name, *aliases)} | NEUTRAL
    dead = {name for name in names if not any(hasattr(namespace, name) for namespace in NAMESPACES)}
    assert dead == GROUPS


def test_every_rule_is_for_a_known_operation_and_every_operation_with_a_row_has_a_rule() -> None:
    assert set(RULED) <= set(ATTNLRP)
    assert set(ATTNLRP) - set(RULED) == MODULES


def test_no_operation_is_both_neutral_and_ruled() -> None:
    aliases = [alias for name, others in RULED.items() for alias in (name, *others)]
    assert len(aliases) == len(set(aliases))
    assert not NEUTRAL & set(aliases)
    assert VIEWS < NEUTRAL
    assert not set(COMPOSITES) & set(OPERATIONS)


def test_names_are_canonical() -> None:
    assert {operation.name for operation in OPERATIONS.values()} <= set(RULED) | NEUTRAL | {"sub"}


def test_functions_that_are_no_operation_are_not_found() -> None:
    for function in (torch.linalg.inv, torch.cdist, torch.special.bessel_j0, torch.prod, len, torch.ops.aten.cumprod):
        assert find(function) is None


# --- spellings --------------------------------------------------------------------------------------------------

X, Y = randn(3, 3) * 0.9, randn(3, 3, seed=1)
POSITIVE = X.abs() + 0.1
aten = torch.ops.aten


def _assigned(operator: str) -> Callable[[Tensor, Any], Tensor]:
    def function(a: Tensor, b: Any) -> Tensor:
        scope = {"a": a.clone(), "b": b}
        exec(f"a {operator} b", scope)  # the statement itself is what is tested
        return scope["a"]

    return function


# canonical name -> (operands, spellings)
SPELLINGS: dict[str, tuple[tuple[Tensor, ...], list[Callable[..., Tensor]]]] = {
    "mul": (
        (X, Y),
        [
            *(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, aten.mul, aten.mul.Tensor),
            *(lambda a, b: a * b, lambda a, b: b.__rmul__(a), _assigned("*="), lambda a, b: a.clone().mul_(b)),
            *(lambda a, b: torch.mul(input=a, other=b), lambda a, b: aten.mul_(a.clone(), b)),
            *(lambda a, b: a.clone().multiply_(b), lambda a, b: torch.einsum("ij,ij->ij", a, b)),
            lambda a, b: torch.addcmul(torch.zeros(3, 3, dtype=a.dtype), a, b),
        ],
    ),
    "div": (
        (X, Y),
        [
            *(torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.__truediv__, aten.div, aten.div.Tensor),
            *(lambda a, b: a / b, _assigned("/="), lambda a, b: a.clone().div_(b), lambda a, b: b.__rtruediv__(a)),
            *(lambda a, b: torch.div(a, other=b), lambda a, b: torch.div(input=a, other=b)),
            *(lambda a, b: aten.div_(a.clone(), b), lambda a, b: a * b.reciprocal(), lambda a, b: a * b**-1),
        ],
    ),
    "matmul": (
        (X, Y),
        [
            *(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, torch.linalg.matmul, aten.mm, aten.matmul),
            *(lambda a, b: a @ b, lambda a, b: b.__rmatmul__(a), lambda a, b: torch.bmm(a[None], b[None])[0]),
            *(lambda a, b: torch.einsum("ij,jk", a, b), lambda a, b: torch.tensordot(a, b, 1), _assigned("@=")),
            *(lambda a, b: torch.inner(a, b.T), lambda a, b: torch.einsum("ij,jk->ik", [a, b])),
            *(lambda a, b: torch.addmm(torch.zeros(3, 3, dtype=a.dtype), a, b), lambda a, b: (b.T @ a.T).T),
        ],
    ),
    "add": (
        (X, Y),
        [
            *(torch.add, Tensor.add, Tensor.__add__, aten.add, lambda a, b: a + b, lambda a, b: b.__radd__(a)),
            *(_assigned("+="), lambda a, b: a.clone().add_(b), lambda a, b: a - (-b), lambda a, b: sum([a, b])),
            *(lambda a, b: torch.stack([a, b]).sum(0), lambda a, b: (-b).__rsub__(a), lambda a, b: torch.sub(a, -b)),
            *(lambda a, b: torch.rsub(-b, a), lambda a, b: _assigned("-=")(a, -b)),
        ],
    ),
    "sigmoid": (
        (X,),
        [
            *(torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.special.expit, aten.sigmoid, torch.nn.Sigmoid()),
            *(lambda x: x.clone().sigmoid_(), lambda x: torch.sigmoid_(x.clone()), lambda x: torch.sigmoid(input=x)),
            lambda x: aten.sigmoid_(x.clone()),
        ],
    ),
    "exp": (
        (X,),
        [torch.exp, Tensor.exp, aten.exp, lambda x: x.clone().exp_(), lambda x: torch.exp_(x.clone())],
    ),
    "tanh": ((X,), [torch.tanh, Tensor.tanh, F.tanh, aten.tanh, torch.nn.Tanh(), lambda x: x.clone().tanh_()]),
    "erf": ((X,), [torch.erf, Tensor.erf, torch.special.erf, aten.erf, lambda x: x.clone().erf_()]),
    "silu": (
        (X,),
        [
            *(F.silu, torch._C._nn.silu, torch.nn.SiLU(), lambda x: F.silu(x.clone(), inplace=True)),
            *(lambda x: F.silu(x.clone(), True), lambda x: torch.nn.SiLU(inplace=True)(x.clone())),
            lambda x: F.silu(input=x, inplace=False),
        ],
    ),
    "hardswish": (
        (X,),
        [F.hardswish, torch.nn.Hardswish(), lambda x: F.hardswish(x.clone(), True), lambda x: F.hardswish(x, False)],
    ),
    "elu": ((X,), [F.elu, torch.nn.ELU(), lambda x: F.elu(x.clone(), 1.0, True), lambda x: F.elu_(x.clone())]),
    "relu": (
        (X,),
        [
            *(F.relu, torch.relu, Tensor.relu, aten.relu, torch.nn.ReLU(), lambda x: F.relu(x.clone(), inplace=True)),
            *(lambda x: x.clone().relu_(), lambda x: x.clamp(min=0), lambda x: torch.maximum(x, torch.zeros_like(x))),
        ],
    ),
    "gelu": ((X,), [F.gelu, torch._C._nn.gelu, torch.nn.GELU(), lambda x: F.gelu(x, approximate="none")]),
    "square": (
        (X,),
        [
            *(torch.square, Tensor.square, lambda x: x**2, lambda x: x.pow(2), lambda x: torch.pow(x, exponent=2)),
            *(lambda x: x.clone().square_(), lambda x: x.clone().pow_(2), lambda x: x.pow(2.0), lambda x: x * x),
            lambda x: torch.pow(input=x, exponent=2),
            lambda x: _assigned("**=")(x, 2),
        ],
    ),
    "clamp": (
        (X,),
        [
            *(lambda x: x.clamp(-0.3, 0.4), lambda x: torch.clip(x, -0.3, 0.4), lambda x: x.clone().clamp_(-0.3, 0.4)),
            *(lambda x: x.clamp(min=-0.3, max=0.4), lambda x: x.clamp_min(-0.3).clamp_max(0.4)),
            *(lambda x: F.hardtanh(x, -0.3, 0.4), lambda x: F.hardtanh(x.clone(), -0.3, 0.4, True)),
        ],
    ),
    "softmax": (
        (X,),
        [
            *(lambda x: F.softmax(x, dim=-1), lambda x: torch.softmax(x, -1), lambda x: x.softmax(-1)),
            *(lambda x: torch.special.softmax(x, -1), torch.nn.Softmax(dim=-1), lambda x: x.softmax(dim=1)),
            *(lambda x: torch.softmax(input=x, dim=-1), lambda x: F.softmin(-x, dim=-1)),
        ],
    ),
    "log_softmax": (
        (X,),
        [lambda x: F.log_softmax(x, dim=-1), lambda x: x.log_softmax(-1), lambda x: torch.special.log_softmax(x, -1)],
    ),
    "rsqrt": (
        (POSITIVE, Y),
        [
            *(lambda x, y: y * x.rsqrt(), lambda x, y: y * torch.rsqrt(x), lambda x, y: y * x.clone().rsqrt_()),
            *(lambda x, y: y * x.pow(-0.5), lambda x, y: y * (1 / x.sqrt()), lambda x, y: y / x.sqrt()),
            lambda x, y: y * x.sqrt().reciprocal(),
        ],
    ),
    "transpose": (
        (X,),
        [
            *(lambda x: x.T, lambda x: x.mT, lambda x: x.t(), lambda x: x.transpose(0, 1), lambda x: x.permute(1, 0)),
            *(lambda x: x.swapaxes(0, 1), lambda x: torch.stack(list(x), 1), lambda x: torch.stack([*x.unbind(0)], 1)),
            lambda x: torch.stack([x[i] for i in range(3)], dim=1),
        ],
    ),
    "masked_fill": (
        (X,),
        [
            *(lambda x: x.masked_fill(X > 0, 2.0), lambda x: x.clone().masked_fill_(X > 0, 2.0)),
            *(lambda x: torch.where(X > 0, 2.0, x), lambda x: x.where(X <= 0, torch.tensor(2.0, dtype=x.dtype))),
            lambda x: x.clone().__setitem__(X > 0, 2.0) or _written(x, X > 0, 2.0),
        ],
    ),
}


def _written(x: Tensor, index: Any, value: Any) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


@pytest.mark.parametrize(
    ("name", "spelling"), [(name, k) for name, (_, spellings) in SPELLINGS.items() for k in range(len(spellings))]
)
def test_every_spelling_gives_the_same_value_and_relevance(name: str, spelling: int) -> None:
    operands, spellings = SPELLINGS[name]
    reference, result = explain(spellings[0], *operands), explain(spellings[spelling], *operands)
    assert_close(result.y, reference.y)
    assert_close(result.relevance, reference.relevance)


@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("mul", [torch.mul, Tensor.mul_, Tensor.__imul__, Tensor.__rmul__, aten.mul_.Tensor, aten.mul.Scalar]),
        ("div", [torch.div, Tensor.div_, Tensor.__itruediv__, Tensor.__rtruediv__, Tensor.__rdiv__, aten.div]),
        ("matmul", [torch.bmm, Tensor.__rmatmul__, torch.linalg.matmul, F.grouped_mm, torch._grouped_mm, torch.dot]),
        ("norm", [torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm]),
        ("conv", [F.conv1d, F.conv2d, F.conv_transpose3d, torch.conv1d, torch.convolution]),
        ("linear", [F.linear, torch._C._nn.linear]),
        ("softmax", [torch.special.softmax, Tensor.softmax, F.softmax, aten.softmax.int]),
        ("sigmoid", [torch.special.expit, Tensor.sigmoid_]),
        ("mT", [Tensor.mT.__get__]),  # type: ignore[attr-defined]
        ("__setitem__", [Tensor.__setitem__]),
        ("index_add", [Tensor.index_add, Tensor.index_add_, torch.index_add]),
        ("fftn", [torch.fft.fftn]),
        ("loss", [F.cross_entropy, F.mse_loss, F.kl_div]),
    ],
)
def test_spellings_map_to_one_name(name: str, functions: list[Any]) -> None:
    for function in functions:
        operation = find(function)
        assert operation is not None, function
        assert operation.name == name
        spelled_in_place = re.search(
            r"^__i|(?<!_)_$|^__setitem__$", str(getattr(function, "_opname", function.__name__))
        )
        assert operation.in_place == bool(spelled_in_place)


# --- in place ---------------------------------------------------------------------------------------------------


def _index_added(x: Tensor, y: Tensor) -> Tensor:
    buffer = torch.zeros(4, 3, dtype=x.dtype)
    buffer.index_add_(0, torch.tensor([0, 2, 2]), x * y)
    return buffer


def _sliced(x: Tensor, y: Tensor) -> Tensor:
    buffer = torch.zeros(4, 3, dtype=x.dtype)
    buffer[:3] = x
    buffer[1:].mul_(y)
    buffer[0] += x[0]
    return buffer


def _chained_on_a_view(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z.view(-1)[3:6].mul_(y[1]).sigmoid_().add_(1.0)
    z.T[0].div_(y[0])
    return z


def _chained(x: Tensor, y: Tensor) -> Tensor:
    middle = torch.sigmoid(x[1] * y[1]) + 1.0
    z = torch.stack([x[0], middle, x[2]])
    return torch.cat([(z[:, :1].T / y[:1]).T, z[:, 1:]], 1)


IN_PLACE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "index_add_": (
        _index_added,
        lambda x, y: torch.stack([(x * y)[0], torch.zeros_like(x[0]), (x * y)[1] + (x * y)[2], torch.zeros_like(x[0])]),
    ),
    "setitem and views": (
        _sliced,
        lambda x, y: torch.cat([2 * x[:1], x[1:] * y[:2], torch.zeros(1, 3, dtype=x.dtype) * y[2]]),
    ),
    "chained on views": (_chained_on_a_view, _chained),
    "a constant target": (lambda x, y: torch.ones(3, 3, dtype=x.dtype).mul_(x).mul_(y), lambda x, y: x * y),
    "a constant denominator": (lambda x, y: torch.ones(3, 3, dtype=x.dtype).div_(x) * y, lambda x, y: (1 / x) * y),
    "addcmul_": (lambda x, y: x.clone().addcmul_(x, y), lambda x, y: x + x * y),
    "addcdiv_": (lambda x, y: x.clone().addcdiv_(x, y, value=2.0), lambda x, y: x + 2 * (x / y)),
    "lerp_": (lambda x, y: x.clone().lerp_(y, 0.3), lambda x, y: x + 0.3 * (y - x)),
    "baddbmm_": (lambda x, y: x.clone()[None].baddbmm_(x[None], y[None])[0], lambda x, y: x + x @ y),
    "copy_": (lambda x, y: x.clone().copy_(x * y), lambda x, y: x * y),
    "scatter_add_": (
        lambda x, y: torch.zeros(3, 3, dtype=x.dtype).scatter_add_(0, torch.zeros(3, 3, dtype=torch.long), x * y),
        lambda x, y: torch.stack([(x * y).sum(0), torch.zeros_like(x[0]), torch.zeros_like(x[0])]),
    ),
    "the same operand twice": (lambda x, y: x.clone().mul_(x).mul_(y), lambda x, y: x * x * y),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_writing_in_place_changes_neither_value_nor_relevance(name: str) -> None:
    in_place, out_of_place = IN_PLACE[name]
    result, expected = explain(in_place, X, Y), explain(out_of_place, X, Y)
    assert_close(result.y, in_place(X, Y), rtol=0, atol=1e-15)
    assert_close(result.y, expected.y)
    assert_close(result.relevance, expected.relevance)


# --- neutral operations: the plain gradient ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.topk(2, dim=-1)[0],
        lambda x: x.max(dim=1).values,
        lambda x: x.sort(descending=True)[0].cumsum(0),
        lambda x: torch.cat(x.split([1, 2])) + x.chunk(3)[0],
        lambda x: torch.stack([a for a in x for _ in range(2)]),
        lambda x: F.pad(x, (1, 2)).roll(1, 0).flip(0),
        lambda x: F.avg_pool1d(x[None], 2) + F.max_pool1d(x[None], 2),
        lambda x: F.interpolate(x[None, None], scale_factor=2.0, mode="bilinear"),
        lambda x: torch.fft.rfft(x).real + torch.fft.fft(x).imag[:, :2],
        lambda x: torch.view_as_real(
            torch.view_as_complex(x[:, :2].contiguous()) * torch.polar(POSITIVE[0, 0], X[0, 0])
        ),
        lambda x: torch.gather(x, 1, torch.tensor([[0], [2], [1]])) - x.mean(-1, keepdim=True),
        lambda x: abs(x) + -x + (+x),
        lambda x: torch.einsum("ij->ji", x) + x.sum().expand(3, 3),
        lambda x: F.silu(x[:0]).sum() + x.sum() + x[0, 0].squeeze(),
    ],
)
def test_neutral_operations_conserve_and_keep_the_plain_gradient(function: Callable[[Tensor], Tensor]) -> None:
    result = explain(function, X)
    plain = explain(function, X, rules={})
    assert_close(result.gradients, plain.gradients, rtol=0, atol=0)
    assert_close(result.received, result.total)

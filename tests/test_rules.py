"""Every rule against a second, naive derivation in float64: the formulas of the paper, written as sums and loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from attnlrp import ATTNLRP, CP_LRP, GRADIENT
from attnlrp.rules import PRESETS, Layer, epsilon, stabilise
from explained import explain, randn

SEEDS = (0, 1, 2)
seeds = pytest.mark.parametrize("seed", SEEDS)


# --- eq. 8: linear layers ---------------------------------------------------------------------------------------


@seeds
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_linear_shares_relevance_by_contribution_and_its_bias_absorbs(seed: int, eps: float) -> None:
    x, w, b = randn(2, 3, seed=seed), randn(4, 3, seed=seed + 10), randn(4, seed=seed + 20)
    rules = ATTNLRP | {"linear": epsilon(eps)} if eps else ATTNLRP
    result = explain(lambda x: F.linear(x, w, b), x, rules=rules)
    expected, absorbed = torch.zeros_like(x), 0.0
    for n, j in itertools.product(range(2), range(4)):
        z = sum(w[j, i] * x[n, i] for i in range(3)) + b[j]
        share = (z * result.g[n, j]) / (z + eps * torch.sign(z))
        for i in range(3):
            expected[n, i] += w[j, i] * x[n, i] * share
        absorbed += b[j] * share + eps * torch.sign(z) * share
    assert_close(result.relevance[0], expected)
    assert_close(result.received + absorbed, result.total)


@seeds
def test_convolution_shares_relevance_by_contribution(seed: int) -> None:
    x, w, b = randn(1, 2, 6, seed=seed), randn(3, 2, 3, seed=seed + 10), randn(3, seed=seed + 20)
    result = explain(lambda x: F.conv1d(x, w, b), x)
    expected = torch.zeros_like(x)
    for out, position, channel, tap in itertools.product(range(3), range(4), range(2), range(3)):
        z = result.y[0, out, position]
        contribution = w[out, channel, tap] * x[0, channel, position + tap]
        expected[0, channel, position + tap] += contribution / z * z * result.g[0, out, position]
    assert_close(result.relevance[0], expected)
    assert_close(result.received + (b[:, None] * result.g[0]).sum(), result.total)


@pytest.mark.parametrize("conv", [F.conv2d, F.conv_transpose2d])
def test_convolutions_without_bias_conserve(conv: Callable[..., Tensor]) -> None:
    w = randn(3, 3, 2, 2, seed=1)
    result = explain(lambda x: conv(x, w), randn(1, 3, 5, 5))
    assert_close(result.received, result.total)


# --- eq. 9: element-wise non-linearities ------------------------------------------------------------------------

POINTS = (0.0, 1e-20, -1e-20, 1e-4, -1e-4, 0.3, -0.3, 0.9, -0.9)
WIDE = (*POINTS, 2.5, -2.5, 8.0, -8.0, 40.0, -40.0)


def _selu(x: Any, alpha: float = 1.6732632423543772, scale: float = 1.0507009873554805) -> Any:
    return scale * x if x > 0 else scale * alpha * mpmath.expm1(x)


def _clipped(low: float, high: float) -> Callable[[Any], Any]:
    return lambda x: max(low, min(high, x))


def _gelu_tanh(x: Any) -> Any:
    return x * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + 0.044715 * x**3))) / 2


# name -> (function, the same in 60 digits, its derivative at 0, points)
IDENTITIES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any], float, tuple[float, ...]]] = {
    "silu": (F.silu, lambda x: x / (1 + mpmath.exp(-x)), 0.5, WIDE),
    "gelu": (F.gelu, lambda x: x * mpmath.ncdf(x), 0.5, WIDE),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh, 0.5, WIDE),
    "mish": (F.mish, lambda x: x * mpmath.tanh(mpmath.log(1 + mpmath.exp(x))), 0.6, WIDE),
    "hardswish": (F.hardswish, lambda x: x * _clipped(0, 6)(x + 3) / 6, 0.5, WIDE),
    "tanh": (torch.tanh, mpmath.tanh, 1, WIDE),
    "erf": (torch.erf, mpmath.erf, 2 / float(mpmath.sqrt(mpmath.pi)), WIDE),
    "sin": (torch.sin, mpmath.sin, 1, WIDE),
    "sinh": (torch.sinh, mpmath.sinh, 1, WIDE),
    "asin": (torch.asin, mpmath.asin, 1, POINTS),
    "asinh": (torch.asinh, mpmath.asinh, 1, WIDE),
    "atan": (torch.atan, mpmath.atan, 1, WIDE),
    "tan": (torch.tan, mpmath.tan, 1, POINTS),
    "expm1": (torch.expm1, mpmath.expm1, 1, WIDE),
    "log1p": (torch.log1p, lambda x: mpmath.log(1 + x), 1, POINTS),
    "softsign": (F.softsign, lambda x: x / (1 + abs(x)), 1, WIDE),
    "elu": (F.elu, lambda x: x if x > 0 else mpmath.expm1(x), 1, WIDE),
    "celu": (lambda x: F.celu(x, 0.5), lambda x: x if x > 0 else mpmath.expm1(2 * x) / 2, 1, WIDE),
    "selu": (F.selu, _selu, 1.0507009873554805, WIDE),
    "relu6": (F.relu6, _clipped(0, 6), 1, WIDE),
    "hardtanh": (F.hardtanh, _clipped(-1, 1), 1, WIDE),
    "clamp": (lambda x: x.clamp(-2, 3), _clipped(-2, 3), 1, WIDE),
    "softshrink": (F.softshrink, lambda x: max(0, x - 0.5) + min(0, x + 0.5), 0, WIDE),
    "hardshrink": (F.hardshrink, lambda x: x if abs(x) > 0.5 else 0 * x, 0, WIDE),
    "tanhshrink": (F.tanhshrink, lambda x: x - mpmath.tanh(x), 0, WIDE),
    "square": (torch.square, lambda x: x**2, 0, WIDE),
    "pow 2": (lambda x: x.pow(2), lambda x: x**2, 0, WIDE),
    "pow 3": (lambda x: x**3, lambda x: x**3, 0, WIDE),
    "pow 1": (lambda x: x**1, lambda x: x, 1, WIDE),
    "relu": (F.relu, lambda x: max(0, x), 0, WIDE),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.1), lambda x: x if x > 0 else x / 10, 0.1, WIDE),
    "abs": (torch.abs, abs, 0, WIDE),
}
PRECISION = {torch.float64: (1e-11, 1e-12), torch.float32: (2e-5, 1e-6), torch.bfloat16: (1e-2, 1e-6)}


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_rule_multiplies_the_gradient_by_the_ratio(name: str, dtype: torch.dtype) -> None:
    function, precise, limit, points = IDENTITIES[name]
    x = torch.tensor(points, dtype=torch.float64).to(dtype)
    result = explain(function, x, g=torch.ones_like(x))
    mpmath.mp.dps = 60
    ratios = [float(precise(mpmath.mpf(v)) / mpmath.mpf(v)) if v else limit for v in x.double().tolist()]
    rtol, atol = PRECISION[dtype]
    assert_close(result.gradients[0].double(), torch.tensor(ratios, dtype=torch.float64), rtol=rtol, atol=atol)


@seeds
@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_rule_conserves(name: str, seed: int) -> None:
    x = randn(40, seed=seed)
    x = x / x.abs().max() * 0.99 if name in ("asin", "log1p") else x
    result = explain(IDENTITIES[name][0], x)
    assert_close(result.relevance[0], result.y * result.g)


# name -> (function, points)
GATES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, ...]]] = {
    "sigmoid": (torch.sigmoid, WIDE),
    "hardsigmoid": (F.hardsigmoid, WIDE),
    "logsigmoid": (F.logsigmoid, WIDE),
    "softplus": (F.softplus, WIDE),
    "exp": (torch.exp, WIDE),
    "exp2": (torch.exp2, WIDE),
    "cos": (torch.cos, WIDE),
    "cosh": (torch.cosh, WIDE),
    "erfc": (torch.erfc, WIDE),
    "log": (torch.log, (0.1, 1.0, 5.0)),
    "log2": (torch.log2, (0.1, 1.0, 5.0)),
    "tensor exponent": (lambda x: x ** torch.tensor(2.0), WIDE),
    "constant base": (lambda x: 2**x, POINTS),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", GATES)
def test_gates_are_stabilised(name: str, dtype: torch.dtype) -> None:
    function, points = GATES[name]
    x = torch.tensor(points, dtype=dtype)
    result = explain(function, x)
    denominators = torch.tensor([v + 0.01 if v >= 0 else v - 0.01 for v in x.tolist()], dtype=dtype)
    assert_close(result.gradients[0], (result.g * function(x) / denominators).masked_fill(x == 0, 0))
    assert result.gradients[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", [torch.sqrt, lambda x: x**0.25, lambda x: x.pow(0.5)])
def test_roots_conserve_and_pass_nothing_on_at_zero(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1e-12, 1e-4, 0.1, 1.0, 5.0], dtype=dtype)
    result = explain(function, x)
    assert_close(result.relevance[0], result.y * result.g)
    assert result.gradients[0][0] == 0


def test_the_stabiliser_keeps_the_sign_and_zero_is_positive() -> None:
    z = torch.tensor([-1.0, -0.0, 0.0, 1.0])
    assert_close(stabilise(z, 0.25), torch.tensor([-1.25, 0.25, 0.25, 1.25]))
    assert_close(
        stabilise(z) - z, torch.tensor([-1.0, 1, 1, 1]) * torch.finfo(torch.float32).eps ** 0.5, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    ("function", "gradient"),
    [
        (lambda x: x.clamp(min=0.5), [0.0, 0.0, 1.0]),
        (lambda x: x.clamp(max=-0.5), [1.0, 0.0, 0.0]),
        (lambda x: F.hardtanh(x, 0.5, 1.5), [0.0, 0.0, 1.0]),
        (lambda x: x.clamp(min=-0.5), [0.5, 1.0, 1.0]),
        (lambda x: x.clamp(torch.tensor(-0.5), torch.tensor(0.5)), [0.5, 1.0, 0.5]),
    ],
)
def test_a_bound_away_from_zero_absorbs(function: Callable[[Tensor], Tensor], gradient: list[float]) -> None:
    x = torch.tensor([-1.0, 0.1, 1.0])
    assert_close(explain(function, x, g=torch.ones(3)).gradients[0], torch.tensor(gradient))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_live_bound_takes_the_relevance_that_it_decides(sign: float) -> None:
    x, low = torch.tensor([1.0, 2.0]) * sign, torch.tensor([0.5, 3.0]) * sign
    result = explain(lambda x, low: torch.clamp(x, min=low), x, low)
    relevance = torch.maximum(x, low) * result.g
    assert_close(result.relevance, [relevance * (x > low), relevance * (x < low)])


# --- props. 3.2 and 3.3: products -------------------------------------------------------------------------------


@seeds
def test_a_product_is_shared_evenly(seed: int) -> None:
    a, b = randn(3, 4, seed=seed), randn(3, 4, seed=seed + 10)
    result = explain(lambda a, b: a * b, a, b)
    assert_close(result.relevance, [a * b * result.g / 2] * 2)


@seeds
def test_a_product_of_n_factors_gives_each_one_nth(seed: int) -> None:
    factors = [randn(5, seed=seed + 10 * k) for k in range(4)]
    for n in (2, 3, 4):
        equation = ",".join("i" * n) + "->i"
        result = explain(lambda *f: torch.einsum(equation, *f), *factors[:n])  # noqa: B023
        assert_close(result.relevance, [result.y * result.g / n] * n)


def test_a_constant_factor_takes_nothing() -> None:
    a, b = randn(3), randn(3, seed=1)
    result = explain(lambda a: a * b * 2.0, a)
    assert_close(result.relevance[0], 2 * a * b * result.g)


def test_a_tensor_times_itself_keeps_its_relevance() -> None:
    x = randn(5)
    result = explain(lambda x: x * x, x)
    assert_close(result.relevance[0], x * x * result.g)


def test_a_broadcast_factor_takes_half_of_every_product() -> None:
    a, b = randn(3, 4), randn(4, seed=1)
    result = explain(lambda a, b: a * b, a, b)
    assert_close(result.relevance[1], (a * b * result.g / 2).sum(0))


@pytest.mark.parametrize("shape", [(3, 4), (4,), (1, 4), (3, 1), ()])
@pytest.mark.parametrize(
    "types", list(itertools.product([torch.float32, torch.bfloat16, torch.complex64], repeat=2)), ids=str
)
def test_each_factor_gets_half_of_its_gradient(types: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    a, b = randn(3, 4) * torch.tensor(1 + 2j), randn(*shape, seed=1) * torch.tensor(2 - 1j)
    a, b = [(x if kind.is_complex else x.real).to(kind) for x, kind in zip((a, b), types, strict=True)]
    functions: list[Callable[..., Tensor]] = [lambda a, b: a * b, lambda a, b: torch.mul(input=a, other=b)]
    if types[0] == torch.promote_types(*types):  # in place, the first factor keeps its type
        functions.append(lambda a, b: a.clone().mul_(b))
    for function in functions:
        halved = explain(function, a, b)
        plain = explain(function, a, b, rules=GRADIENT)
        for ours, whole in zip(halved.gradients, plain.gradients, strict=True):
            assert_close(ours, whole / 2)


def _halves(a: Tensor, v: Tensor, relevance: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """R_ji(A) = sum_p A_ji V_ip R_jp / (2 O_jp), and the same for V with the sum over j (prop. 3.3)."""
    left, right = torch.zeros_like(a), torch.zeros_like(v)
    for j, i, p in itertools.product(range(a.shape[0]), range(a.shape[1]), range(v.shape[1])):
        share = a[j, i] * v[i, p] * relevance[j, p] / (2 * output[j, p])
        left[j, i] += share
        right[i, p] += share
    return left, right


@seeds
@pytest.mark.parametrize(
    "product",
    [
        torch.matmul,
        torch.mm,
        lambda a, v: a @ v,
        lambda a, v: torch.bmm(a[None], v[None])[0],
        lambda a, v: torch.einsum("ji,ip->jp", a, v),
        lambda a, v: torch.tensordot(a, v, dims=1),
        lambda a, v: torch.inner(a, v.T),
        lambda a, v: torch.stack([torch.stack([torch.dot(row, column) for column in v.T]) for row in a]),
        lambda a, v: torch.stack([torch.mv(v.T, row) for row in a]),
        lambda a, v: F.linear(a, v.T) if not v.requires_grad else torch.linalg.matmul(a, v),
    ],
)
def test_matrix_products_give_half_to_each_operand(product: Callable[..., Tensor], seed: int) -> None:
    a, v = randn(3, 4, seed=seed), randn(4, 2, seed=seed + 10)
    result = explain(product, a, v)
    assert_close(result.relevance, list(_halves(a, v, result.y * result.g, result.y)))
    one_sided = explain(lambda a: product(a, v), a)
    assert_close(one_sided.relevance[0], 2 * _halves(a, v, one_sided.y * one_sided.g, one_sided.y)[0])


@seeds
def test_products_added_to_a_summand(seed: int) -> None:
    c, a, b = randn(2, 3, seed=seed), randn(2, 4, seed=seed + 10), randn(4, 3, seed=seed + 20)
    for function in (
        lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2),
        lambda c, a, b: torch.baddbmm(c[None], a[None], b[None], beta=0.5, alpha=2)[0],
        lambda c, a, b: torch.addbmm(c, a[None], b[None], beta=0.5, alpha=2),
    ):
        result = explain(function, c, a, b)
        product = 2 * (a @ b)
        halves = _halves(a, b, product * result.g, product / 2)
        assert_close(result.relevance, [0.5 * c * result.g, *halves])
    result = explain(lambda c, a, b: torch.addcmul(c, a, b, value=3), c, a[:, :3], b[:2])
    assert_close(result.relevance, [c * result.g] + [1.5 * a[:, :3] * b[:2] * result.g] * 2)
    assert_close(result.received, result.total)


def test_outer_products_and_bilinear_forms_conserve() -> None:
    a, b, w = randn(3), randn(4, seed=1), randn(2, 3, 4, seed=2)
    for function in (torch.outer, torch.kron, lambda a, b: F.bilinear(a, b, w)):
        result = explain(function, a, b)
        assert_close(torch.stack([r.sum() for r in result.relevance]), result.total.expand(2) / 2)


# --- prop. 3.4: denominators ------------------------------------------------------------------------------------


@seeds
def test_a_denominator_is_a_constant(seed: int) -> None:
    a, b = randn(4, seed=seed), randn(4, seed=seed + 10)
    result = explain(lambda a, b: a / b, a, b)
    assert_close(result.relevance, [a / b * result.g, torch.zeros(4, dtype=torch.float64)])
    result = explain(lambda a, b: torch.addcdiv(a, a, b, value=2), a, b)
    assert_close(result.relevance, [(a + 2 * a / b) * result.g, torch.zeros(4, dtype=torch.float64)])


@pytest.mark.parametrize(
    "statistic", [lambda x: 2 / x, torch.reciprocal, torch.rsqrt, lambda x: x**-0.5, lambda x: 1 / x]
)
def test_a_reciprocal_is_a_constant_factor(statistic: Callable[[Tensor], Tensor]) -> None:
    x, y = randn(4).abs(), randn(4, seed=1)
    result = explain(lambda x, y: statistic(x) * y, x, y)
    assert_close(result.relevance, [torch.zeros_like(x), statistic(x) * y * result.g])


def test_a_router_keeps_its_relevance_when_its_weights_are_normalised() -> None:
    def router(x: Tensor, *, in_place: bool) -> Tensor:
        w = x.softmax(-1).topk(2, dim=-1).values
        if in_place:
            w /= w.sum(dim=-1, keepdim=True)
            return w
        return w / w.sum(dim=-1, keepdim=True)

    x = randn(3, 5)
    written, in_place = (explain(lambda x, k=k: router(x, in_place=k), x) for k in (False, True))
    assert_close(written.relevance, in_place.relevance)
    sums = explain(lambda w: w / w.sum(dim=-1, keepdim=True), x.softmax(-1))
    assert_close(sums.relevance[0].sum(-1), (sums.y * sums.g).sum(-1))
    plain = explain(lambda w: w / w.sum(dim=-1, keepdim=True), x.softmax(-1), rules=GRADIENT)
    assert_close(plain.relevance[0].sum(-1), torch.zeros(3, dtype=torch.float64))


# --- the presets ------------------------------------------------------------------------------------------------


def test_presets_are_tables_that_differ_where_they_say() -> None:
    assert {k for k in ATTNLRP if CP_LRP[k] is not ATTNLRP[k]} == {"softmax"}
    assert GRADIENT == {}
    for name, rules in PRESETS.items():
        assert not rules or {k for k in rules if not isinstance(k, Layer)} == set(ATTNLRP), name


def test_no_rule_is_gradient_times_input() -> None:
    x, y = randn(3, 4), randn(3, 4, seed=1)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return (F.layer_norm(x * y, (4,)) @ F.silu(y).T).softmax(-1)

    result = explain(function, x, y, rules=GRADIENT)
    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
    assert_close(result.gradients, list(torch.autograd.grad(function(*leaves), leaves, result.g)))


def test_dropout_in_training_passes_relevance_unchanged() -> None:
    module = nn.Dropout(0.4).train()
    result = explain(module, randn(200))
    assert (result.y == 0).any()
    assert_close(result.relevance[0], result.y * result.g)


def test_gated_and_interpolated_forms_follow_their_parts() -> None:
    a, b, w = randn(3, 4), randn(3, 4, seed=1), randn(3, 4, seed=2).abs()
    result = explain(lambda x: F.glu(x), torch.cat([a, b], -1))
    eps = 0.01
    expected = torch.cat([result.y * result.g / 2, result.y * result.g / 2 * b / (b + eps * b.sign())], -1)
    assert_close(result.relevance[0], expected)
    result = explain(torch.lerp, a, b, w)
    step = w * (b - a) * result.g / 2
    assert_close(result.relevance, [a * result.g - w * a * result.g / 2, w * b * result.g / 2, step])
    assert_close(result.received, result.total)

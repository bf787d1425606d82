"""The rules of AttnLRP, one per operation, in the order of the paper (Achtibat et al., ICML 2024).

Relevance of a tensor is `value * gradient`, where *gradient* is what the backward pass carries.
A rule is a function `rule(op, *args, **kwargs)`: it computes `op(*args, **kwargs)` unchanged and decides
what the backward does. A tensor is *live* if it depends on the explained input (`requires_grad`);
everything else, parameters included, is a constant.

An operation without a row in a table keeps its plain gradient: that is the epsilon rule with
epsilon = 0 (eq. 8), and right for every operation that is linear in its live inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlrp.backward import (
    Epsilon,
    Identity,
    Product,
    Softmax,
    Substitution,
    count_live,
    distributed,
    live,
    omitted,
    positive,
    scale_gradient,
    scaled,
    stabilise,
)
from attnlrp.normalisation import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from attnlrp.signed import gamma

__all__ = [
    "ATTNLRP",
    "CP_LRP",
    "GATE_EPSILON",
    "GRADIENT",
    "MAMBA_LRP",
    "PRESETS",
    "ROLES",
    "SOFTMAX",
    "SOFTMAX_DISTRIBUTE",
    "SOFTMAX_IDENTITY",
    "SOFTMAX_OMIT",
    "VIT",
    "VIT_CP",
    "VIT_DINOV2",
    "Layer",
    "Rule",
    "Rules",
    "composite",
    "constant",
    "constant_denominator",
    "epsilon",
    "gradient",
    "identity",
    "stabilise",
    "stabilised_identity",
    "uniform",
]

Rule: TypeAlias = Callable[..., Any]
Rules: TypeAlias = Mapping[Any, Rule]
"""Canonical operation name (or the function itself, for an operation of your own, or a `Layer`) -> rule."""

GATE_EPSILON = 1e-2
"""The stabiliser of gates, in units of the gate's input: the same in every precision, so that relevance is too."""


@dataclass(frozen=True)
class Layer:
    """Key of a table: the layers whose weight has this name; of several that match, the last row applies.

    A layer is a linear layer, a convolution, or a product with a weight, as experts in one stack compute it. Its row
    takes the place of that of the operation.

    Args:
        pattern: path of the module that owns the weight, or of the weight itself, as `fnmatch` reads it:
            "*.mlp.*", "*q_proj", "*.experts.down_proj".
        optional: whether it may match nothing, as in a table that is made for every model.
    """

    pattern: str
    optional: bool = False


# --- eq. 8: linear layers ---------------------------------------------------------------------------------------


def gradient(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """R_i = sum_j x_i dz_j/dx_i R_j / z_j: eq. 8 with epsilon = 0; the bias absorbs its share.

    For a softmax the same line is prop. 3.1, the Taylor expansion at x: R_i = x_i (R_i - s_i sum_j R_j).
    """
    return op(*args, **kwargs)


@dataclass(frozen=True)
class epsilon:
    """R_i = sum_j w_ji x_i R_j / (z_j + eps sign z_j) (eq. 8): small outputs lose relevance to the stabiliser.

    Args:
        value: eps > 0, in units of the layer's output.
    """

    value: float

    def __call__(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return Epsilon.on(op(*args, **kwargs), self.value)


# --- eq. 9: element-wise non-linearities ----------------------------------------------------------------------


@dataclass(frozen=True)
class identity:
    """R_i = R_j for y = f(x), f(0) = 0 (eq. 9): the gradient is multiplied by f(x)/x.

    Args:
        ratio: closed form of f(x)/x, called as ratio(x, *args, **kwargs) in float32 or better;
            without it f(x)/x is computed, with its limit at 0.
    """

    ratio: Callable[..., Tensor] | None = None

    def __call__(self, op: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        if not live(x):
            return constant(op, x, *args, **kwargs)
        ratio = self.ratio or quotient(op)
        return Identity.on(x, lambda t: op(t, *args, **kwargs), lambda t: ratio(t, *args, **kwargs))


@dataclass(frozen=True)
class stabilised_identity:
    """R_i = R_j x / (x + eps sign x) for y = f(x), f(0) != 0: f(x)/x has a pole at 0, so it is stabilised (eq. 9).

    Args:
        value: eps > 0, in units of x; None scales it to the precision of x.
    """

    value: float | None = GATE_EPSILON

    def __call__(self, op: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        # at 0 the share x / (x + eps) is 0; a ratio of 1 / eps would only blow up what cancels behind x = a - b
        return Identity.on(
            x,
            lambda t: op(t, *args, **kwargs),
            lambda t: (op(t, *args, **kwargs) / stabilise(t, self.value)).masked_fill(t == 0, 0),
        )


def square(op: Callable[..., Any], x: Tensor) -> Any:
    """Identity for x^2: f(x)/x = x, half of the derivative."""
    return op(scale_gradient(x, 1 / 2))


def root(op: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """Identity for x^n with 0 < n < 1. At x = 0 exactly, where the slope is infinite, nothing is passed on."""
    return identity(lambda t, *a, **k: (op(t, *a, **k) / t).masked_fill(t == 0, 0))(op, x, *args, **kwargs)


def power(op: Callable[..., Any], x: Any, exponent: Any) -> Any:
    """Identity for x^n with n >= 1: f(x)/x = x^(n-1), the derivative / n. A negative power is a statistic."""
    if live(exponent):
        return stabilised_identity()(lambda n: op(x.detach() if live(x) else x, n), exponent)
    if not isinstance(exponent, (int, float)):
        return stabilised_identity()(op, x, exponent)
    if 0 < exponent < 1:
        return root(op, x, exponent)
    return op(scale_gradient(x, 1 / exponent), exponent) if exponent >= 1 else constant(op, x, exponent)


def clip(op: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """Identity where the clipping interval holds 0; elsewhere plain gradient, and the bound absorbs."""
    if any(map(live, (*args, *kwargs.values()))):
        return op(x, *args, **kwargs)

    def ratio(t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = op(t, *args, **kwargs)
        keeps_zero = op(torch.zeros_like(t), *args, **kwargs) == 0
        return quotient(op)(t, *args, **kwargs).masked_fill(~keeps_zero & (y != t), 0)

    return identity(ratio)(op, x, *args, **kwargs)


# --- prop. 3.1: softmax, and the variants of appendix A.2.1 that the paper shows to be unstable -------------------


def constant(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """R_i = 0: the output is a constant and factors beside it take all relevance (CP-LRP on softmax)."""
    with torch.no_grad():
        return op(*args, **kwargs)


def softmax_identity(op: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """R_i = R_j: the identity rule through softmax. Explodes where x is near 0: for the record only."""
    return stabilised_identity(None)(op, x, *args, **kwargs)  # type: ignore[no-any-return]


def softmax_distribute(op: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """R_i = x_i (R_i - s_i sum_j R_j) + (1/N) sum_j (1 - x_j + x_mean) R_j: the bias is shared out evenly.

    x_mean = sum_j s_j x_j; N counts the logits that are not masked. Explodes: for the record only.
    """
    return _softmax_variant(op, x, args, kwargs, distributed)


def softmax_omit(op: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """R_i = x_i (R_i / d_i - s_i sum_j R_j / d_j), d = x - x_mean: the bias is left out of the denominator.

    d crosses zero, so it is stabilised. Explodes: for the record only.
    """
    return _softmax_variant(op, x, args, kwargs, omitted)


def softmax_positive(op: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """R_i = sum_j (J_ji x_i)+ R_j / sum_k (J_jk x_k)+, J_ji = s_j (delta_ij - s_i): z+ of prop. 3.1, without its bias.

    The only negative logit of a row has no positive contribution: what arrives at it is absorbed. Else it conserves.
    """
    return _softmax_variant(op, x, args, kwargs, positive)


def _softmax_variant(
    op: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], rule: Callable[..., Tensor]
) -> Tensor:
    dim = kwargs["dim"] if "dim" in kwargs else args[0]
    return Softmax.on(x, lambda t: op(t, *args, **kwargs), dim, rule)


# --- props. 3.2 and 3.3: products -----------------------------------------------------------------------------


def uniform(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """R_i = R_j / n for each of n live factors, element-wise (prop. 3.2) or summed over (prop. 3.3: half to each)."""
    count = sum(count_live(a) for a in (*args, *kwargs.values()))
    if count < 2:
        return op(*args, **kwargs)
    return op(*(scaled(a, 1 / count) for a in args), **{k: scaled(a, 1 / count) for k, a in kwargs.items()})


def product(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`uniform` for an element-wise product, with less memory on the way back."""
    two = len(args) == 2 and not kwargs and all(map(live, args)) and args[0] is not args[1]
    return Product.on(*args, op) if two else uniform(op, *args, **kwargs)


def uniform_after_first(op: Callable[..., Any], first: Any, *factors: Any, **kwargs: Any) -> Any:
    """first + product of factors: the sum is linear, the product uniform."""
    return uniform(lambda *f, **k: op(first, *f, **k), *factors, **kwargs)


def uniform_pair(op: Callable[..., Any], a: Any, b: Any, *weights: Any, **kwargs: Any) -> Any:
    """A form that is linear in `a` and in `b`, with constant weights."""
    return uniform(lambda x, y: op(x, y, *weights, **kwargs), a, b)


def constant_denominator(op: Callable[..., Any], a: Any, b: Any, **kwargs: Any) -> Any:
    """a / b with the denominator a constant (prop. 3.4): conserves, where the plain gradient would sum to 0."""
    b = b.detach() if isinstance(b, Tensor) else b
    return op(a, b, **kwargs) if live(a) else constant(op, a, b, **kwargs)


def substitution(op: Callable[..., Any], a: Tensor, b: Tensor, **options: Any) -> Any:
    """a x = b with a triangular, as in the delta rule: x_i = (b_i - sum_j a_ij x_j) / a_ii, step by step.

    A step is a sum (eq. 8) of products (prop. 3.2: half to a_ij, half to x_j) over a constant denominator
    (prop. 3.4); all steps at once, in closed form. Conserves, where the plain gradient would sum to 0. With b
    constant, so is x.
    """
    if not live(b):
        return constant(op, a, b, **options)
    if not options.pop("left", True):
        return substitution(op, a.mT, b.mT, **options | {"upper": not options["upper"]}).mT
    return Substitution.on(a, b, op, options)


def attention_shares(rules: Rules) -> Callable[[bool, bool, bool, bool], tuple[float, float, float, float]] | None:
    """What a fused attention kernel does under `rules`, as factors on the gradients at its inputs.

    Matmul, softmax, matmul under the rules equal the plain gradient of the kernel with queries and keys / 4 and
    values / 2 (Arras et al., arXiv 2502.15886). Returns the factors (query, key, value, mask) as a function
    of which of them are live, or None where the kernel must be taken apart.
    """
    softmax, matmul = rules.get("softmax", gradient), rules.get("matmul", gradient)
    if softmax is gradient and matmul is gradient:
        return lambda q, k, v, m: (1.0, 1.0, 1.0, 1.0)
    if softmax is constant and matmul in (uniform, gradient):
        return lambda q, k, v, m: (0.0, 0.0, 1.0, 0.0)
    if softmax is gradient and matmul is uniform:
        return _quarters
    return None


def _quarters(query: bool, key: bool, value: bool, mask: bool) -> tuple[float, float, float, float]:
    outer = 0.5 if value and (query or key or mask) else 1.0
    inner = 0.5 * outer if query and key else outer
    return inner, inner, outer, outer


# --- closed forms of f(x)/x -------------------------------------------------------------------------------------


def gelu_ratio(x: Tensor, approximate: str = "none") -> Tensor:
    """Phi(x), or its tanh approximation."""
    # in place, in one tensor: fresh memory costs more than what is computed in it
    if approximate == "tanh":
        inner = (x * x).mul_(0.044715).add_(1).mul_(x).mul_(math.sqrt(2 / math.pi))
        return inner.tanh_().add_(1).mul_(0.5)
    return (x * -math.sqrt(0.5)).erfc_().mul_(0.5)


def quotient(op: Callable[..., Any]) -> Callable[..., Tensor]:
    """f(x)/x; at x = 0 its limit f'(0), taken at the smallest x for which f(x) = f'(0) x in floating point."""

    def ratio(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = torch.where(x == 0, 1e-30, x)
        return op(x, *args, **kwargs) / x  # type: ignore[no-any-return]

    return ratio


# --- the tables -------------------------------------------------------------------------------------------------

_GATES = (
    *("sigmoid", "hardsigmoid", "logsigmoid", "softplus"),
    *("exp", "exp2", "cos", "cosh", "erfc", "log", "log2"),
)
_QUOTIENTS = (
    *("activation", "tanh", "erf", "sin", "sinh", "asin", "asinh", "atan", "tan", "expm1", "log1p", "softsign"),
    *("elu", "selu", "celu", "relu6", "softshrink", "hardshrink", "tanhshrink"),
)
_STATISTICS = ("rsqrt", "reciprocal", "var", "std", "norm", "round", "floor", "ceil", "trunc", "sign")

ATTNLRP: Rules = {
    # eq. 8: gradient keeps the epsilon rule with epsilon 0; a table with epsilon(1e-6) here has it greater than 0
    "linear": gradient,
    "conv": gradient,
    # eq. 9
    "silu": identity(torch.sigmoid),
    "gelu": identity(gelu_ratio),
    "gelu_tanh": identity(lambda x: gelu_ratio(x, "tanh")),
    "quick_gelu": identity(lambda x: torch.sigmoid(1.702 * x)),
    "mish": identity(lambda x: torch.tanh(F.softplus(x))),
    "hardswish": identity(lambda x: F.relu6(x + 3) / 6),
    "square": square,
    "pow": power,
    "sqrt": root,
    "clamp": clip,
    "hardtanh": clip,
    **dict.fromkeys(_QUOTIENTS, identity()),
    **dict.fromkeys(_GATES, stabilised_identity()),
    # prop. 3.1
    "softmax": gradient,
    "log_softmax": gradient,
    "logsumexp": gradient,
    # prop. 3.2
    "mul": product,
    # prop. 3.3
    "matmul": uniform,
    "einsum": uniform,
    "addmm": uniform_after_first,
    "bilinear": uniform_pair,
    "solve_triangular": substitution,
    # prop. 3.4
    "div": constant_denominator,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    **dict.fromkeys(_STATISTICS, constant),
    # a loss that the model computes beside its logits is not explained
    "loss": constant,
}
"""The paper's rules."""

CP_LRP: Rules = {**ATTNLRP, "softmax": constant}
"""Ali et al., 2022: attention weights are constants; queries and keys get nothing, values everything."""

MAMBA_LRP: Rules = {
    **ATTNLRP,
    **dict.fromkeys(_GATES, constant),
    Layer("*.x_proj", optional=True): constant,
    Layer("*.x_proj_weight", optional=True): constant,
}
"""Jafari et al., 2024 (MambaLRP): gates, and what a projection gives as parameters of a state space, are constants."""

GRADIENT: Rules = {}
"""No rule at all: gradient x input."""

SOFTMAX_IDENTITY: Rules = {**ATTNLRP, "softmax": softmax_identity}
SOFTMAX_DISTRIBUTE: Rules = {**ATTNLRP, "softmax": softmax_distribute}
SOFTMAX_OMIT: Rules = {**ATTNLRP, "softmax": softmax_omit}
"""Appendix A.2.1: the bias of softmax does not absorb. Unstable: kept to reproduce the failure."""

ROLES: dict[str, tuple[str, ...]] = {
    "mlp": ("*.mlp.*", "*.intermediate.dense", "*.output.dense", "*.pwconv*"),
    "qkv": (*("*.q_proj", "*.k_proj", "*.v_proj", "*.query", "*.key", "*.value"), "*.qkv", "*.qkv_proj", "*.in_proj*"),
    "out": ("*.o_proj", "*.out_proj", "*attn.proj", "*attention.proj", "*attention.output.dense"),
    "head": ("classifier*", "*.classifier", "head*", "heads.*", "*visual_projection", "*text_projection"),
}
"""Role of a linear layer in a vision transformer -> its names in transformers, timm and torchvision; the last match
counts. Convolutions (the patch embedding) are a role of their own."""

SOFTMAX: dict[str, Rule] = {"attnlrp": gradient, "z+": softmax_positive, "cp": constant}
"""What can be done at the softmax of attention in a vision transformer."""


def composite(
    *,
    conv: float = 0.0,
    mlp: float = 0.0,
    qkv: float = 0.0,
    out: float = 0.0,
    head: float = 0.0,
    attention: str = "attnlrp",
) -> Rules:
    """A table for a vision transformer: gamma for convolutions and for the linear layers of each role.

    Args:
        conv: gamma of convolutions, such as the patch embedding; 0 for the rule of ATTNLRP, here and below.
        mlp: gamma of the linear layers of an MLP.
        qkv: gamma of the projections to queries, keys and values.
        out: gamma of the projection behind attention.
        head: gamma of the classifier.
        attention: softmax by "attnlrp" (prop. 3.1), "z+" (its positive part) or "cp" (attention weights constant).
    """
    values = {"mlp": mlp, "qkv": qkv, "out": out, "head": head}
    rules = {role: gamma(value) if value else gradient for role, value in values.items()}
    linear = {Layer(p, optional=True): rules[role] for role, patterns in ROLES.items() for p in patterns}
    return {**ATTNLRP, "conv": gamma(conv) if conv else gradient, "softmax": SOFTMAX[attention], **linear}


VIT: Rules = composite(conv=0.25, mlp=0.05)
VIT_CP: Rules = composite(conv=0.25, mlp=0.05, attention="cp")
"""The paper's best composite for vision transformers (appendix B), and the same with constant attention weights."""

VIT_DINOV2: Rules = composite(mlp=0.1, qkv=0.05, attention="z+")
"""Found by `search_gamma` for DINOv2 ViT-S/14 on 24 training images of ten classes (benchmarks/results/gammas.json)."""

PRESETS: dict[str, Rules] = {
    "attnlrp": ATTNLRP,
    "cp-lrp": CP_LRP,
    "mamba-lrp": MAMBA_LRP,
    "vit": VIT,
    "vit-cp": VIT_CP,
    "vit-dinov2": VIT_DINOV2,
    "gradient": GRADIENT,
    "softmax-identity": SOFTMAX_IDENTITY,
    "softmax-distribute": SOFTMAX_DISTRIBUTE,
    "softmax-omit": SOFTMAX_OMIT,
}

"""One name for every spelling of an operation, and the operations that need no rule.

PyTorch shows each call as the function that was written: `a * b`, `a.mul(b)`, `torch.mul(a, b)` and `a *= b` are four
functions. `OPERATIONS` maps each of them to one `Operation`, whose `name` is the row to look up in a table of rules.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["COMPOSITES", "NEUTRAL", "OPERATIONS", "PASSED", "VIEWS", "Operation", "find"]


class Operation(NamedTuple):
    """What a function of PyTorch is, under any spelling.

    Args:
        name: canonical name, the key in a table of rules.
        call: the same computation, out of place and with operands in canonical order.
        in_place: whether the function writes its result into its first argument.
        swapped: whether the function takes its two operands in the other order, as `x.__rtruediv__(2)` does.
    """

    name: str
    call: Callable[..., Any]
    in_place: bool = False
    swapped: bool = False


# canonical name -> other names of the same operation, in any of the namespaces below
RULED: dict[str, tuple[str, ...]] = {
    "linear": (),
    "conv": ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"),
    "silu": (),
    "gelu": (),
    "mish": (),
    "hardswish": (),
    "square": (),
    "pow": ("__pow__",),
    "clamp": ("clip", "clamp_min", "clamp_max"),
    "tanh": (),
    "erf": (),
    "sin": (),
    "sinh": (),
    "asin": ("arcsin",),
    "asinh": ("arcsinh",),
    "atan": ("arctan",),
    "tan": (),
    "expm1": (),
    "log1p": (),
    "softsign": (),
    "elu": (),
    "selu": (),
    "celu": (),
    "relu6": (),
    "hardtanh": (),
    "softshrink": (),
    "hardshrink": (),
    "tanhshrink": (),
    "sigmoid": ("expit",),
    "hardsigmoid": (),
    "logsigmoid": (),
    "softplus": (),
    "exp": (),
    "exp2": (),
    "cos": (),
    "cosh": (),
    "erfc": (),
    "log": (),
    "log2": (),
    "sqrt": (),
    "softmax": ("_safe_softmax",),
    "log_softmax": (),
    "logsumexp": (),
    "mul": ("multiply", "__mul__", "__rmul__"),
    "matmul": ("bmm", "mm", "mv", "dot", "inner", "vdot", "__matmul__", "_grouped_mm", "grouped_mm"),
    "einsum": ("tensordot", "outer", "ger", "kron"),
    "addmm": ("addbmm", "baddbmm", "addmv", "addr", "addcmul"),
    "bilinear": (),
    "solve_triangular": (),
    "div": ("divide", "true_divide", "__div__", "__truediv__"),
    "layer_norm": (),
    "rms_norm": (),
    "group_norm": (),
    "batch_norm": (),
    "instance_norm": (),
    "rsqrt": (),
    "reciprocal": (),
    "var": (),
    "std": (),
    "norm": ("vector_norm",),
    "round": (),
    "floor": (),
    "ceil": (),
    "trunc": ("fix",),
    "sign": ("sgn",),
    "loss": (
        *("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "ctc_loss"),
        *("binary_cross_entropy", "binary_cross_entropy_with_logits", "cosine_embedding_loss"),
    ),
}

VIEWS = frozenset(
    "T mT H mH real imag data __getitem__ as_strided atleast_1d atleast_2d atleast_3d adjoint broadcast_tensors "
    "broadcast_to chunk contiguous detach diagonal expand expand_as flatten movedim moveaxis narrow permute ravel "
    "reshape reshape_as select split split_with_sizes squeeze swapaxes swapdims t tensor_split dsplit hsplit vsplit "
    "transpose unbind unflatten unfold unsqueeze view view_as view_as_complex view_as_real "
    "numpy tolist item resolve_conj resolve_neg __iter__".split()
)
"""Neutral operations that only rearrange values."""

NEUTRAL = VIEWS | frozenset(
    # linear in their live inputs
    "__add__ __radd__ __sub__ add sub subtract neg negative positive sum mean nansum nanmean cumsum "
    "cat concat concatenate stack hstack vstack dstack column_stack row_stack block_diag "
    "diag diag_embed diagonal_scatter diagflat trace tril triu flip fliplr flipud roll rot90 repeat repeat_interleave "
    "tile pad constant_pad_nd fold im2col col2im pixel_shuffle pixel_unshuffle native_channel_shuffle channel_shuffle "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d lp_pool1d lp_pool2d "
    "interpolate upsample upsample_bilinear upsample_nearest grid_sample affine_grid "
    "embedding embedding_bag one_hot clone to type type_as float double half bfloat16 cpu cuda conj "
    "copy_ fill_ zero_ __setitem__ index_select index_add index_copy index_fill index_put index_reduce gather take "
    "take_along_dim masked_fill masked_scatter masked_select scatter scatter_add scatter_reduce select_scatter "
    "slice_scatter put where nan_to_num dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout "
    "feature_dropout fft ifft fft2 ifft2 fftn ifftn rfft irfft rfftn irfftn "
    "rfft2 irfft2 fftshift ifftshift complex pin_memory unsafe_chunk unsafe_split meshgrid "
    # selections: homogeneous, and linear in what they select
    "relu leaky_relu prelu rrelu threshold abs absolute max min amax amin aminmax maximum minimum fmax fmin topk sort "
    "msort kthvalue median nanmedian mode cummax cummin max_pool1d max_pool2d max_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d max_unpool1d max_unpool2d max_unpool3d".split()
)
"""Operations whose plain gradient is the rule: eq. 8 with epsilon = 0."""


# --- forms that are written differently from what they compute -----------------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float | int = 0.0,
    is_causal: bool = False,
    scale: float | int | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query key^T * scale + mask) value, operation by operation; a row without any key gives 0."""
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    empty = torch.isneginf(scores.detach()).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)
    output: Tensor = F.dropout(weights, dropout_p) @ value
    return output


def lerp(start: Tensor, end: Tensor, weight: Any) -> Tensor:
    """start + weight * (end - start)."""
    result: Tensor = start + weight * (end - start)
    return result


def addcdiv(first: Tensor, numerator: Tensor, denominator: Tensor, *, value: float | int = 1) -> Tensor:
    """first + value * numerator / denominator."""
    return first + value * (numerator / denominator)


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """a * sigmoid(b) for the halves a, b of x."""
    a, b = x.chunk(2, dim)
    return a * torch.sigmoid(b)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """x1 . x2 / (|x1| |x2|)."""
    norms = [torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp(min=eps) for x in (x1, x2)]
    product: Tensor = (x1 / norms[0]) * (x2 / norms[1])
    return product.sum(dim)


def _without_override_check(function: Any) -> Callable[..., Any]:
    """The Python body of a torch function, entered without asking for overrides again.

    Inside the body every operation is seen one by one, so that a composite needs no copy of its code here.
    """
    globals_ = dict(function.__globals__)
    for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
        globals_[name] = lambda *_: False
    opened = types.FunctionType(
        function.__code__, globals_, function.__name__, function.__defaults__, function.__closure__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


COMPOSITES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    torch.lerp: lerp,
    Tensor.lerp: lerp,
    Tensor.lerp_: lambda x, *a, **k: x.copy_(lerp(x.clone(), *a, **k)),
    torch.addcdiv: addcdiv,
    Tensor.addcdiv: addcdiv,
    Tensor.addcdiv_: lambda x, *a, **k: x.copy_(addcdiv(x.clone(), *a, **k)),
    F.glu: glu,
    F.cosine_similarity: cosine_similarity,
    torch.cosine_similarity: cosine_similarity,
    torch.var_mean: lambda x, *a, **k: (x.var(*a, **k), _mean(x, *a, **k)),
    torch.std_mean: lambda x, *a, **k: (x.std(*a, **k), _mean(x, *a, **k)),
    # the functions behind those of torch.nn.functional take their operands in another order
    torch.batch_norm: lambda x, w, b, m, v, *a: F.batch_norm(x, m, v, w, b, *a[:3]),
    torch.instance_norm: lambda x, w, b, m, v, *a: F.instance_norm(x, m, v, w, b, *a[:3]),
    **{
        function: _without_override_check(function)
        for function in (F.multi_head_attention_forward, F.normalize, F.softmin)
    },
}
"""Functions that are taken apart into operations of the table."""


def _mean(x: Tensor, dim: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any) -> Tensor:
    return x.mean(dim, keepdim=keepdim)


PASSED: frozenset[Any] = frozenset(
    {Tensor.backward, torch.autograd.grad, torch.autograd.backward}
    | {Tensor.requires_grad_, Tensor.retain_grad, Tensor.register_hook}
)
"""Not computations: handed on untouched."""


# --- the table of spellings ---------------------------------------------------------------------------------------

_NAMESPACES = (torch, Tensor, F, torch.special, torch.linalg, torch.fft, torch._C._nn)
_REVERSED: dict[Any, tuple[str, Callable[..., Any]]] = {
    Tensor.__rdiv__: ("div", lambda a, b: Tensor.__rdiv__(b, a)),
    Tensor.__rpow__: ("pow", lambda a, b: Tensor.__rpow__(b, a)),
    Tensor.__rmatmul__: ("matmul", torch.matmul),
    Tensor.__rsub__: ("sub", lambda a, b: Tensor.__rsub__(b, a)),
    torch.rsub: ("sub", lambda a, b, **k: torch.rsub(b, a, **k)),
}


def _spellings() -> dict[Any, Operation]:
    table: dict[Any, Operation] = {}
    names = {alias: name for name, aliases in RULED.items() for alias in (name, *aliases)}
    names |= {name: name for name in NEUTRAL}
    for alias, name in names.items():
        for namespace in _NAMESPACES:
            _add(table, namespace, alias, name)
    for function, (name, call) in _REVERSED.items():
        table[function] = Operation(name, call, swapped=True)
    for function in COMPOSITES:
        table.pop(function, None)
    return table


def _add(table: dict[Any, Operation], namespace: Any, alias: str, name: str) -> None:
    function = getattr(namespace, alias, None)
    if hasattr(function, "__get__") and isinstance(function, (types.GetSetDescriptorType, property)):
        table[function.__get__] = Operation(name, function.__get__)  # an attribute such as x.mT
    elif callable(function):
        table[function] = Operation(name, function)
        if alias.startswith("__"):
            in_place = getattr(namespace, f"__i{alias[2:]}", None)
        else:
            in_place = getattr(namespace, alias if alias.endswith("_") else f"{alias}_", None)
        if callable(in_place) or alias == "__setitem__":
            table[in_place or function] = Operation(name, function, in_place=True)


OPERATIONS: dict[Any, Operation] = _spellings()


_FOREIGN = {"transformers.grouped_mm_fallback": "matmul"}
"""Operators of other libraries, by their qualified name."""


_IN_GRAPHS = {
    function.__name__: operation
    for function, operation in OPERATIONS.items()
    if isinstance(function, types.FunctionType) and function in _REVERSED
} | {"pow": OPERATIONS[torch.pow], "pow_": Operation("pow", torch.pow, in_place=True)}
"""Operators that Tensor writes in Python: while a graph is traced they equal no function but themselves."""


def find(function: Any) -> Operation | None:
    """The operation that a function is; operators such as `torch.ops.aten.mul` are found by their name."""
    in_graph = _IN_GRAPHS.get(getattr(function, "__name__", "")) if torch.compiler.is_compiling() else None
    operation = in_graph or OPERATIONS.get(function)
    if operation is None and isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        packet = getattr(function, "overloadpacket", function)
        namespace, _, name = str(packet).partition(".")
        known = OPERATIONS.get(getattr(torch, name.rstrip("_"), None)) if namespace == "aten" else None
        if str(packet) in _FOREIGN:
            return Operation(_FOREIGN[str(packet)], function)
        in_place = name.endswith("_")
        call = getattr(torch.ops.aten, name.rstrip("_")) if in_place else function
        operation = known and Operation(known.name, call, in_place)
    return operation

"""Units inside a model: the neurons of its MLPs and experts, and the heads of its attention.

One forward pass is followed operation by operation: a linear layer that reads what attention has put together is its
output projection, one that reads what an activation has let through is the last of an MLP. No name of a class is asked
for.
"""

from __future__ import annotations

import bisect
import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnlrp.activations import activation_forward, claim, is_written_out, release
from attnlrp.compiled import is_compiled
from attnlrp.errors import InputError, ModelError
from attnlrp.kernels import FLEX_ATTENTION
from attnlrp.operations import VIEWS, find
from attnlrp.targets import Head, Neuron

__all__ = [
    "PRODUCTS",
    "SUMS",
    "Kind",
    "Rows",
    "Site",
    "Taps",
    "Unit",
    "Weights",
    "blocks_of",
    "example_inputs",
    "find_sites",
    "resolve",
]

Kind: TypeAlias = Literal["neurons", "heads"]


class Rows(NamedTuple):
    """Which token each row of an expert's input belongs to.

    Args:
        tokens: index of the token (row,), counted over the whole batch.
        size: number of tokens in the batch.
    """

    tokens: Tensor
    size: int


Tap: TypeAlias = Callable[[Tensor, "Rows | None"], Tensor]
"""Units of a layer (..., width) and, for an expert, the tokens of its rows -> what is computed with instead."""

_ACTIVATIONS = frozenset(
    "silu gelu mish hardswish tanh erf softsign elu selu celu relu relu6 hardtanh sigmoid hardsigmoid softplus "
    "leaky_relu prelu threshold".split()
)
_KEEPS = VIEWS | frozenset(
    "dropout to type float double half bfloat16 clone masked_fill nan_to_num cat stack index_select gather where pad "
    "constant_pad_nd repeat_interleave repeat add sub neg mul div square pow layer_norm rms_norm "
    "group_norm".split()
)
SUMS = frozenset({"add", "sub", "__add__", "__radd__", "__sub__"})
PRODUCTS = frozenset({"linear", "addmm", "matmul", "einsum"})
_GATHERS = frozenset({"__getitem__", "index_select"})
_ATTENTION = frozenset({F.scaled_dot_product_attention, FLEX_ATTENTION})
_MADE, _ROWS = "_attnlrp_made", "_attnlrp_rows"


Unit: TypeAlias = "str | Neuron | Head"
"""A unit by its address, such as "layers.16.mlp:394"; `Neuron(16, 394)` where a layer has one MLP."""


@dataclass(frozen=True)
class Site:
    """Where the units of one layer are: the input of a linear layer.

    Args:
        name: stable address of the layer, such as "layers.16.mlp"; a unit of it is "layers.16.mlp:394".
        kind: "neurons" of an MLP or of one expert, or "heads" of an attention.
        weight: name of the weight that reads them, as in `model.named_parameters()`.
        units: number of units.
        width: numbers that the linear layer reads for each token; a head is several of them.
        expert: which slice of a weight of all experts; None for a weight of its own.
    """

    name: str
    kind: Kind
    weight: str
    units: int
    width: int
    expert: int | None = None

    @property
    def layer(self) -> int | None:
        """The first number in the address."""
        return next((int(part) for part in self.name.split(".") if part.isdecimal()), None)


def resolve(sites: Sequence[Site], unit: Unit) -> tuple[Site, int]:
    """The layer that a unit is in, and its index there.

    Raises:
        InputError: no such unit, or several layers of that number.
    """
    having = ""
    if isinstance(unit, str):
        name, _, index = unit.rpartition(":")
        found = [site for site in sites if site.name == name]
        number = int(index) if index.isdecimal() else -1
    else:
        kind = "neurons" if isinstance(unit, Neuron) else "heads"
        sites = [site for site in sites if site.kind == kind]
        found = [site for site in sites if unit.layer in (site.layer, site.name)]
        name, number, having = str(unit.layer), unit.index, f" with {kind}"
    if len(found) == 1 and 0 <= number < found[0].units:
        return found[0], number
    if len(found) == 1:
        raise InputError(f"unit {unit!r}: {found[0].name} has {found[0].kind} 0 to {found[0].units - 1}")
    names = [site.name for site in found or sites]
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.3) or names[:4]
    called = f"{len(found)} layers{having} are" if found else f"no layer{having} is"
    expected = ", ".join(f"{n}:0" for n in near)
    raise InputError(f"unit {unit!r}: {called} called {name}; expected an address such as {expected}")


def find_sites(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Site, ...]:
    """The neurons and heads of every layer, in the order of computation.

    Args:
        model: any module.
        inputs: keyword inputs of one forward pass, which is run without gradients.

    Raises:
        ModelError: the model computes no units in a sequence of layers, or hides them.
    """
    if is_compiled(model):
        raise ModelError(f"{type(model).__name__} is compiled, which hides its units: use the module that was compiled")
    activations = list(filter(is_written_out, model.modules()))
    claim(activations)
    hooks = [m.register_forward_pre_hook(_forget, with_kwargs=True) for m in _layers_of(model)]
    try:
        with torch.no_grad(), _Follow(model) as followed:
            model(**inputs)
    finally:
        release(activations)
        for hook in hooks:
            hook.remove()
    read = {r.weight: r for r in followed.read if any(part.isdecimal() for part in r.weight.split("."))}
    if not read:
        raise ModelError(
            f"{type(model).__name__}: found neither neurons nor heads; expected layers whose linear layers read an "
            "activation or attention"
        )
    read = _with_siblings(read, dict(model.named_parameters(remove_duplicate=False)))
    names = _addresses(read)
    last = {names[r.weight]: r for r in read.values()}  # of several in one module the last
    return tuple(site for name, r in last.items() for site in _sites(name, r))


def _layers_of(model: nn.Module) -> list[nn.Module]:
    """The members of lists that are more than one operation."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    return list({id(member): member for m in lists for member in m if list(member.children())}.values())


def _forget(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What a layer is given is the residual stream, even if an activation has made it, as behind an embedding."""
    for tensor in _tensors((*args, *kwargs.values())):
        if hasattr(tensor, _MADE):
            delattr(tensor, _MADE)


class _Read(NamedTuple):
    """A linear layer that has read units; `experts` if its weight holds that many of them."""

    kind: Kind
    weight: str
    units: int
    width: int
    experts: int | None


def _sites(name: str, r: _Read) -> list[Site]:
    if r.experts is None:
        return [Site(name, r.kind, r.weight, r.units, r.width)]
    return [Site(f"{name}.{k}", r.kind, r.weight, r.units, r.width, k) for k in range(r.experts)]


def _with_siblings(read: dict[str, _Read], parameters: Mapping[str, Tensor]) -> dict[str, _Read]:
    """Experts that no token has come to: weights of the same name but for the expert's number."""
    result: dict[str, _Read] = {}
    for weight, r in read.items():
        pattern = re.compile(re.sub(r"(?<=experts\.)\d+", r"\\d+", re.escape(weight).replace(r"\.", ".")))
        shape = parameters[weight].shape
        for name in [n for n, p in parameters.items() if pattern.fullmatch(n) and p.shape == shape]:
            result.setdefault(name, r._replace(weight=name))
    return result


class Weights:
    """The parameters of a model by where they lie in memory."""

    def __init__(self, model: nn.Module) -> None:
        spans = {p.data_ptr(): (n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.numel()}
        self._starts = sorted(spans)
        self._spans = [spans[start] for start in self._starts]

    def find(self, tensor: Any) -> tuple[str, Tensor, int] | None:
        """Name of the parameter that a tensor is, or is a view of; the parameter; and where in it the tensor starts."""
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
            return None
        at = tensor.data_ptr()
        k = bisect.bisect_right(self._starts, at) - 1
        if k < 0 or at >= self._starts[k] + self._spans[k][1].numel() * self._spans[k][1].element_size():
            return None
        return (*self._spans[k], (at - self._starts[k]) // tensor.element_size())


class _Made(NamedTuple):
    """What a tensor was made by: attention weights, attention (size of a head), or an activation."""

    kind: Literal["weights", "heads", "neurons"]
    size: int = 1


class _Follow(TorchFunctionMode):
    """Notes on each tensor what has made it, and which weights read units."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.read: list[_Read] = []
        self._weights = Weights(model)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = self._made(func, list(_tensors((*args, *(kwargs or {}).values()))), result)
        if made is not None:
            for tensor in _tensors((result,)):
                setattr(tensor, _MADE, made)
        return result

    def _made(self, func: Callable[..., Any], given: list[Tensor], result: Any) -> _Made | None:
        operation = find(func)
        name = "" if operation is None else operation.name
        before = [made for t in given if (made := getattr(t, _MADE, None)) is not None]
        strongest = next((m for kind in ("heads", "weights", "neurons") for m in before if m.kind == kind), None)
        if func in _ATTENTION:
            return _Made("heads", given[2].shape[-1])
        if name == "softmax":
            return _Made("weights")
        if name in PRODUCTS:
            return self._product(name, given, result, strongest)
        if name in _ACTIVATIONS or func is activation_forward:
            return strongest or _Made("neurons")
        if name in SUMS and any(self._is_stream(t) for t in given):
            return None
        if name in _GATHERS:
            self._refuse_gathered(given, result)
        return strongest if name in _KEEPS else None

    def _product(self, product: str, given: list[Tensor], result: Any, made: _Made | None) -> _Made | None:
        weight = next((found for t in given if t.dim() > 1 and (found := self._weights.find(t)) is not None), None)
        if weight is None:
            return _Made("heads", result.shape[-1]) if made is not None and made.kind == "weights" else None
        name, parameter, _ = weight
        if made is not None and made.kind != "weights" and (parameter.dim() == 2 or product != "einsum"):
            width = next((t.shape[-1] for t in given if self._weights.find(t) is None and t.dim() > 1), 0)
            if width and width % made.size == 0:
                kind: Kind = "heads" if made.kind == "heads" else "neurons"
                experts = len(parameter) if parameter.dim() == 3 else None
                self.read.append(_Read(kind, name, width // made.size, width, experts))
        return None

    def _is_stream(self, tensor: Tensor) -> bool:
        """Whether a term of a sum is made by something else: then the sum is a residual stream, and no units."""
        return getattr(tensor, _MADE, None) is None and tensor.dim() > 1 and self._weights.find(tensor) is None

    def _refuse_gathered(self, given: list[Tensor], result: Any) -> None:
        found = self._weights.find(given[0]) if given else None
        if found is None or found[1].dim() != 3 or not isinstance(result, Tensor) or result.dim() != 3:
            return
        if self._weights.find(result) is None:
            raise ModelError(
                f"{found[0]}: each token's copy of its expert hides the neurons (batched_mm); use "
                "model.set_experts_implementation('grouped_mm') or 'eager'"
            )


class Taps(TorchFunctionMode):
    """Hands what the units of layers are to functions, which give back what is computed with instead.

    Args:
        model: whose layers they are.
        taps: layer -> what to do with its units.
    """

    def __init__(self, model: nn.Module, taps: Mapping[Site, Tap]) -> None:
        super().__init__()
        self._weights = Weights(model)
        self._taps: dict[str, dict[int | None, Tap]] = {}
        for site, tap in taps.items():
            self._taps.setdefault(site.weight, {})[site.expert] = tap
        self._follows_rows = any(site.expert is not None or ".experts." in site.name for site in taps)
        self._acts = False  # a mode that was entered twice is asked twice

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = find(func)
        name = "" if operation is None else operation.name
        if self._acts or not (name or func is activation_forward):
            return func(*args, **kwargs)
        if name in PRODUCTS:
            args = self._tapped(args, kwargs)
        self._acts = True
        try:
            result = func(*args, **kwargs)
        finally:
            self._acts = False
        if self._follows_rows:
            for part in _tensors((result,)):
                rows = _rows(name, args, part)
                if rows is not None:
                    setattr(part, _ROWS, rows)
        return result

    def _tapped(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Arguments of a product, with the input of a tapped layer replaced: the one tensor that is no weight."""
        found = [self._weights.find(v) for v in args]
        weight = next((f for f in (*found, self._weights.find(kwargs.get("weight"))) if f and f[0] in self._taps), None)
        at = next((k for k, v in enumerate(args) if isinstance(v, Tensor) and v.dim() > 1 and not found[k]), None)
        if weight is None or at is None:
            return args
        tapped = _through(self._taps[weight[0]], args[at], weight, kwargs.get("offs"))
        return (*args[:at], tapped, *args[at + 1 :])


def _through(taps: Mapping[int | None, Tap], x: Tensor, weight: tuple[str, Tensor, int], offsets: Any) -> Tensor:
    """The units of a layer, or of each of its experts, through their taps."""
    _, parameter, start = weight
    rows = getattr(x, _ROWS, None)
    if None in taps:
        return taps[None](x, rows)
    if offsets is None and x.dim() == 2:  # one expert at a time
        expert = start // parameter.stride(0)
        return taps[expert](x, rows) if expert in taps else x
    if offsets is None:  # (expert, token, neuron)
        every = Rows(torch.arange(x.shape[1], device=x.device), x.shape[1])
        return torch.stack([taps[k](part, every) if k in taps else part for k, part in enumerate(x)])
    bounds = [0, *offsets.tolist()]
    spans = list(itertools.pairwise(bounds))
    parts = [x[a:b] for a, b in spans]
    own = [None if rows is None else Rows(rows.tokens[a:b], rows.size) for a, b in spans]
    tapped = [taps[k](p, o) if k in taps and len(p) else p for k, (p, o) in enumerate(zip(parts, own, strict=True))]
    return torch.cat([*tapped, x[bounds[-1] :]])


def _rows(name: str, args: tuple[Any, ...], result: Tensor) -> Rows | None:
    """Which token each row of a result belongs to, once tokens were gathered for an expert."""
    source = next((v for v in args if isinstance(v, Tensor) and v.is_floating_point()), None)
    if source is None or result.dim() < 2:
        return None
    before: Rows | None = getattr(source, _ROWS, None)
    if name in _GATHERS and source.dim() == 2:
        index = next((v for v in args[1:] if isinstance(v, Tensor) and v.dtype == torch.int64 and v.dim() == 1), None)
        if index is not None:
            return Rows(index, len(source)) if before is None else Rows(before.tokens[index], before.size)
    return before if before is not None and len(before.tokens) == len(result) else None


def blocks_of(model: nn.Module, sites: Sequence[Site]) -> dict[str, nn.Module]:
    """The layers of a model by their addresses: the smallest modules of a list that hold both heads and neurons.

    Where a layer has one of them only, it is the outermost of a list that holds it.
    """
    modules = dict(model.named_modules())
    paths = {site.weight: _numbered(site.weight) for site in sites}
    by_kind = {kind: {p for s in sites if s.kind == kind for p in paths[s.weight]} for kind in ("heads", "neurons")}
    both = by_kind["heads"] & by_kind["neurons"]
    found: dict[str, nn.Module] = {}
    for site in sites:
        shared = [path for path in paths[site.weight] if path in both]
        path = shared[-1] if shared else paths[site.weight][0]
        found[path[site.weight.index(".".join(site.name.split(".")[:2])) :]] = modules[path]
    return found


def example_inputs(model: Any) -> dict[str, Tensor]:
    """The inputs of a small pass through a model of `transformers` that reads tokens or pixels.

    Raises:
        ModelError: it reads something else.
    """
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or name not in ("input_ids", "pixel_values"):
        raise ModelError(f"{type(model).__name__} reads {name}: pass inputs=, the keyword inputs of one pass")
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size if isinstance(vision.image_size, (list, tuple)) else [vision.image_size] * 2
        return {name: torch.zeros(1, getattr(vision, "num_channels", 3), *size, dtype=model.dtype, device=model.device)}
    ids = torch.arange(4, device=model.device)[None] % config.get_text_config().vocab_size
    return {name: ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {name: ids}


def _numbered(weight: str) -> list[str]:
    """The paths that lead to a weight and end in a number, shortest first."""
    parts = weight.split(".")
    return [".".join(parts[: k + 1]) for k, part in enumerate(parts) if part.isdecimal()]


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _addresses(read: Mapping[str, _Read]) -> dict[str, str]:
    """Names of layers: paths of the modules that hold the linear layers, without what all of them begin with.

    Where the same module holds neurons and heads, the neurons are called by their linear layer.
    """
    paths = {}
    for weight, r in read.items():
        parts = weight.split(".")[:-1]
        outer = parts[:-1]
        whole = r.experts is not None or not any(part.isdecimal() for part in outer) or outer[-1].isdecimal()
        paths[weight] = parts if whole else outer
    heads = [path for weight, path in paths.items() if read[weight].kind == "heads"]
    for weight, path in paths.items():
        if read[weight].kind == "neurons" and path in heads:
            paths[weight] = weight.split(".")[:-1]
    starts = [p[: max(0, next(k for k, part in enumerate(p) if part.isdecimal()) - 1)] for p in paths.values()]
    common = 0
    while all(len(s) > common for s in starts) and len({s[common] for s in starts}) == 1:
        common += 1
    return {weight: ".".join(parts[common:]) for weight, parts in paths.items()}

"""`audit`: proof that every unit of relevance is accounted for, operation by operation.

    target = relevance on inputs + absorbed by biases, softmax, constants and the stabiliser

Each operation is entered twice: relevance that arrives at its outputs, relevance that it hands to its live inputs.
The difference is compared with what the operation may absorb, which is computed from the operation
alone: for a map that is affine in its live inputs, its value at zero times the gradient. What remains is a leak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnlrp.activations import activation_forward, activation_name
from attnlrp.backward import RuleFunction, live
from attnlrp.engine import OnUnknown, Propagation, module_path, write
from attnlrp.errors import InputError
from attnlrp.operations import COMPOSITES, VIEWS, Operation, find
from attnlrp.rules import ATTNLRP, Rules, epsilon, gradient, power, softmax_positive, stabilised_identity
from attnlrp.signed import alpha_beta, gamma

__all__ = ["ABSORBERS", "Entry", "Ledger", "audit"]

ABSORBERS = ("bias", "softmax", "constant", "stabiliser")
_NORMS = frozenset({"layer_norm", "group_norm", "batch_norm", "instance_norm"})
_AFFINE = _NORMS | {"addmm", "bilinear"}  # given their statistics
_BIASED = _AFFINE | {"linear", "conv"}
_NO_OFFSET = frozenset({"softmax", "log_softmax", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"})
_GROUPED = frozenset({torch._grouped_mm, F.grouped_mm})  # the kernel has no float64
_CASTS = frozenset({"to", "float", "half", "bfloat16", "type", "type_as"})
_REMAINDERS = {"logsumexp": "softmax"} | dict.fromkeys(
    ("clamp", "hardtanh", "maximum", "minimum", "max", "min", "fmax", "fmin", "threshold"), "constant"
)


@dataclass
class Entry:
    """One executed operation.

    Args:
        operation: canonical name.
        module: path of the module whose code ran it.
        received: relevance at its outputs.
        passed: relevance handed to its live inputs.
        absorbed: relevance kept, by absorber.
        remainder: absorber that is declared to keep whatever is left, for operations without a closed form of it.
    """

    operation: str
    module: str
    received: float = 0.0
    passed: float = 0.0
    absorbed: dict[str, float] = field(default_factory=dict)
    remainder: str | None = None

    @property
    def leak(self) -> float:
        """Relevance that no declared absorber explains."""
        return self.received - self.passed - sum(self.absorbed.values())

    def absorb(self, kind: str, amount: float) -> None:
        """Add to what an absorber keeps."""
        self.absorbed[kind] = self.absorbed.get(kind, 0.0) + amount


@dataclass(frozen=True)
class Ledger:
    """The account of one explanation. Unit: relevance; 64-bit sums.

    Args:
        target: the explained scalar.
        inputs: relevance that reached each explained input.
        entries: the operations, in order of execution.
        dtype: precision of the forward pass.
    """

    target: float
    inputs: dict[str, float]
    entries: tuple[Entry, ...]
    dtype: torch.dtype

    @property
    def absorbed(self) -> dict[str, float]:
        """Totals by absorber."""
        return {kind: sum((e.absorbed.get(kind, 0.0) for e in self.entries), 0.0) for kind in ABSORBERS}

    @property
    def error(self) -> float:
        """|target - inputs - absorbed| / |target|."""
        rest = self.target - sum(self.inputs.values()) - sum(self.absorbed.values())
        return abs(rest) / max(abs(self.target), torch.finfo(torch.float64).tiny)

    @property
    def tolerance(self) -> float:
        """Relative error that rounding explains: 1e-9 in float64, 1e-4 in float32, 5e-2 below."""
        return {torch.float64: 1e-9, torch.float32: 1e-4}.get(self.dtype, 5e-2)

    @property
    def scale(self) -> float:
        """The largest relevance in the account, to which rounding errors are compared."""
        return max([abs(self.target), *(abs(e.received) for e in self.entries)])

    def leaks(self) -> list[Entry]:
        """The operations that create or lose relevance without a declared absorber, largest leak first."""
        leaking = [e for e in self.entries if not abs(e.leak) <= self.tolerance * self.scale]
        return sorted(leaking, key=lambda e: -abs(e.leak))

    @property
    def closes(self) -> bool:
        """Whether everything is accounted for."""
        return self.error <= self.tolerance * self.scale / max(abs(self.target), 1e-300) and not self.leaks()

    def by_operation(self) -> list[Entry]:
        """Sums over the entries of one operation."""
        return _grouped(self.entries, lambda e: (e.operation, ""))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to JSON; entries of the same operation and module are summed."""
        entries = _grouped(self.entries, lambda e: (e.operation, e.module))
        return {
            "target": self.target,
            "inputs": self.inputs,
            "absorbed": self.absorbed,
            "error": self.error,
            "closes": self.closes,
            "leaks": [vars(e) | {"leak": e.leak} for e in self.leaks()],
            "entries": [vars(e) | {"leak": e.leak} for e in entries],
        }

    def by_module(self, depth: int | None = None) -> list[Entry]:
        """Sums over the entries of one module; `depth` joins what lies below that many path parts."""
        return _grouped(self.entries, lambda e: ("", ".".join(e.module.split(" ")[0].split(".")[:depth])))


def audit(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    target: Callable[[Any], Tensor] | None = None,
    rules: Rules = ATTNLRP,
    on_unknown: OnUnknown = "error",
) -> Ledger:
    """Run one explanation with every operation on the books.

    Args:
        model: any module; its parameters are not touched.
        inputs: keyword arguments of its forward. Floating-point tensors are explained inputs, except masks;
            so are the embeddings of token indices.
        target: output -> the explained scalar; default: the largest logit of the first row at the last position.
        rules: the table to audit.
        on_unknown: as for `propagate`.

    Returns:
        The ledger. `closes` tells whether it balances, `leaks()` names what does not.

    Raises:
        InputError: the target is not one number, or does not depend on the inputs.
    """
    leaves, arguments = {}, dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name:
            leaves[name] = arguments[name] = value.detach().clone().requires_grad_()
    books = _Bookkeeping(model, rules, on_unknown=on_unknown)
    with torch.enable_grad(), books:
        explained = (target or largest_logit)(model(**arguments))
    if explained.numel() != 1 or not explained.requires_grad:
        raise InputError(
            f"audit: the target has shape {tuple(explained.shape)} and does {'' if explained.requires_grad else 'not '}"
            "depend on the inputs; expected one number that does: pass target=function of the model's output"
        )
    leaves |= {f"embeddings {k}" if k else "embeddings": x for k, (_, x) in enumerate(books.embeddings)}
    wanted = [*leaves.values(), *books.created]
    grads = torch.autograd.grad(explained.sum(), wanted, allow_unused=True)
    for x, grad in zip(wanted[len(leaves) :], grads[len(leaves) :], strict=True):
        own = 0.0 if grad is None else _dot(x, grad)
        books.entries.append(Entry("requires_grad_", "", own, absorbed={"constant": own}))
    for entry in books.entries:
        if entry.remainder:
            entry.absorb(entry.remainder, entry.leak)
    reached = {n: 0.0 if g is None else _dot(x, g) for (n, x), g in zip(leaves.items(), grads, strict=False)}
    return Ledger(explained.double().item(), reached, tuple(books.entries), explained.dtype)


def largest_logit(output: Any) -> Tensor:
    """The largest logit of the first row, at the last position if there are positions."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits if hasattr(output, "logits") else output[0]
    return logits[0].reshape(-1, logits.shape[-1])[-1].max()


class _Bookkeeping(Propagation):
    """Propagation that enters every operation into the ledger.

    A float64 model stays in float64 also where its code asks for float32 (most normalisations do), so that its books
    close to rounding in float64.
    """

    def __init__(self, model: nn.Module, rules: Rules, *, on_unknown: OnUnknown) -> None:
        super().__init__(model, rules, on_unknown=on_unknown)
        self.entries: list[Entry] = []
        self.created: list[Tensor] = []  # leaves that the model makes itself: constants, though they take gradients
        self._shares = None  # fused attention is taken apart, so that its softmax has an entry

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.requires_grad_ and not args[0].requires_grad:
            self.created.append(args[0])
        operation = find(func)
        if operation and operation.name in _CASTS and args[0].dtype == torch.float64 and torch.is_grad_enabled():
            with torch.no_grad():
                cast = func(*args, **(kwargs or {}))
            if isinstance(cast, Tensor) and cast.is_floating_point():
                return args[0].to(cast.device)
        return super().__torch_function__(func, types, args, kwargs)

    def _apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operation = Operation(activation_name(args[0]), func) if func is activation_forward else find(func)
        if (func in COMPOSITES and self.rules) or (operation and operation.name in VIEWS):
            return super()._apply(func, args, kwargs)
        if func in _GROUPED and args[0].dtype == torch.float64:
            with self._resumed():
                return grouped_matmul(*args, **kwargs)
        name = operation.name if operation else getattr(func, "__name__", str(func))
        if "dtype" in kwargs and name != "to" and _tensors(args)[0].dtype == torch.float64:
            kwargs = kwargs | {"dtype": torch.float64}
        entry = Entry(name, module_path(self.model), remainder=_REMAINDERS.get(name))
        self.entries.append(entry)
        target = args[0] if operation and operation.in_place else None
        offsets = self._offsets(entry, func, args, kwargs)
        logits = next((t.detach() for t in _tensors(args, kwargs) if live(t)), None) if "softmax" in name else None
        args, kwargs = _mapped((args, kwargs), lambda x: _Probe.on(x, entry) if live(x) else x)
        if target is not None and not live(target):
            args = (target.clone(), *args[1:])
        result = super()._apply(func, args, kwargs)
        outputs = _tensors(args[0] if target is not None else result)
        dim = kwargs.get("dim", next((a for a in args if type(a) is int), None))
        for k, output in enumerate(outputs):
            if live(output):
                self._watch(entry, output, offsets[k] if offsets else None, logits, dim)
        return result if target is None else write(target, args[0])

    def _rule(self, func: Any, name: str) -> Any:
        return self.rules.get(func) or self.rules.get(name, gradient)

    def _offsets(self, entry: Entry, func: Any, args: Any, kwargs: Any) -> list[Tensor] | None:
        """What an operation gives if its live inputs are 0: the constant part of an affine map."""
        layer = self._layers.find(entry.operation, args, kwargs) if self._layers else None
        rule = layer or self._rule(func, entry.operation)
        if rule is power or isinstance(rule, (epsilon, stabilised_identity)):
            entry.remainder = "stabiliser"
        if rule is softmax_positive:
            entry.remainder = "softmax"
        if isinstance(rule, alpha_beta):
            entry.remainder = "bias"
        if isinstance(rule, gamma):
            with torch.no_grad():
                return [rule.constant_part(func, *args, **kwargs)]
        if not (rule is gradient or entry.operation in _AFFINE) or entry.remainder or entry.operation in _NO_OFFSET:
            return None
        with torch.no_grad():
            args, kwargs = _mapped((args, kwargs), lambda x: torch.zeros_like(x) if live(x) else x.clone())
            result = func(*args, **kwargs)
        return _tensors(args[0] if result is None else result)

    def _watch(self, entry: Entry, output: Tensor, offset: Tensor | None, logits: Tensor | None, dim: Any) -> None:
        value = output.detach().clone()
        plain = self._rule(None, entry.operation) is gradient
        kind = "bias" if entry.operation in _BIASED else "constant"

        def enter(grad: Tensor) -> None:
            received = _dot(value, grad)
            entry.received += received
            if logits is not None and plain:
                entry.absorb("softmax", received - _passed_by_softmax(entry.operation, logits, value, grad, dim))
            elif offset is not None:
                amount = _dot(offset, grad)
                if amount:
                    entry.absorb(kind, amount)

        output.register_hook(enter)


class _Probe(RuleFunction):
    """A fresh copy of one input of one operation; on the way back it notes the relevance handed to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, entry: Entry) -> Tensor:
        ctx.save_for_backward(x.clone())
        ctx.entry = entry
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.entry.passed += _dot(ctx.saved_tensors[0], grad)
        return grad, None


def grouped_matmul(x: Tensor, weights: Tensor, *, offs: Tensor, **_: Any) -> Tensor:
    """Rows of x up to each offset times the weights of that group."""
    bounds = [0, *offs.tolist()]
    return torch.cat([x[a:b] @ w for a, b, w in zip(bounds[:-1], bounds[1:], weights, strict=True)])


def _passed_by_softmax(name: str, x: Tensor, y: Tensor, grad: Tensor, dim: int) -> float:
    """Prop. 3.1 written out: sum_i x_i (R_i - s_i sum_j R_j); for log-softmax sum_i x_i (g_i - s_i sum_j g_j)."""
    y, grad = y.double(), grad.double()
    if name == "softmax":
        return _dot(x, y * (grad - (y * grad).sum(dim, keepdim=True)))
    return _dot(x, grad - y.exp() * grad.sum(dim, keepdim=True))


def _dot(x: Tensor, grad: Tensor) -> float:
    """sum x * grad in float64; a value that gets no gradient (such as a masked, infinite logit) counts as 0."""
    wide = torch.complex128 if x.is_complex() or grad.is_complex() else torch.float64
    product = x.to(wide) * grad.to(wide).conj()
    return product.masked_fill(grad == 0, 0).real.sum().item()


def _tensors(*values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
    return found


def _mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(_mapped(v, function) for v in value)
    return {k: _mapped(v, function) for k, v in value.items()} if isinstance(value, dict) else value


def _grouped(entries: Iterable[Entry], key: Callable[[Entry], tuple[str, str]]) -> list[Entry]:
    groups: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        group = groups.setdefault(key(entry), Entry(*key(entry)))
        group.received += entry.received
        group.passed += entry.passed
        for kind, amount in entry.absorbed.items():
            group.absorb(kind, amount)
    return list(groups.values())

"""`propagate`: the rules of a table, applied to every operation inside a block and to nothing else."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F
from torch.nn.modules._functions import BackwardHookFunction
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, resolve_name

from attnlrp.activations import activation_forward, activation_name, claim, is_written_out, own_forward, release
from attnlrp.backward import RuleFunction, live, scale_gradient
from attnlrp.checkpoint import follow_checkpoint
from attnlrp.errors import UnknownOperationError
from attnlrp.operations import COMPOSITES, PASSED, Operation, find
from attnlrp.rules import ATTNLRP, Rules, attention_shares, gradient

__all__ = ["Propagation", "propagate"]

OnUnknown = Literal["error", "warn", "gradient"]


@contextmanager
def propagate(model: nn.Module, rules: Rules = ATTNLRP, *, on_unknown: OnUnknown = "error") -> Iterator[Propagation]:
    """Apply relevance propagation rules to what `model` computes inside the block.

    The forward pass stays the model's own. Gradients taken of its outputs, inside or after the block, are the
    modified ones: relevance of a tensor is `value * gradient`. Parameters are constants inside the block; neither
    their values, nor `requires_grad`, nor their `.grad` change. Blocks may be nested (the innermost one applies),
    and run in several threads at once.

    Args:
        model: any module. If it has `get_input_embeddings()`, or its encoder or decoder has, the result of embedding
            token indices with them becomes an explained input, listed in `Propagation.embeddings`.
        rules: table of operation -> rule, see `attnlrp.rules`.
        on_unknown: what to do about an operation without a rule: "error" raises, "warn" warns and keeps its plain
            gradient, "gradient" keeps it in silence.

    Yields:
        The propagation, with the embeddings that were met.

    Raises:
        UnknownOperationError: an operation is neither neutral nor in the table (names it, its module, and the fix).

    Example:
        >>> with attnlrp.propagate(model):
        ...     logits = model(inputs_embeds=embeds).logits
        ...     logits[0, -1].max().backward()
        >>> relevance = (embeds * embeds.grad).sum(-1)
    """
    with Propagation(model, rules, on_unknown=on_unknown) as propagation:
        yield propagation


class Propagation(TorchFunctionMode):
    """The rules at work: sees every torch function that is called in its block, in its thread.

    Attributes:
        embeddings: (token indices, their embeddings) of each embedding look-up, in order of execution; the embeddings
            are leaves whose `.grad` the backward pass fills.
    """

    def __init__(self, model: nn.Module, rules: Rules, *, on_unknown: OnUnknown = "error") -> None:
        super().__init__()
        if on_unknown not in ("error", "warn", "gradient"):
            raise ValueError(f"on_unknown: got {on_unknown!r}, expected 'error', 'warn' or 'gradient'")
        self.model, self.rules, self.on_unknown = model, rules, on_unknown
        self.embeddings: list[tuple[Tensor, Tensor]] = []
        self._lookups = _token_embeddings(model)
        self._shares = attention_shares(rules)
        self._plans: dict[Any, Callable[..., Any] | None] = {}
        self._activations = list(filter(is_written_out, model.modules())) if rules else []
        scripted = [n for n, m in model.named_modules() if rules and isinstance(m, torch.jit.ScriptModule)]
        if scripted:
            self._report(f"torch.jit.ScriptModule {scripted[0] or '(top)'}")
        self._shadows = 0  # how many blocks inside this one are open: only the innermost applies
        self._outer: Propagation | None = None

    def __enter__(self) -> Propagation:
        modes = _get_current_function_mode_stack()
        self._outer = next((m for m in reversed(modes) if isinstance(m, Propagation)), None)
        if self._outer is not None:
            self._outer._shadows += 1
        claim(self._activations)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        release(self._activations)
        if self._outer is not None:
            self._outer._shadows -= 1

    @contextmanager
    def _resumed(self) -> Iterator[None]:
        """The mode, which torch suspends while it handles a call, for the operations inside of that call."""
        TorchFunctionMode.__enter__(self)
        try:
            yield
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._shadows or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        try:
            plan = self._plans[func]
        except KeyError:
            plan = self._plans[func] = self._plan(func)
        if plan is None:
            return func(*args, **kwargs)
        if func is F.embedding and self._looks_up_tokens(args, kwargs):
            return self._embed(func, args, kwargs)
        lives, trainable = _scan(args, kwargs)
        if trainable:
            args, kwargs = _freeze(args), {k: _freeze(v) for k, v in kwargs.items()}
        if not lives:
            self._refuse_vmap(args)
            return func(*args, **kwargs)
        if not torch.compiler.is_compiling():
            self._refuse_hidden(lives)
            if plan is not func or trainable:  # a region without rules and parameters is recomputed as it is
                follow_checkpoint(self)
        return self._apply(func, args, kwargs)

    def _apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation with at least one live input, by its rule."""
        plan = self._plans[func]
        assert plan is not None
        return plan(*args, **kwargs)

    def _plan(self, func: Callable[..., Any]) -> Callable[..., Any] | None:
        """How calls of a function are computed, decided once; None hands them on untouched."""
        operation = find(func)
        if func in PASSED or (operation is None and getattr(func, "__name__", "") in ("__get__", "__set__")):
            return None
        if func in self.rules:
            return partial(_by_rule, self.rules[func], operation or Operation(str(func), func))
        if func is F.scaled_dot_product_attention and self._shares is not None:
            return partial(self._attend, func)
        if func is activation_forward:
            return self._activate
        if func in COMPOSITES and self.rules:
            return partial(self._compose, COMPOSITES[func])
        if operation is None:
            return partial(self._unknown, func)
        rule = self.rules.get(operation.name, gradient)
        return func if rule is gradient else partial(_by_rule, rule, operation)

    def _compose(self, composite: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._resumed():
            return composite(*args, **kwargs)

    def _activate(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        operation = Operation(activation_name(module), partial(own_forward, module))
        rule = self.rules.get(operation.name, gradient)
        return operation.call(*args, **kwargs) if rule is gradient else _by_rule(rule, operation, *args, **kwargs)

    def _attend(
        self, func: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        assert self._shares is not None
        mask, *rest = args or (kwargs.pop("attn_mask", None),)
        q, k, v, m = self._shares(live(query), live(key), live(value), live(mask))
        inputs = (scale_gradient(query, q), scale_gradient(key, k), scale_gradient(value, v), scale_gradient(mask, m))
        return func(*inputs, *rest, **kwargs)

    # --- explained inputs -----------------------------------------------------------------------------------------

    def _looks_up_tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        weight = kwargs["weight"] if "weight" in kwargs else args[1]
        return any(weight is table.weight for table in self._lookups)

    def _embed(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            embeddings: Tensor = func(*args, **kwargs)
        embeddings.requires_grad_()
        self.embeddings.append((kwargs["input"] if "input" in kwargs else args[0], embeddings))
        return embeddings.clone()  # models may write into it, which a leaf and its views forbid

    # --- what has no rule -----------------------------------------------------------------------------------------

    def _unknown(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        if self.rules and any(map(live, outputs)):
            self._report(resolve_name(func) or getattr(func, "__name__", str(func)))
        return result

    def _refuse_hidden(self, lives: list[Tensor]) -> None:
        """Report a custom autograd function, whose call torch does not show, once its output is used."""
        for tensor in lives:
            node = tensor.grad_fn
            if isinstance(node, BackwardCFunction) and self.rules:
                function = getattr(type(node), "_forward_cls", type(node))
                # what a compiled region runs was seen when it was traced
                seen = function.__module__.startswith("torch._functorch._aot_autograd")
                known = seen or issubclass(function, (RuleFunction, BackwardHookFunction)) or function in self.rules
                if not known:
                    self._report(f"{function.__module__}.{function.__qualname__} (custom autograd function)")

    def _refuse_vmap(self, args: tuple[Any, ...]) -> None:
        """Report torch.vmap over a live tensor, which looks like a constant inside."""
        if torch.compiler.is_compiling() or functorch.maybe_current_level() is None or not self.rules:
            return
        for item in args:
            if isinstance(item, Tensor) and functorch.is_batchedtensor(item) and _unbatched(item).requires_grad:
                self._report("torch.vmap over an explained tensor")

    def _report(self, name: str) -> None:
        if self.on_unknown == "gradient":
            return
        fix = next((fix for part, fix in _FIXES.items() if part in name), _ADD_A_RULE)
        message = f"no rule for operation {name} in module {module_path(self.model)}: {fix}"
        if self.on_unknown == "error":
            raise UnknownOperationError(message)
        warnings.warn(message, stacklevel=4)


_ADD_A_RULE = (
    "add a row to the table, rules=attnlrp.ATTNLRP | {function: rule} with a rule of attnlrp.rules "
    "(see CONTRIBUTING.md, 'Add a rule'), or pass on_unknown='warn' or 'gradient' to keep its plain gradient"
)
_FIXES = {
    "CheckpointFunction": "reentrant checkpointing is not supported: "
    "use torch.utils.checkpoint(..., use_reentrant=False)",
    "AutogradFunctionApply": "torch.compile(backend='eager') runs a graph that has the rules in it already: "
    "use another backend",
    "ScriptModule": "torch shows nothing of what runs inside: use the module that it was made from",
}


def module_path(model: nn.Module) -> str:
    """Path, inside `model`, of the module whose code is running, read off the call stack."""
    names = {id(module): name for name, module in model.named_modules()}
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            return f"{names[id(owner)] or '(top)'} ({type(owner).__name__})"
        frame = frame.f_back  # type: ignore[assignment]
    return "(outside the model)"


def _token_embeddings(model: nn.Module) -> list[nn.Module]:
    """The tables of token embeddings: of the model, and of an encoder and a decoder that do not share it."""
    own: Any = model
    found: list[nn.Module] = []
    for part in (lambda: own, lambda: own.get_encoder(), lambda: own.get_decoder()):
        try:
            table = part().get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(table, nn.Module) and isinstance(getattr(table, "weight", None), Tensor):
            found.append(table)
    if found:
        return found
    rows = getattr(getattr(model, "config", None), "vocab_size", None)  # a model that does not say: by its size
    return next(([m] for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == rows), [])


def _scan(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], bool]:
    """The live tensors among the arguments, and whether any parameter would take a gradient."""
    lives: list[Tensor] = []
    trainable = False
    for value in (*args, *kwargs.values()):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Tensor) and item.requires_grad:
                if item.is_leaf and isinstance(item, nn.Parameter):
                    trainable = True
                else:
                    lives.append(item)
    return lives, trainable


def _unbatched(tensor: Tensor) -> Tensor:
    while functorch.is_batchedtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def _freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(map(_freeze, value)) if type(value) in (list, tuple) else value
    return value.detach() if isinstance(value, nn.Parameter) else value


_TAKES_IN_PLACE = frozenset({"elu", "selu", "celu", "hardtanh", "relu6", "silu", "mish", "hardswish", "hardsigmoid"})
"""Functions whose last positional argument may be `inplace`."""


def _by_rule(rule: Callable[..., Any], operation: Operation, *args: Any, **kwargs: Any) -> Any:
    """Call a rule out of place, and write its result back where the operation was written in place."""
    if "input" in kwargs:
        args = (kwargs.pop("input"), *args)
    if "other" in kwargs:
        args = (*args, kwargs.pop("other"))
    if operation.swapped:
        args = (args[1], args[0])
    if operation.name in _TAKES_IN_PLACE and isinstance(args[-1], bool):
        *args, kwargs["inplace"] = args  # type: ignore[assignment]
    if not (operation.in_place or kwargs.pop("inplace", False)):
        return rule(operation.call, *args, **kwargs)
    target = args[0]
    return write(target, rule(operation.call, target.clone(), *args[1:], **kwargs))


def write(target: Tensor, result: Tensor) -> Tensor:
    """Write a result in place; a target that it makes constant is live no longer, so that no relevance ends in it."""
    target.copy_(result)
    return target if live(result) or not live(target) or target._is_view() else target.detach_()

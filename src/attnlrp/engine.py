"""`propagate`: the rules of a table, applied to every operation inside a block and to nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from attnlrp.changes import again, open_changes
from attnlrp.checkpoint import follow_checkpoint
from attnlrp.compiled import hide, is_compiled, look_up_tokens, show
from attnlrp.errors import InputError, UnknownOperationError
from attnlrp.heap import LARGE, give_back
from attnlrp.kernels import (
    FLEX_ATTENTION,
    caps_inside_kernel,
    factors_at_inputs,
    kernel_rule,
    scale_inputs,
    share_attention,
    spelled,
)
from attnlrp.layers import WEIGHTED, LayerRules, running_module
from attnlrp.operations import COMPOSITES, OPERATIONS, PASSED, Operation, find
from attnlrp.rules import ATTNLRP, Rule, Rules, attention_shares, gradient

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
        InputError: a `Layer` of the table matches nothing in the model.

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
        self.model, self.rules, self.on_unknown = model, spelled(rules), on_unknown
        self.embeddings: list[tuple[Tensor, Tensor]] = []
        self._lookups = _token_embeddings(model)
        self._shares = attention_shares(rules)
        self._layers = LayerRules(model, rules)
        self._plans: dict[Any, Callable[..., Any] | None] = {}
        modules = list(model.named_modules()) if rules else []
        self._activations = [m for _, m in modules if is_written_out(m)]
        scripted = [n for n, m in modules if isinstance(m, torch.jit.ScriptModule)]
        if scripted:
            self._report(f"torch.jit.ScriptModule {scripted[0] or '(top)'}")
        if any(isinstance(m, nn.DataParallel) and len(m.device_ids) > 1 for _, m in modules):
            self._report("torch.nn.DataParallel")
        if self._layers and any(is_compiled(m) or m._compiled_call_impl is not None for _, m in modules):
            self._report("a layer, by a Layer row, in a compiled graph,")
        if rules and caps_inside_kernel(model):
            self._report("tanh (soft-capping) inside fused attention,")
        self._shadows = 0  # how many blocks inside this one are open: only the innermost applies
        self._outer: Propagation | None = None
        self._leaves: list[Tensor] = []  # inputs of a compiled graph, in the order in which it looks them up
        self._looked_up = 0
        self._hook: Any = None
        self._shown: list[Any] = []
        self._changes = ExitStack()

    def __enter__(self) -> Propagation:
        modes = _get_current_function_mode_stack()
        self._outer = next((m for m in reversed(modes) if isinstance(m, Propagation)), None)
        if self._outer is not None:
            self._outer._shadows += 1
        claim(self._activations)
        self._shown = show(OPERATIONS)
        if is_compiled(self.model):
            self._hook = self.model.register_forward_pre_hook(self._enter_graph, with_kwargs=True)
        super().__enter__()  # type: ignore[no-untyped-call]
        self._changes.enter_context(again(open_changes()))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._changes.close()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        release(self._activations)
        hide(self._shown)
        if self._hook is not None:
            self._hook.remove()
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
        plan = self._planned(func)
        if plan is None:
            if func in PASSED and not torch.compiler.is_compiling():
                self._settle_hidden(_scan(args, kwargs)[0])
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
            lives = self._settle_hidden(lives)
            if not lives:
                return func(*args, **kwargs)
            if lives[0].is_cpu and lives[0].nbytes >= LARGE:
                give_back()
            if plan is not func or trainable:  # a region without rules and parameters is recomputed as it is
                follow_checkpoint(self)
        return self._apply(func, args, kwargs)

    def _apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation with at least one live input, by its rule."""
        plan = self._planned(func)
        assert plan is not None
        return plan(*args, **kwargs)

    def _planned(self, func: Callable[..., Any]) -> Callable[..., Any] | None:
        if torch.compiler.is_compiling():  # a graph can neither look up nor hand out every function
            return self._plan(func)
        try:
            return self._plans[func]
        except KeyError:
            self._plans[func] = plan = self._plan(func)
            return plan

    def _plan(self, func: Callable[..., Any]) -> Callable[..., Any] | None:
        """How calls of a function are computed, decided once; None hands them on untouched."""
        plan, operation = self._plan_by_operation(func), find(func)
        if not self._layers or plan is None or operation is None or operation.name not in WEIGHTED:
            return plan
        return partial(self._by_layer, plan, operation)

    def _by_layer(self, plan: Callable[..., Any], operation: Operation, *args: Any, **kwargs: Any) -> Any:
        rule = self._layers.find(operation.name, args, kwargs)
        return plan(*args, **kwargs) if rule is None else _by_rule(rule, operation, *args, **kwargs)

    def _plan_by_operation(self, func: Callable[..., Any]) -> Callable[..., Any] | None:
        operation = find(func)
        if func in PASSED or (operation is None and getattr(func, "__name__", "") in ("__get__", "__set__")):
            return None
        if func in self.rules:
            return partial(_by_row, self.rules[func], operation or Operation(str(func), func))
        if func is F.scaled_dot_product_attention and self._shares is not None:
            return partial(self._attend, func)
        if func is FLEX_ATTENTION and self._shares is not None:
            return partial(share_attention, self._shares, func)
        if func is activation_forward:
            return self._activate
        if func in COMPOSITES and self.rules:
            return partial(self._compose, COMPOSITES[func])
        if operation is None:
            return partial(self._unknown, func)
        rule = self.rules.get(operation.name, gradient)
        if rule is gradient:
            return self._linear if func is F.linear and self.rules else func
        return partial(_by_rule, rule, operation)

    def _linear(self, *args: Any, **kwargs: Any) -> Tensor:
        """A linear layer, whose weight may be of a type that has no gradient."""
        result = F.linear(*args, **kwargs)
        if not result.requires_grad:
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            self._report(f"torch.nn.functional.linear with a {type(weight).__name__}, whose output has no gradient,")
        return result

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
        if torch.compiler.is_compiling():
            return self._embed_in_graph(embeddings)
        embeddings.requires_grad_()
        self.embeddings.append((kwargs["input"] if "input" in kwargs else args[0], embeddings))
        return embeddings.clone()  # models may write into it, which a leaf and its views forbid

    def _enter_graph(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a compiled model runs: its explained inputs, as leaves outside of the graph."""
        modes = _get_current_function_mode_stack()
        if not self._shadows and torch.is_grad_enabled() and any(m is self for m in modes):
            count = look_up_tokens(model, self._lookups, args, kwargs)
            self._leaves = [leaf for _, leaf in self.embeddings[len(self.embeddings) - count :]]
            self._looked_up = 0

    def _embed_in_graph(self, embeddings: Tensor) -> Tensor:
        at = self._looked_up
        if at >= len(self._leaves) or self._leaves[at].shape != embeddings.shape:
            raise InputError(
                "a compiled model that looks tokens up: open the block with what torch.compile returned, "
                "propagate(compiled), or pass inputs_embeds"
            )
        self._looked_up += 1
        leaf = self._leaves[at]
        return embeddings + (leaf - leaf.detach())  # the value is the model's own

    # --- what has no rule -----------------------------------------------------------------------------------------

    def _unknown(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        if self.rules and any(map(live, outputs)):
            named = None if torch.compiler.is_compiling() else resolve_name(func)  # a graph cannot hold the search
            self._report(named or str(getattr(func, "__name__", func)))
        return result

    def _settle_hidden(self, lives: list[Tensor]) -> list[Tensor]:
        """Rules for custom autograd functions, whose call torch does not show, once their outputs are used.

        Returns the tensors that are live still.
        """
        for tensor in lives:
            node = tensor.grad_fn
            if isinstance(node, BackwardCFunction) and self.rules:
                function = getattr(type(node), "_forward_cls", type(node))
                # what a compiled region runs was seen when it was traced
                seen = function.__module__.startswith("torch._functorch._aot_autograd")
                if not (seen or issubclass(function, (RuleFunction, BackwardHookFunction))):
                    self._settle(tensor, node, function)
        return [tensor for tensor in lives if tensor.requires_grad]

    def _settle(self, tensor: Tensor, node: Any, function: type) -> None:
        """Scale the gradients that one call of a custom autograd function hands to its inputs, as its rule asks."""
        name = f"{function.__module__}.{function.__qualname__}"
        known = kernel_rule(name, self._shares)
        rule = self.rules.get(function) or (gradient if function in self.rules else known)
        if self._layers and name.startswith("bitsandbytes.") and function not in self.rules:
            self._report(f"a layer, by a Layer row, in {name},")
        factors = getattr(node, "_attnlrp_factors", None)  # of an earlier use
        if factors == (1.0,):
            return
        if rule is not None and factors is None:
            factors = node._attnlrp_factors = factors_at_inputs(rule, node)
            if any(f != 1 for f in factors):
                node.register_hook(partial(scale_inputs, factors))
        stops = factors is not None and factors != () and not any(factors)
        if rule is None or not factors or (stops and tensor._is_view()):
            self._report(f"{name} (custom autograd function{'' if rule is None else f' with rule {rule}'})")
        elif stops:
            tensor.detach_()  # so that factors beside it take its share

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
        # a graph that is traced must not touch the model
        where = "(compiled)" if torch.compiler.is_compiling() else module_path(self.model)
        message = f"no rule for operation {name} in module {where}: {fix}"
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
    "custom autograd function with rule": "torch shows its call only afterwards, so that its rule can do no more than "
    "scale the gradients at its inputs, as gradient, uniform and constant do; for another rule, call it in a function "
    "decorated with torch.overrides.wrap_torch_function, and add the row for that (see docs/custom-models.md)",
    "DataParallel": "it runs in threads of its own, outside of the block: use a process for each device, or device_map",
    "inside fused attention": "torch shows nothing of what runs inside: use attn_implementation='eager'",
    "Layer row": "there it cannot be told from another: use the module that was compiled, weights that are not "
    "quantised, or a table without Layer keys",
    "whose output has no gradient": "quantise the weights only, and not what they are multiplied with",
    "ScriptModule": "torch shows nothing of what runs inside: use the module that it was made from",
}


def _by_row(rule: Rule, operation: Operation, *args: Any, **kwargs: Any) -> Any:
    """A function with a row of its own: the custom autograd function that it may be made of needs no other."""
    result = _by_rule(rule, operation, *args, **kwargs)
    if torch.compiler.is_compiling():
        return result
    for output in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(output, Tensor) and isinstance(output.grad_fn, BackwardCFunction):
            output.grad_fn._attnlrp_factors = (1.0,)
    return result


def module_path(model: nn.Module) -> str:
    """Path, inside `model`, of the module whose code is running, read off the call stack."""
    names = {id(module): name for name, module in model.named_modules()}
    running = running_module(names)
    if running is None:
        return "(outside the model)"
    return f"{names[id(running)] or '(top)'} ({type(running).__name__})"


def _token_embeddings(model: nn.Module) -> list[nn.Module]:
    """The tables of token embeddings: of the model, and of an encoder and a decoder that do not share it."""
    own: Any = model
    found: list[nn.Module] = []
    for name in ("", "get_encoder", "get_decoder"):
        try:
            table = (getattr(own, name)() if name else own).get_input_embeddings()
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
    if live(result) or not live(target) or target._base is not None:
        return target
    return target.detach_()

"""Checkpointed regions: computed again in the backward pass, under the rules of the block that ran them first."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnlrp.changes import changing, open_changes
from attnlrp.errors import InputError, ModelError
from attnlrp.forwards import StandIn
from attnlrp.heap import SLACK_OF_LAYERS, give_back

__all__ = ["checkpointed", "follow_checkpoint", "repeated_layers"]

# --- making a model compute its layers again ----------------------------------------------------------------------

_blocks = threading.local()  # .open: how many blocks are open in this thread


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Make `model` keep only the inputs of its layers, and compute each layer again in the backward pass.

    Less memory, one more forward pass, the same values and gradients. Evaluation mode stays, so dropout stays off.
    The backward pass may be called after the block. Layers that are given a key-value cache compute again from what
    it held at first.

    Args:
        model: its layers are those that `transformers` would checkpoint; in another model, those of its longest
            `nn.ModuleList` or `nn.Sequential`.

    Raises:
        ModelError: the model has no repeated layers.
        InputError: a layer writes into its arguments, so that it would compute something else the second time.

    Example:
        >>> with attnlrp.propagate(model), checkpointed(model):
        ...     logits = model(inputs_embeds=embeds, use_cache=False).logits
    """
    layers = repeated_layers(model)
    _LAYERS.claim(layers)
    _blocks.open = getattr(_blocks, "open", 0) + 1
    try:
        yield
    finally:
        _blocks.open -= 1
        _LAYERS.release(layers)


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that are computed again: the outermost ones, none inside another."""
    layers = [m for m in model.modules() if any(c.__name__ == "GradientCheckpointingLayer" for c in type(m).__mro__)]
    if not layers:
        stacks = [list(m) for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1]
        layers = max(stacks, key=len, default=[])
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no layers to compute again: expected layers that transformers can checkpoint, "
            "or an nn.ModuleList or nn.Sequential of at least two modules; use memory='full'"
        )
    inner = {id(m) for layer in layers for m in layer.modules() if m is not layer}
    return [layer for layer in dict.fromkeys(layers) if id(layer) not in inner]


def _layer_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the forward of a layer."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not getattr(_blocks, "open", 0):
        return _LAYERS.own_forward(layer, *args, **kwargs)
    names, count = tuple(kwargs), len(args)
    given = (*args, *kwargs.values())
    # torch keeps the tensors and watches that nobody writes into them; the rest is kept here
    tensors = [value for value in given if isinstance(value, Tensor)]
    others = [None if isinstance(value, Tensor) else _copied(value) for value in given]
    is_tensor = [isinstance(value, Tensor) for value in given]
    before = _versions([tensors, others])
    first = [given]  # the first pass fills the real cache

    def forward(*tensors: Tensor) -> Any:
        give_back(SLACK_OF_LAYERS)
        rest = iter(tensors)
        kept = first.pop() if first else [_copied(value) for value in others]
        values = [next(rest) if own else value for own, value in zip(is_tensor, kept, strict=True)]
        return _LAYERS.own_forward(layer, *values[:count], **dict(zip(names, values[count:], strict=True)))

    # accelerate puts weights away when a module has run, so that its modules must run to their end
    early_stop = not any(hasattr(module, "_hf_hook") for module in layer.modules())
    result = checkpoint(forward, *tensors, use_reentrant=False, early_stop=early_stop)
    if _versions([tensors, others]) != before:
        raise InputError(
            f"{type(layer).__name__} writes into what it is given, such as the state of a cache, so it cannot be "
            "computed again: pass use_cache=False, or use memory='full'"
        )
    return result


_LAYERS = StandIn(_layer_forward, "_attnlrp_layer_forward")


def _is_cache(value: Any) -> bool:
    return any(c.__name__.endswith(("Cache", "CacheLayerMixin", "CacheParams")) for c in type(value).__mro__)


def _copied(value: Any) -> Any:
    """Containers and caches, copied with the same tensors in them: what is put into the original later is not here."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if type(value) is dict:
        return {k: _copied(v) for k, v in value.items()}
    if _is_cache(value):
        twin = copy.copy(value)
        twin.__dict__.update({k: _copied(v) for k, v in vars(value).items()})
        return twin
    return value


def _versions(value: Any) -> list[int]:
    """How often each tensor in `value` was written into."""
    if isinstance(value, Tensor):
        return [] if value.is_inference() else [value._version]
    if isinstance(value, (list, tuple)):
        return [n for item in value for n in _versions(item)]
    if type(value) is dict:
        return _versions(list(value.values()))
    return _versions(list(vars(value).values())) if _is_cache(value) else []


# --- making a recomputation follow the rules ----------------------------------------------------------------------
def follow_checkpoint(propagation: Any) -> None:
    """Inside a checkpointed region, make its recomputation run under the same rules.

    The recomputation happens in the backward pass: outside of the block, and on a GPU in another thread. torch offers
    `context_fn` for it, but only to the caller of `checkpoint`, which is the model; so the region's frame is reached
    through its saved-tensor hooks.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or not getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook"):
        return
    cells = dict(zip(hooks[0].__code__.co_freevars, hooks[0].__closure__ or (), strict=True))
    frame = cells["frame"].cell_contents
    if not hasattr(frame.recompute_fn, "propagation"):
        frame.recompute_fn = _Recomputation(frame.recompute_fn, propagation)


class _Recomputation:
    def __init__(self, function: Callable[..., Any], propagation: Any) -> None:
        self.function, self.propagation, self.changes = function, propagation, open_changes()

    def __call__(self, *args: Any) -> None:
        outer, still_open = self.propagation, open_changes()
        closed = [change for change in self.changes if change not in still_open]
        with changing(closed), type(outer)(outer.model, outer.rules, on_unknown=outer.on_unknown):
            self.function(*args)

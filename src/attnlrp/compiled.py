"""Models behind `torch.compile`: what a graph shows while it is traced, and where its explained inputs enter."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["hide", "is_compiled", "look_up_tokens", "show"]

_lock = threading.Lock()
_shown: dict[Any, int] = {}


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` made this module, so that its hooks run outside of the graph."""
    return hasattr(model, "_torchdynamo_orig_callable")


def look_up_tokens(model: nn.Module, tables: Sequence[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Embed the token indices that a compiled model is called with, encoder before decoder; returns how many.

    The function mode that watches makes a leaf of each result. A graph cannot make one: gradients end at its inputs.
    """
    original: Any = model._orig_mod
    given = inspect.signature(original.forward).bind_partial(*args, **kwargs).arguments
    given = given | given.get("kwargs", {})
    names = [n for n in ("input_ids", "decoder_input_ids") if isinstance(given.get(n), Tensor)]
    for name in names:
        table: Any = tables[-1] if name.startswith("decoder") else tables[0]
        F.embedding(given[name], table.weight, table.padding_idx)
    return len(names)


def _dispatched() -> set[Any] | None:
    """The functions that the compiler shows to a function mode, if the compiler is loaded."""
    compiler: Any = sys.modules.get("torch._dynamo.variables.torch")
    return None if compiler is None else compiler.get_overridable_functions()


def show(functions: Iterable[Any]) -> list[Any]:
    """Make the compiler show these functions to function modes, as they are shown outside of graphs.

    It leaves out a few, such as `F.hardswish` and `F.tanh`, which would keep their plain gradient in silence.
    Returns those few, for `hide`.
    """
    dispatched = _dispatched()
    if dispatched is None:
        return []
    with _lock:
        added = [function for function in functions if function in _shown or function not in dispatched]
        for function in added:
            _shown[function] = _shown.get(function, 0) + 1
        dispatched.update(added)
    return added


def hide(added: Iterable[Any]) -> None:
    """Undo one `show`; the last restores what the compiler shows."""
    with _lock:
        for function in added:
            _shown[function] -= 1
            if not _shown[function]:
                del _shown[function]
                (_dispatched() or set()).discard(function)

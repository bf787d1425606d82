"""Stand-ins: a function in place of the `forward` of some module instances, while a block is open."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["StandIn"]


class StandIn:
    """Puts one function in place of the `forward` of module instances; the class and other instances keep theirs.

    Claims are counted, so that blocks may be nested and run in several threads at once. The last release restores
    the instance as it was: without a `forward` of its own, or with the one that another library gave it.

    Args:
        function: called as function(module, *args, **kwargs).
        name: under which an instance's own `forward` is kept meanwhile, in the instance.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name
        self._claims: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def claim(self, modules: Iterable[nn.Module]) -> None:
        """Put the function in place, until released as often as claimed."""
        with self._lock:
            for module in modules:
                self._claims[module] = self._claims.get(module, 0) + 1
                if self._claims[module] == 1:
                    replaced = module.__dict__.get("forward")
                    if replaced is not None and getattr(replaced, "__func__", None) is not self.function:
                        module.__dict__[self.name] = replaced
                    # a bound method: equal in every block, so that a compiled model is not compiled again
                    module.__dict__["forward"] = MethodType(self.function, module)

    def release(self, modules: Iterable[nn.Module]) -> None:
        """Undo one claim; the last restores the modules."""
        with self._lock:
            for module in modules:
                self._claims[module] -= 1
                if self._claims[module] == 0:
                    del self._claims[module], module.__dict__["forward"]
                    if self.name in module.__dict__:
                        module.__dict__["forward"] = module.__dict__.pop(self.name)

    def own_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the module computes when no block is open; a backward pass may ask for it after the block."""
        replaced = module.__dict__.get(self.name) or module.__dict__.get("forward")
        if getattr(replaced, "__func__", None) is self.function:
            replaced = None
        return type(module).forward(module, *args, **kwargs) if replaced is None else replaced(*args, **kwargs)

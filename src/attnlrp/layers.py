"""Rules by the name of a layer: which weight, and so which `Layer` of a table, an operation is computed with."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Container, Mapping
from fnmatch import fnmatchcase
from types import FrameType
from typing import Any

from torch import Tensor, nn

from attnlrp.backward import live
from attnlrp.errors import InputError
from attnlrp.rules import Layer, Rule, Rules

__all__ = ["WEIGHTED", "LayerRules", "running_module"]

WEIGHTED = frozenset({"linear", "conv", "addmm", "matmul", "einsum"})
"""Operations that layers are computed with; the last three are computed without a weight, too."""
_ALWAYS = frozenset({"linear", "conv"})
_NONE = -1


class LayerRules:
    """The `Layer` rows of a table, resolved for one model; false if no row names a layer of it.

    A weight is known by where it lies in memory, which it shares with its views and what it is detached to. One that
    lies elsewhere (loaded for the call, dequantised, merged with an adapter) is that of the module whose code runs.

    Args:
        model: whose modules the patterns are matched with; a weight that several modules share has all their names.
        rules: the table; rows with other keys are left alone.

    Raises:
        InputError: a pattern that is not optional matches nothing.
    """

    def __init__(self, model: nn.Module, rules: Rules) -> None:
        keys = [key for key in rules if isinstance(key, Layer)]
        self._rules: list[Rule] = [rules[key] for key in keys]
        self._at: dict[int, int] = {}  # address of a weight -> its row
        self._of: dict[int, int] = {}  # id of a module -> its row
        if keys:
            self._resolve(model, keys)

    def __bool__(self) -> bool:
        return any(row != _NONE for row in self._of.values())

    def find(self, operation: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rule | None:
        """The rule of the layer that one call belongs to, if a row names it."""
        constants = [_address(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and not live(v)]
        found = [self._at[at] for at in constants if at in self._at]  # a bias too, which may come before its weight
        if not found and operation in _ALWAYS:
            found = [self._of.get(id(running_module(self._of)), _NONE)]
        row = max(found, default=_NONE)
        return None if row == _NONE else self._rules[row]

    def _resolve(self, model: nn.Module, keys: list[Layer]) -> None:
        names: set[str] = set()
        matched: set[Layer] = set()
        starts: dict[int, set[int]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._of.setdefault(id(module), _NONE)
            for name, weight in module.named_parameters(recurse=False):
                own = {path, f"{path}.{name}".lstrip(".")}
                found = [row for row, key in enumerate(keys) if any(fnmatchcase(n, key.pattern) for n in own)]
                matched.update(keys[row] for row in found)
                names |= own
                at, last = _address(weight), max(found, default=_NONE)
                starts.setdefault(at, set()).add(weight.data_ptr() if at else 0)
                self._at[at] = max(last, self._at.get(at, _NONE))
                self._of[id(module)] = max(last, self._of[id(module)])
        self._at = {at: row for at, row in self._at.items() if at and len(starts[at]) == 1}  # one weight per storage
        missing = [key for key in keys if key not in matched and not key.optional]
        if missing:
            raise InputError(_no_match(missing[0], sorted(names - {""})))


def running_module(known: Container[int]) -> nn.Module | None:
    """The innermost module whose code is running, among those with these ids, read off the call stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in known:
            return owner
        frame = frame.f_back
    return None


def _address(tensor: Tensor) -> int:
    """Where the storage of a tensor is; 0 if it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a tensor that is made of others
        return 0


def _no_match(key: Layer, names: list[str]) -> str:
    end = key.pattern.strip("*.").rsplit(".", 1)[-1].lower()
    near = [name for name in names if end in name.lower()]
    near = near or difflib.get_close_matches(key.pattern, names, n=5, cutoff=0.3) or names
    return (
        f"rules: got {key}, which matches no module that owns a weight, and no weight; expected a name such as "
        f"{', '.join(near[:5]) or '(this model has none)'}, with * for what varies; "
        "Layer(..., optional=True) may match nothing"
    )

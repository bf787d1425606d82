"""`intervene`: neurons, heads and directions set, scaled, shifted or clamped while a block is open."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from attnlrp.changes import changing
from attnlrp.errors import InputError, ModelError
from attnlrp.units import Rows, Site, Taps, Unit, blocks_of, example_inputs, find_sites, resolve

__all__ = ["Add", "Change", "Clamp", "Direction", "Scale", "Set", "at_place", "intervene"]


@dataclass(frozen=True)
class Set:
    """Compute with this value instead."""

    value: float

    def __call__(self, x: Tensor) -> Tensor:
        """The changed values."""
        return torch.full_like(x, self.value)


@dataclass(frozen=True)
class Scale:
    """Compute with this multiple; 1 changes nothing, bit by bit."""

    factor: float

    def __call__(self, x: Tensor) -> Tensor:
        """The changed values."""
        return x * self.factor


@dataclass(frozen=True)
class Add:
    """Compute with this much more."""

    amount: float

    def __call__(self, x: Tensor) -> Tensor:
        """The changed values."""
        return x + self.amount


@dataclass(frozen=True)
class Clamp:
    """Compute with nothing below `low` or above `high`."""

    low: float = -math.inf
    high: float = math.inf

    def __call__(self, x: Tensor) -> Tensor:
        """The changed values."""
        return x.clamp(self.low, self.high)


Change: TypeAlias = "Set | Scale | Add | Clamp | float | int"
"""What to do with a unit; a number is `Set`."""

_Function: TypeAlias = "Set | Scale | Add | Clamp"


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction in the residual stream, as a unit whose value is the coordinate along it.

    Args:
        place: what a layer is given or gives, such as "layers.10:before" or "layers.10:after".
        vector: the direction (hidden,); the coordinate is x . v / |v|^2, and a change moves x along v.
        encode: the coordinate from x (..., hidden), where it is not the projection, as of a dictionary's feature.
    """

    place: str
    vector: Tensor
    encode: Callable[[Tensor], Tensor] | None = None

    def moved(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """x (..., hidden) with its coordinate changed; an unchanged coordinate leaves x as it is, bit by bit.

        Raises:
            InputError: the vector has another size, or no direction.
        """
        if self.vector.shape != x.shape[-1:]:
            raise InputError(
                f"{self.place}: got a vector of shape {tuple(self.vector.shape)}, expected ({x.shape[-1]},)"
            )
        if not self.vector.any():
            raise InputError(f"{self.place}: got a vector of zeros, expected a direction")
        vector = self.vector.to(x)
        before = x @ (vector / vector.dot(vector)) if self.encode is None else self.encode(x)
        difference = change(before) - before
        return torch.where(difference[..., None] == 0, x, x + difference[..., None] * vector)


@contextmanager
def intervene(
    model: nn.Module,
    changes: Mapping[Unit | Direction, Change],
    *,
    positions: Sequence[int] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Change what units compute, inside the block and nowhere else; works with `generate` and its cache.

    Args:
        model: any model with layers of neurons or heads; nothing of it is replaced.
        changes: unit -> what to do with it: a number sets it; `Scale`, `Add`, `Clamp`. Heads can be scaled, or set to
            0.
        positions: tokens at which units are changed, counted from the start of the text, padding included; None for
            all.
        inputs: keyword inputs of one pass in which units are found; for models that read neither tokens nor pixels.

    Raises:
        InputError: a unit that the model does not have, a change that it cannot take, or a position below 0.

    Example:
        >>> with attnlrp.intervene(model, {attnlrp.Neuron(16, 394): 0.0}):
        ...     model.generate(**inputs)
    """
    if positions is not None and any(p < 0 for p in positions):
        raise InputError(
            f"positions: got {list(positions)}, expected numbers from 0, counted from the start of the text"
        )
    sites = find_sites(model, example_inputs(model) if inputs is None else inputs)
    where = _Where(model, positions)
    taps: dict[Site, list[tuple[int, _Function]]] = {}
    directions: dict[str, list[tuple[Direction, _Function]]] = {}
    for unit, function in _functions(changes).items():
        if isinstance(unit, Direction):
            directions.setdefault(unit.place, []).append((unit, function))
            continue
        site, index = resolve(sites, unit)
        if site.kind == "heads" and not (isinstance(function, Scale) or function == Set(0.0)):
            raise InputError(f"{unit!r}: a head is {site.width // site.units} numbers; expected Scale(factor), or 0")
        taps.setdefault(site, []).append((index, function))
    with ExitStack() as stack:
        for place, moves in directions.items():
            stack.enter_context(at_place(model, sites, place, partial(_moved, moves, where)))
        stack.enter_context(where)
        mode = Taps(model, {site: partial(_changed, site, own, where) for site, own in taps.items()})
        stack.enter_context(changing([mode]))
        yield


def _functions(changes: Mapping[Unit | Direction, Change]) -> dict[Unit | Direction, _Function]:
    if not changes:
        raise InputError("changes: got none, expected units and what to do with them, such as {Neuron(16, 394): 0.0}")
    functions: dict[Unit | Direction, _Function] = {}
    for unit, change in changes.items():
        function = Set(float(change)) if isinstance(change, (int, float)) else change
        if not isinstance(function, (Set, Scale, Add, Clamp)):
            raise InputError(f"{unit!r}: got {change!r}, expected a number, Set, Scale, Add or Clamp")
        if any(math.isnan(value) for value in vars(function).values()):
            raise InputError(f"{unit!r}: got nan in {function}, expected numbers")
        functions[unit] = function
    return functions


class _Where:
    """Which rows of what is computed stand for the wanted positions, in each pass through the model."""

    def __init__(self, model: nn.Module, positions: Sequence[int] | None) -> None:
        self._model, self._positions = model, positions
        self._start, self._shape = 0, (1, 1)
        self._hook: Any = None

    def __enter__(self) -> _Where:
        if self._positions is not None:
            self._hook = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        names = ("decoder_input_ids", "input_ids", "inputs_embeds")
        tokens = next((kwargs[n] for n in names if kwargs.get(n) is not None), given[0])
        past = kwargs.get("past_key_values")
        self._start = past.get_seq_length() if past is not None else 0
        self._shape = (tokens.shape[0], tokens.shape[1])

    def mask(self, x: Tensor, rows: Rows | None) -> Tensor | None:
        """Whether each row of x (..., width) is to be changed: the shape of x without its last axis; None for all."""
        if self._positions is None:
            return None
        batch, length = self._shape
        wanted = torch.zeros(length, dtype=torch.bool, device=x.device)
        wanted[[p - self._start for p in self._positions if 0 <= p - self._start < length]] = True
        every = wanted.repeat(batch)
        if rows is not None:
            return every[rows.tokens]
        if x[..., 0].numel() != len(every):
            raise ModelError(
                f"positions: a layer computes {x[..., 0].numel()} rows for {len(every)} tokens; expected one for each"
            )
        return every.reshape(x.shape[:-1])


def _changed(site: Site, own: Sequence[tuple[int, _Function]], where: _Where, x: Tensor, rows: Rows | None) -> Tensor:
    """The units of a layer after the changes."""
    y, mask, size = x.clone(), where.mask(x, rows), site.width // site.units
    for index, change in own:
        span = slice(index * size, (index + 1) * size)
        changed = change(y[..., span])
        y[..., span] = changed if mask is None else torch.where(mask[..., None], changed, y[..., span])
    return y


def _moved(own: Sequence[tuple[Direction, _Function]], where: _Where, x: Tensor) -> Tensor:
    """The residual stream after the changes along its directions."""
    y, mask = x, where.mask(x, None)
    for direction, change in own:
        y = direction.moved(y, change)
    return y if mask is None else torch.where(mask[..., None], y, x)


@contextmanager
def at_place(
    model: nn.Module, sites: Sequence[Site], place: str, function: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Inside the block, compute with function(x) where a layer is given, or gives, x (..., hidden).

    Raises:
        InputError: no such place.
    """
    blocks = blocks_of(model, sites)
    name, _, side = place.rpartition(":")
    if name not in blocks or side not in ("before", "after"):
        first = next(iter(blocks))
        raise InputError(f"place {place!r}: expected one such as {first}:before or {first}:after")

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (function(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": function(kwargs["hidden_states"])}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

    block = blocks[name]
    hook = (
        block.register_forward_pre_hook(before, with_kwargs=True)
        if side == "before"
        else block.register_forward_hook(after)
    )
    try:
        yield
    finally:
        hook.remove()

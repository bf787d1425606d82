"""How much memory an explanation takes, estimated before it runs, and how to make it fit."""

from __future__ import annotations

import inspect
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from attnlrp.checkpoint import checkpointed, repeated_layers
from attnlrp.compiled import is_compiled
from attnlrp.engine import propagate
from attnlrp.errors import InputError, ModelError, OutOfMemoryError
from attnlrp.gradients import AT_ONCE
from attnlrp.heap import SLACK
from attnlrp.rules import Rules

__all__ = ["Choice", "Estimate", "Plan", "Planner", "available_bytes"]

Choice: TypeAlias = Literal["full", "checkpoint", "auto"]

PROBES = (16, 32, 64)  # tokens: three points for a parabola, as written-out attention keeps squares
SPARE = 0.9  # share of the memory that is free which an explanation may take
HELD = 0.8  # bytes that the allocator of main memory holds for each byte of a tensor, up to SLACK (docs/speed.md)
_GROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
_TEXTS = {"input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "use_cache", "logits_to_keep"}
_PASSED_ON = 1.5  # gradients and temporaries of a layer's backward pass, in sizes of what the layer keeps


@dataclass(frozen=True)
class Plan:
    """How to run: whether layers are computed again, and how many targets share a backward pass."""

    checkpoint: bool
    at_once: int


@dataclass(frozen=True)
class Estimate:
    """Bytes that one text makes a model keep, as a + b tokens + c tokens ** 2.

    Args:
        full: coefficients (a, b, c) of what the forward pass keeps.
        checkpoint: the same if layers are computed again; None for a model without repeated layers.
        layers: number of repeated layers.
        held: freed bytes that the allocator holds for each byte of a tensor where everything is kept.
    """

    full: tuple[float, float, float]
    checkpoint: tuple[float, float, float] | None
    layers: int
    held: float = 0.0

    def peak(self, plan: Plan, *, texts: int, tokens: int) -> float:
        """Bytes at the peak: what is kept, and what one layer adds while it runs, and for each target on the way back.

        Args:
            plan: how to run.
            texts: in a batch.
            tokens: of each, with padding.
        """
        one_layer = _parabola(self.full, tokens) / self.layers
        kept = self.checkpoint if plan.checkpoint and self.checkpoint is not None else self.full
        again = one_layer if plan.checkpoint else 0.0
        tensors = texts * (_parabola(kept, tokens) + again + _PASSED_ON * (1 + plan.at_once) * one_layer)
        return tensors + (0.0 if plan.checkpoint else min(self.held * tensors, SLACK))


class Planner:
    """Decides how the explanations of one model run.

    Args:
        model: the model.
        choice: "full", "checkpoint", or "auto": whatever is fastest and fits.
        limit: bytes that tensors may take beyond the model; None for most of what is free.

    Raises:
        InputError: another choice, or a limit that is not positive.
    """

    def __init__(self, model: Any, choice: Choice, limit: int | None = None) -> None:
        if choice not in get_args(Choice):
            raise InputError(f"memory: got {choice!r}, expected 'full', 'checkpoint' or 'auto'")
        if limit is not None and (choice != "auto" or limit <= 0):
            raise InputError(f"memory_limit: got {limit}, expected a positive number of bytes, and memory='auto'")
        self.model, self.choice, self.limit = model, choice, limit
        self._estimate: Estimate | None = None

    def plan(self, rules: Rules, inputs: dict[str, Any], targets: int) -> Plan:
        """How to explain a batch.

        Args:
            rules: table of rules.
            inputs: what the model is called with.
            targets: rows of each text.

        Raises:
            OutOfMemoryError: no way fits; says what would.
        """
        ids: Tensor = inputs["input_ids"]
        texts, tokens = ids.shape[0], ids.shape[1]
        decoder = inputs.get("decoder_input_ids")
        tokens = tokens if decoder is None else max(tokens, decoder.shape[1])
        several = max(1, min(targets, AT_ONCE // (texts * tokens)))
        if self.choice != "auto" or is_compiled(self.model):
            return Plan(self.choice == "checkpoint", several)
        if not set(inputs) <= _TEXTS:  # images: a part of them cannot be passed
            return Plan(True, 1)
        if self._estimate is None:
            self._estimate = estimate(self.model, rules, inputs)
        found, limit = self._estimate, self.limit or int(SPARE * available_bytes(ids.device))
        ways = [Plan(False, several), Plan(False, 1)]
        ways += [] if found.checkpoint is None else [Plan(True, several), Plan(True, 1)]
        for way in ways:
            if found.peak(way, texts=texts, tokens=tokens) <= limit:
                return way
        raise OutOfMemoryError(_advice(found, ways[-1], limit, texts, tokens))


def estimate(model: Any, rules: Rules, inputs: dict[str, Any]) -> Estimate:
    """Measure what passes over a few tokens keep, and fit a parabola through them.

    Args:
        model: the model.
        rules: table of rules.
        inputs: those of the explanation; their first tokens, repeated, are what is passed.
    """
    try:
        layers = len(repeated_layers(model))
    except ModelError:
        layers = 1
    full = _fitted([_kept(model, rules, inputs, n) for n in PROBES])
    again = _fitted([_kept(model, rules, inputs, n, saving=True) for n in PROBES]) if layers > 1 else None
    return Estimate(full, again, layers, HELD if inputs["input_ids"].device.type == "cpu" else 0.0)


def available_bytes(device: torch.device) -> int:
    """Bytes that are free on a device: of main memory, what Linux and the control group of this process allow."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = [line for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    found = [int(line.split()[1]) * 1024 for line in lines]
    for names in _GROUPS:
        values = [_lines(f"/sys/fs/cgroup/{name}") for name in names]
        if all(v and v[0].isdecimal() for v in values):
            found.append(int(values[0][0]) - int(values[1][0]))
    if not found:
        raise InputError("memory='auto': this system does not say how much memory is free; give memory_limit in bytes")
    return max(0, min(found))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _kept(model: Any, rules: Rules, inputs: dict[str, Any], tokens: int, *, saving: bool = False) -> int:
    """Bytes that a forward pass over so many tokens keeps for the backward pass, without the weights."""
    accepted = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    given = {k: v for k, v in given.items() if k in accepted}
    for name in ("input_ids", "decoder_input_ids"):
        if name in inputs:
            row = inputs[name][:1]
            given[name] = row.repeat(1, -(-tokens // row.shape[1]))[:, :tokens]
    weights = {w.untyped_storage().data_ptr() for w in (*model.parameters(), *model.buffers())}
    packed: weakref.WeakSet[_Packed] = weakref.WeakSet()

    def pack(x: Tensor) -> _Packed:
        own = _Packed(x)
        packed.add(own)
        return own

    watched = torch.autograd.graph.saved_tensors_hooks(pack, lambda own: own.tensor)
    with watched, propagate(model, rules), checkpointed(model) if saving else nullcontext():
        output = model(**given)
    storages = {own.tensor.untyped_storage().data_ptr(): own.tensor.untyped_storage().nbytes() for own in packed}
    del output  # what its graph does not keep is gone before it is counted
    return sum(size for place, size in storages.items() if place not in weights)


class _Packed:
    """A tensor that a graph keeps, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _fitted(values: list[int]) -> tuple[float, float, float]:
    """The parabola through what the probes keep."""
    (x, y, z), (p, q, r) = PROBES, values
    c = ((r - q) / (z - y) - (q - p) / (y - x)) / (z - x)
    b = (q - p) / (y - x) - c * (x + y)
    return p - b * x - c * x * x, b, c


def _parabola(coefficients: tuple[float, float, float], tokens: int) -> float:
    a, b, c = coefficients
    return max(0.0, a + b * tokens + c * tokens * tokens)


def _advice(found: Estimate, way: Plan, limit: int, texts: int, tokens: int) -> str:
    low, high = 0, tokens
    while high - low > 1:
        middle = (low + high) // 2
        fits = found.peak(way, texts=texts, tokens=middle) <= limit
        low, high = (middle, high) if fits else (low, middle)
    needed = found.peak(way, texts=texts, tokens=tokens)
    fewer = f"{texts} texts of {tokens} tokens" if texts > 1 else f"{tokens} tokens"
    would = [f"texts of at most {low} tokens"] if low else []
    if texts > 1 and found.peak(way, texts=1, tokens=tokens) <= limit:
        would.append("one text at a time")
    would += ["bfloat16 (--dtype bfloat16), which takes half", "a device with more memory (--device)"]
    how = " even if layers are computed again" if way.checkpoint else ""
    return (
        f"out of memory: {fewer} take about {needed / 2**20:,.0f} MiB{how}, "
        f"and {limit / 2**20:,.0f} MiB may be used; what would fit: {', '.join(would)}"
    )

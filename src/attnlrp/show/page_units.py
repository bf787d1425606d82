"""The inside of a model in a page: what is shown at once, and data that the page draws when a section is opened.

Data is JSON. An array of numbers is {"shape", "scale", "data"}: `data` holds whole numbers of 16 bits, little-endian,
deflated, in base64; each row (all but the first axes of attention maps) times its `scale` is relevance.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from attnlrp.explanation import Explanation
from attnlrp.latent import Latent, LatentLayer
from attnlrp.show import text, units

__all__ = ["LIMIT", "context", "packed"]

LIMIT = 4_900_000
"""Bytes of a page that holds layers."""
_FRAME, _CELL, _VALUE = 120_000, 130, 14  # bytes of all but data, of a token, and of its value for one target
_TOP = 20
_STEPS = 2**15 - 1
_CROSSED = re.compile("cross|enc(oder)?_?(dec|attn)", re.IGNORECASE)  # attention of a decoder to its encoder
_ATTENTION = "attention"


def context(explanation: Explanation, labels: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """For each target: sections with what they say at once, their data, and a note of what had to be left out."""
    latent, count = explanation.latent, len(explanation.targets)
    if latent is None:
        return []
    space = LIMIT - _FRAME - (_CELL + _VALUE * count) * len(explanation.tokens)
    blocks, missing = _fitting(explanation, latent, labels or {}, space)
    return [
        {
            "streams": _streams(explanation, latent, k),
            "tables": _tables(explanation, latent, k, blocks[k], labels),
            "attention": _attention(latent, k, blocks[k]),
            "data": blocks[k],
            "note": _left_out(missing, count),
        }
        for k in range(count)
    ]


def packed(values: Tensor) -> dict[str, Any]:
    """Rows of numbers (..., row, column) as whole numbers, each row on a scale of its own; what is not finite is 0.

    Args:
        values: any numbers; of attention, each map is one row.
    """
    rows = values.double().nan_to_num(0.0, 0.0, 0.0)
    rows = rows.flatten(1) if rows.dim() > 2 else rows
    scale = [float(f"{end / _STEPS:.9g}") for end in rows.abs().amax(dim=1).tolist()]
    divisor = torch.tensor([s or 1.0 for s in scale], dtype=torch.float64)[:, None]
    whole = (rows / divisor).round().clamp(-_STEPS, _STEPS).numpy().astype("<i2")
    data = base64.b64encode(zlib.compress(whole.tobytes(), 9)).decode()
    return {"shape": list(values.shape), "scale": scale, "data": data}


# --- data that is drawn later -------------------------------------------------------------------------------------


def _fitting(
    explanation: Explanation, latent: Latent, labels: Mapping[str, str], left: int
) -> tuple[list[dict[str, Any]], dict[str, tuple[int, int]]]:
    """Data of each target, as far as it fits: maps first, then units, then attention, the strongest layers first.

    Returns:
        the data, and of each kind that does not fit how many layers are left out, and of how many.
    """
    targets = range(len(explanation.targets))
    data: list[dict[str, Any]] = [{"maps": [_map(found) for found in units.maps(latent, k)]} for k in targets]
    left -= _size(data)
    missing: dict[str, tuple[int, int]] = {}
    for each in data:
        each["layers"] = {}
    for k, i in _queue(latent, targets):
        layer = latent.layers[i]
        out, of = missing.get(layer.kind, (0, 0))
        block = _block(explanation, latent, k, i, labels) if _may_fit(layer, left) else None
        size = left + 1 if block is None else _size(block)
        if size <= left:
            data[k]["layers"][str(i)] = block
            left -= size
        missing[layer.kind] = (out + (str(i) not in data[k]["layers"]), of + 1)
    return data, {kind: counts for kind, counts in missing.items() if counts[0]}


def _queue(latent: Latent, targets: range) -> Iterator[tuple[int, int]]:
    """(target, layer) in the order in which they are given space."""
    layers = list(enumerate(latent.layers))
    for k in targets:
        yield from ((k, i) for i, layer in layers if layer.kind not in ("residual", _ATTENTION))
    for k in targets:
        attention = [(i, layer) for i, layer in layers if layer.kind == _ATTENTION]
        attention.sort(key=lambda entry: -abs(_sum(entry[1].relevance[k, 0])))
        yield from ((k, i) for i, _ in attention)


def _may_fit(layer: LatentLayer, left: int) -> bool:
    """Whether it is worth to pack a layer: zeros take no space, but attention of long texts is not all zeros."""
    return left > 0 and (layer.attention is None or layer.attention[0].numel() < 30 * left)


def _size(block: Any) -> int:
    return len(json.dumps(block))


def _map(found: units.LayerMap) -> dict[str, Any]:
    end = units.end_of(found.values)
    return {"names": found.names, "start": found.start, "end": end, "values": packed(found.values)}


def _block(explanation: Explanation, latent: Latent, k: int, i: int, labels: Mapping[str, str]) -> dict[str, Any]:
    layer, target = latent.layers[i], (k, explanation.targets[k])
    if layer.attention is None:
        rows = _cells(units.rows_of(latent, i, target, explanation.tokens, labels))
        return {"start": layer.offset, "rows": rows, "values": packed(layer.relevance[k])}
    order = layer.indices[k].argsort()
    sums = [text.signed(_sum(layer.relevance[k, j])) for j in order.tolist()]
    maps = layer.attention[k]
    if not _CROSSED.search(layer.name):
        maps = maps[..., : maps.shape[-2]]  # behind it there is padding
    keys = 0 if layer.offset and _CROSSED.search(layer.name) else layer.offset
    return {"start": layer.offset, "keys": keys, "sums": sums, "maps": packed(maps[order])}


def _cells(rows: list[units.TopUnit]) -> list[list[str]]:
    """Unit, relevance, share, token, activation, label."""
    return [[r.unit, r.relevance, r.share, r.token, r.activation, text.label(r.label) if r.label else ""] for r in rows]


def _sum(row: Tensor) -> float:
    return float(row.double().sum())


# --- what is shown at once ------------------------------------------------------------------------------------------


def _streams(explanation: Explanation, latent: Latent, k: int) -> list[dict[str, Any]]:
    """For each map of the residual stream, where its colours end, and a line for each layer, the last one first."""
    result = []
    for whole in units.maps(latent, k):
        end, found = units.end_of(whole.values), units.short(whole)
        numbers = text.column(found.values.double().sum(dim=1).tolist())
        rows = []
        for name, row, number in zip(found.names, found.values, numbers, strict=True):
            at = int(row.abs().argmax())
            token = f"position {at}" if found.start is None else units.place_of(found.start, at, explanation.tokens)
            rows.append((name, number, token, text.signed(row[at].item())))
        result.append({"rows": rows[::-1], "ends": (text.signed(-end), text.signed(end))})
    return result


def _tables(
    explanation: Explanation, latent: Latent, k: int, data: dict[str, Any], labels: Mapping[str, str] | None
) -> list[dict[str, Any]]:
    """For each kind of units its strongest, and the layers that can be opened."""
    target, tokens = (k, explanation.targets[k]), explanation.tokens
    sections = []
    for kind in units.kinds(latent):
        rows = units.ranked(latent, kind, target, tokens, count=_TOP, labels=labels)
        layers = [
            (i, layer.name, text.signed(_sum(layer.total[k])), layer.indices.shape[1], layer.units)
            for i, layer in enumerate(latent.layers)
            if layer.kind == kind and "rows" in data["layers"].get(str(i), {})
        ]
        labelled = any(row.label for row in rows)
        sections.append({"title": units.TITLES[kind], "rows": rows, "layers": layers, "labelled": labelled})
    return sections


def _attention(latent: Latent, k: int, data: dict[str, Any]) -> list[tuple[int, str, int, str]]:
    """Layers whose maps are in the page, with the strongest head of each."""
    return [
        (i, layer.name, int(layer.indices[k, 0]), text.signed(_sum(layer.relevance[k, 0])))
        for i, layer in enumerate(latent.layers)
        if "maps" in data["layers"].get(str(i), {})
    ]


def _left_out(missing: Mapping[str, tuple[int, int]], targets: int) -> str:
    if not missing:
        return ""
    parts = [f"{kind} of {out} of {of} layers" for kind, (out, of) in missing.items()]
    several = " (counted once for each target)" if targets > 1 else ""
    return (
        f"To keep this page below 5 MB it leaves out maps of {', '.join(parts)}{several}; "
        "save .safetensors to keep everything."
    )

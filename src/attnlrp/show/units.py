"""What all renderers say of the inside of a model: ranked units and layer x token maps, in the same words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnlrp.explanation import ExplainedTarget
from attnlrp.image_explanation import ImageExplanation
from attnlrp.latent import Latent, LatentLayer
from attnlrp.show import colours, text

__all__ = [
    "TITLES",
    "LayerMap",
    "TopUnit",
    "end_of",
    "kinds",
    "maps",
    "named",
    "place",
    "place_of",
    "ranked",
    "rows_of",
    "short",
    "thinned",
]

TITLES = {"neurons": "Neurons", "heads": "Heads", "features": "Features", "attention": "Attention weights, by head"}
"""Headings of the tables, in their order."""
_COLOURED = 0.95  # of the cells of a map that are not zero; the colours end there


class TopUnit(NamedTuple):
    """One row of a table of units.

    Args:
        unit: its address.
        label: what it stands for, or "".
        relevance: summed over the tokens, formatted, in the unit of the target.
        share: relevance as a part of the target, formatted in percent; units of one layer share its relevance, those of
            another layer share it once more.
        token: where it is the strongest, as a label.
        activation: what it computes there, formatted.
        size: relevance as a fraction of the largest magnitude in the table, in [-1, 1].
        layer: index into `Latent.layers`.
        row: index into the kept units of the layer.
    """

    unit: str
    label: str
    relevance: str
    share: str
    token: str
    activation: str
    size: float
    layer: int
    row: int


class LayerMap(NamedTuple):
    """Relevance of the residual stream at each layer and token of one target.

    Args:
        names: addresses of the places, in the order of computation.
        values: relevance (place, token).
        start: index of the first token in the explanation; None where positions are not tokens.
    """

    names: list[str]
    values: Tensor
    start: int | None


def kinds(latent: Latent) -> list[str]:
    """Kinds that have a table of units; heads speak for their attention weights."""
    found = {layer.kind for layer in latent}
    return [kind for kind in TITLES if kind in found and not (kind == "attention" and "heads" in found)]


def place(layer: LatentLayer, at: int, tokens: Sequence[str]) -> str:
    """Label of a position in a layer: its token, or its number where positions are not tokens."""
    return f"position {at}" if layer.offset is None else place_of(layer.offset, at, tokens)


def place_of(start: int | None, at: int, tokens: Sequence[str], *, width: int = 32) -> str:
    """The token at a position behind the start of a layer; the bare number where positions are not tokens."""
    return str(at) if start is None else text.label(tokens[start + at], width=width)


def named(explanation: ImageExplanation) -> tuple[Latent, list[str]]:
    """What was recorded of an image, and names of its positions: tokens in front, and patches by row and column.

    Layers whose positions are not these, as where patches have been merged, have no offset.
    """
    layers = () if explanation.latent is None else explanation.latent.layers
    fronts = [explanation.in_front(x.total.shape[-1], x.offset) for x in layers]
    front = next((f for f in fronts if f is not None), 0)
    own = [x if f == front else dataclasses.replace(x, offset=None) for x, f in zip(layers, fronts, strict=True)]
    rows, columns = explanation.patches.shape[1:]
    patches = [f"row {r}, column {c}" for r in range(rows) for c in range(columns)]
    return Latent(tuple(own)), [f"token {i}" for i in range(front)] + patches


def ranked(
    latent: Latent,
    kind: str,
    target: tuple[int, ExplainedTarget],
    tokens: Sequence[str],
    *,
    count: int,
    labels: Mapping[str, str] | None = None,
) -> list[TopUnit]:
    """The units of the largest |relevance| of all layers of one kind, largest first.

    Args:
        latent: what was recorded.
        kind: such as "neurons".
        target: index and facts of the explained target.
        tokens: text of each token.
        count: rows; fewer where the explanation keeps fewer units of a layer.
        labels: what units stand for, by address.
    """
    layers = [(i, layer) for i, layer in enumerate(latent.layers) if layer.kind == kind]
    count = min([count, *(layer.indices.shape[1] for _, layer in layers if layer.indices.shape[1] < layer.units)])
    sums = [(i, j, v) for i, x in layers for j, v in enumerate(x.relevance[target[0]].double().sum(dim=-1).tolist())]
    found = sorted(sums, key=lambda entry: -abs(entry[2]))[:count]
    return _rows(latent, found, target, tokens, labels or {})


def rows_of(
    latent: Latent,
    layer: int,
    target: tuple[int, ExplainedTarget],
    tokens: Sequence[str],
    labels: Mapping[str, str] | None = None,
) -> list[TopUnit]:
    """All kept units of one layer, see `ranked`."""
    sums = latent.layers[layer].relevance[target[0]].double().sum(dim=-1).tolist()
    return _rows(latent, [(layer, j, value) for j, value in enumerate(sums)], target, tokens, labels or {})


def _rows(
    latent: Latent,
    found: list[tuple[int, int, float]],
    target: tuple[int, ExplainedTarget],
    tokens: Sequence[str],
    labels: Mapping[str, str],
) -> list[TopUnit]:
    k, explained = target
    values = [value for *_, value in found]
    result = []
    for (i, j, value), number, size in zip(found, text.column(values), colours.normalise(values), strict=True):
        layer = latent.layers[i]
        unit = layer.address(int(layer.indices[k, j]))
        at = int(layer.relevance[k, j].abs().argmax())
        activation = text.signed(layer.activation[k, j, at].item())
        share = _share(value, explained.logit)
        token = place(layer, at, tokens)
        result.append(TopUnit(unit, labels.get(unit, ""), number, share, token, activation, size, i, j))
    return result


def _share(value: float, whole: float) -> str:
    return f"{value / abs(whole):+.1%}" if whole and math.isfinite(value / whole) else "–"


def maps(latent: Latent, target: int) -> list[LayerMap]:
    """The residual stream of one target; an encoder and its decoder have a map each."""
    groups: dict[tuple[int | None, int], list[LatentLayer]] = {}
    for layer in latent:
        if layer.kind == "residual":
            groups.setdefault((layer.offset, layer.total.shape[-1]), []).append(layer)
    return [
        LayerMap([x.name for x in layers], torch.stack([x.total[target] for x in layers]), start)
        for (start, _), layers in groups.items()
    ]


def short(found: LayerMap) -> LayerMap:
    """What goes into the first layer, and what each layer gives on."""
    keep = [i for i, name in enumerate(found.names) if i == 0 or name.endswith(":after")]
    names = [found.names[i].removesuffix(":after") for i in keep]
    return LayerMap(names, found.values[keep], found.start) if len(keep) > 1 else found


def thinned(found: LayerMap, rows: int) -> LayerMap:
    """At most this many of the places, evenly, the first and the last among them."""
    count = len(found.names)
    if count <= rows:
        return found
    keep = sorted({round(i * (count - 1) / (rows - 1)) for i in range(rows)})
    return LayerMap([found.names[i] for i in keep], found.values[keep], found.start)


def end_of(values: Tensor) -> float:
    """Relevance at which the colours of a map end: the last token of late layers outshines all else."""
    sizes = values[torch.isfinite(values) & (values != 0)].abs().double().sort().values
    return float(sizes[min(len(sizes) - 1, int(_COLOURED * len(sizes)))]) if len(sizes) else 0.0

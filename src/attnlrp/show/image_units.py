"""The inside of a model in a figure: layer x token maps and bars of units, below the heat map of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attnlrp.explanation import Explanation
from attnlrp.show import colours, image, text, units

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["attach"]

_TOP = 12  # units of each kind
_ROW, _LINE = 0.14, 0.2  # inch, of a layer and of a unit
_WIDE, _NARROW = 0.3, 0.03  # inch, of a token in a map
_LABELLED = 0.11  # inch, above which the columns of a map have labels
_SMALL = 8.0  # points
_TITLE, _GAP = 0.55, 0.3  # inch
_LEFT, _SPACE = 1.3, 1.0  # inch, of the names of layers and of tokens
_MARGIN = 0.3


def attach(drawing: Figure, explanation: Explanation, labels: Mapping[str, str] | None = None) -> None:
    """Draw what was recorded below a figure of one target, which grows for it."""
    if explanation.latent is None:
        return
    width = drawing.get_size_inches()[0]
    found = [units.short(each) for each in units.maps(explanation.latent, 0)]
    target = (0, explanation.targets[0])
    tables = [
        (kind, units.ranked(explanation.latent, kind, target, explanation.tokens, count=_TOP, labels=labels))
        for kind in units.kinds(explanation.latent)
    ]
    heights = [_TITLE + len(x.names) * _ROW + _SPACE for x in found]
    heights += [_TITLE + len(rows) * _LINE + _GAP for _, rows in tables]
    top = sum(heights)
    _grow(drawing, top)
    for each, height in zip(found, heights, strict=False):
        _map(drawing, each, explanation, width, top)
        top -= height
    for (kind, rows), height in zip(tables, heights[len(found) :], strict=True):
        _bars(drawing, units.TITLES[kind], rows, width, top)
        top -= height


def _grow(drawing: Figure, extra: float) -> None:
    """Space of this many inches at the bottom; what is drawn keeps its size and place."""
    width, height = drawing.get_size_inches()
    whole = height + extra
    for axes in drawing.axes:
        x0, y0, across, down = axes.get_position().bounds
        axes.set_position((x0, (y0 * height + extra) / whole, across, down * height / whole))
    for words in drawing.texts:
        x, y = words.get_position()
        words.set_position((x, (y * height + extra) / whole))
    drawing.set_size_inches(width, whole)


def _write(drawing: Figure, top: float, title: str, note: str) -> None:
    width, height = drawing.get_size_inches()
    bold = image.font(11.0) | {"fontweight": "bold"}
    drawing.text(_MARGIN / width, (top - 0.15) / height, title, **bold)
    quiet = image.font(_SMALL) | {"color": image.MUTED}
    drawing.text(_MARGIN / width, (top - 0.35) / height, image.drawable(note), **quiet)


def _place(drawing: Figure, left: float, top: float, across: float, down: float) -> Any:
    width, height = drawing.get_size_inches()
    axes = drawing.add_axes((left / width, (top - down) / height, across / width, down / height))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return axes


def _map(drawing: Figure, found: units.LayerMap, explanation: Explanation, width: float, top: float) -> None:
    """Layers from the last down to the first, above their tokens."""
    rows, columns = found.values.shape
    cell = max(_NARROW, min(_WIDE, (width - 2 * _MARGIN - _LEFT) / columns))
    end = units.end_of(found.values)
    note = f"relevance of each layer (up) at each token; colours end at ±{end:.3g} {explanation.targets[0].unit}"
    _write(drawing, top, "Residual stream", note)
    axes = _place(drawing, _MARGIN + _LEFT, top - _TITLE, columns * cell, rows * _ROW)
    shades = (found.values.float() / (end or 1.0)).nan_to_num(0.0).clamp(-1, 1).flip(0)
    first = found.start or 0
    extent = (first - 0.5, first + columns - 0.5, rows - 0.5, -0.5)
    colour = {"cmap": image.scale(), "vmin": -1, "vmax": 1}
    axes.imshow(shades.numpy(), **colour, extent=extent, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(rows), [image.drawable(text.label(n, width=22)) for n in reversed(found.names)])
    if cell >= _LABELLED:
        names = [units.place_of(found.start, i, explanation.tokens, width=12) for i in range(columns)]
        axes.set_xticks(range(first, first + columns), [image.drawable(name) for name in names], rotation=90)
    else:
        axes.set_xlabel("position of the token", **image.font(_SMALL))
    _plain(axes)


def _bars(drawing: Figure, title: str, rows: list[units.TopUnit], width: float, top: float) -> None:
    """A bar for each unit: its address, its relevance, and what is known of it."""
    _write(drawing, top, title, "relevance, share of the target, token where it is the strongest, label")
    left, across = _MARGIN + 2.6, 1.6
    axes = _place(drawing, left, top - _TITLE, across, len(rows) * _LINE)
    shades = [colours.scale(1.0 if row.size > 0 else -1.0) for row in rows]
    axes.barh(range(len(rows)), [row.size for row in rows], color=shades, height=0.7)
    axes.axvline(0, color=image.MUTED, linewidth=0.6)
    axes.set(xlim=(-1.05, 1.05), ylim=(len(rows) - 0.5, -0.5), xticks=[])
    axes.set_yticks(range(len(rows)), [image.drawable(text.label(row.unit, width=40)) for row in rows])
    for i, row in enumerate(rows):
        known = " · ".join([row.token, *([text.label(row.label)] if row.label else [])])
        words = image.drawable(f"{row.relevance:>9} {row.share:>7}  {text.label(known, width=50)}")
        axes.text(1.1, i, words, **image.font(_SMALL), verticalalignment="center", clip_on=False)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.tick_params(length=0, colors=colours.ink(), labelsize=_SMALL)
    for words in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        words.set(fontfamily=image.font(_SMALL)["fontfamily"], parse_math=False, usetex=False)

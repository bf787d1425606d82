"""The inside of a model for the terminal: a layer x token map, and tables of units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.style import Style
from rich.table import Table
from rich.text import Text

from attnlrp.explanation import ExplainedTarget
from attnlrp.latent import Latent
from attnlrp.show import colours, text, units

__all__ = ["parts", "strongest"]

_ROWS = 24  # of a map, where the height of the terminal is not known
_KEPT = 8  # lines of a terminal that a map leaves
_CELL = 6  # characters of a cell at most
_BAR = 12
_FAINT = 0.02
_ENDLESS = 10_000


def parts(
    latent: Latent,
    target: tuple[int, ExplainedTarget],
    tokens: Sequence[str],
    *,
    top: int,
    dark: bool,
    labels: Mapping[str, str] | None = None,
) -> list[RenderableType]:
    """A map of the residual stream and a table of each other kind, as far as they were recorded."""
    out: list[RenderableType] = []
    for found in units.maps(latent, target[0]):
        out += [Text(), _Map(units.short(found), tokens, target[1].unit, dark)]
    for kind in units.kinds(latent):
        rows = units.ranked(latent, kind, target, tokens, count=top, labels=labels)
        out += [Text(), Text(units.TITLES[kind]), _Table(rows)]
    note = "Share is of the target; each layer shares out the relevance that comes to it."
    return [*out, Text(), Text(note, "dim")] if units.kinds(latent) else out


def strongest(latent: Latent, target: tuple[int, ExplainedTarget], tokens: Sequence[str]) -> Text:
    """The strongest units of one of several targets, on one line."""
    found = [r for kind in units.kinds(latent) for r in units.ranked(latent, kind, target, tokens, count=3)]
    return Text(" · ".join(f"{r.unit} {r.relevance}" for r in found), style="dim")


class _Table:
    """Units in lines; where the width does not allow for all columns, bars go first, then activations."""

    def __init__(self, rows: list[units.TopUnit]) -> None:
        self.rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        long = max((len(row.unit) for row in self.rows), default=0) > options.max_width // 3
        whole, plain = self._table(long, bars=True), self._table(long)
        endless = options.update(max_width=_ENDLESS)
        if Measurement.get(console, endless, whole).maximum <= options.max_width:
            yield whole
        elif Measurement.get(console, endless, plain).minimum <= options.max_width:
            yield plain
        else:
            yield self._table(long, activation=False)

    def _table(self, long: bool, *, activation: bool = True, bars: bool = False) -> Table:
        table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
        labelled = any(row.label for row in self.rows)
        table.add_column("unit", overflow="fold", no_wrap=not long)
        for name in ("relevance", "share"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("strongest at", overflow="fold")
        if activation:
            table.add_column("activation", justify="right", no_wrap=True)
        if labelled:
            table.add_column("label", overflow="fold")
        if bars:
            table.add_column("")
        for row in self.rows:
            words = [row.unit, row.relevance, row.share, text.isolate(row.token)] + [row.activation] * activation
            words += [text.isolate(text.label(row.label, width=60)) if row.label else ""] * labelled
            bar = Text("━" * max(1, round(abs(row.size) * _BAR)), colours.scale(math.copysign(1.0, row.size)))
            table.add_row(*map(Text, words), *[bar] * bars)
        return table


class _Map:
    """Layers from the last down to the first, above their tokens; neighbours are joined where the width ends."""

    def __init__(self, found: units.LayerMap, tokens: Sequence[str], unit: str, dark: bool) -> None:
        self.found, self.tokens, self.unit, self.dark = found, tokens, unit, dark

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        height = console.size.height - _KEPT if console.is_terminal else _ROWS
        found = units.thinned(self.found, max(4, min(height, len(self.found.names))))
        left = min(max(map(len, found.names)), options.max_width // 3)
        count = found.values.shape[1]
        join = -(-count // max(1, options.max_width - left - 2))
        values = torch.nn.functional.pad(found.values, (0, -count % join)).unflatten(1, (-1, join)).sum(dim=-1)
        width = max(1, min(_CELL, (options.max_width - left - 2) // values.shape[1]))
        end = units.end_of(values)
        yield self._title(end, join)
        for name, row in reversed(list(zip(found.names, values.tolist(), strict=True))):
            line = Text(f"{text.label(name, width=left):>{left}}  ", "dim")
            for value in row:
                line.append_text(self._cell(value / (end or 1.0), width))
            yield line
        if join == 1 and width > 2:
            yield self._feet(found, left, width)

    def _title(self, end: float, join: int) -> Text:
        joined = "" if join == 1 else f", {join} to a column"
        how = f"layers × tokens{joined}; colours end at ±{end:.3g} {self.unit}"
        return Text("Residual stream  ", "not dim").append(how, "dim")

    def _cell(self, size: float, width: int) -> Text:
        """A colour, and a sign; two signs where it is strong."""
        size = 0.0 if math.isnan(size) else max(-1.0, min(1.0, size))
        sign = ("+" if size > 0 else "-") * (abs(size) >= 0.1) * (1 + (abs(size) > 0.5 and width > 1))
        if abs(size) < _FAINT:
            return Text(" " * width)
        style = Style(color=colours.ink(dark=self.dark), bgcolor=colours.scale(size, dark=self.dark))
        return Text(sign.center(width), style)

    def _feet(self, found: units.LayerMap, left: int, width: int) -> Text:
        line = Text(" " * (left + 2))
        for i in range(found.values.shape[1]):
            name = units.place_of(found.start, i, self.tokens, width=width).removeprefix("␣")
            shown = Text(text.isolate(text.label(name, width=width - 1)), "dim")
            shown.truncate(width - 1, pad=True)
            line.append_text(shown).append(" ")
        return line

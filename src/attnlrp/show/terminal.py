"""Heat map and tables for the terminal. Without colour, the signed numbers carry the information.

Tokens come from untrusted text: they are `Text` objects, never markup, and their control characters are visible.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from attnlrp.explanation import ExplainedTarget, Explanation
from attnlrp.show import colours, terminal_units, text

__all__ = ["is_dark", "render"]

_BAR = 20  # cells
_LEGEND = 31  # cells
_FAINT = 0.02  # weaker cells keep the terminal's own background
_LONG = 100  # tokens, above which the lines of several targets leave out the weaker tokens
_KEPT = 15  # strongest tokens that such a line keeps
_NUMBER = 7  # cells of one number in the matrix


def render(
    explanation: Explanation, *, top: int = 10, dark: bool | None = None, labels: Mapping[str, str] | None = None
) -> RenderableType:
    """What `Explanation.show` prints.

    Args:
        explanation: one or several targets.
        top: rows of the table of the most relevant tokens, and of units.
        dark: whether the terminal is dark; None reads COLORFGBG and else takes it to be.
        labels: what units stand for, by address.
    """
    dark = is_dark() if dark is None else dark
    head = Text(text.heading(explanation), style="dim")
    several = len(explanation.targets) != 1
    body = _lines(explanation, dark) if several else _single(explanation, top, dark)
    if explanation.latent is not None and not several:
        target = (0, explanation.targets[0])
        inside, tokens = explanation.latent, explanation.tokens
        body += terminal_units.parts(inside, target, tokens, top=top, dark=dark, labels=labels)
    return Group(head, Text(), *body)


def _single(explanation: Explanation, top: int, dark: bool) -> list[RenderableType]:
    parts: list[RenderableType] = [_target(explanation, explanation.targets[0])]
    if explanation.targets[0].candidates:
        parts.append(_candidates(explanation.targets[0]))
    parts += [Text(), _heat(explanation, 0, dark), Text(), _legend(explanation, 0, dark), Text()]
    return [*parts, _table(explanation, top), Text(), Text(text.balance(explanation, 0), style="dim")]


def _lines(explanation: Explanation, dark: bool) -> list[RenderableType]:
    """One heading and one heat map per target, then the matrix if it fits."""
    parts: list[RenderableType] = []
    for k, target in enumerate(explanation.targets):
        strongest = text.top(explanation, k, 3)
        parts.append(_target(explanation, target))
        parts.append(_line(explanation, k, dark))
        parts.append(Text(" · ".join(f"{text.isolate(t.token)} {t.relevance}" for t in strongest), style="dim"))
        if explanation.latent is not None:
            parts.append(terminal_units.strongest(explanation.latent, (k, target), explanation.tokens))
        parts.append(Text())
    return [*parts, _Matrix(explanation, dark)]


def _heat(explanation: Explanation, row: int, dark: bool) -> Text:
    """The input with every token on its colour; special tokens are italic; each of several origins has its line."""
    values = colours.normalise(explanation.relevance[row].tolist())
    fields = zip(explanation.segments, explanation.tokens, values, explanation.special, strict=True)
    out = Text()
    for name, tokens in groupby(fields, key=lambda field: field[0]):
        if not {"prompt", "generated"} >= set(explanation.segments):
            out.append(f"{'' if not out else chr(10)}{name.capitalize():<14}", "dim")
        for _, token, value, special in tokens:
            out.append(text.inline(token), _cell(value, dark) + Style(italic=special))
    return out


def _line(explanation: Explanation, row: int, dark: bool) -> Text:
    """The heat map in short: no line breaks, nothing behind the last token that counts."""
    values = colours.normalise(explanation.relevance[row].tolist())
    read = explanation.targets[row].position or 0
    last = max([read, *(i for i, value in enumerate(values) if value)])
    keep = _strong(values) if last >= _LONG else [True] * len(values)
    out = Text()
    for i, token in enumerate(explanation.tokens[: last + 1]):
        if i and explanation.segments[i] == "decoder" != explanation.segments[i - 1]:
            out.append(" → ", "dim")
        if keep[i]:
            style = _cell(values[i], dark) + Style(italic=explanation.special[i])
            out.append(text.inline(token).replace("\n", ""), style)
        elif i == 0 or keep[i - 1]:
            out.append(" … ", "dim")
    return out


def _strong(values: Sequence[float]) -> list[bool]:
    """Which tokens a short line keeps: the strongest and their neighbours."""
    strongest = set(sorted(range(len(values)), key=lambda i: -abs(values[i]))[:_KEPT])
    return [not strongest.isdisjoint((i - 1, i, i + 1)) for i in range(len(values))]


def _cell(value: float, dark: bool) -> Style:
    """Both ink and background, so that the cell is readable on any terminal."""
    if abs(value) < _FAINT:
        return Style()
    return Style(color=colours.ink(dark=dark), bgcolor=colours.scale(value, dark=dark))


def _legend(explanation: Explanation, row: int, dark: bool) -> Text:
    end = colours.limit(explanation.relevance[row].tolist())
    out = Text(f"{text.signed(-end)} ")
    for i in range(_LEGEND):
        value = 2 * i / (_LEGEND - 1) - 1
        out.append(
            "0" if i == _LEGEND // 2 else " ", Style(bgcolor=colours.scale(value, dark=dark)) + _cell(value, dark)
        )
    return out.append(f" {text.signed(end)}").append(f"  relevance in {explanation.targets[row].unit}", "dim")


def _target(explanation: Explanation, target: ExplainedTarget) -> Text:
    out = Text("Target        ", "dim").append(text.isolate(text.label(target.token)), "bold not dim")
    return out.append("  ").append(" · ".join(text.facts(explanation, target)), "not dim")


def _candidates(target: ExplainedTarget) -> Text:
    out = Text("Other logits  ", "dim")
    listed = (f"{text.isolate(name)} {logit}" for name, logit in text.runners_up(target))
    return out.append(" · ".join(listed), "not dim")


def _table(explanation: Explanation, top: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    table.add_column("#", justify="right", style="dim")
    table.add_column("token", no_wrap=True)
    table.add_column("position", justify="right", style="dim")
    table.add_column("relevance", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for rank, entry in enumerate(text.top(explanation, 0, top), start=1):
        colour = colours.scale(math.copysign(1.0, entry.size))
        bar = Text("━" * max(1, round(abs(entry.size) * _BAR)), colour)
        words = (str(rank), text.isolate(entry.token), str(entry.position), entry.relevance, entry.share)
        table.add_row(*map(Text, words), bar)
    return table


class _Matrix:
    """Output x input with numbers; prints nothing where the console is too narrow for it."""

    def __init__(self, explanation: Explanation, dark: bool) -> None:
        self.explanation = explanation
        self.dark = dark

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if 2 * len(self.explanation.tokens) > options.max_width:
            return
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
        table.add_column("", justify="right", no_wrap=True)
        for token in self.explanation.tokens:
            table.add_column(Text(text.isolate(text.label(token, width=_NUMBER))), justify="right", no_wrap=True)
        for target, row in zip(self.explanation.targets, self.explanation.relevance.tolist(), strict=True):
            numbers = zip(row, colours.normalise(row), strict=True)
            cells = [Text(f"{value:+.2g}" if value else "0", _cell(size, self.dark)) for value, size in numbers]
            table.add_row(Text(text.isolate(text.label(target.token, width=16))), *cells)
        unbounded = options.update(max_width=1_000_000)  # a measure is clipped to the width otherwise
        if console.measure(table, options=unbounded).maximum <= options.max_width:
            yield table


def is_dark() -> bool:
    """Some terminals tell their colours as "foreground;background" with 7 and 15 for light ones."""
    return os.environ.get("COLORFGBG", "").rsplit(";", 1)[-1] not in ("7", "15")

"""Reference samples in the terminal: each text around its peak, coloured by what the unit computes there."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from attnlrp.ranking import ReferenceSample
from attnlrp.show import colours, text
from attnlrp.show.terminal import is_dark

__all__ = ["listed", "render"]

_FAINT = 0.02  # weaker cells keep the terminal's own background


def render(samples: Sequence[ReferenceSample], *, around: int = 12, dark: bool | None = None) -> RenderableType:
    """The samples of one unit, the best first.

    Args:
        samples: those with activations are coloured, on one scale; in the others the peak is underlined.
        around: tokens that are shown before and behind the peak.
        dark: whether the terminal is dark; None reads COLORFGBG and else takes it to be.
    """
    dark = is_dark() if dark is None else dark
    end = colours.limit([v for s in samples if s.activation is not None for v in s.activation.tolist()]) or 1.0
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    table.add_column("#", justify="right", style="dim")
    table.add_column(samples[0].by if samples else "value", justify="right", no_wrap=True)
    table.add_column("peak", no_wrap=True)
    table.add_column("text")
    table.add_column("sample", style="dim", no_wrap=True)
    numbers = text.column([s.value for s in samples])
    for sample, number in zip(samples, numbers, strict=True):
        where = f"{text.label(sample.passage.name, width=24)} @{sample.position}"
        peak = text.isolate(text.label(sample.word, width=18))
        table.add_row(str(sample.rank), number, Text(peak), _passage(sample, around, end, dark), Text(where))
    if not samples:
        return Text("no text has come to this unit", style="dim")
    return Group(table)


def listed(pairs: Sequence[tuple[str, str]]) -> Text:
    """Words or tokens with their numbers, on one line."""
    return Text(" · ".join(f"{text.isolate(text.label(word))} {number}" for word, number in pairs) or "–")


def _passage(sample: ReferenceSample, around: int, end: float, dark: bool) -> Text:
    tokens, peak = sample.passage.tokens, sample.position
    if not tokens:  # of an image
        return Text()
    first, last = max(0, peak - around), min(len(tokens), peak + around + 1)
    out = Text("… " if first else "", "dim")
    for k in range(first, last):
        out.append(text.inline(tokens[k]).replace("\n", ""), _cell(sample, k, end, dark))
    return out.append(" …" if last < len(tokens) else "", "dim")


def _cell(sample: ReferenceSample, token: int, end: float, dark: bool) -> Style:
    style = Style(underline=token == sample.position, dim=False)
    if sample.activation is None or abs(value := sample.activation[token].item() / end) < _FAINT:
        return style
    return style + Style(color=colours.ink(dark=dark), bgcolor=colours.scale(value, dark=dark))

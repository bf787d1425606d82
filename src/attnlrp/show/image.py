"""Heat map as a matplotlib figure: tokens in lines like text, or a matrix for several targets.

Figures are built without pyplot and carry their own colours and fonts, so nothing global changes.
A character for which no installed font has a glyph is drawn as a white square; nothing warns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len

from attnlrp.errors import InputError
from attnlrp.explanation import Explanation
from attnlrp.show import colours, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

__all__ = ["MUTED", "drawable", "empty", "figure", "font", "scale"]

_COLUMNS = 80  # cells of a line of text
_CELL = 0.1  # inch, width of one cell
_LINE = 0.28  # inch, height of one line
_SIZE = 11.95  # points: the advance of a monospaced glyph (0.602 em) is then one cell
_SMALL = 8.0  # points
_SQUARE = 0.2  # inch, one cell of the matrix
_MARGIN, _HEAD, _FOOT = 0.3, 1.0, 0.9  # inch
_NARROWEST = 6.0  # inch
_LONGEST = 1000  # lines; a longer image is beyond what matplotlib can write
_LABELS = 120  # tokens, above which the matrix shows positions instead
MUTED = "#5c5c62"
"""Colour of what is beside the point."""
_MISSING = "□"
# Fonts beside matplotlib's own, in order; an installed one supplies the glyphs that the ones before it lack.
_FONTS = (
    "DejaVu Sans Mono",
    "DejaVu Sans",
    "Noto Sans Mono CJK SC",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Nirmala UI",
    "Noto Emoji",
    "Segoe UI Emoji",
    "Segoe UI Symbol",
    "Symbola",
)


def figure(explanation: Explanation, labels: Mapping[str, str] | None = None) -> Figure:
    """Draw one target as text, with layers and units below it; several as a matrix of output x input.

    Raises:
        InputError: matplotlib is not installed, or the text is too long for a figure.
    """
    drawing = empty()
    if len(explanation.targets) == 1:
        from attnlrp.show import image_units

        _text(drawing, explanation)
        image_units.attach(drawing, explanation, labels)
    else:
        _matrix(drawing, explanation)
    return drawing


def empty() -> Figure:
    """A white figure that can be saved.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('figures need matplotlib, which is not installed: pip install "attnlrp[plot]"') from error
    drawing = Figure(facecolor="white")
    FigureCanvasAgg(drawing)
    return drawing


def _text(drawing: Figure, explanation: Explanation) -> None:
    """Every token on its colour, in a grid of monospaced cells."""
    from matplotlib.collections import PolyCollection

    row, target = explanation.relevance[0].tolist(), explanation.targets[0]
    boxes, lines = _layout(explanation.tokens)
    axes = _axes(drawing, width=_COLUMNS * _CELL, height=lines * _LINE)
    axes.set_axis_off()
    axes.set(xlim=(0, _COLUMNS), ylim=(lines, 0))
    corners = [[(x, y), (x + width, y), (x + width, y + 0.94), (x, y + 0.94)] for _, _, x, y, width in boxes]
    shades = colours.normalise(row)
    axes.add_collection(PolyCollection(corners, facecolors=[colours.scale(shades[i]) for i, *_ in boxes]))
    for i, piece, x, y, _ in boxes:
        slant = "italic" if explanation.special[i] else "normal"
        axes.text(x, y + 0.68, piece, **font(_SIZE), fontstyle=slant)
    _head(drawing, explanation, text.label(target.token), " · ".join(text.facts(explanation, target)))
    _colour_bar(drawing, colours.limit(row), target.unit)


def _layout(tokens: tuple[str, ...]) -> tuple[list[tuple[int, str, int, int, int]], int]:
    """Wrap tokens like text: (token, piece, x, line, width) in cells, and the number of lines."""
    boxes: list[tuple[int, str, int, int, int]] = []
    x = line = 0
    for i, token in enumerate(tokens):
        for k, part in enumerate(text.inline(token).split("\n")):
            x, line = (0, line + 1) if k else (x, line)
            for piece in _pieces(drawable(part)):
                width = _width(piece)
                x, line = (0, line + 1) if x + width > _COLUMNS else (x, line)
                boxes.append((i, piece, x, line, width))
                x += width
    if line >= _LONGEST:
        raise InputError(f"figure: the text takes {line + 1} lines, more than the {_LONGEST} of a figure; save .html")
    return boxes, line + 1


def _width(piece: str) -> int:
    """Cells that a piece takes, character by character: matplotlib does not join emoji."""
    return sum(map(cell_len, piece))


def _pieces(part: str) -> list[str]:
    """A token in pieces that fit on a line; nearly always one."""
    step = _COLUMNS if _width(part) == len(part) else _COLUMNS // 2
    return [part[i : i + step] for i in range(0, len(part), step)]


def _matrix(drawing: Figure, explanation: Explanation) -> None:
    """Output x input on one scale, so that rows can be compared."""
    import torch

    outputs = [drawable(text.label(target.token, width=20)) for target in explanation.targets]
    inputs = [drawable(text.label(token, width=20)) for token in explanation.tokens]
    values = [value for row in explanation.relevance.tolist() for value in row]
    rows, columns, end = len(outputs), len(inputs), colours.limit(values)
    labelled = columns <= _LABELS
    axes = _axes(
        drawing,
        width=columns * _SQUARE if labelled else _COLUMNS * _CELL,
        height=max(rows * _SQUARE, 0.5),
        left=_widest(outputs),
        below=_widest(inputs) if labelled else 0.2,
    )
    shades = torch.tensor(colours.normalise(values)).reshape(rows, columns)
    axes.imshow(shades.numpy(), cmap=scale(), vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(rows), outputs, **font(_SMALL))
    if labelled:
        axes.set_xticks(range(columns), inputs, rotation=90, **font(_SMALL))
    axes.tick_params(length=0, colors=colours.ink(), labelsize=_SMALL)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    across = "input tokens" if labelled else "position of the input token"
    _head(drawing, explanation, f"{rows} outputs", f"rows: output tokens · columns: {across}")
    _colour_bar(drawing, end, " and ".join(sorted({target.unit for target in explanation.targets})))


def _axes(drawing: Figure, *, width: float, height: float, left: float = 0.0, below: float = 0.0) -> Axes:
    """Axes of this size in a figure with space for the head and the colour bar; all in inches."""
    full_width = max(width + left, _NARROWEST) + 2 * _MARGIN
    full_height = height + below + _HEAD + _FOOT
    drawing.set_size_inches(full_width, full_height)
    corner = (_MARGIN + left) / full_width, (_FOOT + below) / full_height
    return drawing.add_axes((*corner, width / full_width, height / full_height))


def _widest(labels: Sequence[str]) -> float:
    """Space of the longest tick label, in inches."""
    return max(map(_width, labels), default=0) * _CELL * _SMALL / _SIZE + 0.1


def _head(drawing: Figure, explanation: Explanation, title: str, facts: str) -> None:
    """Three lines at the top left: the target, what is known of it, where the numbers come from."""
    width, height = drawing.get_size_inches()
    lines = (
        (title, 14.0, "bold", colours.ink()),
        (facts, 9.0, "normal", colours.ink()),
        (text.heading(explanation), _SMALL, "normal", MUTED),
    )
    for line, (words, size, weight, colour) in enumerate(lines):
        x, y = _MARGIN / width, 1 - (0.35 + 0.22 * line) / height
        drawing.text(x, y, drawable(words), **font(size) | {"color": colour}, fontweight=weight)


def _colour_bar(drawing: Figure, end: float, unit: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    width, height = drawing.get_size_inches()
    space = drawing.add_axes((_MARGIN / width, 0.45 / height, 2.2 / width, 0.12 / height))
    ticks = {-1: text.signed(-end), 0: "0", 1: text.signed(end)} if end else {0: "0"}
    bar = drawing.colorbar(ScalarMappable(Normalize(-1, 1), scale()), cax=space, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.set_xticks(list(ticks), list(ticks.values()), **font(_SMALL))
    for tick, label in zip(ticks, bar.ax.get_xticklabels(), strict=True):
        label.set_horizontalalignment(("left", "center", "right")[tick + 1])
    bar.ax.tick_params(length=0, labelsize=_SMALL, colors=colours.ink())
    drawing.text((_MARGIN + 2.5) / width, 0.45 / height, f"relevance in {unit}", **font(_SMALL) | {"color": MUTED})


@cache
def scale() -> ListedColormap:
    """The one scale of colours."""
    from matplotlib.colors import ListedColormap

    return ListedColormap([colours.scale(i / 128) for i in range(-128, 129)], name="attnlrp")


def font(size: float) -> dict[str, Any]:
    """How every text is drawn; tokens such as $x$ are neither mathematics nor LaTeX."""
    return {
        "fontsize": size,
        "fontfamily": _fonts()[0],
        "color": colours.ink(),
        "parse_math": False,
        "usetex": False,
    }


@cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """The fonts of `_FONTS` that are installed, and the code points that they draw together."""
    from matplotlib.font_manager import fontManager, get_font

    files = {entry.name: entry.fname for entry in reversed(fontManager.ttflist) if entry.name in _FONTS}
    glyphs = frozenset(code for file in files.values() for code in get_font(file).get_charmap())
    return [name for name in _FONTS if name in files], glyphs


def drawable(shown: str) -> str:
    """Text in characters that some font has; what has no width of its own is left out, the rest is a square."""
    _, glyphs = _fonts()
    return "".join(c if ord(c) in glyphs else _MISSING * min(1, cell_len(c)) for c in shown)

"""Heat maps of images: figure, HTML page, notebook, terminal.

Each target has a line of three panels: what the model reads; relevance of each pixel; relevance of each patch over the
picture in grey, where the weaker a patch is, the more of the picture shows. Both maps go from -limit to +limit. A few
pixels or patches can be many times as relevant as all others, so colours end at a quantile, which is written under
each map.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from markupsafe import Markup

from attnlrp.errors import InputError
from attnlrp.explanation import ExplainedTarget
from attnlrp.image_explanation import ImageExplanation
from attnlrp.latent import Latent, LatentLayer
from attnlrp.show import colours, text, units

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure", "fragment", "page", "panels", "render", "save", "show"]

_PIXELS, _PATCHES = 0.999, 0.99  # quantiles of the magnitudes, where the colours of the maps end
_STEPS = 128  # colours on each side of zero
_OPAQUE = 0.85  # of the strongest patch over the picture
_PANEL, _GAP, _LEFT, _TITLE, _HEAD, _FOOT = 2.6, 0.15, 0.25, 0.6, 0.35, 0.3  # inch
_WIDEST = 32  # patches side by side in a terminal
_TOP = 10
_FRONT = "Tokens are in front of the patches, such as the class token; what is not on patches lies there."


class Panels(NamedTuple):
    """Pictures of one target (height, width, 3), and where their colours end.

    Args:
        pixels: relevance of each pixel.
        overlay: relevance of each patch over the picture.
        pixel_end: relevance of a pixel at the end of the scale.
        patch_end: the same of a patch.
    """

    pixels: np.ndarray
    overlay: np.ndarray
    pixel_end: float
    patch_end: float


class _Layer(NamedTuple):
    """What a layer gives on: its address, relevance, the part of it on patches, where it is the strongest; by patch."""

    name: str
    relevance: str
    on_patches: str
    place: str
    patches: torch.Tensor | None


def panels(explanation: ImageExplanation, target: int = 0) -> Panels:
    """The pictures of one target."""
    relevance, patches = explanation.relevance[target].float(), explanation.patches[target].float()
    pixel_end, patch_end = _quantile(relevance, _PIXELS), _quantile(patches, _PATCHES)
    height, width = relevance.shape
    spread = patches.repeat_interleave(explanation.patch, 0).repeat_interleave(explanation.patch, 1)[:height, :width]
    strength = (spread / (patch_end or 1.0)).clamp(-1, 1)
    grey = explanation.picture.float() @ torch.tensor([0.299, 0.587, 0.114])
    over = _OPAQUE * strength.abs()[..., None].numpy()
    ends = np.where(strength[..., None].numpy() < 0, _table()[0], _table()[-1])
    overlay = (1 - over) * grey[..., None].numpy() + over * ends
    return Panels(_coloured(relevance, pixel_end), overlay.round().astype(np.uint8), pixel_end, patch_end)


def save(explanation: ImageExplanation, path: str | Path, *, labels: Mapping[str, str] | None = None) -> Path:
    """Write a file; its suffix chooses: .html a page, .png .pdf .svg a figure.

    Args:
        explanation: with `latent`, a page has tables of its units.
        path: of the file.
        labels: what units stand for, by address.

    Raises:
        InputError: another suffix, or a figure without matplotlib.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".html":
        path.write_text(page(explanation, labels), encoding="utf-8")
    elif suffix in (".png", ".pdf", ".svg"):
        figure(explanation).savefig(path, dpi=200)
    else:
        raise InputError(
            f"{path}: cannot write {path.suffix or 'a file without suffix'}; "
            "expected .html, .json, .pdf, .png, .safetensors or .svg"
        )
    return path


def figure(explanation: ImageExplanation) -> Figure:
    """One line of panels for each target.

    Raises:
        InputError: matplotlib is not installed.
    """
    from attnlrp.show import image

    drawing, (high, wide) = image.empty(), explanation.picture.shape[:2]
    panel = _PANEL * min(max(high / wide, 0.25), 4.0)
    notes, line = [_read(explanation), *explanation.notes], _TITLE + panel + 0.25
    foot = _HEAD + len(explanation.targets) * line
    width, height = 2 * _LEFT + 3 * _PANEL + 2 * _GAP, foot + _FOOT + 0.16 * len(notes)
    drawing.set_size_inches(width, height)

    def write(x: float, y: float, words: str, size: float = 7.0, **style: Any) -> None:
        style = {"color": image.MUTED} | style
        drawing.text(x / width, 1 - y / height, image.drawable(words), **image.font(size) | style)

    def place(x: float, y: float, across: float, down: float, pixels: np.ndarray, **how: Any) -> None:
        axes = drawing.add_axes((x / width, 1 - (y + down) / height, across / width, down / height))
        axes.imshow(pixels, interpolation="nearest", **how)
        axes.set_axis_off()

    write(_LEFT, 0.3, heading(explanation), 8.0)
    for k, target in enumerate(explanation.targets):
        top = _HEAD + k * line
        write(_LEFT, top + 0.28, text.label(target.token, width=60), 12.0, color=colours.ink(), fontweight="bold")
        write(_LEFT, top + 0.5, " · ".join(facts(target)), 8.0, color=colours.ink())
        for column, (pixels, caption) in enumerate(_captioned(explanation, k)):
            x, y = _LEFT + column * (_PANEL + _GAP), top + _TITLE
            place(x, y, _PANEL, panel, pixels)
            write(x, y + panel + 0.14, caption)
    for k, note in enumerate(notes):
        write(_LEFT, foot + 0.16 * (k + 1), note)
    left, right = _LEFT + 2 * (_PANEL + _GAP), width - _LEFT
    write(left, foot + 0.16, "against")
    place(left + 0.5, foot + 0.08, right - left - 1.35, 0.08, _table()[None] / 255, aspect="auto")
    write(right, foot + 0.16, "for the target", horizontalalignment="right")
    return drawing


def _captioned(explanation: ImageExplanation, target: int) -> list[tuple[np.ndarray, str]]:
    """The three pictures of a target, and what they are."""
    made, unit = panels(explanation, target), explanation.targets[target].unit
    return [
        (explanation.picture.numpy(), "as the model reads it"),
        (made.pixels, f"pixels: ±{made.pixel_end:.3g} {unit} ({_PIXELS:.1%} of them)"),
        (made.overlay, f"patches of {explanation.patch}: ±{made.patch_end:.3g} {unit} ({_PATCHES:.0%} of them)"),
    ]


def page(explanation: ImageExplanation, labels: Mapping[str, str] | None = None) -> str:
    """A whole document that works without a network."""
    from attnlrp.show import html

    return html.environment().get_template("image_page.html").render(_context(explanation, labels))


def fragment(explanation: ImageExplanation) -> str:
    """One element for a notebook's output."""
    from attnlrp.show import html

    return html.environment().get_template("image_fragment.html").render(_context(explanation))


def show(explanation: ImageExplanation, *, top: int = _TOP, labels: Mapping[str, str] | None = None) -> None:
    """Print the heat map of the patches to the terminal, and tables of this many most relevant patches and units."""
    from rich.console import Console

    Console(highlight=False).print(render(explanation, top=top, labels=labels))


def render(
    explanation: ImageExplanation,
    *,
    top: int = _TOP,
    dark: bool | None = None,
    labels: Mapping[str, str] | None = None,
) -> Any:
    """What `show` prints: for each target its name, its patches in colour, the most relevant of them, and of units."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from attnlrp.show import terminal

    dark = terminal.is_dark() if dark is None else dark
    parts: list[Any] = [Text(heading(explanation), style="dim"), Text(_read(explanation), style="dim")]
    parts += [Text(note, style="dim") for note in explanation.notes]
    for k, target in enumerate(explanation.targets):
        name = Text(text.label(target.token, width=60), style="bold").append(
            "  " + " · ".join(facts(target)), "not bold"
        )
        others = "  ".join(f"{label} {logit}" for label, logit in text.runners_up(target))
        table = Table("row", "column", "relevance", box=None, header_style="dim", pad_edge=False)
        for each in table.columns:
            each.justify = "right"
        found = explanation.top(top, target=k)
        for (row, column, _), number in zip(found, text.column([value for *_, value in found]), strict=True):
            table.add_row(str(row), str(column), number)
        parts += [
            Text(),
            name,
            Text(f"other logits  {others}", style="dim"),
            Text(),
            _blocks(explanation.patches[k], dark),
        ]
        parts += [Text(), table, Text(), Text(balance(explanation, k), style="dim")]
        parts += _units(explanation, k, top, dark, labels)
    return Group(*parts)


def _units(explanation: ImageExplanation, k: int, top: int, dark: bool, labels: Mapping[str, str] | None) -> list[Any]:
    """Tables of layers and units, and the patches of the strongest ones."""
    from rich.table import Table
    from rich.text import Text

    from attnlrp.show import terminal_units

    if explanation.latent is None:
        return []
    latent, names = units.named(explanation)
    rows = _stream(explanation, latent, names, k)
    table = Table("layer", "relevance", "on patches", "strongest at", box=None, header_style="dim", pad_edge=False)
    for each in table.columns[1:3]:
        each.justify = "right"
    for row in rows:
        table.add_row(*map(Text, (row.name, row.relevance, row.on_patches, row.place)))
    parts: list[Any] = [Text(), Text("Layers"), table] if rows else []
    latent = Latent(tuple(layer for layer in latent if layer.kind != "residual"))
    target = (k, explanation.targets[k])
    parts += terminal_units.parts(latent, target, names, top=top, dark=dark, labels=labels)
    for kind in units.kinds(latent):
        first = units.ranked(latent, kind, target, names, count=1)[0]
        layer = latent.layers[first.layer]
        shown, patches = _on_patches(explanation, layer.relevance[k, first.row], layer)
        if patches is not None:
            parts += [Text(), Text(f"patches of {first.unit}, {shown} in all", style="dim"), _blocks(patches, dark)]
    return [*parts, Text(), Text(_FRONT, "dim")] if names[0] == "token 0" else parts


def _stream(explanation: ImageExplanation, latent: Latent, names: list[str], k: int) -> list[_Layer]:
    """What each layer gives on, the last one first, and what goes into the first."""
    stream = [layer for layer in latent if layer.kind == "residual"]
    kept = [layer for i, layer in enumerate(stream) if i == 0 or layer.name.endswith(":after")]
    numbers = text.column([layer.total[k].double().sum().item() for layer in kept])
    rows = []
    for layer, number in zip(kept, numbers, strict=True):
        shown, patches = _on_patches(explanation, layer.total[k], layer)
        place = units.place(layer, int(layer.total[k].abs().argmax()), names)
        rows.append(_Layer(layer.name.removesuffix(":after"), number, shown, place, patches))
    return rows[::-1]


def _on_patches(
    explanation: ImageExplanation, values: torch.Tensor, layer: LatentLayer
) -> tuple[str, torch.Tensor | None]:
    """The sum of values over patches, without what is in front of them, and the values if any is not 0."""
    patches = explanation.of_patches(values, layer.offset)
    if patches is None:
        return "–", None
    return text.signed(patches.double().sum().item()), patches if patches.any() else None


def heading(explanation: ImageExplanation) -> str:
    """Where the numbers come from: model, rules, version."""
    model, rules = text.label(explanation.model, width=80), text.label(explanation.rules, width=100)
    return f"{model} · rules {rules} · attnlrp {explanation.version}"


def facts(target: ExplainedTarget) -> list[str]:
    """What is known of a target besides its name: value, contrast, rank."""
    against = [] if target.against is None else [f"against {text.label(target.against)}"]
    return [text.quantity(target), *against, f"rank {target.rank}"]


def balance(explanation: ImageExplanation, target: int) -> str:
    """How much of the target reached the image."""
    reached, total = text.signed(explanation.sum[target]), text.quantity(explanation.targets[target])
    return f"Relevance sums to {reached} of {total}; {text.absorbers(explanation.rules)} the rest."


def _read(explanation: ImageExplanation) -> str:
    height, width = explanation.picture.shape[:2]
    return f"{width} × {height} pixels, read from an image of {explanation.size[0]} × {explanation.size[1]}"


def _blocks(patches: torch.Tensor, dark: bool) -> Any:
    """Patches, or sums over squares of them, as coloured cells; strong ones also carry their sign."""
    from rich.style import Style
    from rich.text import Text

    join = -(-patches.shape[1] // _WIDEST)
    pad = (0, -patches.shape[1] % join, 0, -patches.shape[0] % join)
    joined = torch.nn.functional.pad(patches, pad).unfold(0, join, join).unfold(1, join, join).sum(dim=(-2, -1))
    out = Text()
    for row in joined.tolist():
        for value in row:
            size = value / (joined.abs().max().item() or 1.0)
            sign = "++" if size > 0.5 else "--" if size < -0.5 else "  "
            out.append(sign, Style(color=colours.ink(dark=dark), bgcolor=colours.scale(size, dark=dark)))
        out.append("\n")
    out.rstrip()
    return out


def _context(explanation: ImageExplanation, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    from attnlrp.show import html

    ends = colours.scale(-1.0), colours.scale(0.0), colours.scale(1.0)
    style = html.environment().get_template("image.css").render(ends=ends, inks=(colours.ink(), colours.ink(dark=True)))
    targets = []
    for k, target in enumerate(explanation.targets):
        found = explanation.top(_TOP, target=k)
        numbers = text.column([value for *_, value in found])
        targets.append(
            {
                "label": text.label(target.token, width=60),
                "facts": facts(target),
                "runners_up": text.runners_up(target),
                "pictures": [(_uri(pixels), caption) for pixels, caption in _captioned(explanation, k)],
                "top": [(row, column, number) for (row, column, _), number in zip(found, numbers, strict=True)],
                "balance": balance(explanation, k),
                "units": _sections(explanation, k, labels),
                "front": _FRONT if units.named(explanation)[1][0] == "token 0" else "",
            }
        )
    return {
        "heading": heading(explanation),
        "notes": [_read(explanation), *explanation.notes],
        "targets": targets,
        "unit": explanation.targets[0].unit,
        "style": Markup(style),
        "style_hash": html.digest(style),
    }


def _sections(explanation: ImageExplanation, k: int, labels: Mapping[str, str] | None) -> list[dict[str, Any]]:
    """Tables of the layers, and of the strongest units of each kind; with patches, where positions are patches."""
    if explanation.latent is None:
        return []
    latent, names = units.named(explanation)
    target = (k, explanation.targets[k])
    sections: list[dict[str, Any]] = []
    layers = [
        (x.name, "", (x.relevance, x.on_patches, x.place), _drawn(x.patches))
        for x in _stream(explanation, latent, names, k)
    ]
    if layers:
        columns = ["Layer", "Relevance", "On patches", "Strongest at"]
        sections.append({"title": "Layers: the residual stream", "columns": columns, "rows": layers})
    for kind in units.kinds(latent):
        rows = []
        for row in units.ranked(latent, kind, target, names, count=_TOP, labels=labels):
            layer = latent.layers[row.layer]
            shown, patches = _on_patches(explanation, layer.relevance[k, row.row], layer)
            cells = row.relevance, row.share, shown, row.token, row.activation
            rows.append((row.unit, row.label, cells, _drawn(patches)))
        columns = ["Unit", "Relevance", "Share of the target", "On patches", "Strongest at", "Activation"]
        title = f"{units.TITLES[kind]}: the most relevant of all layers"
        sections.append({"title": title, "columns": columns, "rows": rows})
    return sections


def _drawn(patches: torch.Tensor | None) -> str | None:
    return None if patches is None else _uri(_coloured(patches.float(), _largest(patches)))


def _largest(values: torch.Tensor) -> float:
    return colours.limit(values.flatten().tolist())


def _uri(pixels: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@cache
def _table() -> np.ndarray:
    """The colours of the scale from -1 to 1 (colour, 3)."""
    names = [colours.scale(i / _STEPS) for i in range(-_STEPS, _STEPS + 1)]
    return np.array([[int(name[i : i + 2], 16) for i in (1, 3, 5)] for name in names], dtype=np.float32)


def _coloured(values: torch.Tensor, end: float) -> np.ndarray:
    level = (values / (end or 1.0)).clamp(-1, 1).mul(_STEPS).round().long() + _STEPS
    pixels: np.ndarray = _table()[level.numpy()].astype(np.uint8)
    return pixels


def _quantile(values: torch.Tensor, share: float) -> float:
    """The magnitude that this share of the values does not exceed."""
    found = values.abs().flatten().sort().values
    return found[min(len(found) - 1, int(share * len(found)))].item()

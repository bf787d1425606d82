"""Renderers of an explanation: terminal, HTML page, notebook, figure. Each loads on first use.

An image has one column in all of them: the sum over its patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attnlrp.errors import InputError
from attnlrp.explanation import Explanation

__all__ = ["fragment", "save", "show"]


def save(explanation: Explanation, path: str | Path, *, labels: Mapping[str, str] | None = None) -> Path:
    """Write a file; its suffix chooses: .html a page, .png .pdf .svg a figure, .json .safetensors the data.

    Args:
        explanation: with `latent`, its layers and units are drawn too.
        path: of the file.
        labels: what units stand for, by address, such as {"layers.16.mlp:394": "cold"}; pictures show it.

    Raises:
        InputError: another suffix, or a figure without matplotlib.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".html":
        from attnlrp.show import html

        path.write_text(html.page(explanation.merge_images(), labels), encoding="utf-8")
    elif suffix in (".png", ".pdf", ".svg"):
        from attnlrp.show import image

        image.figure(explanation.merge_images(), labels).savefig(path, dpi=200, bbox_inches="tight")
    elif path.suffix in (".json", ".safetensors"):
        explanation.save(path)
    else:
        raise InputError(
            f"{path}: cannot write {path.suffix or 'a file without suffix'}; "
            "expected .html, .json, .pdf, .png, .safetensors or .svg"
        )
    return path


def show(explanation: Explanation, *, top: int = 10, labels: Mapping[str, str] | None = None) -> None:
    """Print the heat map to the terminal, and tables of this many most relevant tokens and units, with their labels."""
    from rich.console import Console

    from attnlrp.show import terminal

    Console(highlight=False).print(terminal.render(explanation.merge_images(), top=top, labels=labels))


def fragment(explanation: Explanation) -> str:
    """HTML for a notebook cell."""
    from attnlrp.show import html

    return html.fragment(explanation.merge_images())

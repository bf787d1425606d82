"""Renderers of an explanation: terminal, HTML page, notebook, figure. Each loads on first use."""

from __future__ import annotations

from pathlib import Path

from attnlrp.errors import InputError
from attnlrp.explanation import Explanation

__all__ = ["fragment", "save", "show"]


def save(explanation: Explanation, path: str | Path) -> Path:
    """Write a file; its suffix chooses: .html a page, .png .pdf .svg a figure, .json .safetensors the data.

    Raises:
        InputError: another suffix, or a figure without matplotlib.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".html":
        from attnlrp.show import html

        path.write_text(html.page(explanation), encoding="utf-8")
    elif suffix in (".png", ".pdf", ".svg"):
        from attnlrp.show import image

        image.figure(explanation).savefig(path, dpi=200, bbox_inches="tight")
    elif path.suffix in (".json", ".safetensors"):
        explanation.save(path)
    else:
        raise InputError(
            f"{path}: cannot write {path.suffix or 'a file without suffix'}; "
            "expected .html, .json, .pdf, .png, .safetensors or .svg"
        )
    return path


def show(explanation: Explanation) -> None:
    """Print the heat map to the terminal."""
    from rich.console import Console

    from attnlrp.show import terminal

    Console(highlight=False).print(terminal.render(explanation))


def fragment(explanation: Explanation) -> str:
    """HTML for a notebook cell."""
    from attnlrp.show import html

    return html.fragment(explanation)

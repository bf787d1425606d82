"""One self-contained HTML page, and the same content as a fragment for notebooks.

Nothing is loaded from a network. Jinja escapes every text; the data for the script is JSON in a data block with
`<`, `>`, `&`, `'` and everything beyond ASCII escaped. The page's content security policy allows its own style and
script by hash and nothing else, so the cells take their colours from numbered levels instead of style attributes.
The fragment's style and script reach only what is inside its own, unique id.
"""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import Mapping
from functools import cache
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from attnlrp.explanation import Explanation
from attnlrp.show import colours, page_units, text

__all__ = ["digest", "environment", "fragment", "page"]

_LEVELS = 20  # steps of the colour scale on each side of zero
_TOP = 10


def page(explanation: Explanation, labels: Mapping[str, str] | None = None) -> str:
    """A whole document that follows the reader's light or dark preference and works without a network.

    Args:
        explanation: with `latent`, its layers and units have sections, drawn when they are opened.
        labels: what units stand for, by address.
    """
    return environment().get_template("page.html").render(_context(explanation, "attnlrp", labels))


def fragment(explanation: Explanation) -> str:
    """One element for a notebook's output; several on one page do not disturb each other nor the host."""
    return environment().get_template("fragment.html").render(_context(explanation, f"attnlrp-{uuid.uuid4().hex}"))


@cache
def environment() -> Environment:
    """The templates."""
    loader = PackageLoader("attnlrp.show", "templates")
    return Environment(autoescape=True, loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _context(explanation: Explanation, identifier: str, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    inside = page_units.context(explanation, labels)
    style = environment().get_template("style.css").render(id=identifier, inside=bool(inside), **_theme())
    script = environment().get_template("script.js").render(id=identifier, inside=bool(inside))
    rows = explanation.relevance.tolist()
    values = [[text.signed(value) for value in row] for row in rows]
    levels = [[round(value * _LEVELS) for value in colours.normalise(row)] for row in rows]
    return {
        "id": identifier,
        "style": Markup(style),
        "script": Markup(script),
        "style_hash": digest(style),
        "script_hash": digest(script),
        "heading": text.heading(explanation),
        "targets": [_target(explanation, k) for k in range(len(rows))],
        "segments": _segments(explanation, values[0], levels[0]),
        "inside": inside,
        "data": {
            "values": [" ".join(row) for row in values],
            "levels": [" ".join(map(str, row)) for row in levels],
            "units": [target.unit for target in explanation.targets],
            "positions": [target.position for target in explanation.targets],
        },
    }


def _target(explanation: Explanation, k: int) -> dict[str, Any]:
    target = explanation.targets[k]
    end = colours.limit(explanation.relevance[k].tolist())
    return {
        "label": text.label(target.token),
        "unit": target.unit,
        "read": target.position is not None,
        "facts": text.facts(explanation, target),
        "runners_up": text.runners_up(target),
        "ends": (text.signed(-end), text.signed(end)),
        "top": text.top(explanation, k, _TOP),
        "balance": text.balance(explanation, k),
    }


def _segments(explanation: Explanation, values: list[str], levels: list[int]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The cells of the heat map of the first target, grouped by the origin of their tokens."""
    first = explanation.targets[0]
    fields = zip(explanation.tokens, values, levels, explanation.special, strict=True)
    cells = [
        {
            "text": text.inline(token),
            "value": f"{value} {first.unit}",
            "level": level,
            "special": special,
            "read": i == first.position,
        }
        for i, (token, value, level, special) in enumerate(fields)
    ]
    pairs = zip(explanation.segments, cells, strict=True)
    return [(name, [cell for _, cell in group]) for name, group in groupby(pairs, key=lambda pair: pair[0])]


def _theme() -> dict[str, Any]:
    """The scale as (level, light colour, dark colour), and the inks."""
    steps = range(-_LEVELS, _LEVELS + 1)
    return {
        "levels": [(i, colours.scale(i / _LEVELS), colours.scale(i / _LEVELS, dark=True)) for i in steps],
        "inks": (colours.ink(), colours.ink(dark=True)),
    }


def digest(source: str) -> str:
    """Source of an inline element as the content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()

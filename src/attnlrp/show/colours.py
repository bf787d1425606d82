"""The one diverging colour scale: blue is negative, orange is positive, zero is the background.

Both halves are straight lines in OKLab from the neutral colour to an end of the same lightness and chroma, so equal
steps of relevance look equally large and +v is as strong as -v. Blue and orange stay apart for every common kind of
colour blindness. The ends are light (on dark backgrounds: dark) enough that one ink is readable on the whole scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["ink", "limit", "normalise", "scale"]

Oklab = tuple[float, float, float]


def _oklch(lightness: float, chroma: float, degrees: float) -> Oklab:
    hue = math.radians(degrees)
    return lightness, chroma * math.cos(hue), chroma * math.sin(hue)


_INK = {False: "#1a1a1a", True: "#f2f2f2"}
_NEUTRAL = {False: _oklch(0.98, 0.0, 0.0), True: _oklch(0.25, 0.0, 0.0)}
_NEGATIVE = {False: _oklch(0.65, 0.16, 255.0), True: _oklch(0.53, 0.13, 255.0)}
_POSITIVE = {False: _oklch(0.65, 0.16, 45.0), True: _oklch(0.53, 0.13, 45.0)}


def ink(*, dark: bool = False) -> str:
    """The text colour (#rrggbb) with a contrast of at least 4.5 to every colour of the scale."""
    return _INK[dark]


def scale(value: float, *, dark: bool = False) -> str:
    """Colour (#rrggbb) of a value in [-1, 1]; values outside are clipped, NaN is neutral.

    Args:
        value: relevance divided by `limit`, without unit.
        dark: for a dark background.
    """
    strength = 0.0 if math.isnan(value) else min(abs(value), 1.0)
    end = _POSITIVE[dark] if value > 0 else _NEGATIVE[dark]
    lightness, a, b = (n + strength * (e - n) for n, e in zip(_NEUTRAL[dark], end, strict=True))
    return _hex(lightness, a, b)


def limit(row: Sequence[float]) -> float:
    """The value at the ends of the scale: the largest finite magnitude, 0 if there is none."""
    return max((abs(value) for value in row if math.isfinite(value)), default=0.0)


def normalise(row: Sequence[float]) -> list[float]:
    """Relevance to [-1, 1]: divided by `limit`; infinite values are clipped, NaN and rows of zeros become 0."""
    end = limit(row) or 1.0
    return [0.0 if math.isnan(value) else max(-1.0, min(1.0, value / end)) for value in row]


def _hex(lightness: float, a: float, b: float) -> str:
    """OKLab (Ottosson 2020) to #rrggbb."""
    l, m, s = (  # noqa: E741 - the long, medium and short cones
        (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3,
        (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3,
        (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3,
    )
    linear = (
        +4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
        -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
        -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s,
    )
    return "#" + "".join(f"{round(255 * _gamma(min(1.0, max(0.0, c)))):02x}" for c in linear)


def _gamma(linear: float) -> float:
    """Linear light to sRGB, both in [0, 1]."""
    return 12.92 * linear if linear <= 0.0031308 else float(1.055 * linear ** (1 / 2.4) - 0.055)

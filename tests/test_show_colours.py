"""The colour scale: readable, symmetric, even, and apart for colour-blind readers."""

from __future__ import annotations

import math

import pytest
import torch

from attnlrp.show import colours


def linear(colour: str) -> list[float]:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def oklab(rgb: list[float]) -> torch.Tensor:
    """The published forward matrices; the library holds the inverse ones."""
    cones = torch.tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    axes = torch.tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return axes @ (cones @ torch.tensor(rgb)).clamp(min=0) ** (1 / 3)


def contrast(first: str, second: str) -> float:
    bright = sorted(
        sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(x), strict=True)) for x in (first, second)
    )
    return (bright[1] + 0.05) / (bright[0] + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_on_every_point_of_the_scale(dark: bool) -> None:
    worst = min(contrast(colours.ink(dark=dark), colours.scale(i / 200, dark=dark)) for i in range(-200, 201))
    assert worst >= 4.5


@pytest.mark.parametrize("dark", [False, True])
def test_scale_is_symmetric_and_even(dark: bool) -> None:
    points = {i: oklab(linear(colours.scale(i / 10, dark=dark))) for i in range(-10, 11)}
    for i in range(1, 11):
        up, down = ((points[s * i] - points[0]).norm() for s in (1, -1))
        assert up == pytest.approx(down.item(), abs=0.01)
        assert points[i][0] == pytest.approx(points[-i][0].item(), abs=0.005)
        assert up == pytest.approx(i / 10 * (points[10] - points[0]).norm().item(), abs=0.01)


@pytest.mark.parametrize(
    "deficiency",
    [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ],
    ids=["protanopia", "deuteranopia", "tritanopia"],
)
@pytest.mark.parametrize("dark", [False, True])
def test_signs_stay_apart_for_colour_blind_readers(deficiency: list[list[float]], dark: bool) -> None:
    """Machado et al. 2009, severity 1; 0.02 in OKLab is about one just noticeable difference."""
    for value in (0.25, 0.5, 1.0):
        seen = [torch.tensor(deficiency) @ torch.tensor(linear(colours.scale(s * value, dark=dark))) for s in (1, -1)]
        distance = (oklab(seen[0].clamp(0, 1).tolist()) - oklab(seen[1].clamp(0, 1).tolist())).norm()
        assert distance > 0.16 * value


def test_scale_takes_any_number() -> None:
    assert colours.scale(math.nan) == colours.scale(0.0) == colours.scale(-0.0)
    assert colours.scale(math.inf) == colours.scale(1.0)
    assert colours.scale(-math.inf) == colours.scale(-1.0)


def test_normalise() -> None:
    assert colours.normalise([1.0, -4.0, 0.0]) == [0.25, -1.0, 0.0]
    assert colours.normalise([0.0, 0.0]) == [0.0, 0.0]
    assert colours.normalise([math.nan, math.inf, -math.inf, 2.0, 1.0]) == [0.0, 1.0, -1.0, 1.0, 0.5]
    assert colours.normalise([]) == []

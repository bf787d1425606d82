"""Heat maps of images: what their colours mean, and what is written beside them."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from attnlrp import ImageExplanation
from attnlrp.explanation import Candidate, ExplainedTarget
from attnlrp.latent import Latent, LatentLayer
from attnlrp.show import colours, heat

TARGET = ExplainedTarget("lion", 2, None, 1.5, 1, candidates=(Candidate("lion", 2, 1.5), Candidate("cat", 1, 0.5)))


def explanation(relevance: torch.Tensor, patch: int = 2, token: str = "lion") -> ImageExplanation:
    return ImageExplanation(
        relevance=relevance,
        picture=torch.full((*relevance.shape[1:], 3), 100, dtype=torch.uint8),
        targets=(dataclasses.replace(TARGET, token=token),) * len(relevance),
        patch=patch,
        size=(40, 30),
        notes=("first of 2 frames",),
        model="tiny",
        rules="vit",
        task="image-classification",
        version="0",
    )


def colour(value: float) -> list[int]:
    name = colours.scale(value)
    return [int(name[i : i + 2], 16) for i in (1, 3, 5)]


def test_pixels_have_the_colours_of_a_symmetric_scale() -> None:
    relevance = torch.zeros(1, 4, 4)
    relevance[0, 0, 0], relevance[0, 0, 3], relevance[0, 3, 0] = 2.0, -2.0, -1.0
    made = heat.panels(explanation(relevance))
    assert made.pixel_end == 2.0
    assert made.pixels[0, 0].tolist() == colour(1.0)
    assert made.pixels[0, 3].tolist() == colour(-1.0)
    assert made.pixels[3, 0].tolist() == colour(-0.5)
    assert made.pixels[2, 2].tolist() == colour(0.0)


def test_a_single_pixel_does_not_hide_the_others() -> None:
    relevance = torch.ones(1, 100, 100)
    relevance[0, 50, 50] = 1e6
    made = heat.panels(explanation(relevance))
    assert made.pixel_end == 1.0
    assert made.pixels[0, 0].tolist() == colour(1.0)
    assert "99.9%" in heat.page(explanation(relevance))


def test_a_single_patch_does_not_hide_the_others() -> None:
    relevance = torch.ones(1, 40, 40)
    relevance[0, :2, :2] = 1e6
    assert heat.panels(explanation(relevance)).patch_end == 4.0


def test_weak_patches_let_the_picture_through() -> None:
    relevance = torch.zeros(1, 4, 4)
    relevance[0, :2, :2], relevance[0, 2:, 2:] = 0.25, -0.125
    made = heat.panels(explanation(relevance))
    assert made.patch_end == 1.0
    assert made.overlay[0, 3].tolist() == [100, 100, 100]
    strong = [round(0.15 * 100 + 0.85 * c) for c in colour(1.0)]
    weak = [round(0.575 * 100 + 0.425 * c) for c in colour(-1.0)]
    assert np.abs(made.overlay[1, 1].astype(int) - strong).max() <= 1
    assert np.abs(made.overlay[3, 3].astype(int) - weak).max() <= 1


def test_patches_at_the_edges_are_drawn() -> None:
    made = heat.panels(explanation(torch.ones(1, 5, 7), patch=3))
    assert made.overlay.shape == made.pixels.shape == (5, 7, 3)


def test_no_relevance_at_all() -> None:
    made = heat.panels(explanation(torch.zeros(1, 4, 4)))
    assert (made.pixels == colour(0.0)).all()
    assert (made.overlay == 100).all()


@pytest.mark.parametrize("ending", ["png", "pdf", "svg", "html"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 4, 40), (1, 40, 4)])
def test_files(tmp_path: Path, ending: str, shape: tuple[int, int, int]) -> None:
    path = explanation(torch.randn(shape)).save(tmp_path / f"it.{ending}")
    assert path.stat().st_size > 1000
    if ending == "png":
        assert np.array(Image.open(path)).std() > 1


def test_the_page_holds_its_pictures_and_nothing_from_outside() -> None:
    found = explanation(torch.randn(2, 8, 8), token="<script>alert(1)</script>")
    page = heat.page(found)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/png;base64,") == 6
    assert re.search(r"(?:src|href)=\"(?!data:)", page) is None
    first = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert first is not None
    assert np.array(Image.open(io.BytesIO(base64.b64decode(first[1])))).tolist() == found.picture.tolist()
    for words in ("first of 2 frames", "8 × 8 pixels, read from an image of 40 × 30", "logit +1.5", "rank 1", "cat"):
        assert words in page
    assert heat.fragment(found) in page
    assert found._repr_html_() == heat.fragment(found)


def test_the_terminal_shows_signs_without_colours(capsys: pytest.CaptureFixture[str]) -> None:
    relevance = torch.zeros(1, 4, 4)
    relevance[0, :2, :2], relevance[0, 2:, 2:], relevance[0, 2:, :2] = 1.0, -0.9, 0.2
    console = Console(width=80, file=io.StringIO(), no_color=True)
    console.print(heat.render(explanation(relevance), dark=True))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line for line in written.splitlines() if set(line) <= set("+- ") and line.strip()]
    assert [line.rstrip() for line in lines] == ["++", "  --"]
    for words in ("lion  logit +1.500 · rank 1", "cat +0.5000", "first of 2 frames", "Relevance sums to"):
        assert words in written
    explanation(relevance).show()
    assert "lion" in capsys.readouterr().out


def test_many_patches_are_joined_for_the_terminal() -> None:
    console = Console(width=80, file=io.StringIO(), no_color=True)
    console.print(heat.render(explanation(torch.ones(1, 80, 80), patch=1)))
    rows = [line for line in console.file.getvalue().splitlines() if line.startswith("++")]  # type: ignore[attr-defined]
    assert len(rows) == 27
    assert {len(row) for row in rows[:-1]} == {54}


# --- units inside the model -------------------------------------------------------------------------------------------


def layer(name: str, kind: str, values: torch.Tensor, offset: int | None = 0) -> LatentLayer:
    """A layer of one target, from the relevance of its units (unit, position), the strongest first."""
    kept = torch.arange(len(values))[None]
    return LatentLayer(name, kind, len(values), values.sum(dim=0)[None], kept, values[None], values[None] + 7, offset)


@pytest.fixture
def inside() -> ImageExplanation:
    """Patches 2 x 2 behind one token; layer 1 is read at the token alone, and layer 2 has other positions."""
    values = torch.tensor([[2.0, 1.0, -4.0, 3.0, 0.5], [0.1, 0.0, 0.0, 0.0, -0.2]])
    alone = torch.tensor([[1.5, 0.0, 0.0, 0.0, 0.0]])
    layers = (
        layer("layers.0:before", "residual", values.sum(0, keepdim=True)),
        layer("layers.0.mlp", "neurons", values),
        layer("layers.0:after", "residual", 2 * values.sum(0, keepdim=True)),
        layer("layers.1.mlp", "neurons", alone),
        layer("layers.1:after", "residual", alone),
        layer("layers.2.attn", "heads", torch.tensor([[0.25, 0.5]]), offset=None),
    )
    return dataclasses.replace(explanation(torch.ones(1, 4, 4)), latent=Latent(layers))


def rows(page: str) -> dict[str, list[str]]:
    """Cells behind the first one of each line of a table."""
    found = re.findall(r'<tr><th scope="row">([^<]+).*?</th>(.*?)</tr>', page)
    return {name: re.findall(r"<td>(.*?)</td>", cells) for name, cells in found}


def test_a_page_says_what_of_a_unit_lies_on_patches(inside: ImageExplanation) -> None:
    page = heat.page(inside, {"layers.0.mlp:0": "<b>fur</b>"})
    found = rows(page)
    number, share, on_patches, place, activation, drawn = found["layers.0.mlp:0"]
    assert (number, share, on_patches, place, activation) == (
        "+2.500",
        "+166.7%",
        "+0.5000",
        "row 0, column 1",
        "+3.000",
    )
    uri = re.search(r'base64,([^"]+)"', drawn)
    assert uri is not None
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(uri[1]))))
    assert pixels.tolist() == [[colour(0.25), colour(-1.0)], [colour(0.75), colour(0.125)]]
    assert found["layers.1.mlp:0"][2:4] == ["0", "token 0"]
    assert found["layers.1.mlp:0"][-1] == "–"  # nothing is on patches
    assert found["layers.2.attn:0"][2:4] == ["–", "position 1"]  # positions are not patches
    assert list(found)[:3] == ["layers.1", "layers.0", "layers.0:before"]
    assert found["layers.0"][:3] == ["+4.800", "+0.6000", "row 0, column 1"]
    assert "&lt;b&gt;fur" in page
    assert "<b>" not in page
    assert "Tokens are in front of the patches" in page
    assert "Layers" not in heat.page(dataclasses.replace(inside, latent=None))


def test_the_terminal_shows_layers_units_and_patches_of_the_strongest(inside: ImageExplanation) -> None:
    console = Console(width=100, file=io.StringIO(), no_color=True)
    console.print(heat.render(inside, dark=True, labels={"layers.0.mlp:0": "fur"}))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [" ".join(line.split()) for line in written.splitlines()]
    assert "layers.0 +4.800 +0.6000 row 0, column 1" in lines
    assert "layers.0.mlp:0 +2.500 +166.7% row 0, column 1 +3.000 fur ━━━━━━━━━━━━" in lines
    at = lines.index("patches of layers.0.mlp:0, +0.5000 in all")
    assert [line.rstrip() for line in written.splitlines()[at + 1 : at + 3]] == ["  --", "++"]
    assert not [line for line in lines if line.startswith("patches of layers.2")]
    assert "Residual stream" not in written


def test_what_was_not_recorded_is_not_shown(inside: ImageExplanation) -> None:
    assert inside.latent is not None
    bare = dataclasses.replace(inside, latent=Latent(inside.latent.layers[-1:]))
    page = heat.page(bare)
    assert list(rows(page)) == ["layers.2.attn:0"]
    assert "Tokens are in front" not in page
    assert "Layers" not in page

"""`attnlrp image`: from a file to a picture; its errors; gammas that are searched on the user's images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from attnlrp import ATTNLRP, ImageExplainer, ImageExplanation
from attnlrp.gamma import Search
from command import Run
from tiny_vision import TEXTS, build, photo


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("vision")
    for name in ("ViT", "CLIP", "Segformer"):
        ours = build(name)
        ours.model.float().save_pretrained(root / name)
        ours.processor.save_pretrained(root / name)
    (root / "photos").mkdir()
    for k in range(2):
        photo(seed=k).save(root / "photos" / f"{k}.png")
    return root


def expect(found: ImageExplanation, expected: ImageExplanation) -> None:
    assert [t.token for t in found.targets] == [t.token for t in expected.targets]
    end = expected.relevance.abs().max().item()
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-4, atol=1e-5 * end)


@pytest.mark.parametrize(
    ("name", "arguments", "asked"),
    [
        ("ViT", ["--top", "3"], {"top": 3}),
        ("ViT", ["--target", "tabby", "--target", "#2", "--against", "goldfish"], {"target": [1, 2], "against": 0}),
        ("Segformer", [], {}),
        ("CLIP", ["--text", TEXTS[0], "--text", TEXTS[1]], {"texts": TEXTS}),
    ],
)
def test_the_command_explains_what_the_library_does(
    run: Run, root: Path, name: str, arguments: list[str], asked: dict[str, Any]
) -> None:
    file = root / "photos" / "0.png"
    result = run("image", file, "--model", root / name, *arguments, "--json", "-")
    assert result.status == 0, result.err
    expect(
        ImageExplanation.from_dict(json.loads(result.out)), ImageExplainer.from_pretrained(root / name)(file, **asked)
    )


def test_what_is_inside_is_shown(run: Run, root: Path) -> None:
    file = root / "photos" / "0.png"
    asked = ["--latent", "neurons", "--latent", "residual"]
    result = run("image", file, "--model", root / "ViT", *asked)
    assert result.status == 0, result.err
    ours = ImageExplainer.from_pretrained(root / "ViT")
    unit = ours(file, latent=["neurons", "residual"]).top("neurons", 1)[0].unit
    assert unit in result.out
    result = run("image", file, "--model", root / "ViT", "--through", unit, "--json", "-")
    expect(ImageExplanation.from_dict(json.loads(result.out)), ours(file, through=unit))


@pytest.mark.parametrize("ending", ["png", "html", "json", "safetensors"])
def test_files_and_what_a_person_sees(run: Run, root: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"heat.{ending}"
    result = run("image", root / "photos" / "0.png", "--model", root / "ViT", "--smooth", "2", "--out", out)
    assert result.status == 0, result.err
    assert out.stat().st_size > 1000
    assert "rank 1" in result.out
    assert "smoothed (Gaussian, standard deviation 2 pixels)" in result.out


def test_rules_can_be_chosen(run: Run, root: Path) -> None:
    file = root / "photos" / "0.png"
    result = run("image", file, "--model", root / "ViT", "--rules", "attnlrp", "--json", "-")
    found = ImageExplanation.from_dict(json.loads(result.out))
    assert found.rules == "attnlrp"
    expect(found, ImageExplainer.from_pretrained(root / "ViT", rules=ATTNLRP)(file))


def test_gammas_are_searched_kept_and_used_again(run: Run, root: Path, tmp_path: Path) -> None:
    kept, file = tmp_path / "gammas.json", root / "photos" / "0.png"
    common = ["image", file, "--model", root / "ViT", "--json", "-"]
    asked = ["--gamma", "auto", "--images", root / "photos", "--seconds", "0", "--gamma-out", kept]
    searched = run(*common, *asked)
    assert searched.status == 0, searched.err
    assert "gammas: conv 0.25, mlp 0.05" in searched.err
    assert "the budget ended before the search" in searched.err
    assert "on 2 images: conv 0.25" in searched.err
    journal = (tmp_path / "gammas.json.jsonl").read_text().splitlines()
    assert len(journal) == 1 + 2
    assert run(*common, *asked).status == 0
    assert (tmp_path / "gammas.json.jsonl").read_text().splitlines() == journal, "measured again"
    search = Search.load(kept)
    assert search.images == 2
    again = run(*common, "--gamma", kept)
    assert again.status == 0, again.err
    found = [ImageExplanation.from_dict(json.loads(r.out)) for r in (searched, again)]
    assert found[0] == found[1]
    assert found[0].rules == f"gamma ({search.best})"
    expect(found[0], ImageExplainer.from_pretrained(root / "ViT", rules=search.rules)(file))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--model: expected a vision model"),
        (["--model", "ViT", "--gamma", "auto", "--rules", "vit"], "--rules and --gamma exclude each other"),
        (["--model", "ViT", "--images", "photos"], "--images: is for --gamma auto, got --gamma paper"),
        (["--model", "ViT", "--gamma", "none.json"], "cannot read none.json"),
        (["--model", "CLIP", "--gamma", "auto", "--text", "a"], "zero-shot-image-classification, expected one for"),
        (["--model", "ViT", "--gamma", "auto", "--images", "ViT"], "no image in it"),
        (["--model", "ViT", "--target", "dog"], "target: got 'dog'"),
        (["--model", "ViT", "--out", "heat.bmp"], "cannot write .bmp"),
    ],
)
def test_errors(run: Run, root: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    result = run("image", root / "photos" / "0.png", *arguments)
    assert result.status in (1, 2)
    assert said in " ".join(result.err.split())
    assert "Traceback" not in result.err


def test_a_folder_without_an_image_processor(run: Run, root: Path, tmp_path: Path) -> None:
    build("ViT").model.float().save_pretrained(tmp_path / "bare")
    result = run("image", root / "photos" / "0.png", "--model", tmp_path / "bare")
    assert result.status == 1
    assert "image processor" in result.err

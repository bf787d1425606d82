"""`attnlrp evaluate` on images: squares that are taken away, localisation against boxes, tables of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from attnlrp import InputError
from attnlrp.methods import Gammas, find_methods
from attnlrp.rules import VIT
from attnlrp.runs import Setup
from command import Run
from tiny_tokenizers import build as build_text
from tiny_vision import build, photo

METHODS = "random,gradient-x-input,attention-rollout,vit"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("images")
    ours = build("ViT")
    ours.model.float().save_pretrained(root / "vit")
    ours.processor.save_pretrained(root / "vit")
    model, tokenizer = build_text("gpt2")
    model.save_pretrained(root / "gpt2")
    tokenizer.save_pretrained(root / "gpt2")
    rows = ["file,split,label,x0,y0,x1,y1"]
    for k in range(6):
        photo(seed=k).save(root / f"{k}.png")
        box = "5,5,30,20" if k != 5 else ",,,"
        rows.append(f"{k}.png,{'val' if k else 'train'},lion,{box}")
    (root / "table.csv").write_text("\n".join(rows))
    return root


def test_squares_of_images_are_taken_away(run: Run, root: Path, tmp_path: Path) -> None:
    asked = ["evaluate", "faithfulness", "--model", root / "vit", "--data", root / "table.csv", "--split", "val"]
    asked += ["--samples", 3, "--steps", 4, "--methods", METHODS, "--baseline", "blur", "--json", "-"]
    result = run(*asked, "--out", tmp_path / "run.jsonl", "--figure", tmp_path / "curves.png")
    assert result.status == 0, result.err
    found = json.loads(result.out)
    settings = found["settings"]
    assert (settings["patch"], settings["baseline"], settings["split"]) == (16, "blur", "val")
    assert settings["task"] == "image-classification"
    assert "length" not in settings
    assert set(found["methods"]) == set(METHODS.split(","))
    assert found["counts"]["samples"] == 3
    assert all(row["sample"] != "0.png" for row in found["samples"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    again = run(*asked, "--out", tmp_path / "run.jsonl")
    assert json.loads(again.out)["methods"] == found["methods"]


def test_localisation(run: Run, root: Path) -> None:
    asked = ["evaluate", "localisation", "--model", root / "vit", "--data", root / "table.csv", "--split", "val"]
    result = run(*asked, "--samples", 4, "--methods", METHODS, "--json", "-")
    assert result.status == 0, result.err
    found = json.loads(result.out)
    assert all(row["sample"] != "5.png" for row in found["samples"]), "an image without a box"
    metrics = found["methods"]["vit"]["metrics"]
    assert {"mass", "pointing", "iou", "top_k"} <= set(metrics)
    assert all(0 <= metrics[m]["mean"] <= 1 for m in ("mass", "pointing", "iou", "top_k"))
    shown = run(*asked, "--samples", 4, "--methods", METHODS)
    assert "mass" in shown.out


def test_a_table_of_both(run: Run, root: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
models: [{{name: tiny, path: "{root / "vit"}"}}]
data:
  - {{name: squares, source: "${{DATA}}/table.csv", split: val, kind: faithfulness, samples: 3, steps: 3, patch: 8}}
  - {{name: boxes, source: "${{DATA}}/table.csv", split: val, kind: localisation, samples: 3}}
methods: [random, {{name: ours, method: gamma, mlp: 0.05, conv: 0.25}}, vit]
"""
    )
    result = run("evaluate", "table", "--config", config, "--data-folder", root, "--out", tmp_path / "out")
    assert result.status == 0, result.err
    text = (tmp_path / "out" / "table.md").read_text()
    for words in ("squares: area", "boxes: mass", "boxes: IoU", "patch 8", "pointing game", "top-k"):
        assert words in text
    head, *rows = [line for line in text.splitlines() if line.startswith("| ")]
    same = {
        line.split("|")[1].strip(): line.split("|")[2:]
        for line in rows
        if line.split("|")[1].strip() in ("ours", "vit")
    }
    assert [c.strip("* ") for c in same["ours"]][:3] == [c.strip("* ") for c in same["vit"]][:3], head
    assert (tmp_path / "out" / "curves.png").is_file()


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("faithfulness", ["--model", "vit", "--data", "table.csv", "--baseline", "mask"], "baseline: got 'mask'"),
        ("faithfulness", ["--model", "vit", "--data", "table.csv", "--split", "test"], "got the split 'test'"),
        ("faithfulness", ["--model", "vit", "--data", "none"], "none"),
        ("localisation", ["--model", "gpt2", "--data", "table.csv"], "expected one for image-classification"),
        ("qa", ["--model", "vit", "--data", "table.csv"], "got images, expected records with question"),
        (
            "faithfulness",
            ["--model", "vit", "--data", "table.csv", "--samples", "7"],
            "got 6 records, expected at least 7",
        ),
        (
            "localisation",
            ["--model", "vit", "--data", "table.csv", "--samples", "6"],
            "got 5 records, expected at least 6",
        ),
    ],
)
def test_bad_usage(
    run: Run, root: Path, command: str, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    result = run("evaluate", command, "--methods", "random", "--samples", "2", *arguments)
    assert result.status == 2, result.err
    assert said in " ".join(result.err.split())


def test_gammas_are_a_method() -> None:
    found = find_methods([{"name": "mine", "method": "gamma", "conv": 0.25, "mlp": 0.05}])["mine"]
    assert isinstance(found, Gammas)
    assert found.rules == VIT
    with pytest.raises(InputError, match="got the parameter 'conf'"):
        find_methods([{"name": "mine", "method": "gamma", "conf": 0.25}])
    with pytest.raises(InputError, match="patch: got 0"):
        Setup("x", patch=0)

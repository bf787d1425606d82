"""`attnlrp evaluate`: from a file of texts to a table, per-sample results that a run goes on from, and a figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from command import Run
from tiny_tokenizers import CORPUS, build


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("evaluate")
    model, tokenizer = build("gpt2")
    model.save_pretrained(root / "gpt2")
    tokenizer.save_pretrained(root / "gpt2")
    texts = [sentence.strip() for line in CORPUS[:3] for sentence in line.split(".") if sentence.strip()]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


def test_faithfulness_of_methods_on_a_file(run: Run, root: Path, tmp_path: Path) -> None:
    asked = ["evaluate", "faithfulness", "--model", root / "gpt2", "--data", root / "texts.jsonl", "--samples", 3]
    asked += ["--methods", "random,attnlrp", "--length", 8, "--out", tmp_path / "run.jsonl"]
    first = run(*asked, "--json", tmp_path / "run.json", "--figure", tmp_path / "curves.png")
    assert first.status == 0, first.err
    assert "attnlrp" in first.out
    assert "random" in first.out
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3 * 2  # settings, and a result for each sample and method
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    json.loads((tmp_path / "run.json").read_text())
    again = run(*asked)
    assert again.status == 0, again.err
    assert (tmp_path / "run.jsonl").read_text().splitlines() == lines


def test_bad_usage(run: Run, root: Path) -> None:
    asked = ["evaluate", "faithfulness", "--model", root / "gpt2", "--data", root / "texts.jsonl"]
    unknown = run(*asked, "--methods", "guess", "--samples", 2)
    assert unknown.status == 2
    assert "guess" in unknown.err
    too_many = run(*asked, "--methods", "random", "--samples", 500)
    assert too_many.status == 2
    assert "expected at least 500" in too_many.err

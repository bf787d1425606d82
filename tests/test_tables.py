"""A table: methods x data x models, whole after each cell, continued from its journals; and tuned parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from attnlrp import InputError
from attnlrp.configuration import Config, DataEntry, ModelEntry
from attnlrp.runs import Setup, evaluate
from attnlrp.tables import Table, run_table
from attnlrp.tuning import open_grids, tune
from command import Run
from tiny_tokenizers import CORPUS, build

CALLS: list[str] = []


@dataclass(frozen=True)
class Counted:
    """Relevance that grows along the text, times a sign."""

    sign: int = 1

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Any) -> Tensor:
        CALLS.append("counted")
        return self.sign * torch.arange(float(inputs["input_ids"].shape[1]))


def broken(model: Any, inputs: Mapping[str, Any], target: Any) -> Tensor:
    raise RuntimeError("out of ideas")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("tables")
    model, tokenizer = build("gpt2")
    model.save_pretrained(root / "gpt2")
    tokenizer.save_pretrained(root / "gpt2")
    texts = [sentence.strip() for line in CORPUS[:3] for sentence in line.split(".") if sentence.strip()]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = [("Paris is a capital.", "What is a capital?", "Paris"), ("Rome is old.", "What is old?", "Rome")]
    questions = [{"context": c, "question": q, "answers": [a]} for c, q, a in asked]
    (root / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return root


def run(root: Path, folder: Path) -> Table:
    def load(entry: ModelEntry) -> tuple[Any, Any]:
        if entry.path == "nowhere":
            raise InputError("model: not found")
        return build("gpt2")

    texts = {"source": str(root / "texts.jsonl"), "kind": "faithfulness", "samples": 3, "length": 8, "steps": 4}
    questions = {"source": str(root / "questions.jsonl"), "kind": "qa", "samples": 2, "length": 60}
    config = Config(
        models=(ModelEntry("tiny", "gpt2"), ModelEntry("lost", "nowhere", ("texts",))),
        data=(DataEntry("texts", texts), DataEntry("questions", questions, ("up",))),
    )
    methods = {"up": Counted(), "down": Counted(-1), "broken": broken}
    return run_table(config, folder, load, methods=methods)


def test_a_table(root: Path, tmp_path: Path) -> None:
    CALLS.clear()
    table = run(root, tmp_path)
    assert [(c.model, c.data) for c in table.cells] == [("tiny", "texts"), ("tiny", "questions"), ("lost", "texts")]
    assert sorted(table.failed) == ["lost, texts: model: not found", "tiny, texts, broken: RuntimeError: out of ideas"]
    first = table.cells[0].run
    assert first is not None
    # reversed orders: MoRF of one is LeRF of the other
    up, down = (first.report.values(name, "area") for name in ("up", "down"))
    assert up == pytest.approx({sample: -area for sample, area in down.items()})
    best = first.ranking[0]
    text = (tmp_path / "table.md").read_text()
    assert f"| {best} | **" in text
    assert "Not run: broken: RuntimeError: out of ideas" in text
    assert "Not run: model: not found" in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    cells = json.loads((tmp_path / "table.json").read_text())["cells"]
    assert cells[2]["error"] == "model: not found"
    assert set(cells[0]["curves"]["methods"]) == {"up", "down"}
    # the same run again measures nothing: what there is comes from the journals
    CALLS.clear()
    again = run(root, tmp_path)
    assert CALLS == []
    assert again.cells[0].run is not None
    assert again.cells[0].run.report.values("up", "area") == up


def test_questions_over_all_and_over_correct_ones(root: Path) -> None:
    model, tokenizer = build("gpt2")
    setup = Setup(str(root / "questions.jsonl"), "qa", samples=2, length=60)
    found = evaluate(model, tokenizer, {"up": Counted()}, setup)
    assert found.counts["samples"] == 2
    assert found.counts["correct"] == 0  # an untrained model
    assert not found.correct_only
    assert set(found.report.metrics) == {"top1", "iou", "mass"}


def test_a_setup_is_checked() -> None:
    with pytest.raises(InputError, match="baseline: got 'x', expected one of zero"):
        Setup("x.jsonl", baseline="x")
    with pytest.raises(InputError, match="steps: got 0, expected at least 1"):
        Setup("x.jsonl", steps=0)


def test_tuned_parameters_are_the_best_on_records_that_are_kept_apart(root: Path, tmp_path: Path) -> None:
    model, tokenizer = build("gpt2")
    grids = {"up": {"sign": (1, -1)}}
    setup = Setup(str(root / "texts.jsonl"), samples=3, length=8, steps=4, tune=2, grids=grids)
    found = evaluate(model, tokenizer, {"up": Counted()}, setup, journal=tmp_path / "run.jsonl")
    (choice,) = found.choices
    means = {t["parameters"]["sign"]: t["mean"] for t in choice.tried}
    assert means[1] == pytest.approx(-means[-1])
    assert choice.parameters["sign"] == max(means, key=lambda sign: means[sign])
    assert found.report.settings["methods"]["up"] == {"sign": choice.parameters["sign"]}
    tuned = {json.loads(line).get("sample") for line in (tmp_path / "run.tuning.jsonl").read_text().splitlines()}
    assert tuned.isdisjoint({row["sample"] for row in found.report.rows})
    with pytest.raises(InputError, match="expected at least 300 samples and 2 to tune on"):
        evaluate(model, tokenizer, {"up": Counted()}, Setup(str(root / "texts.jsonl"), samples=300, tune=2))


def test_grids() -> None:
    assert open_grids(["up", {"name": "near", "method": "up", "sign": 1}], {"up": {"sign": (1, -1)}}) == {
        "up": {"sign": (1, -1)},
        "near": {},
    }
    assert tune({"up": Counted()}, {}, lambda methods: pytest.fail("nothing to tune"), "area") == []
    with pytest.raises(InputError, match="expected a list of values"):
        tune({"up": Counted()}, {"up": {"sign": "1"}}, lambda methods: pytest.fail("bad grid"), "area")
    with pytest.raises(InputError, match="'size'"):
        tune({"up": Counted()}, {"up": {"size": (1,)}}, lambda methods: pytest.fail("no such parameter"), "area")


def test_the_commands(run: Run, root: Path, tmp_path: Path) -> None:
    common = ["--model", root / "gpt2", "--methods", "attnlrp,random"]
    asked = run("evaluate", "qa", "--data", root / "questions.jsonl", "--samples", 2, "--length", 60, *common)
    assert asked.status == 0, asked.err
    assert "top1" in asked.out
    assert "samples 2, correct 0" in asked.out
    texts = run("evaluate", "qa", "--data", root / "texts.jsonl", "--samples", 2, *common)
    assert texts.status == 2
    assert "expected records with question, context and answers" in texts.err
    config = {
        "models": [{"name": "tiny", "path": str(root / "gpt2")}, {"name": "lost", "path": str(root / "none")}],
        "data": [{"name": "texts", "source": "${DATA}/texts.jsonl", "kind": "faithfulness", "samples": 2, "length": 6}],
        "methods": ["attnlrp", "random"],
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    out = tmp_path / "out"
    table = run("evaluate", "table", "--config", tmp_path / "config.yaml", "--data-folder", root, "--out", out)
    assert table.status == 1  # one model is not there; the other is in the table
    assert "lost, texts" in table.err
    assert "| attnlrp |" in table.out
    assert (out / "table.json").is_file()
    missing = run("evaluate", "table", "--config", tmp_path / "none.yaml")
    assert missing.status == 2
    assert "No such file" in missing.err

"""Many texts: the same relevance as one by one, and a file that a later run continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnlrp import CP_LRP, Explainer, InputError, dataset, explain_dataset, read_dataset
from command import Run
from nearness import same
from tiny_tokenizers import build

TEXTS = [
    "the film was great",
    "he said not",
    "Paris is the capital of France. Berlin is the capital of",
    "in the end",
] * 3


@pytest.fixture
def explainer() -> Explainer:
    return Explainer(*build("llama"))


def test_relevance_is_that_of_single_texts(explainer: Explainer, tmp_path: Path) -> None:
    path, told = tmp_path / "out.jsonl", []
    count = explain_dataset(explainer, TEXTS, path, tokens=60, progress=lambda *n: told.append(n))
    assert count == len(TEXTS)
    assert told[-1] == (len(TEXTS), len(TEXTS))
    assert 1 < len(told) < len(TEXTS)
    found = dict(read_dataset(path))
    assert sorted(found) == list(range(len(TEXTS)))
    for k, explanation in found.items():
        assert same(explanation, explainer(TEXTS[k]))


def test_a_killed_run_is_continued(explainer: Explainer, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    explain_dataset(explainer, TEXTS, whole, tokens=60, target=5)
    text = whole.read_text()
    kept = text.splitlines(keepends=True)
    path.write_text("".join(kept[:5]) + kept[5][:40])
    assert [k for k, _ in read_dataset(path)] == [k for k, _ in read_dataset(whole)][:4]
    assert explain_dataset(explainer, TEXTS, path, tokens=60, target=5) == len(TEXTS) - 4
    assert {k for k, _ in read_dataset(path)} == set(range(len(TEXTS)))
    assert explain_dataset(explainer, TEXTS, path, tokens=60, target=5) == 0


def test_batches_are_of_like_length_and_within_the_budget() -> None:
    lengths = [(n, k) for k, n in enumerate([3, 50, 4, 48, 5, 200, 1])]
    batches = list(dataset._batches(lengths, 100))
    assert batches == [[5], [1, 3], [4, 2, 0, 6]]


def test_files_of_other_runs_are_refused(explainer: Explainer, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    explain_dataset(explainer, TEXTS[:2], path)
    with pytest.raises(InputError, match="holds explanations with options"):
        explain_dataset(explainer, TEXTS[:2], path, target=5)
    with pytest.raises(InputError, match="holds explanations with rules"):
        explain_dataset(Explainer(explainer.model, explainer.tokenizer, rules=CP_LRP), TEXTS[:2], path)
    with pytest.raises(InputError, match="another text as number"):
        explain_dataset(explainer, TEXTS[1:3], path)
    path.write_text("something else\n")
    with pytest.raises(InputError, match="not a file of explain_dataset"):
        list(read_dataset(path))


def test_what_is_not_a_data_set_is_refused(explainer: Explainer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got 0 texts"):
        explain_dataset(explainer, [], tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="got context="):
        explain_dataset(explainer, TEXTS, tmp_path / "out.jsonl", context="a text")


def test_the_command_goes_on_where_it_was_stopped(tmp_path: Path, run: Run) -> None:
    model, tokenizer = build("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data, out = tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    command = ["explain-dataset", data, "--model", tmp_path / "model", "--out", out, "--target", "#5"]
    first = run(*command, "--samples", 5)
    assert first.status == 0, first.err
    assert first.err.endswith(f"5 texts explained, 5 in {out}\n")
    second = run(*command, "--tokens", 60, "--memory", "auto")
    assert second.err.endswith(f"7 texts explained, 12 in {out}\n")
    found = dict(read_dataset(out))
    expected = Explainer.from_pretrained(tmp_path / "model")(TEXTS[2], target=5)
    assert sorted(found) == list(range(12))
    assert same(found[2], expected)


def test_the_command_refuses_the_file_of_another_target(tmp_path: Path, run: Run) -> None:
    model, tokenizer = build("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data, out = tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    data.write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    assert run("explain-dataset", data, "--model", tmp_path / "model", "--out", out, "--target", "#5").status == 0
    result = run("explain-dataset", data, "--model", tmp_path / "model", "--out", out, "--target", "#6")
    assert result.status == 2
    assert "give another file" in result.err
    assert len(dict(read_dataset(out))) == 1

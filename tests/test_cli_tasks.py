"""One command for every task: it follows from the model's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from attnlrp import Explainer, Explanation
from command import Run
from nearness import same
from tiny_tasks import MODELS, build

# model -> text, options of the command, options of the call
ASKED: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "bert-mlm": ("the [MASK] of France", [], {}),
    "bert-ner": ("Paris is the capital", ["--position", "1", "--target", "LOC"], {"position": 1, "target": "LOC"}),
    "bert-qa": ("the capital", ["--context", "Rome is the end ."], {"context": "Rome is the end ."}),
    "t5": ("the capital of", ["--generate", "3"], {"generate": 3}),
    "bart": ("the capital of", ["--prefix", "Rome is"], {"prefix": "Rome is"}),
    "marian": ("the capital of", [], {}),
    "bart-classifier": ("the film", ["--target", "#1"], {"target": 1}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        ours = build(name)
        ours.model.float().save_pretrained(root / name)
        ours.tokenizer.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", MODELS)
def test_the_command_explains_what_the_library_does(run: Run, root: Path, name: str) -> None:
    text, arguments, options = ASKED[name]
    result = run("explain", "--model", root / name, text, *arguments, "--json", "-")
    assert result.status == 0, result.err
    expected = Explainer.from_pretrained(root / name)(text, **options)
    assert same(Explanation.from_dict(json.loads(result.out)), expected)


@pytest.mark.parametrize("name", ["t5", "bert-qa"])
def test_a_person_sees_each_input_by_its_name(run: Run, root: Path, name: str, tmp_path: Path) -> None:
    text, arguments, _ = ASKED[name] if name == "bert-qa" else (ASKED[name][0], [], {})
    arguments = [*arguments, *(["--target", "Rome"] if name == "bert-qa" else [])]
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    result = run("explain", "--model", root / name, text, *arguments, "--html", page, "--png", picture)
    assert result.status == 0, result.err
    sides = ("Encoder", "Decoder") if name == "t5" else ("Question", "Context")
    assert all(f">{side}</p>" in page.read_text() for side in sides)
    assert picture.read_bytes().startswith(b"\x89PNG")
    if name == "t5":
        assert all(side in result.out for side in sides)


@pytest.mark.parametrize("name", ["t5", "bert-mlm"])
def test_the_audit_of_every_task(run: Run, root: Path, name: str) -> None:
    result = run("audit", "--model", root / name, ASKED[name][0])
    assert result.status == 0, result.err
    assert "the ledger closes" in result.out


def test_an_option_of_another_task_is_bad_usage(run: Run, root: Path) -> None:
    result = run("explain", "--model", root / "bert-mlm", "the [MASK]", "--generate", "3")
    assert result.status == 2
    assert "generate" in result.err
    assert "this option is for" in result.err

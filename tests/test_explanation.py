"""The result: frozen, saved without loss or pickle, merged without loss."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from attnlrp import Explanation, InputError, __version__
from attnlrp.explanation import Candidate, ExplainedTarget

TOKENS = ("<s>", "un", "believ", "able", " 日[1/3]", " 日[2/3]", " 日[3/3]", "!\n")
FIELDS = {"model", "rules", "tokens", "token_ids", "relevance", "targets", "sum", "version"}


def build(rows: int = 2, dtype: torch.dtype = torch.float32, **changes: Any) -> Explanation:
    candidates = (Candidate(" Germany", 7, 14.5), Candidate("😀", 9, 3.25))
    targets = tuple(
        ExplainedTarget(" Germany", 7 + k, position=3 + 4 * k, logit=14.5 - k, rank=1 + k, candidates=candidates)
        for k in range(rows)
    )
    relevance = torch.randn(rows, len(TOKENS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fields: dict[str, Any] = {
        "tokens": TOKENS,
        "token_ids": tuple(range(20, 28)),
        "relevance": relevance.to(dtype),
        "targets": targets,
        "special": (True, *[False] * 7),
        "segments": (*["prompt"] * 7, "generated"),
        "words": (0, 1, 1, 1, 2, 2, 2, 3),
        "model": "a/model",
        "rules": "attnlrp",
        "task": "causal-lm",
        "version": __version__,
    }
    return Explanation(**fields | changes)


def test_it_is_frozen() -> None:
    explanation = build()
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.model = "other"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.targets[0].logit = 0.0  # type: ignore[misc]


@pytest.mark.parametrize("change", [{"tokens": TOKENS[1:]}, {"words": (0,)}, {"targets": ()}, {"special": ()}])
def test_fields_that_do_not_fit_together_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"2 x 8 needs 2 targets and 8 tokens, got \d targets and token fields"):
        build(**change)


def test_equality_is_by_value() -> None:
    assert build() == build()
    assert hash(build()) == hash(build())
    assert build() != build(model="other")
    assert build() != build(dtype=torch.float64)
    changed = build().relevance.clone()
    changed[1, 2] += 1e-3
    assert build() != build(relevance=changed)
    assert build() != "an explanation"


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saving_and_loading_loses_nothing(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    explanation = build(dtype=dtype)
    path = explanation.save(tmp_path / f"x{suffix}")
    assert path == tmp_path / f"x{suffix}"
    loaded = Explanation.load(str(path))
    assert loaded == explanation
    for field in dataclasses.fields(Explanation):
        if field.name != "relevance":
            assert getattr(loaded, field.name) == getattr(explanation, field.name), field.name
            assert type(getattr(loaded, field.name)) is type(getattr(explanation, field.name)), field.name
    assert loaded.relevance.dtype == dtype
    assert torch.equal(loaded.relevance, explanation.relevance)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_sum_over_several_tokens_and_a_class_survive_saving(tmp_path: Path, suffix: str) -> None:
    targets = (
        ExplainedTarget(" New York", None, position=7, logit=3.0),
        ExplainedTarget("positive", 1, None, 2.0, rank=1, against="<others>", unit="probability"),
    )
    explanation = build(targets=targets)
    assert Explanation.load(explanation.save(tmp_path / f"x{suffix}")).targets == targets


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_part_of_a_larger_tensor_is_saved_alone(tmp_path: Path, suffix: str) -> None:
    whole = torch.randn(2, 3, 100)
    explanation = build(relevance=whole[:, 1, :8])
    path = explanation.save(tmp_path / f"x{suffix}")
    assert torch.equal(Explanation.load(path).relevance, whole[:, 1, :8])
    assert path.stat().st_size < 5000


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    for suffix in (".json", ".safetensors"):
        path = build().save(tmp_path / f"x{suffix}")
        assert Explanation.load(path) == build()
        assert b"\x80\x04" not in path.read_bytes()[:2]


def test_json_holds_what_the_readme_promises(tmp_path: Path) -> None:
    explanation = build()
    data = json.loads(explanation.save(tmp_path / "x.json").read_text(encoding="utf-8"))
    assert set(data) >= FIELDS
    assert data["tokens"] == list(TOKENS)
    assert data["token_ids"] == list(range(20, 28))
    assert data["relevance"] == explanation.relevance.tolist()
    assert [len(row) for row in data["relevance"]] == [8, 8]
    assert [set(t) >= {"token", "id", "position", "logit"} for t in data["targets"]] == [True, True]
    assert [(t["id"], t["position"], t["logit"]) for t in data["targets"]] == [(7, 3, 14.5), (8, 7, 13.5)]
    assert data["sum"] == pytest.approx([sum(row) for row in data["relevance"]], abs=1e-6)
    assert (data["model"], data["rules"], data["version"]) == ("a/model", "attnlrp", __version__)
    assert "日" in (tmp_path / "x.json").read_text(encoding="utf-8"), "scripts are readable in the file"


def test_safetensors_holds_the_relevance_and_readable_metadata(tmp_path: Path) -> None:
    path = build().save(tmp_path / "x.safetensors")
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["relevance"]
        assert json.loads(file.metadata()["attnlrp"])["model"] == "a/model"


def broken(folder: Path) -> dict[str, Path]:
    """Files that are not explanations, by what is wrong with them."""
    folder.mkdir(exist_ok=True)
    data = build().to_dict()
    contents = {
        "text.json": "not json",
        "list.json": "[1, 2]",
        "number.json": "3",
        "empty.json": "",
        "other.json": '{"a": 1}',
        "later.json": json.dumps(data | {"format": 99}),
        "without.json": json.dumps({k: v for k, v in data.items() if k != "tokens"}),
        "shape.json": json.dumps(data | {"relevance": [[1.0, 2.0]]}),
        "ragged.json": json.dumps(data | {"relevance": [[1.0], [1.0, 2.0]]}),
        "dtype.json": json.dumps(data | {"dtype": "nn"}),
        "words.json": json.dumps(data | {"words": [0]}),
        "targets.json": json.dumps(data | {"targets": [1, 2]}),
        "text.safetensors": "not a tensor",
        "empty.safetensors": "",
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00\x80")
    save_file({"weights": torch.zeros(2)}, folder / "model.safetensors")
    save_file({"relevance": torch.zeros(2, 8)}, folder / "plain.safetensors", {"format": "pt"})
    return {path.name: path for path in folder.iterdir()}


BROKEN = (
    *("text list number empty other later without shape ragged dtype words targets binary".split()),
    *("text.safetensors empty.safetensors model.safetensors plain.safetensors".split()),
)


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_explanation_is_refused(tmp_path: Path, name: str) -> None:
    path = broken(tmp_path)[name if "." in name else f"{name}.json"]
    with pytest.raises(InputError, match=r"not an explanation saved by attnlrp .*; expected a file that") as caught:
        Explanation.load(path)
    assert str(path) in str(caught.value)


def test_a_later_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format 99 is not known, expected 1"):
        Explanation.load(broken(tmp_path)["later.json"])


@pytest.mark.parametrize("name", ["x.pkl", "x.pt", "x"])
def test_other_suffixes_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"cannot write .*expected .*\.json"):
        build().save(tmp_path / name)
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"cannot load .*; expected \.safetensors or \.json"):
        Explanation.load(tmp_path / name)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    for name in ("none.json", "none.safetensors"):
        with pytest.raises(FileNotFoundError):
            Explanation.load(tmp_path / name)


def test_merging_words_conserves_relevance_and_moves_positions() -> None:
    explanation = build(dtype=torch.float64)
    merged = explanation.merge_words()
    assert merged.tokens == ("<s>", "unbelievable", " 日", "!\n")
    assert merged.token_ids == (20, 21, 24, 27)
    assert merged.special == (True, False, False, False)
    assert merged.segments == ("prompt", "prompt", "prompt", "generated")
    assert merged.words == (0, 1, 2, 3)
    assert merged.sum == pytest.approx(explanation.sum, rel=1e-12)
    expected = [explanation.relevance[:, a:b].sum(1) for a, b in ((0, 1), (1, 4), (4, 7), (7, 8))]
    assert torch.equal(merged.relevance, torch.stack(expected, dim=1))
    assert [t.position for t in merged.targets] == [1, 3]
    assert [dataclasses.replace(t, position=None) for t in merged.targets] == [
        dataclasses.replace(t, position=None) for t in explanation.targets
    ]
    assert explanation == build(dtype=torch.float64), "the original stays"
    assert merged.merge_words() == merged


def test_merging_keeps_a_target_without_position() -> None:
    merged = build(1, targets=(ExplainedTarget("positive", 1, None, 2.0),)).merge_words()
    assert merged.target.position is None


def test_top_orders_by_magnitude() -> None:
    row = torch.tensor([[0.5, -3.0, 1.0, 0.0, 2.0, -0.1, 0.2, 0.3]])
    explanation = build(1, relevance=row)
    assert explanation.top(3) == [(1, "un", -3.0), (4, " 日[1/3]", 2.0), (2, "believ", 1.0)]
    assert len(explanation.top()) == 8
    assert explanation.top(0) == []
    both = build(2, relevance=torch.cat([row, -row.flip(1)]))
    assert both.top(1, target=1) == [(6, " 日[3/3]", pytest.approx(3.0))]


def test_the_only_target_and_its_logit() -> None:
    explanation = build(1)
    assert explanation.target is explanation.targets[0]
    assert explanation.logit == 14.5
    for name in ("target", "logit"):
        with pytest.raises(InputError, match=r"this explanation has 3 targets; use .targets\[k\]"):
            getattr(build(3), name)


def test_sums_are_taken_in_double_precision() -> None:
    relevance = torch.zeros(1, 8)
    relevance[0, :4] = torch.tensor([1e8, 1.0, -1e8, 1.0])
    assert build(1, relevance=relevance).sum == (2.0,)

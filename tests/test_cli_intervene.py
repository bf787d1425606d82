"""`attnlrp intervene`: what a model says once units of it are changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from attnlrp import Explainer, Neuron, compare
from command import Run
from tiny_tokenizers import build

TEXT = "Paris is the capital of"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    model, tokenizer = build("llama")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_report_is_that_of_compare(folder: Path, run: Run) -> None:
    changes = ["--set", "layers.1.mlp:3=30", "--scale", "layers.0.self_attn:1=0", "--add", "layers.0.mlp:2=9"]
    result = run("intervene", TEXT, "--model", folder, *changes, "--position", 2, "--generate", 3, "--json", "-")
    assert result.status == 0, result.err
    found = json.loads(result.out)
    assert found["text"] == TEXT
    assert found["kl"] > 0
    assert found["changes"]["layers.1.mlp:3"] == "Set(value=30.0)"
    ours = compare(Explainer.from_pretrained(folder), TEXT, {Neuron(1, 3): 30.0}, positions=[2], generate=3)
    assert ours.prediction[0] == found["prediction"][0]


def test_what_is_printed(folder: Path, run: Run) -> None:
    result = run("intervene", TEXT, "--model", folder, "--clamp", "layers.1.mlp:3=5,6", "--generate", 3, "--top", 2)
    assert result.status == 0, result.err
    for word in (
        "Clamp(low=5.0, high=6.0)",
        "before Paris is",
        "after  Paris is",
        "prediction",
        "nats",
        "rose",
        "fell",
    ):
        assert word in result.out


def test_features_of_a_dictionary_are_units(folder: Path, run: Run, tmp_path: Path) -> None:
    weights = {"W_enc": torch.ones(32, 40), "W_dec": torch.randn(40, 32), "b_enc": torch.ones(40)}
    save_file(weights, tmp_path / "sae.safetensors")
    sae = f"layers.0:after={tmp_path / 'sae.safetensors'}"
    result = run(
        "intervene", TEXT, "--model", folder, "--sae", sae, "--add", "layers.0:after.features:7=5", "--json", "-"
    )
    assert result.status == 0, result.err
    assert json.loads(result.out)["kl"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "layers.1.mlp:3"], "--set: got 'layers.1.mlp:3', expected UNIT=NUMBER"),
        (["--clamp", "layers.1.mlp:3=1"], "--clamp: got 'layers.1.mlp:3=1', expected UNIT=LOW,HIGH"),
        (["--set", "layers.7.mlp:3=1"], "no layer is called layers.7.mlp"),
        (["--sae", "layers.0:after", "--set", "layers.1.mlp:3=1"], "--sae: got 'layers.0:after', expected PLACE=FILE"),
        ([], "expected --set, --scale, --add or --clamp"),
    ],
)
def test_bad_usage(folder: Path, run: Run, arguments: list[str], message: str) -> None:
    result = run("intervene", TEXT, "--model", folder, *arguments)
    assert result.status == 2
    assert message in result.err

"""`attnlrp neurons explain`: what it prints and writes is what the library explains; bad input is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny_vision
from attnlrp import Explainer, Explanation, Neuron, ReferenceSamples, SparseAutoencoder
from command import Run
from tiny_tokenizers import build

TEXT = "Paris is the capital of"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, a dictionary and texts."""
    path = tmp_path_factory.mktemp("neurons")
    for name in ("llama", "gpt2", "bert"):
        model, tokenizer = build(name)
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    torch.manual_seed(0)
    weights = {"W_enc": torch.ones(32, 40), "W_dec": torch.randn(40, 32), "b_enc": torch.ones(40)}
    save_file(weights, path / "sae.safetensors")
    texts = ["Paris is the capital of", "he said not", "the film was great"]
    (path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def explained(run: Run, root: Path, *arguments: Any, name: str = "llama") -> Explanation:
    """What the command writes as JSON."""
    result = run("neurons", "explain", TEXT, "--model", root / name, *arguments, "--json", "-")
    assert result.status == 0, result.err
    return Explanation.from_dict(json.loads(result.out))


def expect(found: Explanation, root: Path, *, name: str = "llama", **options: Any) -> None:
    """The same as the library, in float32."""
    ours = Explainer.from_pretrained(root / name)(TEXT, **options)
    assert isinstance(ours, Explanation)
    assert found.targets == ours.targets
    torch.testing.assert_close(found.relevance, ours.relevance)
    assert [x.name for x in found.latent or ()] == [x.name for x in ours.latent or ()]
    for one, other in zip(found.latent or (), ours.latent or (), strict=True):
        torch.testing.assert_close(one.total, other.total)
        assert torch.equal(one.indices, other.indices)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_neurons_and_heads_are_what_it_shows(run: Run, root: Path, name: str) -> None:
    expect(explained(run, root, name=name), root, name=name, latent=("neurons", "heads"))
    result = run("neurons", "explain", TEXT, "--model", root / name, "--top", 3)
    assert result.status == 0, result.err
    explanation = Explainer.from_pretrained(root / name)(TEXT, latent=("neurons", "heads"))
    for kind in ("neurons", "heads"):
        for unit in explanation.top(kind, 3):
            assert f"{unit.unit} " in result.out
        fourth = explanation.top(kind, 4)[3]
        assert f"{fourth.unit} " not in result.out
    assert "Residual stream" not in result.out


def test_kinds_can_be_chosen(run: Run, root: Path) -> None:
    kinds = ("residual", "attention")
    expect(explained(run, root, "--kind", kinds[0], "--kind", kinds[1]), root, latent=kinds)
    shown = run("neurons", "explain", TEXT, "--model", root / "llama", "--kind", "residual").out
    assert "Residual stream" in shown
    assert "Neurons" not in shown


def test_targets_and_positions(run: Run, root: Path) -> None:
    found = explained(run, root, "--target", "#7", "--position", 2, "--through", "layers.1.mlp:3")
    expect(found, root, latent=("neurons", "heads"), target=7, position=2, through="layers.1.mlp:3")
    assert (found.target.id, found.target.position) == (7, 2)
    layer = found.latent["layers.1.mlp"] if found.latent else None
    assert layer is not None
    assert not torch.equal(found.relevance, explained(run, root, "--target", "#7", "--position", 2).relevance)


def test_a_neuron_is_the_target(run: Run, root: Path) -> None:
    found = explained(run, root, "--unit", "layers.1.mlp:3", "--position", 3)
    expect(found, root, latent=("neurons", "heads"), target=Neuron(1, 3), position=3)
    assert found.target.token == "layers.1.mlp:3"
    assert found.target.unit == "activation"


def test_a_dictionary_alone_and_beside_neurons(run: Run, root: Path) -> None:
    said = f"layers.0:after={root / 'sae.safetensors'}"
    dictionary = SparseAutoencoder.load(root / "sae.safetensors", "layers.0:after")
    expect(explained(run, root, "--sae", said), root, latent=dictionary)
    both = explained(run, root, "--sae", said, "--kind", "neurons")
    assert {layer.kind for layer in both.latent or ()} == {"neurons", "features"}
    shown = run("neurons", "explain", TEXT, "--model", root / "llama", "--sae", said).out
    assert "layers.0:after.features:" in shown
    assert "Neurons" not in shown


def test_samples_say_what_units_stand_for(run: Run, root: Path, tmp_path: Path) -> None:
    samples, page = tmp_path / "samples", tmp_path / "page.html"
    model = ("--model", root / "llama")
    done = run("neurons", "collect", root / "texts.jsonl", "--out", samples, *model, "--units", "layers.1.mlp")
    assert done.status == 0, done.err
    arguments = ("neurons", "explain", TEXT, "--kind", "neurons", "--samples", samples, "--top", 40)
    result = run(*arguments, *model, "--save", page)
    assert result.status == 0, result.err
    found = ReferenceSamples.load(samples)
    rows = [line.rstrip(" ━") for line in result.out.splitlines() if line.startswith("layers.1.mlp:")]
    assert rows
    for row in rows:
        words = [word for word, _ in found.words(row.split()[0]) if word.strip()]
        assert row.endswith(f"  {', '.join(words[:4])}")
    assert not re.search(r"^layers\.0\.mlp:.*\b(said|film|great)\b", result.out, re.MULTILINE)
    assert '<th scope="col">Label</th>' in page.read_text()
    other = run(*arguments, "--model", root / "gpt2")
    assert other.status == 2
    assert "is of llama, expected gpt2" in other.err


@pytest.mark.parametrize("ending", ["html", "png", "json", "safetensors"])
def test_files(run: Run, root: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"units.{ending}"
    result = run("neurons", "explain", TEXT, "--model", root / "llama", "--save", out)
    assert result.status == 0, result.err
    if ending in ("json", "safetensors"):
        expect(Explanation.load(out), root, latent=("neurons", "heads"))
    elif ending == "html":
        assert "layers.1.mlp:" in out.read_text()
    else:
        assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unit", "layers.1.mlp:3", "--target", "the"], "--unit and --target exclude each other"),
        (["--unit", "layers.1.mlp"], "--unit: got 'layers.1.mlp', expected an address such as layers.16.mlp:394"),
        (["--unit", "layers.7.mlp:3"], "no layer with neurons is called layers.7.mlp; expected an address such as"),
        (["--unit", "layers.0.self_attn:1"], "expected an address such as layers.0.mlp:0"),
        (["--unit", "layers.1.mlp:48"], "layers.1.mlp has neurons 0 to 47"),
        (["--through", "layers.1.mpl:3"], "no layer is called layers.1.mpl"),
        (["--sae", "layers.0:after"], "--sae: got 'layers.0:after', expected PLACE=FILE"),
        (["--samples", "nowhere"], "nowhere: no reference samples"),
        (["--save", "units.gif"], "units.gif: cannot write .gif"),
        (["--kind", "nerves"], "'nerves' is not one of"),
    ],
)
def test_bad_usage(run: Run, root: Path, arguments: list[str], message: str) -> None:
    result = run("neurons", "explain", TEXT, "--model", root / "llama", *arguments)
    assert result.status == 2
    assert message in " ".join(result.err.split())


def test_a_model_of_images_is_refused(run: Run, tmp_path: Path) -> None:
    ours = tiny_vision.build("ViT")
    ours.model.float().save_pretrained(tmp_path / "vit")
    ours.processor.save_pretrained(tmp_path / "vit")
    result = run("neurons", "explain", TEXT, "--model", tmp_path / "vit")
    assert result.status == 1
    assert "use attnlrp.ImageExplainer (attnlrp image)" in result.err

"""The logit lens against its formula, and a search that finds a neuron that was put there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import tiny_tasks
import tiny_vision
from attnlrp import Explainer, InputError, ModelError, Neuron, ReferenceSamples, reference_samples
from attnlrp.labels import LogitLens, label, search
from attnlrp.units import Rows, Taps, find_sites
from command import Run
from conformance import recipe
from test_reference import TEXTS, explain
from tiny_tokenizers import build_tokenizer

WORD = "capital"


def deviations(logits: Tensor) -> Tensor:
    return (logits - logits.mean()) / logits.std(correction=0)


def naive(name: str, model: Any, index: int) -> Tensor:
    """Logits from the weights, by name, for a neuron of layer 1 (of its expert 2)."""
    if name == "gpt2":
        block, norm, head = model.transformer.h[1], model.transformer.ln_f, model.lm_head
        column = block.mlp.c_proj.weight[index]
        return head.weight @ (norm.weight * (column - column.mean()) / column.std(correction=0))
    block, norm, head = model.model.layers[1], model.model.norm, model.lm_head
    gain = norm.weight + 1 if name.startswith("gemma") else norm.weight
    column = block.mlp.experts.down_proj[2][:, index] if name == "mixtral" else block.mlp.down_proj.weight[:, index]
    if name.startswith("gemma"):
        column = (block.post_feedforward_layernorm.weight + 1) * column
    return head.weight @ (gain * column)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3", "mixtral", "phi-square"])
def test_the_lens_is_its_formula(name: str) -> None:
    settings: Any = {}
    if name == "phi-square":  # as many neurons as hidden numbers: shapes do not tell which way the weight lies
        settings, name = {"intermediate_size": 32}, "llama"
    model: Any = tiny.build(name, **settings)
    tokenizer = build_tokenizer("bytes")
    lens = LogitLens(Explainer(model, tokenizer))
    with torch.no_grad():
        expected = deviations(naive(name, model, 3))
    address = {"gpt2": "h.1.mlp:3", "mixtral": "layers.1.mlp.experts.2:3"}.get(name, "layers.1.mlp:3")
    promoted, suppressed = lens(address, 5)
    assert [t.id for t in promoted] == expected.topk(5).indices.tolist()
    assert [t.id for t in suppressed] == expected.topk(5, largest=False).indices.tolist()
    assert [t.deviation for t in promoted] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-3)
    assert promoted[0].token == tokenizer.decode([promoted[0].id])


@pytest.mark.parametrize("kind", ["cohere", "gemma3_text", "gpt_neox", "nemotron", "olmo2", "opt", "stablelm"])
def test_the_lens_is_what_a_neuron_does_to_the_logits(kind: str) -> None:
    """Switched on far above and far below everything else, it moves the logits by twice the lens."""
    model: Any = recipe.build("causal-lm", kind)
    lens = LogitLens(Explainer(model, build_tokenizer("bytes")))
    site = [s for s in lens.sites if s.kind == "neurons"][-1]
    logits = []
    for strength in (1e4, -1e4):

        def switch(x: Tensor, rows: Rows | None, strength: float = strength) -> Tensor:
            y = x.clone()
            y[..., 1] += strength
            return y

        with torch.no_grad(), Taps(model, {site: switch}):
            logits.append(model(**recipe.inputs("causal-lm", kind, model)).logits[0, -1])
    moved = deviations(logits[0] - logits[1])
    every, _ = lens(f"{site.name}:1", len(moved))
    found = torch.zeros_like(moved)
    found[[t.id for t in every]] = torch.tensor([t.deviation for t in every])
    # a norm behind the MLP bounds what a neuron can do, so that the rest is still seen
    assert torch.corrcoef(torch.stack([found, moved]))[0, 1] > (0.98 if kind in ("gemma3_text", "olmo2") else 0.9999)


@pytest.mark.parametrize("kind", ["bert", "openai-gpt", "xlnet"])
def test_a_lens_needs_a_norm_alone_behind_the_last_layer(kind: str) -> None:
    model: Any = recipe.build("causal-lm", kind)
    with pytest.raises(ModelError, match="a logit lens expects a norm, and nothing else, between its last layer and"):
        LogitLens(Explainer(model, build_tokenizer("bytes")))


def test_promotion_of_a_word_is_the_deviation_of_its_token() -> None:
    explainer = explain("gpt2")
    lens = LogitLens(explainer)
    site = next(s for s in lens.sites if s.name == "h.0.mlp")
    ids = [explainer.tokenizer.encode(form) for form in (" " + WORD, WORD)]
    (token,) = {own[0] for own in ids if len(own) == 1}
    every, _ = lens("h.0.mlp:9", len(explainer.tokenizer))
    expected = next(t.deviation for t in every if t.id == token)
    assert lens.promotion(site, WORD)[9].item() == pytest.approx(expected, abs=1e-4)
    assert lens.promotion(site, "unheardof").tolist() == [0.0] * site.units


def test_a_lens_is_for_neurons_of_language_models() -> None:
    with pytest.raises(ModelError, match=r"is a model for sequence-classification; a logit lens is for causal-lm"):
        LogitLens(explain("bert"))
    with pytest.raises(InputError, match=r"logit lens: layers\.1\.self_attn has heads, whose output is no single"):
        LogitLens(explain("llama"))("layers.1.self_attn:0")


def plant(explainer: Explainer, index: int) -> None:
    """A neuron of layer 0 that is active at " capital" and promotes it."""
    model: Any = explainer.model
    (token,) = explainer.tokenizer.encode(" " + WORD)
    layer = model.transformer.h[0]
    with torch.no_grad():
        seen: list[Tensor] = []
        hook = layer.mlp.c_fc.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
        for text in TEXTS:
            model(**explainer.tokenizer(text, return_tensors="pt"))
        hook.remove()
        ids = torch.tensor([i for text in TEXTS for i in explainer.tokenizer(text).input_ids])
        rows, wanted = torch.cat(seen), (ids == token).to(model.dtype)
        centred = rows - rows.mean(dim=0)
        direction = torch.linalg.lstsq(centred, wanted[:, None] - wanted.mean()).solution[:, 0]
        layer.mlp.c_fc.weight[:, index] = 20 * direction
        layer.mlp.c_fc.bias[index] = -20 * (rows.mean(dim=0) @ direction) - 5
        unembedding = model.lm_head.weight
        layer.mlp.c_proj.weight[index] = (unembedding[token] - unembedding.mean(dim=0)) / model.transformer.ln_f.weight


def test_a_search_finds_the_neuron_that_was_put_there() -> None:
    explainer = explain("gpt2")
    plant(explainer, 77)
    samples = reference_samples(explainer, TEXTS, by=("activation", "relevance"))
    lens = LogitLens(explainer)
    (first, second) = search(samples, "Capital", lens=lens, count=2)
    assert first.unit == "h.0.mlp:77"
    assert first.at == 3 / 8  # as many texts hold the word, of all that were kept
    assert first.promotes > 3
    assert first.score == pytest.approx(max(first.at, first.after) + min(first.promotes / 10, 1))
    assert first.score > second.score
    assert any(match.unit == first.unit for match in search(samples, WORD, by="relevance", count=200))
    found = label(samples, Neuron(0, 77), lens=lens, count=3)
    assert (found.unit, found.words[0][0]) == ("h.0.mlp:77", WORD)
    assert " " + WORD in [t.token for t in found.promotes]
    assert len(found.suppresses) == 3
    assert label(samples, Neuron(0, 77)).promotes == []


def test_shares_are_of_the_samples_of_a_unit() -> None:
    samples = reference_samples(explain("gpt2"), TEXTS, by="activation", top=4)
    for match in search(samples, "bad", count=500):
        own = samples.of(match.unit)
        assert match.at == sum(s.word == "bad" for s in own) / 4
        assert match.after == sum(s.passage.word_after(s.position) == "bad" for s in own) / 4
        assert (match.promotes, match.score) == (0, max(match.at, match.after))


@pytest.mark.parametrize("word", ["", " ", "two words"])
def test_what_is_not_a_word(word: str) -> None:
    with pytest.raises(InputError, match=f"word: got {word!r}, expected one word"):
        search(reference_samples(explain("gpt2"), TEXTS[:1]), word)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, texts, and their samples in two parts."""
    folder = tmp_path_factory.mktemp("neurons")
    explainer = explain("gpt2")
    plant(explainer, 77)
    explainer.model.save_pretrained(folder / "model")
    explainer.tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"id": f"text {k}", "text": text}) for k, text in enumerate(TEXTS)]
    for name, part in {"all": lines, "first": lines[:3], "rest": lines[3:]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(part))
    return folder


def collect(run: Run, root: Path, name: str, *options: Any) -> Any:
    model = ("--model", root / "model", "--dtype", "float64")
    return run("neurons", "collect", root / f"{name}.jsonl", "--out", root / f"samples-{name}", *model, *options)


def test_collect_label_and_search(run: Run, root: Path) -> None:
    done = collect(run, root, "all", "--top", 4)
    assert done.status == 0, done.err
    assert "8 texts, 2 layers, 256 units, activation, relevance" in done.err
    options = ("--samples", root / "samples-all", "--model", root / "model", "--dtype", "float64")
    shown = run("neurons", "label", "h.0.mlp:77", *options)
    assert shown.status == 0, shown.err
    for part in ("h.0.mlp:77", "at         capital", "promotes", "suppresses", "activation", "text 0 @"):
        assert part in shown.out
    plain = run("neurons", "label", "h.0.mlp:77", "--samples", root / "samples-all", "--by", "relevance")
    assert plain.status == 0
    assert "promotes" not in plain.out
    found = run("neurons", "search", WORD, *options, "--top", 3)
    assert found.out.splitlines()[0].split() == "unit score at before promotes words at its peaks".split()
    assert found.out.splitlines()[1].startswith("h.0.mlp:77")


def test_json_of_labels_and_matches(run: Run, root: Path) -> None:
    assert collect(run, root, "all", "--top", 4).status == 0
    options = ("--samples", root / "samples-all", "--model", root / "model", "--dtype", "float64", "--json", "-")
    (found,) = json.loads(run("neurons", "label", "h.0.mlp:77", *options).out)
    assert found["words"][0][0] == WORD
    sample = found["samples"][0]
    assert sample["word"] == WORD
    assert len(sample["activation"]) == len(sample["tokens"])
    assert sample["activation"][sample["position"]] == pytest.approx(sample["value"])
    first, *_ = json.loads(run("neurons", "search", WORD, *options).out)
    assert first["unit"] == "h.0.mlp:77"


def test_parts_are_merged(run: Run, root: Path) -> None:
    for name in ("all", "first", "rest"):
        assert collect(run, root, name, "--top", 4).status == 0
    merged = run("neurons", "merge", root / "samples-first", root / "samples-rest", "--out", root / "merged")
    assert "8 texts" in merged.err
    outs = [
        run("neurons", "label", "h.1.mlp:5", "--samples", root / folder, "--json", "-").out
        for folder in ("merged", "samples-all")
    ]
    assert outs[0] == outs[1]


def test_images_are_collected_too(run: Run, tmp_path: Path) -> None:
    explainer = tiny_vision.build("ViT")
    explainer.model.float().save_pretrained(tmp_path / "model")
    explainer.processor.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for k in range(3):
        tiny_vision.photo(seed=k).save(tmp_path / "photos" / f"{k}.png")
    done = run("neurons", "collect", tmp_path / "photos", "--out", tmp_path / "out", "--model", tmp_path / "model")
    assert done.status == 0, done.err
    assert "3 texts, 2 layers" in done.err
    (site, *_) = ReferenceSamples.load(tmp_path / "out").sites
    shown = run("neurons", "label", f"{site.name}:3", "--samples", tmp_path / "out", "--model", tmp_path / "model")
    assert shown.status == 0, shown.err
    assert ".png @" in shown.out


def test_errors_of_the_command(run: Run, root: Path) -> None:
    nothing = run("neurons", "search", "x", "--samples", root / "nowhere")
    assert nothing.status == 2
    assert "nowhere: no reference samples" in nothing.err
    assert collect(run, root, "all", "--top", 4).status == 0
    assert collect(run, root, "all", "--top", 5).status == 2
    (root / "other").mkdir(exist_ok=True)
    tiny_tasks.build("bert-mlm").model.save_pretrained(root / "other")
    tiny_tasks.build("bert-mlm").tokenizer.save_pretrained(root / "other")
    other = run("neurons", "search", "x", "--samples", root / "samples-all", "--model", root / "other")
    assert other.status == 2
    assert "--model: got other, the samples are of model" in other.err


def test_sites_of_a_lens_are_those_of_the_samples() -> None:
    explainer = explain("llama")
    lens = LogitLens(explainer)
    assert lens.sites == find_sites(explainer.model, tiny.inputs("llama"))

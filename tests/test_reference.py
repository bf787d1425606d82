"""Reference samples against a brute-force pass that keeps everything and sorts it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

import attnlrp
import tiny_tasks
import tiny_vision
from attnlrp import Explainer, InputError, Neuron, NumericalError, ReferenceSamples, activation_maps, reference_samples
from attnlrp.images import read_image
from attnlrp.ranking import Passage, Ranking
from attnlrp.units import example_inputs, find_sites
from tiny_tokenizers import CONTEXT, build, build_tokenizer

TEXTS = [
    "Paris is the capital of France.",
    "Berlin is the capital of Germany.",
    "The film was great, the play was bad",
    "He said: don't go there! She said 'why not?'",
    "they were walking and talking in the garden.",
    "Italy has Rome as its capital.",
    "unbelievable unhappiness is not the end of the world.",
    "The film was great, the play was bad",
]
ALL: tuple[Any, ...] = ("activation", "relevance", "-activation", "-relevance")
Read = dict[str, tuple[Tensor, Tensor]]  # layer -> units (row, unit), and the token of each row


def explain(name: str) -> Explainer:
    if name == "mixtral":
        tokenizer = build_tokenizer("bytes")
        config = transformers.MixtralConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
        )
        config.vocab_size, config.num_local_experts, config.max_position_embeddings = len(tokenizer), 4, CONTEXT
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape))
        model.set_experts_implementation("eager")  # grouped_mm has no float64
        return Explainer(model.double().eval(), tokenizer)
    if name in tiny_tasks.MODELS:
        return tiny_tasks.build(name)
    return Explainer(*build(name, torch.float64))


# --- the naive pass ---------------------------------------------------------------------------------------------------


def watch(explainer: Explainer) -> Read:
    """Fills with what each layer's last linear reads, from now on; experts are computed one token after the other."""
    model: Any = explainer.model
    read: Read = {}

    def note(name: str, module: Any, args: tuple[Tensor, ...]) -> None:
        read[name] = (args[0], torch.arange(args[0].shape[-2]))

    def experts(name: str, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for e in range(len(module.down_proj)):
            token, place = (index == e).nonzero(as_tuple=True)
            if len(token):
                gate, up = F.linear(hidden[token], module.gate_up_proj[e]).chunk(2, dim=-1)
                read[f"{name}.{e}"] = (F.silu(gate) * up, token)
                own = F.linear(read[f"{name}.{e}"][0], module.down_proj[e]) * weights[token, place, None]
                result = result.index_add(0, token, own)
        return result

    for site in find_sites(model, example_inputs(model)):
        module = model.get_submodule(site.weight.rpartition(".")[0])
        if site.expert is not None:
            module.forward = partial(experts, site.name.rpartition(".")[0], module)
        elif site.kind == "neurons":
            module.register_forward_pre_hook(partial(note, site.name))
    return read


def explained(explainer: Explainer, output: Any, ids: list[int], target: str) -> Tensor:
    logits = output.logits[0]
    if target == "own":
        return logits.max() if logits.dim() == 1 else logits[-1].max()
    special = explainer.tokenizer.all_special_ids
    return torch.stack([row.max() for row, token in zip(logits, ids, strict=True) if token not in special]).sum()


def brute_force(explainer: Explainer, target: str) -> dict[str, list[dict[str, tuple[Tensor, Tensor, Tensor]]]]:
    """For each text: layer -> activation (row, unit), relevance (row, unit), token of each row."""
    read, found = watch(explainer), []
    for text in TEXTS:
        read.clear()
        encoded = explainer.tokenizer(text, return_tensors="pt")
        with attnlrp.propagate(explainer.model, explainer.rules):
            output = explainer.model(**encoded)
            total = explained(explainer, output, encoded.input_ids[0].tolist(), target)
        xs = [x for x, _ in read.values()]
        grads = torch.autograd.grad(total, xs, allow_unused=True, materialize_grads=True)
        rows = zip(read.items(), grads, strict=True)
        found.append(
            {
                name: (x.detach().flatten(0, -2), (x * g).detach().flatten(0, -2), tokens)
                for (name, (x, tokens)), g in rows
            }
        )
    return {"texts": found}


def ranked(found: Any, layer: str, unit: int, by: str, reduce: str, top: int) -> list[tuple[int, int, float]]:
    """Sample, position and value of the best samples, from everything that there is."""
    entries = []
    for sample, layers in enumerate(found["texts"]):
        if layer not in layers:
            continue
        activation, relevance, tokens = layers[layer]
        own = (activation if "activation" in by else relevance)[:, unit] * (-1 if by.startswith("-") else 1)
        value = own.sum() if by.endswith("relevance") and reduce == "sum" else own.max()
        entries.append((value.item(), sample, int(tokens[own.argmax()])))
    entries.sort(key=lambda e: (-round(e[0], 10), e[1]))
    sign = -1 if by.startswith("-") else 1
    return [(sample, position, sign * value) for value, sample, position in entries[:top]]


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize(
    ("name", "target"),
    [("llama", "every"), ("gpt2", "own"), ("mixtral", "every"), ("bert", "own"), ("bert-mlm", "every")],
)
def test_samples_are_those_of_a_pass_that_keeps_everything(name: str, target: Any, reduce: Any) -> None:
    samples = reference_samples(explain(name), TEXTS, by=ALL, reduce=reduce, top=3, target=target)
    found = brute_force(explain(name), target)
    layers = {layer for text in found["texts"] for layer in text}
    assert layers <= {site.name for site in samples.sites}
    assert len(layers) == (8 if name == "mixtral" else 2)
    for layer in layers:
        for unit in range(0, 48, 5):
            for by in ALL:
                own = samples.of(f"{layer}:{unit}", by)
                expected = ranked(found, layer, unit, by, reduce, 3)
                assert [(s.sample, s.position) for s in own] == [e[:2] for e in expected], (layer, unit, by)
                assert [s.value for s in own] == pytest.approx([e[2] for e in expected], abs=1e-9)
                assert [s.rank for s in own] == list(range(1, len(expected) + 1))


def test_heads_by_the_norm_of_their_output() -> None:
    explainer = explain("llama")
    samples = reference_samples(explainer, TEXTS, units="heads", top=2, by="activation")
    read: list[Tensor] = []
    module = explainer.model.model.layers[1].self_attn.o_proj
    hook = module.register_forward_pre_hook(lambda m, args: read.append(args[0][0].unflatten(-1, (4, -1)).norm(dim=-1)))
    with torch.no_grad():
        for text in TEXTS:
            explainer.model(**explainer.tokenizer(text, return_tensors="pt"))
    hook.remove()
    best = torch.stack([norms.amax(dim=0) for norms in read])[:, 3]
    expected = best.argsort(descending=True, stable=True)[:2].tolist()
    assert [s.sample for s in samples.of("layers.1.self_attn:3")] == expected


def test_an_encoder_decoder_has_units_on_both_sides() -> None:
    explainer = tiny_tasks.build("t5")
    samples = reference_samples(explainer, TEXTS, top=2)
    assert samples.settings.target == "own"
    (first, _) = samples.of("decoder.block.1.layer.2.DenseReluDense:7")
    ids = explainer.tokenizer(first.passage.text).input_ids
    assert (first.position, len(first.passage.tokens)) == (len(ids), len(ids) + 1)  # of the one that the decoder reads
    (other, _) = samples.of("encoder.block.0.layer.1.DenseReluDense:7")
    assert other.position < len(explainer.tokenizer(other.passage.text).input_ids)
    for sample in activation_maps(explainer, [first, other]):
        assert sample.activation is not None
        assert len(sample.activation) == len(sample.passage.tokens)
        assert sample.activation[sample.position].item() == pytest.approx(sample.value)


def test_images_have_patches_instead_of_tokens(tmp_path: Path) -> None:
    explainer = tiny_vision.build("ViT")
    files = [tmp_path / f"{k}.png" for k in range(4)]
    for k, file in enumerate(files):
        tiny_vision.photo(seed=k).save(file)
    (site, *_) = [s for s in find_sites(explainer.model, example_inputs(explainer.model)) if s.kind == "neurons"]
    samples = reference_samples(explainer, files, by=ALL, top=2)
    read: list[Tensor] = []
    module = explainer.model.get_submodule(site.weight.rpartition(".")[0])
    hook = module.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    activations, relevance = [], []
    for file in files:
        pixels = explainer.processor(images=read_image(file)[0], return_tensors="pt")["pixel_values"].double()
        with attnlrp.propagate(explainer.model, explainer.rules):
            total = explainer.model(pixel_values=pixels.requires_grad_()).logits.max()
        (grad,) = torch.autograd.grad(total, read[-1])
        activations.append(read[-1][0].detach())
        relevance.append((read[-1] * grad)[0].detach().sum(dim=0))
    hook.remove()
    for unit in range(0, site.units, 5):
        best = torch.stack([x[:, unit].max() for x in activations]).argsort(descending=True)[:2].tolist()
        own = samples.of(f"{site.name}:{unit}")
        assert [(s.sample, s.passage.text) for s in own] == [(k, str(files[k])) for k in best]
        assert [s.position for s in own] == [int(activations[k][:, unit].argmax()) for k in best]
        lowest = torch.stack(relevance)[:, unit].argsort()[:2].tolist()
        assert [s.sample for s in samples.of(f"{site.name}:{unit}", "-relevance")] == lowest
    (mapped,) = activation_maps(explainer, samples.of(f"{site.name}:3")[:1])
    assert mapped.activation is not None
    torch.testing.assert_close(mapped.activation, activations[mapped.sample][:, 3])
    with pytest.raises(InputError, match="image 0: got 3, expected the name of a file"):
        reference_samples(explainer, [{"image": 3}])


# --- one pass, in parts ---------------------------------------------------------------------------------------------


def same(a: ReferenceSamples, b: ReferenceSamples, *, exact: bool = True) -> None:
    assert (a.settings, a.sites, a.passages, a.count) == (b.settings, b.sites, b.passages, b.count)
    for by, layers in a.rankings.items():
        for name, ranking in layers.items():
            other = b.rankings[by][name]
            torch.testing.assert_close(ranking.values, other.values, rtol=0, atol=0 if exact else 1e-9)
            assert ranking.samples.equal(other.samples)
            assert ranking.positions.equal(other.positions)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_shards_merge_to_one_pass(name: str) -> None:
    collect = partial(reference_samples, explain(name), by=ALL, top=3)
    parts = [collect(TEXTS[:3]), collect(TEXTS[3:4]), collect(TEXTS[4:])]
    numbered = [{"name": str(k), "text": text} for k, text in enumerate(TEXTS)]
    whole = collect(numbered)
    merged = parts[0].merge(parts[1]).merge(parts[2])
    names = {k: dataclasses.replace(passage, name=str(k)) for k, passage in merged.passages.items()}
    same(dataclasses.replace(merged, passages=names), whole)


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert", "gpt2"])
def test_batches_find_what_single_texts_do(name: str) -> None:
    collect = partial(reference_samples, explain(name), TEXTS[:7], by=ALL, top=3)
    same(collect(), collect(batch_size=3), exact=False)


def test_a_model_that_keeps_less_finds_the_same() -> None:
    explainer = explain("llama")
    whole = reference_samples(explainer, TEXTS, by=ALL)
    saving = Explainer(explainer.model, explainer.tokenizer, memory="checkpoint")
    same(whole, reference_samples(saving, TEXTS, by=ALL), exact=False)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_run_that_was_killed_goes_on(after: int, tmp_path: Path) -> None:
    collect = partial(reference_samples, explain("llama"), TEXTS, by=ALL, top=2, save_every=2)
    seen: list[int] = []

    def kill(done: int, last: str) -> None:
        if done == after:
            raise KilledError

    with pytest.raises(KilledError):
        collect(folder=tmp_path / "samples", progress=kill)
    again = collect(folder=tmp_path / "samples", progress=lambda done, last: seen.append(done))
    assert seen == list(range(1 + after // 2 * 2, 9))
    same(again, collect())
    same(ReferenceSamples.load(tmp_path / "samples"), again)
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_a_run_that_is_killed_while_it_writes_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = partial(reference_samples, explain("llama"), folder=tmp_path, top=2)
    collect(TEXTS[:4])
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(KilledError()))
        with pytest.raises(KilledError):
            collect(TEXTS)
    assert ReferenceSamples.load(tmp_path).count == 4
    same(collect(TEXTS), reference_samples(explain("llama"), TEXTS, top=2))


def test_a_finished_run_is_read_and_may_be_extended(tmp_path: Path) -> None:
    collect = partial(reference_samples, explain("llama"), folder=tmp_path, top=2)
    first = collect(TEXTS[:4])

    def never(done: int, last: str) -> None:
        raise AssertionError(last)

    same(collect(TEXTS[:4], progress=never), first)
    same(collect(TEXTS), reference_samples(explain("llama"), TEXTS, top=2))


def test_only_texts_that_a_unit_has_kept_are_kept() -> None:
    samples = reference_samples(explain("llama"), TEXTS, units="layers.1.mlp", by="activation", top=1)
    kept = samples.rankings["activation"]["layers.1.mlp"].samples.unique().tolist()
    assert sorted(samples.passages) == kept
    assert len(kept) < len(TEXTS)
    assert 7 not in kept  # the same as text 2, which came first


def test_a_folder_loads_as_it_was_saved(tmp_path: Path) -> None:
    samples = reference_samples(explain("mixtral"), TEXTS, by=ALL, top=20)
    same(ReferenceSamples.load(samples.save(tmp_path / "deep" / "folder")), samples)
    assert samples.of("layers.0.mlp.experts.2:0")[0].activation is None


# --- what samples say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert"])
def test_heat_maps_are_the_activations_of_the_unit(name: str) -> None:
    explainer = explain(name)
    unit = {"mixtral": "layers.0.mlp.experts.1:7", "bert": "layer.1.output:7"}.get(name, "layers.1.mlp:7")
    samples = reference_samples(explainer, TEXTS, by="activation", length=9, top=4).of(unit)
    mapped = activation_maps(explainer, samples)
    assert len(mapped) == 4
    for sample in mapped:
        assert sample.activation is not None
        assert len(sample.activation) == len(sample.passage.tokens) <= 9
        assert sample.activation[sample.position].item() == pytest.approx(sample.value, abs=1e-12)
        assert sample.activation.max().item() <= sample.value + 1e-12 or name == "mixtral"


def test_the_text_of_a_sample_is_what_was_read() -> None:
    samples = reference_samples(explain("llama"), [{"name": "a", "text": TEXTS[0]}], length=6, top=1)
    (found,) = samples.of(Neuron(1, 3))
    assert found.passage.name == "a"
    assert TEXTS[0].startswith(found.passage.text)
    assert found.passage.text != TEXTS[0]
    assert "".join(found.passage.tokens[1:]).strip() == found.passage.text
    assert (found.unit, found.by, found.rank) == ("layers.1.mlp:3", "activation", 1)


def test_words_at_and_behind_the_peaks() -> None:
    passage = Passage("a", "cold ice bears", ("co", "ld", " ice", " be", "ars", " "), (0, 0, 1, 2, 2, 3))
    assert [passage.word(k) for k in range(7)] == ["cold", "cold", "ice", "bears", "bears", " ", ""]
    assert [passage.word_after(k) for k in (0, 1, 2, 3, 5)] == ["ice", "ice", "bears", " ", ""]
    samples = reference_samples(explain("llama"), TEXTS[:1], units="layers.0.mlp", by="activation", top=3)
    ranking = Ranking.empty(48, 3, torch.float64)
    for sample, position in enumerate([0, 2, 1]):
        ranking.add(sample, torch.full((48,), 1.0 - sample, dtype=torch.float64), torch.full((48,), position))
    held = dataclasses.replace(
        samples, rankings={"activation": {"layers.0.mlp": ranking}}, passages=dict.fromkeys(range(3), passage)
    )
    assert held.words("layers.0.mlp:0") == [("cold", pytest.approx(2 / 3)), ("ice", pytest.approx(1 / 3))]
    assert held.words("layers.0.mlp:0", after=True)[0] == ("ice", pytest.approx(2 / 3))


def test_a_ranking_keeps_the_first_of_equal_samples() -> None:
    ranking = Ranking.empty(2, 2, torch.float64)
    for sample, values in enumerate([[1.0, 0.0], [1.0, 2.0], [1.0, 1.0], [3.0, 2.0], [1.0, -math.inf]]):
        ranking.add(sample, torch.tensor(values, dtype=torch.float64), torch.tensor([sample, 9]))
    assert ranking.samples.tolist() == [[3, 0], [1, 3]]
    assert ranking.values.tolist() == [[3.0, 1.0], [2.0, 2.0]]
    assert ranking.positions.tolist() == [[3, 0], [9, 9]]


# --- what cannot be done --------------------------------------------------------------------------------------------

WRONG: list[tuple[Callable[[Explainer], Any], str]] = [
    (lambda e: reference_samples(e, "one text"), "texts: got 'one text', expected a list of texts"),
    (lambda e: reference_samples(e, ["a text", " "]), "text 1: got ' ', expected a text"),
    (lambda e: reference_samples(e, [{"text": 3}]), "text 0: got 3, expected a text, or a mapping with text"),
    (
        lambda e: reference_samples(e, TEXTS, units="layers.9.mlp"),
        r"units: got layers\.9\.mlp, expected neurons, heads",
    ),
    (
        lambda e: reference_samples(e, TEXTS, units=[]),
        "units: got an empty list, expected neurons, heads, or a pattern",
    ),
    (lambda e: reference_samples(e, TEXTS, by=()), "by: got nothing, expected any of activation, relevance"),
    (lambda e: reference_samples(e, TEXTS, top=0), "top: got 0, expected at least 1"),
    (lambda e: reference_samples(e, TEXTS, batch_size=0), "batch_size, save_every: got 0, 100, expected at least 1"),
    (
        lambda e: reference_samples(e, TEXTS[:1]).of("layers.0.mlp:0", "-activation"),
        "by: got '-activation', collected was activation, relevance",
    ),
    (lambda e: reference_samples(e, TEXTS[:1]).of("layers.0.mlp:99"), r"layers\.0\.mlp has neurons 0 to 47"),
]


@pytest.mark.parametrize(("call", "match"), WRONG)
def test_errors_say_what_to_do(call: Callable[[Explainer], Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        call(explain("llama"))


def test_a_model_with_one_output_has_no_every() -> None:
    with pytest.raises(InputError, match=r"target: .* is a model for sequence-classification, which has no output at"):
        reference_samples(explain("bert"), TEXTS, target="every")


def test_only_the_same_can_be_merged() -> None:
    one = reference_samples(explain("llama"), TEXTS[:1])
    with pytest.raises(InputError, match=r"merge: collected with top 10 \(now 3\); expected the same settings"):
        one.merge(reference_samples(explain("llama"), TEXTS[:1], top=3))
    with pytest.raises(InputError, match=r"merge: collected with model 'LlamaForCausalLM' \(now 'GPT2LMHeadModel'\)"):
        one.merge(reference_samples(explain("gpt2"), TEXTS[:1]))
    with pytest.raises(InputError, match=r"merge: of other layers \(layers\.1\.mlp\); expected the same units"):
        one.merge(reference_samples(explain("llama"), TEXTS[:1], units="layers.0.mlp"))


def test_a_folder_is_continued_with_the_same_texts_and_settings(tmp_path: Path) -> None:
    collect = partial(reference_samples, explain("llama"), folder=tmp_path, units="layers.0.mlp")
    collect(TEXTS[:3])
    with pytest.raises(InputError, match=r"its 3 texts are not those that were given; expected the same"):
        collect(TEXTS[1:])
    with pytest.raises(InputError, match=r"holds samples of 3 texts, got 2; expected the same texts"):
        collect(TEXTS[:2])
    with pytest.raises(InputError, match=r"collected with reduce 'sum' \(now 'max'\); expected the same settings"):
        collect(TEXTS[:3], reduce="max")
    with pytest.raises(InputError, match="holds samples of other units; give another folder, or the same units"):
        reference_samples(explain("llama"), TEXTS[:3], folder=tmp_path)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"no reference samples .*; expected a folder that attnlrp neurons collect"):
        reference_samples(explain("llama"), TEXTS, folder=tmp_path)


def test_without_pyarrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    samples = reference_samples(explain("llama"), TEXTS[:1])
    with pytest.raises(InputError, match=r'kept in Parquet: pip install "attnlrp\[neurons\]"'):
        samples.save(tmp_path)


def test_values_that_are_not_finite() -> None:
    explainer = explain("llama")
    with torch.no_grad():
        explainer.model.model.layers[1].mlp.up_proj.weight[5] = torch.inf
    with pytest.raises(NumericalError, match=r"0: activation of layers\.1\.mlp is NaN or infinite; use float32"):
        reference_samples(explainer, TEXTS[:1], by="activation")


def test_model_and_tokenizer_are_left_as_they_were() -> None:
    explainer = explain("llama")
    before = [p.clone() for p in explainer.model.parameters()]
    ids = explainer.tokenizer(TEXTS[0]).input_ids
    reference_samples(explainer, TEXTS, length=4)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, explainer.model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in explainer.model.modules())
    assert explainer.tokenizer(TEXTS[0]).input_ids == ids

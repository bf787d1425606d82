"""Relevance inside the model: against hooks and gradients taken by hand, and against the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny_tasks
from attnlrp import Explainer, Explanation, Head, InputError, Neuron, TargetError, propagate
from attnlrp.latent import Latent, LatentLayer
from attnlrp.recording import KINDS
from tiny_tokenizers import build, build_tokenizer

TEXT = "Paris is the capital of"
TEXTS = ["Paris is the capital of", "he said not", "the film was great"]


def explainer(name: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Explainer:
    return Explainer(*build(name, dtype), **options)


def mixtral(implementation: str, dtype: torch.dtype = torch.float32) -> Explainer:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "bos_token_id": 1}
    tokenizer = build_tokenizer("sentencepiece")
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**shape | experts, vocab_size=len(tokenizer), eos_token_id=2)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    model.set_experts_implementation(implementation)
    return Explainer(model.to(dtype).eval(), tokenizer)


def explain(ours: Explainer, text: str = TEXT, **options: Any) -> Explanation:
    explanation = ours(text, **options)
    assert isinstance(explanation, Explanation)
    return explanation


def inside(explanation: Explanation) -> Latent:
    assert explanation.latent is not None
    return explanation.latent


class Watched:
    """A model explained by hand: inputs of some modules are kept, with their gradients."""

    def __init__(self, ours: Explainer, explanation: Explanation, modules: dict[str, nn.Module]) -> None:
        self.seen: dict[str, Tensor] = {}
        self.embeddings = ours.model.get_input_embeddings()(torch.tensor([explanation.token_ids])).detach()
        self.embeddings.requires_grad_()
        handles = [m.register_forward_pre_hook(lambda _, x, n=n: self._keep(n, x[0])) for n, m in modules.items()]
        with propagate(ours.model):
            self.logits = ours.model(inputs_embeds=self.embeddings).logits[0]
        for handle in handles:
            handle.remove()

    def _keep(self, name: str, x: Tensor) -> None:
        self.seen[name] = x

    def grad(self, scalar: Tensor, name: str, weights: Tensor | None = None) -> Tensor:
        at = self.embeddings if name == "input" else self.seen[name]
        return torch.autograd.grad(scalar, at, weights, retain_graph=True)[0]

    def relevance(self, scalar: Tensor, name: str) -> Tensor:
        """(token, width)."""
        at = self.embeddings if name == "input" else self.seen[name]
        return (at * self.grad(scalar, name)).detach()[0]


def watched(ours: Explainer, explanation: Explanation) -> Watched:
    layers = ours.model.model.layers
    modules = {f"{k}.mlp": layers[k].mlp.down_proj for k in range(2)}
    modules |= {f"{k}.attn": layers[k].self_attn.o_proj for k in range(2)} | {f"{k}": layers[k] for k in range(2)}
    modules |= {f"{k}.between": layers[k].post_attention_layernorm for k in range(2)}
    return Watched(ours, explanation, modules | {"norm": ours.model.model.norm})


# --- what is recorded -----------------------------------------------------------------------------------------------


def test_neurons_heads_and_residual_against_hooks() -> None:
    ours = explainer()
    kinds = ("neurons", "heads", "residual")  # attention switches to eager, whose softmax is in float32
    explanation = explain(ours, latent=kinds, latent_top=None, target=["the", "is"])
    by_hand, latent = watched(ours, explanation), inside(explanation)
    for row, target in enumerate(explanation.targets):
        scalar = by_hand.logits[-1, target.id]
        for k in range(2):
            layer = latent[f"layers.{k}.mlp"]
            expected = by_hand.relevance(scalar, f"{k}.mlp")
            torch.testing.assert_close(layer.relevance[row], expected[:, layer.indices[row]].T)
            activation = by_hand.seen[f"{k}.mlp"].detach()[0]
            torch.testing.assert_close(layer.activation[row], activation[:, layer.indices[row]].T)
            torch.testing.assert_close(layer.total[row], expected.sum(-1))
            assert layer.relevance[row].sum(-1).abs().diff().max() <= 0  # largest first

            heads = latent[f"layers.{k}.self_attn"]
            expected = by_hand.relevance(scalar, f"{k}.attn").unflatten(-1, (4, 8)).sum(-1)
            torch.testing.assert_close(heads.relevance[row], expected[:, heads.indices[row]].T)
            norms = by_hand.seen[f"{k}.attn"].detach()[0].unflatten(-1, (4, 8)).norm(dim=-1)
            torch.testing.assert_close(heads.activation[row], norms[:, heads.indices[row]].T)

            places = {"before": f"{k}", "between": f"{k}.between", "after": "1" if k == 0 else "norm"}
            for place, name in places.items():
                expected = by_hand.relevance(scalar, name).sum(-1)
                torch.testing.assert_close(latent[f"layers.{k}:{place}"].total[row], expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "llama-classifier"])
def test_recording_changes_nothing(name: str) -> None:
    ours = explainer(name)
    plain, recorded = explain(ours), explain(ours, latent=("neurons", "heads", "residual"))
    assert torch.equal(plain.relevance, recorded.relevance)
    assert plain.targets == recorded.targets
    assert plain.latent is None
    assert {layer.kind for layer in inside(recorded)} == {"neurons", "heads", "residual"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_neurons_of_a_layer_add_up_to_what_the_ledger_books(name: str) -> None:
    ours = explainer(name)
    explanation = explain(ours, latent=("neurons", "heads"), latent_top=None)
    paths = {
        "llama": ("layers.{}.mlp", "model.layers.{}.mlp.down_proj", "layers.{}.self_attn", "self_attn.o_proj"),
        "gpt2": ("h.{}.mlp", "transformer.h.{}.mlp.c_proj", "h.{}.attn", "attn.c_proj"),
        "bert": ("layer.{}.output", "bert.encoder.layer.{}.output.dense", "layer.{}.attention.output", "attention.output.dense"),
    }  # fmt: skip
    near = {"rel": 1e-6, "abs": 1e-6}  # norms of llama are computed in float32
    ledger, (neurons, module, heads, output) = ours.audit(TEXT), paths[name]
    assert ledger.closes
    booked = {e.module.split(" ")[0]: e for e in ledger.by_module() if e.module}
    for k in range(2):
        layer = inside(explanation)[neurons.format(k)]
        entry = next(e for path, e in booked.items() if path.endswith(module.format(k)))
        assert layer.relevance[0].sum().item() == pytest.approx(entry.passed, **near)
        # the output of the MLP, up to what its bias absorbs
        assert entry.received - entry.absorbed.get("bias", 0.0) == pytest.approx(entry.passed, **near)
        attention = inside(explanation)[heads.format(k)]
        entry = next(e for path, e in booked.items() if path.endswith(f".{k}.{output}"))
        assert attention.relevance[0].sum().item() == pytest.approx(entry.passed, **near)


def test_the_residual_stream_goes_on() -> None:
    ours = explainer("gpt2")
    names, trace = inside(explain(ours, latent="residual")).trace()
    assert names == [f"h.{k}:{place}" for k in range(2) for place in ("before", "between", "after")]
    assert torch.equal(trace[2], trace[3])
    assert trace.shape == (6, len(explain(ours).tokens))


def test_attention_weights_get_half_of_what_the_heads_get() -> None:
    latent = inside(explain(explainer(), latent=("attention", "heads")))
    for k in range(2):
        attention, heads = latent[f"layers.{k}.self_attn.weights"], latent[f"layers.{k}.self_attn"]
        assert attention.attention is not None
        tokens = attention.total.shape[-1]
        assert attention.attention.shape == (1, 4, tokens, tokens)
        # a matrix product gives half to each factor
        by_head = heads.relevance[0][heads.indices[0].argsort()].sum(-1)
        maps = attention.attention[0][attention.indices[0].argsort()]
        torch.testing.assert_close(maps.sum((-1, -2)), by_head / 2, rtol=1e-5, atol=1e-6)
        assert attention.attention[0].triu(1).abs().max() == 0  # what is masked gets nothing


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_batch_equals_one_by_one(name: str) -> None:
    ours = explainer(name)
    options: dict[str, Any] = {"latent": KINDS, "latent_top": None}
    for text, found in zip(TEXTS, ours(TEXTS, **options), strict=True):
        alone = explain(ours, text, **options)
        for a, b in zip(inside(found), inside(alone), strict=True):
            assert (a.name, a.kind, a.units, a.offset) == (b.name, b.kind, b.units, b.offset)
            torch.testing.assert_close(a.total, b.total)
            torch.testing.assert_close(dense(a), dense(b))


def dense(layer: LatentLayer) -> Tensor:
    """(target, unit, token)."""
    size = (layer.indices.shape[0], layer.units, layer.total.shape[-1])
    index = layer.indices[..., None].expand(-1, -1, size[2])
    return layer.relevance.new_zeros(size).scatter(1, index, layer.relevance)


def test_the_largest_are_kept_and_the_totals_are_of_all() -> None:
    ours = explainer()
    whole, kept = (inside(explain(ours, latent="neurons", latent_top=top)) for top in (None, 3))
    for a, b in zip(whole, kept, strict=True):
        assert b.relevance.shape[1] == 3
        assert torch.equal(b.indices, a.indices[:, :3])
        assert torch.equal(b.total, a.total)
        torch.testing.assert_close(a.relevance.sum(1), a.total)
    best = kept.top("neurons", 3)
    every = torch.cat([dense(layer)[0].sum(-1) for layer in whole])
    assert [abs(u.relevance) for u in best] == pytest.approx(every.abs().sort(descending=True).values[:3].tolist())
    with pytest.raises(InputError, match="latent_top=4"):
        kept.top("neurons", 4)


def test_the_top_units_say_where_they_are() -> None:
    ours = explainer()
    explanation = explain(ours, latent="neurons", latent_top=None)
    first = explanation.top("neurons", 1)[0]
    name, _, index = first.unit.partition(":")
    row = dense(inside(explanation)[name])[0, int(index)]
    assert first.relevance == pytest.approx(row.sum().item())
    assert first.token == int(row.abs().argmax())
    alone = explain(ours, target=Neuron(name, int(index)), position=first.token)
    assert first.activation == pytest.approx(alone.target.logit)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_neurons_of_experts(implementation: str) -> None:
    ours = mixtral(implementation)
    explanation = explain(ours, latent=("neurons", "residual"), latent_top=None)
    latent, layers = inside(explanation), ours.model.model.layers
    assert any("experts" in layer.name for layer in latent.of("neurons"))
    modules = {f"{k}": layers[k].mlp for k in range(2)}
    by_hand: dict[str, Tensor] = {}
    embeddings = ours.model.get_input_embeddings()(torch.tensor([explanation.token_ids])).detach().requires_grad_()
    handles = [m.register_forward_hook(lambda _, x, y, n=n: by_hand.update({n: y})) for n, m in modules.items()]
    with propagate(ours.model):
        scalar = ours.model(inputs_embeds=embeddings).logits[0, -1, explanation.target.id]
    for k in range(2):
        handles[k].remove()
        out = by_hand[str(k)]
        relevance = (out * torch.autograd.grad(scalar, out, retain_graph=True)[0]).sum(-1)[0]
        own = [x for x in latent.of("neurons") if x.name.startswith(f"layers.{k}.")]
        # a router that is not a constant gets half of what its experts give
        torch.testing.assert_close(torch.stack([x.total[0] for x in own]).sum(0), relevance / 2, rtol=1e-4, atol=1e-5)


def test_experts_agree_between_implementations() -> None:
    one, other = (inside(explain(mixtral(i), latent="neurons", latent_top=None)) for i in ("grouped_mm", "eager"))
    for layer in one:
        torch.testing.assert_close(dense(layer), dense(other[layer.name]), rtol=1e-4, atol=1e-5)


def test_an_encoder_decoder_has_tokens_of_both() -> None:
    ours = tiny_tasks.build("t5")
    explanation = explain(ours, "the film was great", latent=("neurons", "residual"), prefix="the")
    count = explanation.segments.count("encoder")
    for layer in inside(explanation):
        written = layer.name.startswith("decoder")
        assert layer.offset == (count if written else 0)
        assert layer.total.shape[-1] == (len(explanation.tokens) - count if written else count)


# --- through units, and units as targets ----------------------------------------------------------------------------


def test_through_a_neuron_against_a_masked_gradient() -> None:
    ours = explainer()
    plain = explain(ours)
    by_hand = watched(ours, plain)
    scalar = by_hand.logits[-1, plain.target.id]
    mask = torch.zeros(48, dtype=torch.float64)
    mask[[3, 17]] = 1
    masked = by_hand.grad(scalar, "1.mlp") * mask
    wanted = (by_hand.embeddings * by_hand.grad(by_hand.seen["1.mlp"], "input", masked)).sum(-1)[0].detach()
    found = explain(ours, through=["layers.1.mlp:3", Neuron(1, 17)])
    torch.testing.assert_close(found.relevance[0], wanted)


def test_through_all_units_of_a_layer_is_what_the_layer_gets() -> None:
    ours = explainer()
    found = explain(ours, through=[Neuron(1, n) for n in range(48)], latent="neurons", latent_top=None)
    assert found.relevance.sum() != pytest.approx(explain(ours).relevance.sum().item())
    whole = inside(explain(ours, latent="neurons", latent_top=None))["layers.1.mlp"]
    # at the neurons themselves the relevance is what it is without a condition
    torch.testing.assert_close(dense(inside(found)["layers.1.mlp"]), dense(whole))


def test_through_two_layers_nothing_goes_past_either() -> None:
    ours = explainer()
    plain = explain(ours)
    by_hand = watched(ours, plain)
    scalar = by_hand.logits[-1, plain.target.id]
    heads, neurons = torch.zeros(32, dtype=torch.float64), torch.zeros(48, dtype=torch.float64)
    heads[8:16], neurons[5] = 1, 1
    upper = by_hand.grad(scalar, "1.mlp") * neurons
    lower = by_hand.grad(by_hand.seen["1.mlp"], "0.attn", upper) * heads
    wanted = (by_hand.embeddings * by_hand.grad(by_hand.seen["0.attn"], "input", lower)).sum(-1)[0].detach()
    found = explain(ours, through=[Neuron(1, 5), Head(0, 1)])
    torch.testing.assert_close(found.relevance[0], wanted)


def test_through_units_of_experts_of_one_layer() -> None:
    ours = mixtral("eager")
    units = [f"layers.1.mlp.experts.{e}:{n}" for e in range(4) for n in range(48)]
    halves = explain(ours, through=units[:96]).relevance + explain(ours, through=units[96:]).relevance
    torch.testing.assert_close(explain(ours, through=units).relevance, halves, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", [None, 3, -1])
def test_a_neuron_as_the_target(position: int | None) -> None:
    ours = explainer("bert" if position is None else "llama")
    site = "layer.1.output" if position is None else "layers.1.mlp"
    explanation = explain(ours, target=Neuron(site, 4), position=position)
    at = explanation.target.position
    assert at is not None
    modules = {"x": ours.model.bert.encoder.layer[1].output.dense} if position is None else {}
    by_hand = Watched(ours, explanation, modules or {"x": ours.model.model.layers[1].mlp.down_proj})
    values = by_hand.seen["x"][0, :, 4]
    assert at == (int(values.abs().argmax()) if position is None else position % len(explanation.tokens))
    assert explanation.target.unit == "activation"
    assert explanation.target.token == f"{site}:4"
    assert explanation.target.logit == pytest.approx(values[at].item())
    torch.testing.assert_close(explanation.relevance[0], by_hand.relevance(values[at], "input").sum(-1))


# --- options that go together ----------------------------------------------------------------------------------------


def test_layers_that_are_computed_again_are_recorded_once() -> None:
    plain, saving = (explainer(memory=memory) for memory in ("full", "checkpoint"))
    options: dict[str, Any] = {"latent": ("neurons", "heads", "residual"), "latent_top": None}
    one, other = explain(plain, **options), explain(saving, **options)
    assert torch.equal(one.relevance, other.relevance)
    for a, b in zip(inside(one), inside(other), strict=True):
        assert a.name == b.name
        assert torch.equal(a.relevance, b.relevance)


def test_generated_tokens_each_have_their_units() -> None:
    ours = explainer()
    explanation = explain(ours, generate=3, latent="neurons")
    assert inside(explanation)["layers.0.mlp"].total.shape[0] == len(explanation.targets) == 3


def test_joined_tokens_keep_the_sums() -> None:
    explanation = explain(explainer(), "unbelievable unhappiness", latent=("neurons", "residual", "attention"))
    words = explanation.merge_words()
    assert len(words.tokens) < len(explanation.tokens)
    for a, b in zip(inside(explanation), inside(words), strict=True):
        assert b.total.shape[-1] == len(words.tokens)
        torch.testing.assert_close(a.total.sum(), b.total.sum())
        torch.testing.assert_close(a.relevance.sum(-1), b.relevance.sum(-1))
        if a.attention is not None and b.attention is not None:
            torch.testing.assert_close(a.attention.sum((-1, -2)), b.attention.sum((-1, -2)))


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_saved_and_loaded(ending: str, tmp_path: Path) -> None:
    explanation = explain(explainer(), latent=KINDS)
    explanation.save(tmp_path / f"e.{ending}")
    loaded = Explanation.load(tmp_path / f"e.{ending}")
    for a, b in zip(inside(explanation), inside(loaded), strict=True):
        for key, value in vars(a).items():
            other = getattr(b, key)
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": "neuron"}, r"latent: got \['neuron'\], expected any of neurons, heads, residual, attention"),
        ({"latent": "neurons", "latent_top": 0}, "latent_top: got 0"),
        ({"through": "layers.0.mlp:99"}, "layers.0.mlp has neurons 0 to 47"),
        ({"through": "layers.0.mpl:1"}, "no layer is called layers.0.mpl; expected an address such as layers.0.mlp:0"),
        ({"target": Neuron(5, 0)}, "no layer with neurons is called 5; expected an address such as layers.0.mlp:0"),
    ],
)
def test_what_is_not_there_is_refused(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        explainer()(TEXT, **options)


def test_an_expert_that_is_not_chosen_computes_nothing() -> None:
    ours = mixtral("eager")
    latent = inside(explain(ours, "he", latent="neurons"))
    idle = {f"layers.1.mlp.experts.{e}" for e in range(4)} - {layer.name for layer in latent}
    if not idle:
        pytest.skip("two tokens came to all four experts")
    with pytest.raises(TargetError, match="computes nothing for this text"):
        ours("he", target=Neuron(min(idle), 0))
    with pytest.raises(InputError, match="computes none of these units"):
        ours("he", through=f"{min(idle)}:0")


def test_kinds_that_were_not_recorded() -> None:
    latent = inside(explain(explainer(), latent="neurons"))
    with pytest.raises(InputError, match=r"expected one of \['neurons'\]"):
        latent.of("heads")
    with pytest.raises(InputError, match=r"no layer '.*' was recorded"):
        latent["layers.0.self_attn"]


def test_long_texts_keep_little() -> None:
    """What is kept of a text grows with its tokens times the kept units, not with all units."""
    ours = explainer(dtype=torch.float32)
    latent = inside(explain(ours, "the film was great " * 7, latent="neurons", latent_top=2))
    kept = sum(t.numel() for t in latent.tensors().values())
    tokens = latent["layers.0.mlp"].total.shape[-1]
    assert kept == 2 * (tokens + 2 + 2 * 2 * tokens)

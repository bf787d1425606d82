"""Units are found from what a model computes, at the layers that a reader of its code would name."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny
from attnlrp import Head, InputError, ModelError, Neuron
from attnlrp.units import Rows, Site, Taps, blocks_of, example_inputs, find_sites, resolve
from conformance import recipe
from conformance.units import survey
from test_conformance import PAIRS

# name -> (neurons, their number, heads, their number), of the first layer
KNOWN = {
    "llama": ("layers.0.mlp", 48, "layers.0.self_attn", 4),
    "gpt2": ("h.0.mlp", 128, "h.0.attn", 4),
    "phi": ("layers.0.mlp", 48, "layers.0.self_attn", 4),
    "gemma2": ("layers.0.mlp", 48, "layers.0.self_attn", 4),
    "gemma3": ("layers.0.mlp", 48, "layers.0.self_attn", 4),
    "qwen3": ("layers.0.mlp", 48, "layers.0.self_attn", 4),
    "mixtral": ("layers.0.mlp.experts.0", 48, "layers.0.self_attn", 4),
    "bert": ("layer.0.output", 48, "layer.0.attention.output", 4),
    "t5": ("encoder.block.0.layer.1.DenseReluDense", 48, "encoder.block.0.layer.0.SelfAttention", 4),
}


def sites_of(name: str) -> tuple[Site, ...]:
    model = tiny.build(name)
    return find_sites(model, tiny.inputs(name))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_units_of_known_models(name: str, attention: str) -> None:
    model = tiny.build(name, attention="eager" if name in tiny.EAGER_ONLY else attention)
    sites = {site.name: site for site in find_sites(model, tiny.inputs(name))}
    neurons, width, heads, count = KNOWN[name]
    assert (sites[neurons].kind, sites[neurons].units, sites[neurons].width) == ("neurons", width, width)
    assert (sites[heads].kind, sites[heads].units, sites[heads].width) == ("heads", count, 32)
    per_layer = {"mixtral": 1 + 4, "t5": 2 + 3}.get(name, 2)  # of T5, a layer of the encoder and one of the decoder
    assert len(sites) == 2 * per_layer


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_experts_have_neurons_of_their_own(implementation: str) -> None:
    model = tiny.build("mixtral")
    model.set_experts_implementation(implementation)
    sites = [s for s in find_sites(model, tiny.inputs("mixtral", tokens=1)) if s.kind == "neurons"]
    assert [s.name for s in sites] == [f"layers.{k}.mlp.experts.{e}" for k in range(2) for e in range(4)]
    assert [s.expert for s in sites] == [0, 1, 2, 3] * 2


def test_experts_that_are_modules_are_found_also_if_no_token_came_to_them() -> None:
    model = recipe.build("causal-lm", "deepseek_v3")
    names = [s.name for s in find_sites(model, recipe.inputs("causal-lm", "deepseek_v3", model))]
    assert any("experts" in name for name in names)


def test_copied_experts_are_refused() -> None:
    model = tiny.build("mixtral")
    model.set_experts_implementation("batched_mm")
    with pytest.raises(
        ModelError, match=r"gate_up_proj: .*hides the neurons .*set_experts_implementation\('grouped_mm'\)"
    ):
        find_sites(model, tiny.inputs("mixtral"))


def test_gates_of_a_normalisation_are_no_neurons() -> None:
    model = recipe.build("causal-lm", "gemma4_text")  # writes x * (mean + eps) ** -0.5
    sites = find_sites(model, recipe.inputs("causal-lm", "gemma4_text", model))
    assert [s.name for s in sites if s.name.endswith("self_attn")] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert {s.kind for s in sites if s.name.endswith("self_attn")} == {"heads"}


@pytest.mark.parametrize(("kind", "name"), [("arcee", "layers.0.mlp"), ("nemotron", "layers.0.mlp")])
def test_squared_activations_are_neurons(kind: str, name: str) -> None:
    model = recipe.build("causal-lm", kind)  # relu(x) ** 2
    sites = find_sites(model, recipe.inputs("causal-lm", kind, model))
    assert next(s.name for s in sites if s.kind == "neurons") == name


def test_a_model_without_layers_of_units() -> None:
    with pytest.raises(ModelError, match=r"Sequential: found neither neurons nor heads; expected layers whose"):
        find_sites(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {"input": torch.randn(2, 3)})


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(ModelError, match="compiled, which hides its units: use the module that was compiled"):
        find_sites(torch.compile(tiny.build("llama"), backend="aot_eager"), tiny.inputs("llama"))


def test_finding_leaves_the_model_as_it_was() -> None:
    model = tiny.build("gpt2")
    before = {id(m): dict(vars(m)) for m in model.modules()}
    find_sites(model, tiny.inputs("gpt2"))
    assert {id(m): dict(vars(m)) for m in model.modules()} == before


# --- addresses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["layers.1.mlp:47", Neuron(1, 47), Neuron("layers.1.mlp", 47)])
def test_a_unit_has_one_address(unit: str | Neuron) -> None:
    site, index = resolve(sites_of("llama"), unit)
    assert (site.name, site.layer, index) == ("layers.1.mlp", 1, 47)


def test_a_head_has_an_address() -> None:
    site, index = resolve(sites_of("llama"), Head(0, 3))
    assert (site.name, index) == ("layers.0.self_attn", 3)


@pytest.mark.parametrize(
    ("unit", "match"),
    [
        ("layers.1.mlp:48", r"layers\.1\.mlp has neurons 0 to 47"),
        (Neuron(1, -1), r"layers\.1\.mlp has neurons 0 to 47"),
        ("layers.1.mlp:x", r"layers\.1\.mlp has neurons 0 to 47"),
        ("layers.1.mpl:3", r"no layer is called layers\.1\.mpl; expected an address such as layers\.1\.mlp:0"),
        ("3", "expected an address such as"),
        (Neuron("layers.1.self_attn", 0), r"no layer with neurons is called layers.1.self_attn; .* layers\.1\.mlp:0"),
        (Neuron(7, 0), r"no layer with neurons is called 7; expected an address such as layers.0.mlp:0"),
    ],
)
def test_units_that_are_not_there(unit: str | Neuron, match: str) -> None:
    with pytest.raises(InputError, match=match):
        resolve(sites_of("llama"), unit)


def test_a_number_that_several_layers_have() -> None:
    with pytest.raises(InputError, match=r"4 layers with neurons are called 1; expected .*experts\.0:0"):
        resolve(sites_of("mixtral"), Neuron(1, 0))


def test_the_layers_hold_heads_and_neurons() -> None:
    model = recipe.build("image-classification", "swin")
    sites = find_sites(model, recipe.inputs("image-classification", "swin", model))
    assert next(iter(blocks_of(model, sites))) == "layers.0.blocks.0"
    model = tiny.build("t5")
    assert list(blocks_of(model, find_sites(model, tiny.inputs("t5")))) == [
        *("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
    ]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_small_pass_finds_the_same_units(name: str) -> None:
    model = tiny.build(name)
    assert find_sites(model, example_inputs(model)) == find_sites(model, tiny.inputs(name))


# --- taps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.NAMES)
def test_taps_see_what_the_layers_read(name: str) -> None:
    """Once for each site and each use; handing the input back changes nothing."""
    model, inputs = tiny.build(name), tiny.inputs(name, batch=2)
    sites = find_sites(model, inputs)
    seen: dict[str, list[Tensor]] = {}

    def tap(site: Site) -> object:
        def see(x: Tensor, rows: Rows | None) -> Tensor:
            assert x.shape[-1] == site.width
            assert (rows is None) == (site.expert is None)
            seen.setdefault(site.name, []).append(x)
            return x

        return see

    before = model(**inputs).logits
    with Taps(model, {site: tap(site) for site in sites}):
        assert torch.equal(model(**inputs).logits, before)
    assert set(seen) <= {site.name for site in sites}
    assert all(site.name in seen for site in sites if site.expert is None)
    experts = [site for site in sites if site.expert is not None]
    assert sum(len(x) for s in experts for x in seen.get(s.name, [])) == (2 * 2 * 2 * 7 if experts else 0)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_rows_of_experts_belong_to_their_tokens(implementation: str) -> None:
    """Against the router's choice, read off the experts' own arguments."""
    model, inputs = tiny.build("mixtral"), tiny.inputs("mixtral", batch=2)
    model.set_experts_implementation(implementation)
    chosen: list[Tensor] = []
    experts = model.model.layers[0].mlp.experts
    hook = experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1]))
    seen: dict[int, Tensor] = {}

    def tap(expert: int) -> object:
        def see(x: Tensor, rows: Rows) -> Tensor:
            assert rows.size == 14
            seen[expert] = rows.tokens
            return x

        return see

    sites = [s for s in find_sites(model, inputs) if s.name.startswith("layers.0.mlp")]
    chosen.clear()
    with Taps(model, {site: tap(site.expert) for site in sites}):
        model(**inputs)
    hook.remove()
    for expert in range(4):
        expected = (chosen[0] == expert).any(dim=-1).nonzero().flatten().tolist()
        assert sorted(seen.get(expert, torch.tensor([], dtype=torch.int64)).tolist()) == expected


@pytest.mark.filterwarnings("ignore")  # what transformers warns of while it builds its own models
@pytest.mark.parametrize(("task", "kind"), PAIRS)
def test_units_of_an_architecture(task: str, kind: str) -> None:
    found = survey(task, kind)
    assert found["wrong"] == ""
    assert found["neurons"] + found.get("heads", 0) >= max(1, found["layers"])


def test_what_an_activation_puts_into_the_stream_is_no_unit() -> None:
    shape = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 99}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**shape | ids, decoder_attention_heads=4, max_source_positions=6)
    inputs = {"input_features": torch.randn(1, 80, 12), "decoder_input_ids": torch.ones(1, 2, dtype=torch.long)}
    sites = find_sites(transformers.WhisperForConditionalGeneration(config).eval(), inputs)
    encoder = [(s.name, s.kind) for s in sites if s.name.startswith("encoder")]
    parts = (("self_attn", "heads"), ("fc2", "neurons"))
    assert encoder == [(f"encoder.layers.{k}.{n}", kind) for k in range(2) for n, kind in parts]


def test_neurons_beside_heads_in_one_module_have_a_name_of_their_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.down, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.down(torch.relu(self.gate(x)))
            return x + self.out(nn.functional.scaled_dot_product_attention(x, x, x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"mixer": Block()}) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer["mixer"](x)
            return x

    sites = find_sites(Model(), {"x": torch.randn(1, 3, 8)})
    assert [(s.name, s.kind) for s in sites] == [
        (f"layers.{k}.mixer{rest}", kind) for k in range(2) for rest, kind in ((".down", "neurons"), ("", "heads"))
    ]

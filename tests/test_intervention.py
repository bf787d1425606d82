"""Interventions change the units that they name, in every pass inside the block, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from attnlrp import (
    ATTNLRP,
    VIT,
    Add,
    Clamp,
    Direction,
    Head,
    InputError,
    ModelError,
    Neuron,
    Scale,
    Set,
    intervene,
    propagate,
)
from attnlrp.changes import open_changes
from attnlrp.checkpoint import checkpointed
from attnlrp.rules import Rules
from attnlrp.units import Site, find_sites

IDS = torch.randint(3, 100, (1, 6), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module, name: str, **shape: int) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tiny.inputs(name, **shape)).logits
    return found


@contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The input of a module, changed by a hook."""
    handle = module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0].clone()), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def at(index: int, value: float, positions: Any = slice(None)) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x[:, positions, index] = value
        return x

    return change


@contextmanager
def scaled_weight(model: nn.Module, site: Site, index: int, factor: float) -> Iterator[None]:
    """What scaling a unit is, by another way: its share of the weight that reads it, scaled."""
    parameter = dict(model.named_parameters(remove_duplicate=False))[site.weight]
    before, size = parameter.detach().clone(), site.width // site.units
    weight = parameter if site.expert is None else parameter[site.expert]
    axis = 0 if weight.shape[0] == site.width and weight.shape[1] != site.width else 1
    axis = 0 if isinstance(model.get_submodule(site.weight.rpartition(".")[0]), _conv1d()) else axis
    with torch.no_grad():
        weight.narrow(axis, index * size, size).mul_(factor)
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(before)


def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


# --- changes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_factor_of_1_changes_no_bit(name: str) -> None:
    model = tiny.build(name)
    sites = find_sites(model, tiny.inputs(name))
    before = logits(model, name)
    with intervene(model, {f"{site.name}:{site.units - 1}": Scale(1.0) for site in sites}):
        assert torch.equal(logits(model, name), before)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_scaling_a_unit_is_scaling_the_weights_that_read_it(name: str) -> None:
    model = tiny.build(name)
    before, changed = logits(model, name), 0
    for site in find_sites(model, tiny.inputs(name)):
        with scaled_weight(model, site, 1, 3.0):
            expected = logits(model, name)
        with intervene(model, {f"{site.name}:1": Scale(3.0)}):
            found = logits(model, name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        changed += not torch.allclose(found, before, rtol=1e-4, atol=1e-5)
    assert changed > 1
    assert torch.equal(logits(model, name), before)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_scaling_a_neuron_of_an_expert(implementation: str) -> None:
    model = tiny.build("mixtral")
    model.set_experts_implementation(implementation)
    sites = [s for s in find_sites(model, tiny.inputs("mixtral")) if s.kind == "neurons"]
    for site in sites:
        with scaled_weight(model, site, 5, -2.0):
            expected = logits(model, "mixtral", batch=2)
        with intervene(model, {f"{site.name}:5": Scale(-2.0)}):
            torch.testing.assert_close(logits(model, "mixtral", batch=2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (0.0, lambda x: torch.zeros_like(x)),
        (2, lambda x: torch.full_like(x, 2.0)),
        (Set(1.5), lambda x: torch.full_like(x, 1.5)),
        (Add(0.5), lambda x: x + 0.5),
        (Clamp(low=0.01), lambda x: torch.maximum(x, torch.tensor(0.01))),
        (Clamp(high=-0.01), lambda x: torch.minimum(x, torch.tensor(-0.01))),
        (Scale(-1.0), lambda x: -x),
    ],
)
def test_each_change_against_a_hook(change: Any, expected: Callable[[Tensor], Tensor]) -> None:
    model = tiny.build("llama")

    def by_hand(x: Tensor) -> Tensor:
        x[..., 7] = expected(x[..., 7])
        return x

    with hooked(model.model.layers[1].mlp.down_proj, by_hand):
        wanted = logits(model, "llama", batch=2)
    with intervene(model, {Neuron(1, 7): change}):
        assert torch.equal(logits(model, "llama", batch=2), wanted)


def test_several_units_at_once() -> None:
    model = tiny.build("gpt2")
    with (
        hooked(model.transformer.h[0].mlp.c_proj, at(3, 1.0)),
        hooked(model.transformer.h[0].attn.c_proj, at(slice(8, 16), 0.0)),  # type: ignore[arg-type]
    ):
        wanted = logits(model, "gpt2")
    with intervene(model, {Neuron(0, 3): 1.0, Head(0, 1): 0}):
        assert torch.equal(logits(model, "gpt2"), wanted)


def test_blocks_in_blocks() -> None:
    model = tiny.build("llama")
    with intervene(model, {Neuron(0, 1): 4.0, Neuron(1, 2): 4.0}):
        wanted = logits(model, "llama")
    with intervene(model, {Neuron(0, 1): 4.0}), intervene(model, {Neuron(1, 2): 4.0}):
        assert torch.equal(logits(model, "llama"), wanted)


# --- positions ----------------------------------------------------------------------------------------------------


def test_at_chosen_positions_only() -> None:
    model = tiny.build("llama")
    with hooked(model.model.layers[0].mlp.down_proj, at(2, 9.0, [1, 4])):
        wanted = logits(model, "llama", batch=2)
    with intervene(model, {Neuron(0, 2): 9.0}, positions=[1, 4, 30]):
        found = logits(model, "llama", batch=2)
    assert torch.equal(found, wanted)
    assert torch.equal(found[:, 0], logits(model, "llama", batch=2)[:, 0])


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_experts_at_chosen_positions(implementation: str) -> None:
    model = tiny.build("mixtral")
    model.set_experts_implementation(implementation)
    changes = {f"layers.1.mlp.experts.{e}:{n}": 3.0 for e in range(4) for n in range(48)}
    with intervene(model, changes, positions=[5]):
        found = logits(model, "mixtral", batch=2)
    before = logits(model, "mixtral", batch=2)
    differs = (found != before).any(dim=-1)
    assert differs.tolist() == [[False] * 5 + [True] + [False]] * 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
@pytest.mark.parametrize("positions", [None, [2], [6, 8]])
def test_generation_with_and_without_cache(name: str, positions: list[int] | None) -> None:
    model = tiny.build(name)
    sites = [s for s in find_sites(model, tiny.inputs(name)) if s.kind == "neurons"]
    changes = {f"{site.name}:{n}": 4.0 for site in sites for n in range(4)}
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": torch.ones_like(IDS)}
    plain = model.generate(IDS, **options)
    with intervene(model, changes, positions=positions):
        cached = model.generate(IDS, **options)
        whole = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(cached.sequences, whole.sequences)
    for a, b in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    first_changed = next(k for k, (a, b) in enumerate(zip(cached.logits, plain.logits, strict=True)) if (a != b).any())
    assert first_changed == (1 if positions == [6, 8] else 0)  # position 6 is the first that is generated


def test_an_encoder_decoder_generates_with_changes_in_both() -> None:
    model = tiny.build("t5")
    sites = find_sites(model, tiny.inputs("t5"))
    neurons = [s for s in sites if s.kind == "neurons"]
    arguments = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with intervene(model, {f"{s.name}:0": 30.0 for s in neurons}):
        cached = model.generate(IDS, **arguments)
        whole = model.generate(IDS, use_cache=False, **arguments)
    for a, b in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- directions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_direction_is_moved_along(name: str) -> None:
    model = tiny.build(name)
    layer = model.model.layers[1] if name == "llama" else model.bert.encoder.layer[1]
    prefix = "layers.1" if name == "llama" else "layer.1"
    v = torch.randn(32)

    def by_hand(x: Tensor) -> Tensor:
        coordinate = (x @ v) / (v @ v)
        return x + (2.0 - coordinate)[..., None] * v

    with hooked(layer, by_hand):
        wanted = logits(model, name)
    with intervene(model, {Direction(f"{prefix}:before", v): 2.0}):
        torch.testing.assert_close(logits(model, name), wanted)
    before = logits(model, name)
    with intervene(model, {Direction(f"{prefix}:before", v): Scale(1.0), Direction(f"{prefix}:after", v): Add(0.0)}):
        assert torch.equal(logits(model, name), before)


def test_a_direction_behind_a_layer_at_positions() -> None:
    model = tiny.build("llama")
    v = torch.randn(32)
    with intervene(model, {Direction("layers.0:after", v): Add(3.0)}, positions=[2]):
        found = logits(model, "llama")

    def by_hand(x: Tensor) -> Tensor:
        x[:, 2] += 3 * v
        return x

    with hooked(model.model.layers[1], by_hand):
        torch.testing.assert_close(found, logits(model, "llama"))


def test_a_direction_with_an_encoder_of_its_own() -> None:
    model = tiny.build("llama")
    v, w = torch.randn(32), torch.randn(32)
    direction = Direction("layers.0:after", v, encode=lambda x: torch.relu(x @ w))
    with intervene(model, {direction: 0.0}):
        found = logits(model, "llama")
    with hooked(model.model.layers[1], lambda x: x - torch.relu(x @ w)[..., None] * v):
        torch.testing.assert_close(found, logits(model, "llama"))


# --- with explanations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [ATTNLRP, VIT], ids=["attnlrp", "vit"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "t5"])
def test_relevance_of_a_changed_model(name: str, rules: Rules) -> None:
    model = tiny.build(name)
    site = next(s for s in find_sites(model, tiny.inputs(name)) if s.kind == "neurons")
    inputs = tiny.embedded(name, model)

    def relevance(total: Tensor) -> Tensor:
        return torch.autograd.grad(total, inputs["inputs_embeds"])[0]

    with scaled_weight(model, site, 3, 5.0):
        if rules is ATTNLRP:
            with propagate(model, rules):
                wanted = relevance(model(**inputs).logits[0, -1, 4])
    with intervene(model, {f"{site.name}:3": Scale(5.0)}), propagate(model, rules):
        outside = relevance(model(**inputs).logits[0, -1, 4])
    with propagate(model, rules), intervene(model, {f"{site.name}:3": Scale(5.0)}):
        inside = relevance(model(**inputs).logits[0, -1, 4])
    assert torch.equal(inside, outside)
    if rules is ATTNLRP:
        torch.testing.assert_close(inside, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_layers_that_are_computed_again_are_changed_again(order: str) -> None:
    model = tiny.build("llama")
    inputs = tiny.embedded("llama", model)
    changes = {Neuron(0, 3): Scale(5.0), Neuron(1, 4): 2.0}
    with propagate(model), intervene(model, changes):
        total = model(**inputs).logits[0, -1, 4]
    (wanted,) = torch.autograd.grad(total, inputs["inputs_embeds"])
    first, second = propagate(model), intervene(model, changes)
    with second if order == "outside" else first, checkpointed(model), first if order == "outside" else second:
        total = model(**inputs | {"use_cache": False}).logits[0, -1, 4]
    (found,) = torch.autograd.grad(total, inputs["inputs_embeds"])  # after the blocks
    assert torch.equal(found, wanted)


# --- scope and errors ---------------------------------------------------------------------------------------------


def test_all_is_restored_after_an_exception() -> None:
    model = tiny.build("llama")
    before = logits(model, "llama")
    changes = {Neuron(0, 1): 5.0, Direction("layers.0:after", torch.ones(32)): 1.0}
    with pytest.raises(ZeroDivisionError), intervene(model, changes, positions=[0]):
        assert not torch.equal(logits(model, "llama"), before)
        raise ZeroDivisionError
    assert torch.equal(logits(model, "llama"), before)
    assert open_changes() == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Neuron(0, 48): 0.0}, "layers.0.mlp has neurons 0 to 47"),
        (
            {"layers.9.mlp:0": 0.0},
            "no layer is called layers.9.mlp; expected an address such as layers.1.mlp:0, layers.0.mlp:0",
        ),
        ({Head(0, 1): 2.0}, r"a head is 8 numbers; expected Scale\(factor\), or 0"),
        ({Head(0, 1): Clamp(0.0)}, "a head is 8 numbers"),
        ({Direction("layers.7:after", torch.ones(32)): 1.0}, "expected one such as layers.0:before or layers.0:after"),
        ({Direction("layers.0", torch.ones(32)): 1.0}, "expected one such as layers.0:before"),
        ({Direction("layers.0:after", torch.ones(31)): 1.0}, r"got a vector of shape \(31,\), expected \(32,\)"),
        ({Direction("layers.0:after", torch.zeros(32)): 1.0}, "got a vector of zeros"),
        ({Neuron(0, 1): math.nan}, "got nan"),
        ({Neuron(0, 1): "off"}, "got 'off', expected a number, Set, Scale, Add or Clamp"),
        ({}, "changes: got none"),
    ],
)
def test_what_cannot_be_changed_is_refused(changes: Any, message: str) -> None:
    model = tiny.build("llama")
    with pytest.raises(InputError, match=message), intervene(model, changes):
        logits(model, "llama")
    assert open_changes() == []


def test_positions_count_from_the_start() -> None:
    model = tiny.build("llama")
    with (
        pytest.raises(InputError, match="expected numbers from 0"),
        intervene(model, {Neuron(0, 1): 0}, positions=[-1]),
    ):
        pass


def test_a_model_of_unknown_inputs_needs_an_example() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    model, x = Plain(), torch.randn(2, 3, 4)
    with pytest.raises(ModelError, match="pass inputs="), intervene(model, {"layers.0.2:1": 0.0}):
        pass
    with hooked(model.layers[0][2], at(1, 6.0)):
        wanted = model(x)
    with intervene(model, {"layers.0.2:1": 6.0}, inputs={"x": x}):
        assert torch.equal(model(x), wanted)

"""`checkpointed`: less memory, the same relevance, and nothing of it left behind."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import tiny
from attnlrp import ATTNLRP, CP_LRP, audit, propagate
from attnlrp.checkpoint import checkpointed, repeated_layers
from attnlrp.errors import InputError, ModelError
from attnlrp.rules import Rules


def other(name: str) -> nn.Module:
    """Models beside those of `tiny`."""
    kinds: dict[str, tuple[str, str, dict[str, Any]]] = {
        "bart": (
            "BartConfig",
            "BartForConditionalGeneration",
            {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 100, "max_position_embeddings": 64}
            | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
            | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48)
            | {"pad_token_id": 2, "decoder_start_token_id": 0},
        ),
        "vit": (
            "ViTConfig",
            "ViTForImageClassification",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
            | {"image_size": 16, "patch_size": 8, "num_labels": 3},
        ),
    }
    config_name, model_name, settings = kinds[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**settings)
    model: nn.Module = getattr(transformers, model_name)._from_config(config, attn_implementation="sdpa")
    return model.eval()


def case(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if name == "vit":
        return other(name), {"pixel_values": torch.randn(1, 3, 16, 16)}
    if name == "bart":
        ids = torch.randint(3, 100, (1, 7))
        return other(name), {"input_ids": ids, "decoder_input_ids": ids[:, :2]}
    return tiny.build(name), tiny.inputs(name)


def relevance(
    model: nn.Module, inputs: dict[str, Any], *, saving: bool, inside: bool = False, rules: Rules = ATTNLRP
) -> tuple[list[Tensor], Tensor]:
    """Gradients at every explained input, and the logits."""
    pixels = {k: v.clone().requires_grad_() for k, v in inputs.items() if k == "pixel_values"}
    arguments = inputs | pixels

    def taken(logits: Tensor) -> list[Tensor]:
        embeddings = [e for _, e in propagation.embeddings]
        return list(
            torch.autograd.grad(logits.reshape(-1, logits.shape[-1])[-1].max(), [*embeddings, *pixels.values()])
        )

    with propagate(model, rules) as propagation:
        if saving:
            with checkpointed(model):
                logits = model(**arguments).logits
                found = taken(logits) if inside else []
        else:
            logits, found = model(**arguments).logits, []
    return found or taken(logits), logits.detach()


class Saved:
    """Counts the bytes that the forward pass keeps for the backward pass, each storage once."""

    def __enter__(self) -> Saved:
        self.storages: dict[int, Tensor] = {}
        self.hooks = saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.hooks.__exit__(*exception)

    def pack(self, x: Tensor) -> Tensor:
        self.storages[x.untyped_storage().data_ptr()] = x
        return x

    def bytes(self, model: nn.Module) -> int:
        weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        return sum(x.untyped_storage().nbytes() for at, x in self.storages.items() if at not in weights)


NAMES = [*tiny.NAMES, "bart", "vit"]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_computes_its_layers_again_has_the_same_relevance(name: str, inside: bool) -> None:
    model, inputs = case(name)
    expected, logits = relevance(model, inputs, saving=False)
    found, recomputed = relevance(model, inputs, saving=True, inside=inside)
    assert torch.equal(recomputed, logits)
    assert len(found) == len(expected) > 0
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert all(e.abs().max() > 1e-5 for e in expected)


@pytest.mark.parametrize("name", NAMES)
def test_less_is_kept_for_the_backward_pass(name: str) -> None:
    model, inputs = case(name)
    if "pixel_values" in inputs:
        inputs["pixel_values"].requires_grad_()
    kept = []
    for saving in (False, True):
        with Saved() as saved, propagate(model):
            if saving:
                with checkpointed(model):
                    output = model(**inputs).logits
            else:
                output = model(**inputs).logits
        kept.append(saved.bytes(model))
        assert output.requires_grad
    assert kept[1] < 0.5 * kept[0]


def test_the_rules_of_the_block_hold_in_the_recomputation() -> None:
    model, inputs = case("llama")
    expected, _ = relevance(model, inputs, saving=False, rules=CP_LRP)
    found, _ = relevance(model, inputs, saving=True, rules=CP_LRP)
    plain, _ = relevance(model, inputs, saving=False)
    assert torch.equal(found[0], expected[0])
    assert not torch.allclose(plain[0], expected[0])


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_a_key_value_cache_is_filled_once_and_harmless(name: str) -> None:
    model, inputs = case(name)
    expected, _ = relevance(model, inputs | {"use_cache": False}, saving=False)
    with propagate(model) as propagation, checkpointed(model):
        output = model(**inputs, use_cache=True)
    logits = output.logits
    target = logits.reshape(-1, logits.shape[-1])[-1].max()
    for _ in range(2):  # every backward pass computes again, from what the cache held at first
        found = torch.autograd.grad(target, [e for _, e in propagation.embeddings], retain_graph=True)
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert output.past_key_values.get_seq_length() == (1 if name == "t5" else tiny.TOKENS)


def test_a_cache_with_the_first_half_of_the_text_in_it() -> None:
    model, inputs = case("llama")
    ids = inputs["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :4]).past_key_values
    found = []
    for saving in (False, True):
        arguments = {"input_ids": ids[:, 4:], "past_key_values": copy.deepcopy(cache)}
        found.append(relevance(model, arguments, saving=saving)[0][0])
    assert torch.equal(*found)


def test_a_layer_that_writes_into_what_it_is_given_is_refused() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor, state: list[Tensor]) -> Tensor:
            state[0].add_(1)
            return x * state[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Counting(), Counting()])

        def forward(self, x: Tensor) -> Tensor:
            state = [torch.zeros(3)]
            for layer in self.layers:
                x = layer(x, state)
            return x

    model = Model()
    with (
        pytest.raises(InputError, match="Counting writes into what it is given"),
        propagate(model),
        checkpointed(model),
    ):
        model(torch.ones(3, requires_grad=True))
    assert "forward" not in vars(model.layers[0])


# --- scope ------------------------------------------------------------------------------------------------------


def attributes(model: nn.Module) -> dict[str, list[str]]:
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


def test_the_model_is_as_before_also_after_an_exception() -> None:
    model, inputs = case("llama")
    before = attributes(model)
    with pytest.raises(RuntimeError, match="mine"), checkpointed(model), checkpointed(model):
        assert attributes(model) != before
        raise RuntimeError("mine")
    assert attributes(model) == before
    assert not model.training
    assert len(relevance(model, inputs, saving=False)[0]) == 1


def test_nested_blocks_compute_again_once() -> None:
    model, inputs = case("llama")
    expected, _ = relevance(model, inputs, saving=False)
    calls = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with checkpointed(model):
        found, _ = relevance(model, inputs, saving=True)
        assert "forward" in vars(model.model.layers[0])
    handle.remove()
    assert torch.equal(found[0], expected[0])
    assert len(calls) == 2


def test_a_block_does_not_reach_other_threads() -> None:
    model, inputs = case("llama")
    calls = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(threading.get_ident()))
    with checkpointed(model):
        thread = threading.Thread(target=relevance, args=(model, inputs), kwargs={"saving": False})
        thread.start()
        thread.join()
    handle.remove()
    assert len(calls) == 1


def test_threads_that_explain_one_model_at_once() -> None:
    model, inputs = case("llama")
    expected, _ = relevance(model, inputs, saving=False)
    found: list[Tensor] = []
    before = attributes(model)

    def run(saving: bool) -> None:
        found.extend(relevance(model, inputs, saving=saving)[0][0] for _ in range(3))

    threads = [threading.Thread(target=run, args=(k % 2 == 0,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert all(torch.equal(f, expected[0]) for f in found)
    assert attributes(model) == before


def test_the_forward_that_another_library_gave_a_layer_is_kept() -> None:
    model, inputs = case("llama")
    layer = model.model.layers[0]
    own, calls = layer.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    layer.forward = forward
    relevance(model, inputs, saving=True)
    assert layer.forward is forward
    assert len(calls) == 2


def test_dropout_is_drawn_once_in_a_model_that_trains() -> None:
    model = tiny.build("llama", attention_dropout=0.5).train()
    inputs = tiny.inputs("llama") | {"use_cache": False}
    found = []
    for saving in (False, True):
        torch.manual_seed(3)
        found.append(relevance(model, inputs, saving=saving)[0][0])
    assert torch.equal(*found)


def test_without_gradients_nothing_is_computed_again() -> None:
    model, inputs = case("llama")
    with torch.no_grad(), checkpointed(model), Saved() as saved:
        assert torch.equal(model(**inputs).logits, tiny.build("llama")(**inputs).logits)
    assert not saved.storages


# --- which layers -------------------------------------------------------------------------------------------------


def test_the_layers_of_any_model() -> None:
    stack = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3)))
    )
    assert repeated_layers(stack) == list(stack[1])
    llama = tiny.build("llama")
    assert repeated_layers(llama) == list(llama.model.layers)
    t5 = tiny.build("t5")
    assert len(repeated_layers(t5)) == 4


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear has no layers to compute again"), checkpointed(nn.Linear(2, 2)):
        pass


def test_a_model_of_plain_torch() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"), 3, enable_nested_tensor=False
    ).eval()
    x = torch.randn(1, 5, 8, requires_grad=True)
    with propagate(encoder):
        (expected,) = torch.autograd.grad(encoder(x)[0, 0, 0], x)
    with propagate(encoder), checkpointed(encoder):
        y = encoder(x)[0, 0, 0]
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)


def test_the_ledger_of_a_model_that_computes_again() -> None:
    model = tiny.build("llama", torch.float64)
    expected = audit(model, tiny.inputs("llama"))
    with checkpointed(model):
        found = audit(model, tiny.inputs("llama"))
    assert found.closes
    assert found.inputs == pytest.approx(expected.inputs, rel=1e-12)

"""`propagate` on whole models: the forward pass is the model's own, and nothing is left behind."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.testing import assert_close
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
from attnlrp import ATTNLRP, CP_LRP, GRADIENT, propagate
from attnlrp.rules import Rules

LAYOUTS = [(n, a) for n in tiny.NAMES for a in ("sdpa", "eager") if a == "eager" or n not in tiny.EAGER_ONLY]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
WITHOUT_FLOAT64 = ("mixtral",)  # the kernel of its experts has no float64


def logits(model: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**arguments).logits
    return found


def target(model: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
    found = logits(model, arguments)
    return found.reshape(-1, found.shape[-1])[-1].max()


def relevance(model: nn.Module, name: str, rules: Rules = ATTNLRP) -> Tensor:
    with propagate(model, rules) as propagation:
        target(model, tiny.inputs(name)).backward()
    return torch.cat([x.detach() * x.grad for _, x in propagation.embeddings], 1)


# --- the forward pass -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "attention", "dtype"),
    [(*way, d) for way in LAYOUTS for d in DTYPES if d != torch.float64 or way[0] not in WITHOUT_FLOAT64],
)
def test_the_forward_pass_is_bit_identical(name: str, attention: str, dtype: torch.dtype, training: bool) -> None:
    model = tiny.build(name, dtype, attention=attention).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    results = []
    for block in (False, True):
        torch.manual_seed(3)
        arguments = tiny.embedded(name, model)
        if block:
            with propagate(model):
                results.append(logits(model, arguments))
        else:
            # T5 alone adds a parameter to fused attention, where torch chooses the kernel by what requires a gradient
            model.requires_grad_(name != "t5")
            results.append(logits(model, arguments))
            model.requires_grad_(True)
    assert torch.equal(*results)


def test_the_forward_pass_of_a_trainable_t5_is_the_same_to_rounding() -> None:
    model = tiny.build("t5")
    plain = logits(model, tiny.inputs("t5"))
    with propagate(model):
        assert_close(logits(model, tiny.inputs("t5")), plain, rtol=1e-6, atol=1e-6 * float(plain.detach().abs().max()))


@pytest.mark.parametrize("rules", [ATTNLRP, CP_LRP, GRADIENT])
@pytest.mark.parametrize("name", [n for n in tiny.NAMES if n not in tiny.EAGER_ONLY])
def test_fused_and_written_attention_have_the_same_relevance(name: str, rules: Rules) -> None:
    dtype = torch.float32 if name in WITHOUT_FLOAT64 else torch.float64
    fused, written = (relevance(tiny.build(name, dtype, attention=a), name, rules) for a in ("sdpa", "eager"))
    # written attention computes its softmax in float32, whatever the dtype of the model
    assert_close(fused, written, rtol=0, atol=2e-6 * float(fused.abs().max()))
    assert fused.abs().max() > 1e-3


def test_mixed_precision_agrees_with_float32() -> None:
    model = tiny.build("llama")
    plain = relevance(model, "llama")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = relevance(model, "llama")
    assert F.cosine_similarity(plain.flatten(), mixed.flatten(), dim=0) > 0.99
    assert not torch.equal(plain, mixed)


# --- nothing is left behind -------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that patching would change, by identity."""
    namespaces = (torch, torch.Tensor, F, nn, nn.Module, transformers.activations, torch.utils.checkpoint)
    return {
        "namespaces": [{k: id(v) for k, v in vars(n).items()} for n in namespaces],
        "attention": dict(ALL_ATTENTION_FUNCTIONS),
        "modules": {n: {k: id(v) for k, v in vars(m).items()} for n, m in model.named_modules()},
        "hooks": {n: [len(v) for k, v in vars(m).items() if "hooks" in k] for n, m in model.named_modules()},
        "classes": {type(m): {k: id(v) for k, v in vars(type(m)).items()} for m in model.modules()},
        "parameters": {
            n: (id(p), p.data_ptr(), p._version, p.requires_grad, p.grad) for n, p in model.named_parameters()
        },
        "modes": len(_get_current_function_mode_stack()),
        "grad": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
        "warnings": list(warnings.filters),
    }


@pytest.mark.parametrize("name", tiny.NAMES)
def test_nothing_changes(name: str) -> None:
    model = tiny.build(name)
    with propagate(model):  # whatever torch and transformers fill in on first use
        target(model, tiny.inputs(name)).backward()
    before = snapshot(model)
    with propagate(model), propagate(model, CP_LRP):
        target(model, tiny.inputs(name)).backward()
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_nothing_changes_when_the_block_fails(name: str) -> None:
    model = tiny.build(name)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), propagate(model), propagate(model):
        target(model, tiny.inputs(name))
        raise ZeroDivisionError
    with pytest.raises(IndexError), propagate(model):
        model(torch.tensor([[10_000]]))
    assert snapshot(model) == before


def test_a_replaced_forward_of_an_activation_is_used_and_put_back() -> None:
    model = tiny.build("gpt2")
    activation = model.transformer.h[0].mlp.act
    own, calls = activation.forward, []
    activation.forward = lambda x: calls.append(1) or own(x)
    replaced = activation.forward
    expected = relevance(tiny.build("gpt2"), "gpt2")
    assert_close(relevance(model, "gpt2"), expected)
    assert activation.forward is replaced
    assert calls
    assert "_attnlrp_forward" not in vars(activation)


def test_parameters_take_no_gradient_inside_and_the_same_outside() -> None:
    model = tiny.build("gpt2")

    def train() -> dict[str, Tensor]:
        model.zero_grad()
        target(model, tiny.inputs("gpt2")).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    before = train()
    with propagate(model):
        target(model, tiny.inputs("gpt2")).backward()
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())
    after = train()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_parameter_can_be_written_inside_the_block() -> None:
    model = nn.Linear(3, 2)
    model(torch.randn(3)).sum().backward()
    hooked = []
    with propagate(model):
        model.zero_grad()
        assert model.weight.grad is None
        model.bias.requires_grad = False
        model.weight.data = torch.ones(2, 3)
        model.weight.register_hook(hooked.append)
        with torch.no_grad():
            model.weight.mul_(2)
    assert not model.bias.requires_grad
    assert torch.equal(model.weight, torch.full((2, 3), 2.0))
    model(torch.randn(3)).sum().backward()
    assert len(hooked) == 1


def test_without_gradients_nothing_happens_inside_the_block() -> None:
    model = tiny.build("llama")
    plain = logits(model, tiny.inputs("llama"))
    for context in (torch.no_grad(), torch.inference_mode()):
        with propagate(model) as propagation, context:
            assert torch.equal(logits(model, tiny.inputs("llama")), plain)
        assert propagation.embeddings == []


# --- nested blocks, several models, several threads -------------------------------------------------------------


def test_nested_blocks_apply_each_rule_once() -> None:
    model = tiny.build("gpt2")
    expected = {rules: relevance(model, "gpt2", TABLES[rules]) for rules in TABLES}
    for outer in TABLES:
        for inner in TABLES:
            with propagate(model, TABLES[outer]) as block, propagate(tiny.build("llama"), TABLES[outer]):
                assert torch.equal(relevance(model, "gpt2", TABLES[inner]), expected[inner])
            assert block.embeddings == []
            with propagate(model, TABLES[outer]) as block:
                relevance(model, "gpt2", TABLES[inner])
                target(model, tiny.inputs("gpt2")).backward()
            assert torch.equal(torch.cat([x * x.grad for _, x in block.embeddings], 1), expected[outer])


TABLES = {"attnlrp": ATTNLRP, "cp-lrp": CP_LRP, "gradient": GRADIENT}


def test_two_models_side_by_side() -> None:
    first, second = tiny.build("gpt2"), tiny.build("phi")
    expected = relevance(first, "gpt2"), relevance(second, "phi", CP_LRP)
    for _ in range(2):
        assert torch.equal(relevance(first, "gpt2"), expected[0])
        assert torch.equal(relevance(second, "phi", CP_LRP), expected[1])
    x, y = tiny.embedded("gpt2", first), tiny.embedded("phi", second)
    with propagate(first), propagate(second):
        (target(first, x) + target(second, y)).backward()
    assert_close(x["inputs_embeds"] * x["inputs_embeds"].grad, expected[0])


def test_threads_do_not_see_each_other() -> None:
    model = tiny.build("gpt2")
    model.zero_grad()
    expected = {name: relevance(model, "gpt2", rules) for name, rules in TABLES.items()}
    parameters = list(model.parameters())
    trained = torch.autograd.grad(target(model, tiny.inputs("gpt2")), parameters)
    barrier = threading.Barrier(4, timeout=60)

    def explain(name: str) -> None:
        barrier.wait()
        for _ in range(10):
            assert torch.equal(relevance(model, "gpt2", TABLES[name]), expected[name])

    def train() -> None:
        barrier.wait()
        for _ in range(10):
            gradients = torch.autograd.grad(target(model, tiny.inputs("gpt2")), parameters)
            assert all(map(torch.equal, gradients, trained))

    before = snapshot(model)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(explain, name) for name in TABLES] + [pool.submit(train)]
        for job in jobs:
            job.result()
    assert snapshot(model) == before


# --- backward ---------------------------------------------------------------------------------------------------


def test_the_backward_pass_may_be_inside_or_after_the_block_and_by_any_function() -> None:
    model = tiny.build("llama")
    expected = relevance(model, "llama")
    for inside in (True, False):
        for way in ("method", "autograd.backward", "autograd.grad"):
            arguments = tiny.embedded("llama", model)
            x = arguments["inputs_embeds"]

            def backward(y: Tensor, x: Tensor = x, way: str = way) -> Tensor:
                if way == "autograd.grad":
                    return torch.autograd.grad(y, x)[0]
                y.backward() if way == "method" else torch.autograd.backward(y)
                return x.grad  # type: ignore[return-value]

            with propagate(model):
                y = target(model, arguments)
                gradient = backward(y) if inside else None
            gradient = gradient if inside else backward(y)
            assert torch.equal(x * gradient, expected), (inside, way)


def test_several_targets_at_once_equal_a_loop() -> None:
    for name in ("llama", "gpt2", "t5"):
        model = tiny.build(name)
        arguments = tiny.embedded(name, model)
        x = arguments["inputs_embeds"]
        with propagate(model):
            y = logits(model, arguments)[0, -1, :5]
        basis = torch.eye(5)
        loop = [torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in basis]
        batched = torch.autograd.grad(y, x, basis, is_grads_batched=True)[0]
        assert_close(batched, torch.stack(loop), rtol=1e-4, atol=1e-6)


# --- explained inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.NAMES)
def test_token_embeddings_are_explained_inputs(name: str) -> None:
    model = tiny.build(name)
    by_tokens = relevance(model, name)
    with propagate(model) as propagation:
        target(model, tiny.inputs(name)).backward()
    ids, embeddings = propagation.embeddings[0]
    assert torch.equal(ids, tiny.inputs(name)["input_ids"])
    assert embeddings.is_leaf
    assert torch.equal(embeddings, F.embedding(ids, model.get_input_embeddings().weight))
    assert torch.equal((embeddings * embeddings.grad)[0], by_tokens[0, : ids.shape[1]])
    if name in ("gemma2", "gemma3", "t5"):
        return  # Gemma scales embeddings inside of the module; T5 has decoder tokens besides
    arguments = tiny.embedded(name, model)
    with propagate(model) as propagation:
        target(model, arguments).backward()
    x = arguments["inputs_embeds"]
    assert_close(x * x.grad, by_tokens)


def test_models_without_token_embeddings_are_explained_at_their_inputs() -> None:
    class Refusing(nn.Linear):
        def get_input_embeddings(self) -> None:
            raise NotImplementedError

    for model in (nn.Linear(3, 2), Refusing(3, 2), nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))):
        x = torch.randn(3, requires_grad=True)
        with propagate(model) as propagation:
            model(x).sum().backward()
        assert x.grad is not None
        assert propagation.embeddings == []


def test_a_model_may_write_into_its_embeddings() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            x[:, 0] = 0.0
            x += 1.0
            return self.head(x)

    with propagate(Writing()) as propagation:
        propagation.model(torch.tensor([[1, 2]]))[0, 1, 0].backward()
    ((_, embeddings),) = propagation.embeddings
    assert (embeddings.grad[0, 0] == 0).all()
    assert (embeddings.grad[0, 1] != 0).any()


def test_functional_call_uses_the_given_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU())
    other = {
        n: torch.randn_like(p).requires_grad_() for n, p in nn.Sequential(nn.Linear(3, 3), nn.GELU()).named_parameters()
    }
    x = torch.randn(3, requires_grad=True)
    frozen = {n: nn.Parameter(p) for n, p in other.items()}
    with propagate(model):
        y = torch.func.functional_call(model, frozen, (x,))
    y.sum().backward()
    assert all(p.grad is None for p in frozen.values())
    assert_close(
        (x * x.grad).sum() + ((y / F.linear(x, frozen["0.weight"], frozen["0.bias"])) * frozen["0.bias"]).sum(), y.sum()
    )

"""Rows of a table by the name of a layer, each against the same model with that layer treated by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import tiny
from attnlrp import ATTNLRP, CP_LRP, InputError, Propagation, UnknownOperationError, audit, propagate
from attnlrp.rules import MAMBA_LRP, Layer, Rules, constant, epsilon, gradient


def relevance(model: nn.Module, inputs: dict[str, Any], rules: Rules) -> Tensor:
    with propagate(model, rules) as propagation:
        logits = model(**inputs).logits[0]
    embeddings = propagation.embeddings[0][1]
    (grad,) = torch.autograd.grad(logits.reshape(-1, logits.shape[-1])[-1].max(), embeddings)
    return embeddings.detach() * grad


def stopped(model: nn.Module, inputs: dict[str, Any], end: str, rules: Rules = ATTNLRP) -> Tensor:
    """Relevance where the outputs of the modules whose path ends so are cut off by hand."""
    hooks = [m.register_forward_hook(lambda *a: a[-1].detach()) for n, m in model.named_modules() if n.endswith(end)]
    assert hooks
    try:
        return relevance(model, inputs, rules)
    finally:
        for hook in hooks:
            hook.remove()


def gradients(model: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    x = x.clone().requires_grad_()
    with propagate(model, rules):
        y = model(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    return grad


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "end"), [("llama", "q_proj"), ("llama", "mlp.down_proj"), ("gpt2", "c_attn")])
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_a_constant_layer_is_one_that_is_cut_off(name: str, end: str, suffix: str) -> None:
    model, inputs = tiny.build(name, torch.float64), tiny.inputs(name)
    found = relevance(model, inputs, ATTNLRP | {Layer(f"*{end}{suffix}"): constant})
    assert_close(found, stopped(model, inputs, end))
    assert not torch.allclose(found, relevance(model, inputs, ATTNLRP))


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("llama", {Layer("*q_proj"): constant}),
        ("llama", {Layer("*.mlp.*"): epsilon(0.1)}),
        ("gpt2", {Layer("*.c_attn"): epsilon(0.1), Layer("*.0.mlp.*"): constant}),
        ("mixtral", {Layer("*.experts.down_proj"): constant}),
        ("bert", {Layer("*.query"): constant, Layer("*.pooler.*"): epsilon(0.1)}),
    ],
)
def test_the_ledger_closes_with_rows_by_layer(name: str, rows: dict[Any, Any]) -> None:
    model, inputs = tiny.build(name, torch.float64), tiny.inputs(name)
    if name == "mixtral":
        model.set_experts_implementation("eager")  # the kernel of the other has no float64
    ledger = audit(model, inputs, rules={**ATTNLRP, **rows})
    assert ledger.closes, ledger.leaks()
    assert sum(ledger.inputs.values()) == pytest.approx(float(relevance(model, inputs, {**ATTNLRP, **rows}).sum()))


def test_only_the_named_layers_absorb() -> None:
    model, inputs = tiny.build("llama", torch.float64), tiny.inputs("llama")
    ledger = audit(model, inputs, rules=ATTNLRP | {Layer("*.1.mlp.up_proj"): epsilon(0.1)})
    absorbing = {e.module.split(" ")[0] for e in ledger.entries if e.absorbed.get("stabiliser")}
    assert absorbing == {"model.layers.1.mlp.up_proj"}


def test_a_row_for_every_layer_is_the_row_of_the_operation_and_goes_before_it() -> None:
    model, inputs = tiny.build("llama", torch.float64), tiny.inputs("llama")
    plain, stabilised = relevance(model, inputs, ATTNLRP), relevance(model, inputs, ATTNLRP | {"linear": epsilon(0.1)})
    assert not torch.allclose(plain, stabilised)
    assert_close(relevance(model, inputs, ATTNLRP | {Layer("*"): epsilon(0.1)}), stabilised)
    assert_close(relevance(model, inputs, ATTNLRP | {"linear": epsilon(0.1), Layer("*"): gradient}), plain)
    assert_close(relevance(model, inputs, ATTNLRP | {F.linear: epsilon(0.1), Layer("*"): gradient}), plain)


def test_the_last_row_that_matches_applies() -> None:
    model, inputs = tiny.build("llama", torch.float64), tiny.inputs("llama")
    expected = stopped(model, inputs, "up_proj")
    assert_close(relevance(model, inputs, ATTNLRP | {Layer("*"): gradient, Layer("*up_proj"): constant}), expected)
    found = relevance(model, inputs, ATTNLRP | {Layer("*up_proj"): constant, Layer("*"): gradient})
    assert_close(found, relevance(model, inputs, ATTNLRP))


@pytest.mark.parametrize("pattern", ["lm_head", "*.embed_tokens", "lm_head.weight"])
def test_a_tied_weight_has_the_names_of_all_its_modules(pattern: str) -> None:
    tied = tiny.build("llama", torch.float64, tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    inputs = tiny.inputs("llama")
    found = relevance(tied, inputs, ATTNLRP | {Layer(pattern): epsilon(0.1)})
    everywhere = relevance(tied, inputs, ATTNLRP | {Layer("*"): epsilon(0.1), Layer("*_proj"): gradient})
    assert_close(found, everywhere)
    assert not torch.allclose(found, relevance(tied, inputs, ATTNLRP))


@pytest.mark.parametrize("pattern", ["0", "2"])
def test_a_module_in_two_places_has_both_names(pattern: str) -> None:
    shared = nn.Linear(3, 3)
    x = numbers(2, 3)
    assert not gradients(nn.Sequential(shared, nn.ReLU(), shared).double(), x, ATTNLRP).eq(0).all()
    with propagate(nn.Sequential(shared, nn.ReLU(), shared), ATTNLRP | {Layer(pattern): constant}):
        assert not shared(x.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_in_one_stack_are_named_by_their_module_or_weight(implementation: str) -> None:
    model, inputs = tiny.build("mixtral"), tiny.inputs("mixtral")
    model.set_experts_implementation(implementation)
    second = relevance(model, inputs, ATTNLRP | {Layer("*.experts.down_proj"): constant})
    both = relevance(model, inputs, ATTNLRP | {Layer("*.experts"): constant})
    assert_close(second, both)  # with the second product a constant, nothing comes through to the first
    assert not torch.allclose(second, relevance(model, inputs, ATTNLRP))
    model.set_experts_implementation("eager")
    assert_close(second, relevance(model, inputs, ATTNLRP | {Layer("*.experts.down_proj"): constant}))


def test_a_convolution_has_a_name() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Conv1d(3, 2, 2)).double()
    x = numbers(1, 2, 6)
    found = gradients(model, x, ATTNLRP | {Layer("2"): epsilon(0.1)})
    z = model(x)
    (expected,) = torch.autograd.grad(model(y := x.clone().requires_grad_()), y, z / (z + 0.1 * z.sign()))
    assert_close(found, expected)


class Borrowed(nn.Module):
    """Uses the weights of modules whose own code never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mixer(x, x, x, need_weights=False)[0]
        return x + mixed


def test_the_owner_of_the_weight_counts_and_not_whose_code_runs() -> None:
    model, x = Borrowed().double().eval(), numbers(1, 3, 4)
    assert_close(gradients(model, x, ATTNLRP | {Layer("*.out_proj"): constant}), torch.ones_like(x))
    cut = gradients(model, x, ATTNLRP | {Layer("*.in_proj_weight"): constant})
    assert_close(cut, torch.ones_like(x))
    assert not torch.allclose(gradients(model, x, ATTNLRP), cut)


class Moved(nn.Linear):
    """Computes with a copy of its weight, as layers do whose weight is dequantised or loaded for the call."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 1.0, self.bias)


def test_a_weight_that_has_moved_belongs_to_the_module_whose_code_runs() -> None:
    model = nn.Sequential(Moved(4, 3), nn.ReLU(), Moved(3, 2, bias=False)).double()
    x = numbers(2, 4)
    z = model(x)
    found = gradients(model, x, ATTNLRP | {Layer("2"): epsilon(0.1)})
    (expected,) = torch.autograd.grad(model(y := x.clone().requires_grad_()), y, z / (z + 0.1 * z.sign()))
    assert_close(found, expected)


def test_weights_in_one_storage_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    flat = numbers(27)
    for k, layer in enumerate(model):
        layer.weight = nn.Parameter(flat[9 * k : 9 * k + 9].view(3, 3))
    x = numbers(2, 3)
    with propagate(model, ATTNLRP | {Layer("1"): constant}):
        first = model[0](x.clone().requires_grad_())
        second = model[1](first)
        third = model[2](first)
    assert first.requires_grad
    assert not second.requires_grad
    assert third.requires_grad


def test_recomputed_layers_keep_their_rows() -> None:
    model, inputs = tiny.build("llama", torch.float64), tiny.inputs("llama")
    rules = ATTNLRP | {Layer("*.mlp.*"): epsilon(0.1)}
    expected = relevance(model, inputs, rules)
    model.activation_checkpointing_enable()
    assert_close(relevance(model.train(), inputs, rules), expected)


def test_tables_without_rows_by_layer_and_rows_that_match_nothing_cost_nothing() -> None:
    model = tiny.build("llama")
    plain = Propagation(model, ATTNLRP)
    assert plain._plan(F.linear) == plain._linear
    optional = Propagation(model, MAMBA_LRP)
    assert optional._plan(F.linear) == optional._linear
    named = Propagation(model, ATTNLRP | {Layer("*q_proj"): constant})
    assert named._plan(F.linear) != named._linear
    assert named._plan(F.silu) is not None
    assert "_by_layer" not in str(named._plan(F.silu))


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*.q_projj", "model.layers.0.self_attn.q_proj"),
        ("model.layers.0.mlp", "model.layers.0.mlp.gate_proj, "),
        ("*.attention.query", "self_attn"),
        ("*.0.MLP.*", "model.layers.0.mlp"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_names_near_it(pattern: str, near: str) -> None:
    model = tiny.build("llama")
    with pytest.raises(InputError, match="matches no module that owns a weight, and no weight; expected") as error:
        Propagation(model, CP_LRP | {Layer(pattern): constant})
    assert f"got Layer(pattern={pattern!r}, optional=False)" in str(error.value)
    assert near in str(error.value)
    assert "optional=True" in str(error.value)
    Propagation(model, CP_LRP | {Layer(pattern, optional=True): constant})


@pytest.mark.parametrize("part", ["", "0"])
def test_a_compiled_model_refuses_rows_by_layer(part: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    model.get_submodule(part).compile(backend="aot_eager")
    for compiled in (model, torch.compile(nn.Sequential(nn.Linear(3, 2)), backend="aot_eager")):
        Propagation(compiled, ATTNLRP)
        with pytest.raises(
            UnknownOperationError, match=r"by a Layer row, in a compiled graph.*use the module that was"
        ):
            Propagation(compiled, ATTNLRP | {Layer("*0"): constant})


# --- weights that are elsewhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("to_disk", [False, True])
def test_offloaded_layers_keep_their_rows(to_disk: bool, tmp_path: Path) -> None:
    accelerate: Any = pytest.importorskip("accelerate", reason="needs accelerate")
    model, inputs = tiny.build("llama"), tiny.inputs("llama")
    rules = ATTNLRP | {Layer("*.mlp.*"): epsilon(0.1), Layer("*.0.self_attn.q_proj"): constant}
    expected = relevance(model, inputs, rules)
    if to_disk:
        accelerate.disk_offload(model, str(tmp_path), "cpu")
    else:
        accelerate.cpu_offload(model, "cpu")
    assert model.lm_head.weight.device.type == "meta"
    assert_close(relevance(model, inputs, rules), expected)


def test_layers_of_bitsandbytes_refuse_rows_by_layer() -> None:
    class MatMul4Bit(torch.autograd.Function):
        """As the layers of bitsandbytes compute: torch shows the call once its output is used, without the weight."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return 2 * grad

    MatMul4Bit.__module__, MatMul4Bit.__qualname__ = "bitsandbytes.autograd._functions", "MatMul4Bit"
    x, model = torch.randn(2, 3, requires_grad=True), nn.Sequential(nn.Linear(3, 3))
    with propagate(model):
        assert (MatMul4Bit.apply(x) * 1).requires_grad
    with propagate(model, ATTNLRP | {Layer("0"): constant}):
        with pytest.raises(
            UnknownOperationError, match=r"by a Layer row, in bitsandbytes.*weights that are not quantised"
        ):
            MatMul4Bit.apply(x) * 1

"""Experts against an oracle: a dense gated layer, cut into experts that are all chosen, computes the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from attnlrp import ATTNLRP, CP_LRP, GRADIENT, Ledger, audit, propagate
from attnlrp.rules import Layer, Rules, constant, gradient

EXPERTS, HIDDEN, WIDTH, TOKENS = 4, 8, 16, 3  # grouped products want rows of 16 bytes
PART = WIDTH // EXPERTS
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": HIDDEN, "hidden_act": "silu"}
CHOSEN = {"num_experts_per_tok": EXPERTS}
NAMES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
CONSTANT_ROUTER: Rules = {
    **ATTNLRP,
    Layer("*gate", optional=True): constant,
    Layer("*router", optional=True): constant,
}


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def copied(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)


def dense_swiglu() -> nn.Module:
    torch.manual_seed(3)
    return LlamaMLP(transformers.LlamaConfig(**HEADS, intermediate_size=WIDTH)).double()


def split(experts: Any, dense: Any) -> None:
    """The neurons of the dense layer, a part to each expert; their sum is weighted 1 / EXPERTS, so down is scaled."""
    gate, up = (w.weight.view(EXPERTS, PART, HIDDEN) for w in (dense.gate_proj, dense.up_proj))
    copied(experts.gate_up_proj, torch.cat([gate, up], dim=1))
    copied(experts.down_proj, EXPERTS * dense.down_proj.weight.view(HIDDEN, EXPERTS, PART).transpose(0, 1))


def mixtral(way: str, chosen: int = EXPERTS) -> tuple[nn.Module, nn.Module]:
    sizes = {"intermediate_size": PART, "num_local_experts": EXPERTS, "num_experts_per_tok": chosen}
    config = transformers.MixtralConfig(**HEADS, **sizes, experts_implementation=way)
    return MixtralSparseMoeBlock(config), dense_swiglu()


def qwen3_moe(way: str) -> tuple[nn.Module, nn.Module]:
    sizes = {"moe_intermediate_size": PART, "num_experts": EXPERTS, "norm_topk_prob": True}
    config = transformers.Qwen3MoeConfig(**HEADS, **CHOSEN, **sizes, experts_implementation=way)
    return Qwen3MoeSparseMoeBlock(config), dense_swiglu()


def deepseek_v3(way: str) -> tuple[nn.Module, nn.Module]:
    """Sigmoids, made to sum to 1; the expert that all tokens share is switched off."""
    sizes = {"moe_intermediate_size": PART, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 1}
    scale = {"topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True}
    config = transformers.DeepseekV3Config(**HEADS, **CHOSEN, **sizes, **scale, experts_implementation=way)
    block = DeepseekV3MoE(config)
    nn.init.zeros_(block.shared_experts.down_proj.weight)
    return block, dense_swiglu()


def gpt_oss(way: str) -> tuple[nn.Module, nn.Module]:
    """The dense layer is one expert, which the softmax over it alone weights with 1; gate and up lie interleaved."""

    def build(experts: int) -> Any:
        sizes = {"intermediate_size": WIDTH // experts, "num_local_experts": experts, "num_experts_per_tok": experts}
        config = transformers.GptOssConfig(**HEADS, **sizes, experts_implementation=way)
        block: Any = GptOssMLP(config).double()
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.4)
        zero(block)
        return block

    torch.manual_seed(3)
    dense, block = build(1), build(EXPERTS)
    one, many = dense.experts, block.experts
    copied(many.gate_up_proj, one.gate_up_proj[0].view(HIDDEN, EXPERTS, 2 * PART).transpose(0, 1))
    copied(many.gate_up_proj_bias, one.gate_up_proj_bias[0].view(EXPERTS, 2 * PART))
    copied(many.down_proj, EXPERTS * one.down_proj[0].view(EXPERTS, PART, HIDDEN))
    copied(many.down_proj_bias, one.down_proj_bias.expand(EXPERTS, -1))
    return block, dense


BUILDERS: dict[str, Callable[[str], tuple[nn.Module, nn.Module]]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
}


def router(block: Any) -> Any:
    return block.router if hasattr(block, "router") else block.gate


def zero(block: nn.Module) -> None:
    for parameter in router(block).parameters():
        nn.init.zeros_(parameter)


def build(name: str, way: str = "eager") -> tuple[nn.Module, nn.Module]:
    """Experts with a router that gives 1 / EXPERTS to each, and the dense layer that they are made of."""
    block, dense = BUILDERS[name](way)
    block = block.double()
    if name != "gpt_oss":
        split(block.experts, dense)
    zero(block)
    return block.eval(), dense.eval()


def make_live(block: nn.Module, scale: float = 1.0) -> None:
    for parameter in router(block).parameters():
        nn.init.normal_(parameter, std=scale)


def states(seed: int = 7) -> Tensor:
    return torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scalar(output: Any) -> Tensor:
    """A fixed weighted sum of what a block returns."""
    value: Tensor = output[0] if isinstance(output, tuple) else output
    weights = torch.randn(value.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    return (value[0] * weights.to(value.dtype)).sum()


def relevance(block: nn.Module, rules: Rules = ATTNLRP, x: Tensor | None = None) -> Tensor:
    x = (states() if x is None else x).clone().requires_grad_()
    with propagate(block, rules):
        scalar(block(x)).backward()
    assert x.grad is not None
    return (x * x.grad).detach()


def books(block: nn.Module, rules: Rules = ATTNLRP) -> Ledger:
    return audit(block, {"hidden_states": states()}, target=scalar, rules=rules)


@pytest.mark.parametrize("name", NAMES)
def test_experts_compute_the_dense_function(name: str) -> None:
    block, dense = build(name)
    close(scalar(block(states())), scalar(dense(states())))


@pytest.mark.parametrize("name", NAMES)
def test_with_a_constant_router_relevance_is_that_of_the_dense_layer(name: str) -> None:
    block, dense = build(name)
    close(relevance(block, CONSTANT_ROUTER), relevance(dense, CONSTANT_ROUTER))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_cp_lrp_makes_a_softmax_router_constant(name: str) -> None:
    block, dense = build(name)
    close(relevance(block, CP_LRP), relevance(dense, CP_LRP))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_live_router_without_an_opinion_keeps_exactly_half(name: str) -> None:
    block, dense = build(name)
    close(relevance(block), relevance(dense) / 2)
    close(relevance(block, GRADIENT), relevance(dense, GRADIENT), 1e-12)  # the half is the rule's doing


def test_one_expert_that_is_always_chosen_has_a_router_that_keeps_half() -> None:
    block, dense = build("gpt_oss")
    make_live(dense)
    close(relevance(dense), relevance(dense, CONSTANT_ROUTER) / 2)
    close(relevance(block), relevance(dense))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_the_half_of_a_router_without_an_opinion_is_absorbed(name: str) -> None:
    ledger = books(build(name)[0])
    kind = "stabiliser" if name == "deepseek_v3" else "softmax"
    assert ledger.closes, ledger.leaks()
    assert ledger.absorbed[kind] == pytest.approx(ledger.target / 2, rel=1e-12)
    assert sum(ledger.inputs.values()) == pytest.approx(ledger.target / 2, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rules", [ATTNLRP, CP_LRP, CONSTANT_ROUTER], ids=["attnlrp", "cp-lrp", "constant-router"])
def test_the_books_of_a_router_with_an_opinion_close(name: str, rules: Rules) -> None:
    block, _ = build(name)
    make_live(block)
    ledger = books(block, rules)
    assert ledger.closes, ledger.leaks()
    assert ledger.error < 1e-12


@pytest.mark.parametrize("chosen", [1, 2, EXPERTS])
def test_a_live_router_gets_what_the_formulas_say(chosen: int) -> None:
    """R_logit = l (R_chosen - s sum R) with R half of each expert's share, and each expert the other half."""
    block, dense = mixtral("eager", chosen)
    block = block.double().eval()
    split(block.experts, dense)
    make_live(block)
    x = states()
    weight = router(block).weight.detach()
    logits = x[0] @ weight.T
    s = logits.softmax(-1)
    top, index = s.topk(chosen)
    mask = torch.zeros_like(s).scatter(-1, index, top / top.sum(-1, keepdim=True))
    weights = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    expected = torch.zeros_like(x[0])
    received = torch.zeros_like(s)
    for e in range(EXPERTS):
        gate, up = (x[0] @ block.experts.gate_up_proj[e].detach().T).chunk(2, -1)
        down = block.experts.down_proj[e].detach()
        outgoing = mask[:, e, None] * weights @ down / 2  # half of the gradient at the product of silu(gate) and up
        gates, ups = block.experts.gate_up_proj[e].detach().chunk(2)
        expected += x[0] * ((outgoing * torch.sigmoid(gate) * up / 2) @ gates)
        expected += x[0] * ((outgoing * torch.nn.functional.silu(gate) / 2) @ ups)
        received[:, e] = mask[:, e] * ((torch.nn.functional.silu(gate) * up) @ down.T * weights).sum(-1) / 2
    at_logits = received - s * received.sum(-1, keepdim=True)  # the gradient, per unit of logit
    expected += x[0] * (at_logits @ weight)
    close(relevance(block)[0], expected, 1e-5)  # the router of Mixtral is in float32, but not in the books
    ledger = {(e.operation, e.module.split(" ")[0]): e for e in books(block).entries}
    assert ledger["linear", "gate"].received == pytest.approx((logits * at_logits).sum().item(), rel=1e-10)
    assert ledger["softmax", "gate"].received == pytest.approx(received.sum().item(), rel=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_router_gets_half_of_what_reaches_the_weighted_sum(name: str) -> None:
    """Conserved on its way: product, renormalisation and choice pass on what they get; softmax or sigmoid absorb."""
    block, _ = build(name)
    make_live(block)
    ledger = books(block)
    own = "router" if name == "gpt_oss" else "gate"
    entries = [e for e in ledger.entries if e.module.split(" ")[0] == own]
    squash = next(e for e in entries if e.operation in ("softmax", "sigmoid"))
    projection = next(e for e in entries if e.operation == "linear")
    assert squash.received == pytest.approx(ledger.target / 2, rel=1e-10)
    assert squash.received == pytest.approx(squash.passed + sum(squash.absorbed.values()), rel=1e-10)
    assert projection.received == pytest.approx(squash.passed, rel=1e-10)
    for entry in entries:
        assert entry.leak == pytest.approx(0, abs=1e-12 * ledger.scale), entry


def test_a_constant_denominator_conserves_what_the_plain_gradient_loses() -> None:
    block, dense = mixtral("eager", 2)
    block = block.double().eval()
    split(block.experts, dense)
    make_live(block)
    ledger = books(block)
    (renormalised,) = (e for e in ledger.entries if e.operation == "div")
    assert renormalised.passed == pytest.approx(renormalised.received, rel=1e-12)
    plain = books(block, {**ATTNLRP, "div": gradient})
    (renormalised,) = (e for e in plain.entries if e.operation == "div")
    assert abs(renormalised.passed) < 1e-12 * plain.scale
    assert renormalised.received == pytest.approx(plain.target / 2, rel=1e-10)


def renormalised(logits: Tensor, k: int) -> Tensor:
    """Softmax over all, then the best divided by their sum."""
    top = logits.softmax(-1).topk(k, dim=-1).values
    return top / top.sum(-1, keepdim=True)


def over_the_best(logits: Tensor, k: int) -> Tensor:
    """The same weights: softmax over the best."""
    return logits.topk(k, dim=-1).values.softmax(-1)


@pytest.mark.parametrize("k", [2, 5])
def test_two_spellings_of_one_router_agree_where_all_experts_are_chosen(k: int) -> None:
    torch.manual_seed(4)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    parts = torch.randn(k, dtype=torch.float64)
    grads = []
    for spelling in (renormalised, over_the_best):
        with propagate(nn.Identity()):
            weights = spelling(logits, k)
        close(weights, over_the_best(logits, k))
        (grad,) = torch.autograd.grad((weights * parts).sum(), logits)
        grads.append(grad)
    total = (over_the_best(logits, k) * parts).sum().detach()
    chosen = torch.zeros(5, dtype=torch.float64).scatter(0, logits.topk(k).indices, over_the_best(logits, k).detach())
    close(grads[0], grads[1] + (chosen - logits.detach().softmax(-1)) * total)
    assert (k == 5) == bool((grads[0] - grads[1]).abs().max() < 1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rules", [ATTNLRP, CONSTANT_ROUTER], ids=["attnlrp", "constant-router"])
def test_every_way_to_run_experts_gives_the_same_relevance(name: str, rules: Rules) -> None:
    """Grouped and batched products in float32, against one expert after the other in float64."""
    block, _ = build(name)
    make_live(block)
    expected = relevance(block, rules)
    for way in ("grouped_mm", "batched_mm"):
        other, _ = build(name, way)
        other.load_state_dict(block.state_dict())
        found = relevance(other.float(), rules, states().float())
        assert torch.isfinite(found).all()
        close(found.double(), expected, 2e-5)
        assert books(other.double(), rules).closes

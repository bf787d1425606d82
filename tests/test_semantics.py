"""The decisions of docs/semantics.md, one number for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import tiny
from attnlrp import ATTNLRP, CP_LRP, GRADIENT, audit, propagate
from attnlrp.ledger import Ledger
from attnlrp.rules import Rules
from conformance import recipe
from explained import explain, randn

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns of while it builds its own models

EPS = 0.01


class Body(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.function(**inputs)


def books(function: Callable[..., Tensor], rules: Rules = ATTNLRP, **inputs: Tensor) -> Ledger:
    """The ledger of the sum of a function's output."""
    ledger = audit(Body(function), inputs, rules=rules, target=lambda y: y.sum())
    assert ledger.closes, ledger.leaks()
    return ledger


def closed(task: str, kind: str, rules: Rules = ATTNLRP) -> Ledger:
    """The ledger of a tiny model in float64."""
    model = recipe.build(task, kind)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the kernel of the other has no float64
    ledger = audit(model.double(), recipe.inputs(task, kind, model), rules=rules)
    assert ledger.closes, ledger.leaks()
    return ledger


def kept(ledger: Ledger, kind: str, operation: str, module: str) -> float:
    """What one kind of operation absorbs in the modules of one class."""
    entries = [e for e in ledger.entries if e.operation == operation and module in e.module]
    assert entries
    return sum(e.absorbed.get(kind, 0.0) for e in entries)


def by_token(model: nn.Module, rules: Rules = ATTNLRP, **inputs: Any) -> Tensor:
    """Relevance of each token for the largest logit of the last position."""
    with propagate(model, rules) as propagation:
        logits = model(**inputs).logits[0]
    embeddings = propagation.embeddings[0][1]
    (grad,) = torch.autograd.grad(logits.reshape(-1, logits.shape[-1])[-1].max(), embeddings)
    return (embeddings.detach() * grad).sum(-1)[0]


# --- experts and routers ----------------------------------------------------------------------------------------


def routed(x: Tensor, weights: Callable[[Tensor], Tensor]) -> Tensor:
    """Two of four experts, each a matrix, weighted by the router."""
    router, experts = randn(4, 5, seed=1), randn(4, 5, 5, seed=2)
    chosen, index = weights(x @ router.T).topk(2, dim=-1)
    chosen = chosen / chosen.sum(dim=-1, keepdim=True)
    outputs = torch.einsum("tkoi,ti->tko", experts[index], x)
    return (chosen[..., None] * outputs).sum(-2)


@pytest.mark.parametrize("weights", [lambda z: z.softmax(-1), torch.sigmoid], ids=["softmax", "sigmoid"])
def test_a_router_gets_half_and_renormalised_weights_conserve(weights: Callable[[Tensor], Tensor]) -> None:
    ledger = books(lambda x: routed(x, weights), x=randn(3, 5))
    (product,) = [e for e in ledger.entries if e.operation == "mul"]
    assert product.received == pytest.approx(ledger.target)
    (ratio,) = [e for e in ledger.entries if e.operation == "div"]
    assert ratio.received == pytest.approx(ledger.target / 2)
    assert ratio.passed == pytest.approx(ratio.received)
    plain = explain(lambda w: w / w.sum(-1, keepdim=True), randn(3, 2).softmax(-1), rules=GRADIENT)
    assert plain.received == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "qwen2_moe"])
def test_the_ratio_of_a_router_conserves_in_a_model(kind: str) -> None:
    model: Any = recipe.build("causal-lm", kind)
    model.set_experts_implementation("eager")
    model.config.norm_topk_prob = True
    for module in model.modules():
        if hasattr(module, "norm_topk_prob"):
            module.norm_topk_prob = True
    ledger = audit(model.double(), recipe.inputs("causal-lm", kind, model))
    assert ledger.closes, ledger.leaks()
    ratios = [e for e in ledger.entries if e.operation == "div" and e.received]
    assert ratios
    for entry in ratios:
        assert entry.passed == pytest.approx(entry.received, abs=1e-12)


# --- gates and constants ----------------------------------------------------------------------------------------


def test_the_constant_in_up_plus_one_absorbs_its_share() -> None:
    """GPT-OSS: (up + 1) * gate * sigmoid(alpha * gate), with up and gate clipped."""
    gate, up, alpha = 3 * randn(4, 6), 3 * randn(4, 6, seed=1), 1.702

    def activation(gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.clamp(max=2.0), up.clamp(min=-2.0, max=2.0)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))

    assert (gate > 2).any()
    ledger = books(activation, gate=gate, up=up)
    gate, up = gate.clamp(max=2.0), up.clamp(-2.0, 2.0)
    glu = gate * torch.sigmoid(gate * alpha)
    assert ledger.absorbed["constant"] == pytest.approx(float(glu.sum() / 2))
    assert ledger.inputs["up"] == pytest.approx(float((up * glu).sum() / 2))
    lost = EPS / ((gate * alpha).abs() + EPS)  # of the quarter that goes through sigmoid
    assert ledger.absorbed["stabiliser"] == pytest.approx(float(((up + 1) * glu * lost).sum() / 4))


def test_the_sigmoid_of_a_gate_written_out_gives_what_silu_gives_but_for_the_stabiliser() -> None:
    x = randn(40)
    written = explain(lambda x: x * torch.sigmoid(x), x)
    assert_close(written.relevance[0], written.y * written.g * (1 - EPS / (x.abs() + EPS) / 2))
    assert_close(explain(F.silu, x).relevance[0], written.y * written.g)


# --- attention --------------------------------------------------------------------------------------------------


def test_a_sink_logit_absorbs_by_the_rule_of_softmax() -> None:
    scores, values, sink = randn(3, 5), randn(5, seed=1), randn(3, 1, seed=2)

    def attend(x: Tensor) -> Tensor:
        return torch.cat([x, sink], dim=-1).softmax(-1)[..., :-1] @ values

    ledger = books(attend, x=scores)
    p = torch.cat([scores, sink], dim=-1).softmax(-1)
    mean = p[:, :-1] @ values
    assert ledger.absorbed["constant"] == pytest.approx(float(-(sink[:, 0] * p[:, -1] * mean).sum()))


def test_the_sinks_of_gpt_oss_absorb_and_nothing_if_they_are_closed() -> None:
    model: Any = recipe.build("causal-lm", "gpt_oss").double()
    model.set_experts_implementation("eager")
    inputs = recipe.inputs("causal-lm", "gpt_oss", model)
    open_ = audit(model, inputs)
    assert kept(open_, "constant", "cat", "GptOssAttention") != 0
    assert kept(audit(model, inputs, rules=CP_LRP), "constant", "cat", "GptOssAttention") == 0
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-1e4)
    assert kept(audit(model, inputs), "constant", "cat", "GptOssAttention") == 0


@pytest.mark.parametrize(
    ("task", "kind", "operation", "absorber"),
    [
        ("causal-lm", "mpt", "add", "constant"),
        ("seq2seq-lm", "t5", "add", "constant"),
        ("causal-lm", "bloom", "addmm", "bias"),
    ],
)
def test_a_position_bias_is_a_constant_that_absorbs_through_softmax(
    task: str, kind: str, operation: str, absorber: str
) -> None:
    attention = "Attention"
    assert kept(closed(task, kind), absorber, operation, attention) != 0
    without = closed(task, kind, CP_LRP)
    entries = [e for e in without.entries if e.operation == operation and attention in e.module]
    assert sum(abs(v) for e in entries for v in e.absorbed.values()) == 0
    if kind != "bloom":  # the others have no constants but these
        assert set(without.absorbed.values()) == {0}
        assert sum(without.inputs.values()) == pytest.approx(without.target)


def test_soft_caps_conserve() -> None:
    x = 60 * randn(50)
    result = explain(lambda x: 30 * torch.tanh(x / 30), x)
    assert_close(result.relevance[0], result.y * result.g)
    ledger = closed("causal-lm", "gemma2")
    caps = [e for e in ledger.entries if e.operation == "tanh"]
    assert {e.module.split(" ")[1] for e in caps} == {"(Gemma2Attention)", "(Gemma2ForCausalLM)"}
    for entry in caps:
        assert entry.passed == pytest.approx(entry.received)


def test_norms_of_queries_and_keys_conserve() -> None:
    ledger = closed("causal-lm", "qwen3")
    entries = [e for e in ledger.entries if e.module.split(" ")[0].endswith(("q_norm", "k_norm"))]
    assert sum(abs(e.passed) for e in entries) > 0
    assert all(not any(e.absorbed.values()) for e in entries)


def test_rotary_positions_conserve() -> None:
    q, angle = randn(1, 2, 5, 8), randn(1, 5, 4, seed=1).repeat(1, 1, 2)
    result = explain(lambda q: apply_rotary_pos_emb(q, q, angle.cos(), angle.sin())[0], q)
    assert result.received == pytest.approx(float(result.total))
    plain = explain(lambda q: apply_rotary_pos_emb(q, q, angle.cos(), angle.sin())[0], q, rules=GRADIENT)
    assert_close(result.relevance, plain.relevance)


def test_what_a_window_or_a_mask_hides_gets_exactly_nothing() -> None:
    settings = tiny.IDS | tiny.GROUPED | {"num_hidden_layers": 1, "sliding_window": 3}
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**settings)).eval()
    ids = tiny.inputs("llama")["input_ids"]
    found = by_token(model, input_ids=ids)
    assert (found[:-3] == 0).all()
    assert (found[-3:] != 0).all()
    mask = torch.ones_like(ids)
    mask[0, -2] = 0
    found = by_token(model, input_ids=ids, attention_mask=mask)
    assert found[-2] == 0
    assert found[-3] != 0


def test_cross_attention_gives_to_encoder_and_decoder() -> None:
    ledger = closed("seq2seq-lm", "t5")
    assert set(ledger.inputs) == {"embeddings", "embeddings 1"}
    assert all(ledger.inputs.values())
    model = recipe.build("seq2seq-lm", "t5").double()
    inputs = recipe.inputs("seq2seq-lm", "t5", model)
    with propagate(model) as propagation:
        logits = model(**inputs).logits
    assert [tuple(ids.shape) for ids, _ in propagation.embeddings] == [(1, recipe.TOKENS), (1, recipe.DECODER_TOKENS)]
    encoder = torch.autograd.grad(logits[0, 0].max(), propagation.embeddings[0][1])[0]
    assert (encoder != 0).any(-1).all()  # already the first decoder token reads the whole text


# --- inputs and outputs -----------------------------------------------------------------------------------------


def test_a_pooler_conserves_in_its_tanh_and_absorbs_in_its_bias() -> None:
    ledger = closed("sequence-classification", "bert")
    (pooled,) = [e for e in ledger.entries if e.operation == "tanh"]
    assert pooled.passed == pytest.approx(pooled.received)
    (dense,) = [e for e in ledger.entries if e.module.startswith("bert.pooler.dense") and e.operation == "linear"]
    assert dense.absorbed["bias"] != 0
    model = recipe.build("sequence-classification", "bert")
    found = by_token(model, input_ids=torch.tensor([[11, 12, 13, 14]]))
    assert (found != 0).all()  # not only the first token, which is pooled


def test_a_picture_among_the_text_takes_the_place_of_its_tokens() -> None:
    model = recipe.build("image-text-to-text", "llava")
    inputs = recipe.inputs("image-text-to-text", "llava", model)
    pixels = inputs.pop("pixel_values").requires_grad_()
    with propagate(model) as propagation:
        logit = model(pixel_values=pixels, **inputs).logits[0, -1].max()
    ids, embeddings = propagation.embeddings[0]
    of_text, of_pixels = torch.autograd.grad(logit, [embeddings, pixels])
    placeholders = ids[0] == model.config.image_token_id
    assert 0 < placeholders.sum() < len(placeholders)
    assert (of_text[0, placeholders] == 0).all()
    assert (of_text[0, ~placeholders] != 0).any(-1).all()
    assert (of_pixels != 0).float().mean() > 0.9


def test_a_scale_of_the_embeddings_changes_no_relevance() -> None:
    model, inputs = tiny.build("gemma3", torch.float64), tiny.inputs("gemma3")
    with propagate(model) as propagation:
        logit = model(**inputs).logits[0, -1].max()
    table = propagation.embeddings[0][1]
    unscaled = table.detach() * torch.autograd.grad(logit, table)[0]
    scaled = tiny.embedded("gemma3", model)["inputs_embeds"].detach()
    assert_close(scaled, table.detach() * 32**0.5, rtol=1e-2, atol=1e-2)
    scaled.requires_grad_()
    with propagate(model):
        logit = model(inputs_embeds=scaled).logits[0, -1].max()
    assert_close(scaled.detach() * torch.autograd.grad(logit, scaled)[0], unscaled)


def test_tied_embeddings_give_relevance_to_what_is_read_only() -> None:
    tied = tiny.build("llama", torch.float64, tie_word_embeddings=True)
    untied = tiny.build("llama", torch.float64, tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    inputs = tiny.inputs("llama")
    assert torch.equal(by_token(tied, **inputs), by_token(untied, **inputs))


def test_dropout_that_is_active_conserves() -> None:
    torch.manual_seed(0)
    ledger = books(lambda x: F.dropout(x, 0.5, training=True) @ randn(4, 3, seed=1), x=randn(3, 4))
    assert ledger.inputs["x"] == pytest.approx(ledger.target)


def test_a_choice_passes_nothing_on_and_a_straight_through_estimate_absorbs_its_error() -> None:
    x, book = randn(6, 4), randn(8, 4, seed=1)

    def nearest(x: Tensor) -> Tensor:
        return book[torch.cdist(x.detach(), book).argmin(-1)]

    ledger = books(lambda x: 2 * (x + (nearest(x) - x).detach()), x=x)
    assert ledger.inputs["x"] == pytest.approx(float(2 * x.sum()))
    assert ledger.absorbed["constant"] == pytest.approx(float(2 * (nearest(x) - x).sum()))
    with propagate(nn.Identity()):
        chosen = (leaf := x.clone().requires_grad_()).argmax(-1)
        assert not book[chosen].requires_grad
    assert leaf.grad is None


def test_the_branch_that_is_taken_is_explained_and_not_the_condition() -> None:
    def early(x: Tensor) -> Tensor:
        x = 2 * x
        return x if float(x.sum()) > 0 else x.square()

    x = randn(5).abs()
    result = explain(early, x)
    assert_close(result.relevance[0], 2 * x * result.g)

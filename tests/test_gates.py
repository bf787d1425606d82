"""Gates: the stabiliser that is the same in every precision, long texts, and the preset for state spaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import tiny
from attnlrp import ATTNLRP, audit, propagate
from attnlrp.rules import GATE_EPSILON, MAMBA_LRP, PRESETS, Rules, constant, stabilised_identity
from conformance import recipe
from explained import explain

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns of while it builds its own models

GATES = [name for name, rule in ATTNLRP.items() if isinstance(rule, stabilised_identity)]
BY_PRECISION = {**ATTNLRP, **dict.fromkeys(GATES, stabilised_identity(None))}
LONG = 256


def relevance(model: nn.Module, tokens: int, rules: Rules) -> tuple[Tensor, float]:
    """Relevance of each token, and the explained logit."""
    ids = torch.randint(10, 90, (1, tokens), generator=torch.Generator().manual_seed(2))
    with propagate(model, rules) as propagation:
        logit = model(input_ids=ids, use_cache=False).logits[0, -1].max()
    embeddings = propagation.embeddings[0][1]
    (grad,) = torch.autograd.grad(logit, embeddings)
    return (embeddings.detach() * grad).double().sum(-1)[0], logit.item()


def disagreement(model: nn.Module, rules: Rules) -> float:
    """Largest difference between float32 and float64, in parts of the largest relevance."""
    coarse, precise = relevance(model.float(), 16, rules)[0], relevance(model.double(), 16, rules)[0]
    return float((coarse - precise).abs().max() / precise.abs().max())


def test_one_stabiliser_for_every_gate() -> None:
    assert {ATTNLRP[name].value for name in GATES} == {GATE_EPSILON} == {0.01}
    assert {"sigmoid", "softplus", "exp", "logsigmoid", "hardsigmoid"} <= set(GATES)
    assert "sqrt" not in GATES


def test_the_input_of_a_gate_gets_at_most_what_the_stabiliser_lets_through() -> None:
    x = torch.tensor([-3.0, -1e-2, -1e-9, 0.0, 1e-9, 1e-2, 3.0], dtype=torch.float64, requires_grad=True)
    with propagate(nn.Identity()):
        y = torch.sigmoid(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert_close(x * grad / y, x.detach().abs() / (x.detach().abs() + 0.01))
    assert grad.abs().max() <= y.max() / 0.01


@pytest.mark.parametrize("kind", ["rwkv", "jamba", "xlstm"])
def test_relevance_does_not_depend_on_the_precision(kind: str) -> None:
    model = recipe.build("causal-lm", kind)
    assert disagreement(model, ATTNLRP) < 1e-4
    assert disagreement(model, MAMBA_LRP) < 1e-5
    assert disagreement(model, BY_PRECISION) > 1e-2


def test_relevance_stays_in_bounds_in_a_long_text() -> None:
    model = recipe.build("causal-lm", "rwkv").double()
    largest = {}
    for name, rules in {"attnlrp": ATTNLRP, "mamba-lrp": MAMBA_LRP, "by precision": BY_PRECISION}.items():
        found, logit = relevance(model, LONG, rules)
        largest[name] = float(found.abs().max() / abs(logit))
    assert largest["mamba-lrp"] < 1
    assert largest["attnlrp"] < 3
    assert largest["by precision"] > 10


# --- the preset for state spaces ----------------------------------------------------------------------------------


def mixed_by_hand(mixer: Any, x: Tensor) -> Tensor:
    """MambaLRP, written out: gates, and the steps, inputs and outputs of the state space, cut off; halves of the gate."""
    hidden, gate = mixer.in_proj(x).transpose(1, 2).chunk(2, dim=1)
    hidden = mixer.conv1d(hidden)[..., : x.shape[1]]
    hidden = hidden * hidden.sigmoid().detach()
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    step, b, c = mixer.x_proj(hidden.transpose(1, 2)).detach().split(sizes, dim=-1)
    step = F.softplus(mixer.dt_proj(step)).detach()
    decay = torch.exp(-mixer.A_log.exp() * step[..., None]).detach()  # (batch, token, channel, state)
    state, outputs = torch.zeros_like(decay[:, 0]), []
    for t in range(x.shape[1]):
        state = decay[:, t] * state + step[:, t, :, None] * b[:, t, None, :] * hidden[:, :, t, None]
        outputs.append((state * c[:, t, None, :]).sum(-1) + mixer.D * hidden[:, :, t])
    product = torch.stack(outputs, dim=-1) * (gate * gate.sigmoid().detach())
    return mixer.out_proj((product / 2 + product.detach() / 2).transpose(1, 2))  # type: ignore[no-any-return]


def test_mamba_lrp_is_the_rule_of_its_paper_on_a_mixer() -> None:
    model: Any = recipe.build("causal-lm", "mamba").double()
    mixer = model.backbone.layers[0].mixer
    holder = nn.Module()
    holder.mixer = mixer
    x = torch.randn(1, 12, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    g = torch.randn(1, 12, model.config.hidden_size, dtype=torch.float64)
    with propagate(holder, MAMBA_LRP):
        y = mixer(x)
    (found,) = torch.autograd.grad(y, x, g)
    by_hand = mixed_by_hand(mixer, x)
    assert_close(y, by_hand, rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(by_hand, x, g)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)  # the mixer computes its decays in float32
    with propagate(holder, ATTNLRP):
        y = mixer(x)
    assert not torch.allclose(torch.autograd.grad(y, x, g)[0], expected, rtol=1e-2)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "jamba", "zamba", "rwkv", "xlstm"])
def test_the_ledger_of_the_preset_closes_and_no_gate_passes_anything_on(kind: str) -> None:
    model = recipe.build("causal-lm", kind).double()
    arguments = recipe.inputs("causal-lm", kind, model)
    ledger = audit(model, arguments, rules=MAMBA_LRP)
    assert ledger.closes, ledger.leaks()
    assert ledger.absorbed["stabiliser"] == 0
    gates = set(GATES)
    assert not gates & {e.operation for e in ledger.entries if e.passed}
    assert gates & {e.operation for e in audit(model, arguments).entries if e.passed}


def remembered(x: Tensor) -> Tensor:
    """h_t = sigmoid(x_t) h_(t-1) + x_t, the least of all recurrences with a gate."""
    state = torch.zeros((), dtype=x.dtype)
    for item in x:
        state = item.sigmoid() * state + item
    return state


def test_a_decay_takes_half_at_each_step_or_none() -> None:
    x = torch.tensor([4.0, 0.0, 0.0, 0.0], dtype=torch.float64)  # sigmoid(0) = 1/2, and what is 0 gets nothing
    one = torch.tensor(1.0, dtype=torch.float64)
    assert explain(remembered, x, rules=MAMBA_LRP, g=one).relevance[0].tolist() == [4 / 2**3, 0, 0, 0]
    assert explain(remembered, x, g=one).relevance[0].tolist() == [4 / 2**3 / 2**3, 0, 0, 0]


@pytest.mark.parametrize(("kind", "own"), [("mamba", True), ("falcon_mamba", True), ("zamba", True), ("mamba2", False)])
def test_what_a_projection_of_its_own_computes_is_constant(kind: str, own: bool) -> None:
    """Mamba 2 has values, B, C and steps out of one projection: there B and C are factors, and only gates constants."""
    model = recipe.build("causal-lm", kind).double()
    gates_only = {**ATTNLRP, **dict.fromkeys(GATES, constant)}
    found, with_b_and_c = relevance(model, 12, MAMBA_LRP)[0], relevance(model, 12, gates_only)[0]
    assert torch.allclose(found, with_b_and_c, rtol=1e-9, atol=0) is not own


def test_the_preset_changes_nothing_where_there_is_no_gate() -> None:
    assert PRESETS["mamba-lrp"] is MAMBA_LRP
    model, inputs = tiny.build("llama", torch.float64), tiny.inputs("llama")
    plain, preset = audit(model, inputs), audit(model, inputs, rules=MAMBA_LRP)
    assert preset.inputs == plain.inputs

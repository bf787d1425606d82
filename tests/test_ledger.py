"""The ledger: every unit of relevance is accounted for, absorbers are what they should be, and leaks have names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
from attnlrp import ATTNLRP, CP_LRP, GRADIENT, UnknownOperationError, audit, propagate
from attnlrp.errors import InputError
from attnlrp.ledger import ABSORBERS, Entry, Ledger
from attnlrp.rules import Rules, epsilon, gradient, identity
from explained import randn

# what a model has that keeps relevance, besides softmax: parameters added to something that depends on the input
ABSORBING = {"gpt2": {"bias", "constant"}, "phi": {"bias"}, "bert": {"bias", "constant"}, "t5": {"constant"}}


class Body(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.function(**inputs)


def books(function: Callable[..., Tensor], rules: Rules = ATTNLRP, **inputs: Tensor) -> Ledger:
    """The ledger of the sum of a function's output."""
    return audit(Body(function), inputs or {"x": randn(3, 4)}, rules=rules, target=lambda y: y.sum())


def assert_closed(ledger: Ledger, *, tolerance: float = 1e-9) -> None:
    assert ledger.leaks() == []
    assert ledger.closes
    rest = ledger.target - sum(ledger.inputs.values()) - sum(ledger.absorbed.values())
    assert abs(rest) <= tolerance * ledger.scale


# --- whole models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rules", [ATTNLRP, CP_LRP, ATTNLRP | {"linear": epsilon(1e-3)}], ids=["lrp", "cp", "epsilon"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_model_closes(name: str, rules: Rules, attention: str, dtype: torch.dtype) -> None:
    model = tiny.build(name, dtype, attention="eager" if name in tiny.EAGER_ONLY else attention)
    ledger = audit(model, tiny.inputs(name), rules=rules)
    assert ledger.dtype == dtype
    assert ledger.error < (1e-9 if dtype == torch.float64 else 1e-4)
    assert_closed(ledger, tolerance=1e-9 if dtype == torch.float64 else 1e-4)
    expected = ABSORBING.get(name, set()) | ({"softmax"} if rules is not CP_LRP else set())
    expected |= {"stabiliser"} if isinstance(rules["linear"], epsilon) else set()
    if name == "t5" and rules is CP_LRP:
        expected = set()  # its position bias is added to logits, which are constants here
    assert {kind for kind, amount in ledger.absorbed.items() if abs(amount) > 1e-12} == expected


@pytest.mark.parametrize("name", [n for n in tiny.NAMES if n not in ABSORBING])
def test_without_biases_cp_lrp_hands_everything_to_the_inputs(name: str) -> None:
    ledger = audit(tiny.build(name, torch.float64), tiny.inputs(name), rules=CP_LRP)
    assert sum(ledger.inputs.values()) == pytest.approx(ledger.target, rel=1e-9)
    assert all(amount == 0 for amount in ledger.absorbed.values())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert"])
def test_sums_by_operation_and_by_module_are_the_totals(name: str, training: bool) -> None:
    ledger = audit(tiny.build(name, torch.float64).train(training), tiny.inputs(name))
    assert_closed(ledger)
    for grouped in (ledger.by_operation(), ledger.by_module(), ledger.by_module(2)):
        assert len({(e.operation, e.module) for e in grouped}) == len(grouped)
        for field in ("received", "passed"):
            total = sum(getattr(e, field) for e in ledger.entries)
            assert sum(getattr(e, field) for e in grouped) == pytest.approx(total, rel=1e-9)
        for kind in ABSORBERS:
            assert sum(e.absorbed.get(kind, 0.0) for e in grouped) == pytest.approx(ledger.absorbed[kind], abs=1e-12)
    names = {n for n, _ in tiny.build(name).named_modules()} | {"(top)", "(outside"}
    assert {e.module for e in ledger.by_module()} <= names
    assert all(len(e.module.split(".")) <= 2 for e in ledger.by_module(2))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_ledger_has_the_relevance_of_propagate(name: str) -> None:
    model = tiny.build(name)
    with propagate(model) as propagation:
        output = model(**tiny.inputs(name)).logits
        output[0].reshape(-1, output.shape[-1])[-1].max().backward()
    expected = [float((x * x.grad).detach().double().sum()) for _, x in propagation.embeddings]
    ledger = audit(model, tiny.inputs(name))
    assert list(ledger.inputs.values()) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    arguments = tiny.embedded(name, model)
    by_embeddings = audit(model, {k: v.detach() for k, v in arguments.items()})
    if name not in ("gemma2", "gemma3"):  # which scale embeddings inside of the module
        assert by_embeddings.inputs["inputs_embeds"] == pytest.approx(expected[0], rel=1e-4, abs=1e-5)
        assert "attention_mask" not in by_embeddings.inputs


def test_the_audit_leaves_the_model_as_it_was() -> None:
    model = tiny.build("gpt2").train()
    next(model.parameters()).requires_grad_(False)
    model(**tiny.inputs("gpt2")).logits.sum().backward()
    names = dict(model.named_modules())
    before = {
        "values": [p.detach().clone() for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "flags": [(p.requires_grad, p._version, id(p)) for p in model.parameters()],
        "modules": {n: {k: id(v) for k, v in vars(m).items()} for n, m in names.items()},
    }
    audit(model, tiny.inputs("gpt2"))
    assert [(p.requires_grad, p._version, id(p)) for p in model.parameters()] == before["flags"]
    assert all(map(torch.equal, model.parameters(), before["values"]))
    for parameter, expected in zip(model.parameters(), before["gradients"], strict=True):
        assert parameter.grad is expected is None or torch.equal(parameter.grad, expected)
    assert {n: {k: id(v) for k, v in vars(m).items()} for n, m in names.items()} == before["modules"]


def test_running_statistics_are_not_updated_twice() -> None:
    model, once = (nn.BatchNorm1d(4, dtype=torch.float64) for _ in range(2))
    x = randn(3, 4)
    once(x)
    ledger = audit(model, {"input": x}, target=lambda y: (y * randn(3, 4, seed=1)).sum())
    assert torch.equal(model.running_mean, once.running_mean)
    assert_closed(ledger)


# --- absorbers with known answers -------------------------------------------------------------------------------


def test_a_bias_absorbs_its_share() -> None:
    x, w, b, head = randn(3, 4), randn(5, 4, seed=1), randn(5, seed=2), randn(5, seed=3)
    ledger = books(lambda x: F.linear(x, w, b) * head, x=x)
    assert ledger.absorbed["bias"] == pytest.approx(float((b * head).sum() * 3))
    assert ledger.inputs["x"] == pytest.approx(float(((x @ w.T) * head).sum()))
    assert_closed(ledger)
    for layer in (
        lambda x: F.layer_norm(x, (4,), w[0], b[:4]),
        lambda x: F.group_norm(x, 2, w[0], b[:4]),
        lambda x: F.batch_norm(x, None, None, w[0], b[:4], training=True),
        lambda x: F.instance_norm(x[None], weight=w[0][:3], bias=b[:3])[0],
        lambda x: torch.addmm(b[:4], x, w[:4].T),
    ):
        ledger = books(lambda x, f=layer: f(x) * head[:4], x=x)
        share = (
            (b[:3, None] * head[:4]).sum() if "instance" in layer.__code__.co_names[1] else (b[:4] * head[:4]).sum() * 3
        )
        assert ledger.absorbed["bias"] == pytest.approx(float(share))
        assert_closed(ledger)


def test_added_constants_absorb() -> None:
    x, c = randn(3, 4), randn(3, 4, seed=1)
    for function, amount in (
        (lambda x: 2 * (x + c), 2 * c.sum()),
        (lambda x: x * 2 + 1.5, torch.tensor(1.5 * 12)),
        (lambda x: c - x, c.sum()),
        (lambda x: x.masked_fill(c > 0, 3.0), 3.0 * (c > 0).sum()),
        (lambda x: torch.where(c > 0, x, c), c[c <= 0].sum()),
        (lambda x: torch.cat([x, c]), c.sum()),
        (lambda x: F.pad(x, (1, 0), value=2.0), torch.tensor(6.0)),
        (lambda x: x.clamp(min=0.5), 0.5 * (x < 0.5).sum()),
        (lambda x: torch.maximum(x, c), c[c > x].sum()),
    ):
        ledger = books(function, x=x)
        assert ledger.absorbed["constant"] == pytest.approx(float(amount)), amount
        assert ledger.absorbed["bias"] == 0
        assert_closed(ledger)


@pytest.mark.parametrize("dim", [-1, 0])
def test_softmax_absorbs_by_its_formula(dim: int) -> None:
    x, v = randn(3, 4), randn(3, 4, seed=1)
    s = x.softmax(dim)
    r = s * v
    passed = (x * (r - s * r.sum(dim, keepdim=True))).sum()
    for function in (
        lambda x: F.softmax(x, dim=dim) * v,
        lambda x: x.softmax(dim) * v,
        lambda x: torch.softmax(x, dim) * v,
    ):
        ledger = books(function, x=x)
        assert ledger.absorbed["softmax"] == pytest.approx(float(r.sum() - passed))
        assert ledger.inputs["x"] == pytest.approx(float(passed))
        assert_closed(ledger)
    ledger = books(lambda x: x.log_softmax(dim) * v, x=x)
    passed = (x * (v - s * v.sum(dim, keepdim=True))).sum()
    assert ledger.absorbed["softmax"] == pytest.approx(float((x.log_softmax(dim) * v).sum() - passed))
    assert_closed(ledger)
    assert_closed(books(lambda x: x.logsumexp(dim), x=x))
    constant = books(lambda x: x.softmax(dim) * x, CP_LRP, x=x)
    assert constant.absorbed["softmax"] == 0
    assert constant.inputs["x"] == pytest.approx(constant.target)


def test_the_stabiliser_absorbs_by_its_formula() -> None:
    x, w = randn(3, 4), randn(5, 4, seed=1)
    z = x @ w.T
    ledger = books(lambda x: F.linear(x, w), ATTNLRP | {"linear": epsilon(0.2)}, x=x)
    assert ledger.absorbed["stabiliser"] == pytest.approx(float((z - z * z / (z + 0.2 * z.sign())).sum()))
    assert_closed(ledger)
    eps = 0.01
    ledger = books(lambda x: x.sigmoid() * w[:3], x=x)
    gate = x.sigmoid() * w[:3]
    assert ledger.absorbed["stabiliser"] == pytest.approx(
        float((gate * (1 - x / (x + eps * x.sign()))).sum()), rel=1e-5
    )
    assert_closed(ledger)
    assert_closed(books(lambda x: x.abs().pow(0.25) + x.abs().sqrt(), x=x))


# --- leaks are named --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "rule", "module"),
    [
        ("mul", gradient, "mlp"),
        ("matmul", gradient, "self_attn"),
        ("silu", gradient, "mlp"),
        ("rsqrt", gradient, "norm"),
        ("silu", identity(lambda x: 1.1 * torch.sigmoid(x)), "mlp"),
    ],
)
def test_a_wrong_rule_is_named_with_its_operation_and_module(operation: str, rule: Any, module: str) -> None:
    ledger = audit(
        tiny.build("llama", torch.float64, attention="eager"), tiny.inputs("llama"), rules=ATTNLRP | {operation: rule}
    )
    assert not ledger.closes
    assert {e.operation for e in ledger.leaks()} == {operation}
    assert all(module in e.module for e in ledger.leaks())
    assert ledger.leaks() == sorted(ledger.leaks(), key=lambda e: -abs(e.leak))


def test_without_rules_products_create_relevance() -> None:
    ledger = audit(tiny.build("llama", torch.float64), tiny.inputs("llama"), rules=GRADIENT)
    assert not ledger.closes
    assert {"mul", "silu"} <= {e.operation for e in ledger.leaks()}
    created = [e for e in ledger.leaks() if e.operation == "mul"]
    assert any(e.leak < 0 for e in created)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


def test_a_hidden_function_keeps_the_books_from_closing() -> None:
    model = Body(lambda x: (Squared.apply(x * 1.0) * 1.0).sum())
    with pytest.raises(UnknownOperationError, match="Squared"):
        audit(model, {"x": randn(3)}, target=lambda y: y)
    ledger = audit(model, {"x": randn(3)}, target=lambda y: y, on_unknown="gradient")
    assert not ledger.closes
    assert ledger.error == pytest.approx(1.0)  # twice the relevance


def test_an_unknown_operation_is_refused_or_shown_as_a_leak() -> None:
    with pytest.raises(UnknownOperationError, match=r"prod"):
        books(lambda x: x.prod(-1))
    ledger = audit(Body(lambda x: x.prod(-1).sum()), {"x": randn(3, 4)}, target=lambda y: y, on_unknown="gradient")
    assert [(e.operation, e.module) for e in ledger.leaks()] == [("prod", "(top) (Body)")]
    assert ledger.leaks()[0].leak == pytest.approx(-3 * ledger.target)


# --- in-place writes, views, buffers ----------------------------------------------------------------------------


def _buffers(x: Tensor, y: Tensor) -> Tensor:
    buffer = torch.zeros(4, 4, dtype=x.dtype)
    buffer[:3] = x * y
    buffer[1:].mul_(2).add_(1.0)
    buffer.index_add_(0, torch.tensor([0, 3, 3]), y)
    buffer.view(-1)[2:9].sigmoid_()
    return buffer


def _router(x: Tensor, y: Tensor) -> Tensor:
    weights, index = x.softmax(-1).topk(2, -1)
    weights /= weights.sum(-1, keepdim=True)
    return (y.gather(1, index) * weights).sum(-1)


def _normalised(x: Tensor, y: Tensor) -> Tensor:
    scale = x.square().mean(-1, keepdim=True).add_(1e-6).rsqrt_()
    return x.mul(scale).mul_(y)


@pytest.mark.parametrize(
    "function",
    [
        _buffers,
        _router,
        _normalised,
        lambda x, y: (x.T @ y).mT[1:].unbind(0)[0] + torch.stack([*x[0]]).chunk(2)[0].sum(),
        lambda x, y: F.silu(x.clone(), inplace=True) * F.gelu(y) + x.clone().mul_(y).div_(y.detach()),
        lambda x, y: torch.einsum("ij,ij,kj->ik", x, y, x) / y.exp().sum(),
        lambda x, y: F.scaled_dot_product_attention(x[None], y[None], x[None], is_causal=True),
        lambda x, y: F.cosine_similarity(x, y) + torch.lerp(x, y, 0.3).sum() + torch.addcdiv(x, y, y).sum(),
        lambda x, y: torch.fft.rfft(x * y).real + (x * 1j * y).imag.sum(),
        lambda x, y: torch.var_mean(x, -1)[1] * y.max(-1).values + x.sort(-1).values[:, 0],
        lambda x, y: x.to(torch.long).to(x.dtype) + x + x.to(torch.float32).mul(y.float()),
    ],
)
def test_in_place_writes_views_and_composites_are_accounted_for(function: Callable[..., Tensor]) -> None:
    x, y = randn(3, 4), randn(3, 4, seed=1)
    ledger = books(function, x=x, y=y)
    assert ledger.target == pytest.approx(float(function(x.clone(), y.clone()).sum()), rel=1e-6)
    assert_closed(ledger)
    leaves = {"x": x.clone().requires_grad_(), "y": y.clone().requires_grad_()}
    with propagate(nn.Identity()):
        output = function(**leaves).sum()
    grads = torch.autograd.grad(output, list(leaves.values()), allow_unused=True, materialize_grads=True)
    expected = [float((leaf.detach() * grad).sum()) for leaf, grad in zip(leaves.values(), grads, strict=True)]
    assert list(ledger.inputs.values()) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_router_in_float32_of_a_float64_model_stays_in_float64() -> None:
    w = nn.Parameter(randn(2, 4))
    assert_closed(
        books(lambda x: F.linear(x.type(torch.float32), w.type(torch.float32)).softmax(-1, dtype=torch.float32))
    )


# --- what is explained ------------------------------------------------------------------------------------------


def test_a_target_is_a_function_of_the_output() -> None:
    model = tiny.build("llama", torch.float64)
    first = audit(model, tiny.inputs("llama"), target=lambda output: output.logits[0, 2, 5])
    assert first.target == pytest.approx(model(**tiny.inputs("llama")).logits[0, 2, 5].item())
    assert_closed(first)
    largest = audit(model, tiny.inputs("llama", batch=2))
    assert largest.target == pytest.approx(model(**tiny.inputs("llama", batch=2)).logits[0, -1].max().item())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda y: y, r"the target has shape \(3, 4\)"),
        (lambda y: y.detach().sum(), r"does not depend on the inputs"),
        (lambda y: torch.tensor(1.0), r"pass target=function"),
    ],
)
def test_a_target_that_is_not_one_dependent_number_is_refused(target: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        audit(Body(lambda x: x * 2), {"x": randn(3, 4)}, target=target)


def test_masks_and_indices_are_no_explained_inputs() -> None:
    mask = torch.zeros(3, 4, dtype=torch.float64)
    ledger = audit(
        Body(lambda x, attention_mask, index: (x + attention_mask)[index]),
        {"x": randn(3, 4), "attention_mask": mask, "index": torch.tensor([1])},
        target=lambda y: y.sum(),
    )
    assert set(ledger.inputs) == {"x"}
    assert not mask.requires_grad


def test_a_ledger_without_relevance_has_a_finite_error() -> None:
    ledger = Ledger(target=0.0, inputs={"x": 0.0}, entries=(), dtype=torch.float64)
    assert ledger.error == 0
    assert ledger.closes
    leaking = Ledger(
        1.0, {"x": 0.5}, (Entry("mul", "a (A)", 1.0, 0.5), Entry("add", "b (B)", 1.0, 0.25)), torch.float32
    )
    assert [e.operation for e in leaking.leaks()] == ["add", "mul"]
    assert leaking.error == pytest.approx(0.5)
    nan = Ledger(1.0, {"x": 1.0}, (Entry("mul", "a (A)", float("nan"), 0.5),), torch.float32)
    assert not nan.closes


def test_a_ledger_is_plain_data() -> None:
    ledger = books(lambda x: F.linear(x, randn(2, 4), randn(2)) * (x * x)[:, :2])
    data = ledger.to_dict()
    assert set(data) == {"target", "inputs", "absorbed", "error", "closes", "leaks", "entries"}
    assert data["closes"] is True
    assert sum(e["received"] for e in data["entries"]) == pytest.approx(sum(e.received for e in ledger.entries))

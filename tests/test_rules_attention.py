"""Softmax and attention against the paper's formulas, written as sums over queries, keys and dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from attnlrp import ATTNLRP, CP_LRP
from attnlrp.rules import SOFTMAX_DISTRIBUTE, SOFTMAX_IDENTITY, SOFTMAX_OMIT, Rules, gradient, uniform
from explained import explain, randn

seeds = pytest.mark.parametrize("seed", [0, 1, 2])
QUERIES, KEYS, DEPTH = 3, 4, 2


# --- prop. 3.1: softmax -----------------------------------------------------------------------------------------


def taylor(x: Tensor, s: Tensor, relevance: Tensor) -> Tensor:
    """R_i = x_i (R_i - s_i sum_j R_j) for one row; a masked logit counts as 0."""
    total = sum(relevance)
    return torch.stack([x[i] * (relevance[i] - s[i] * total) if x[i] > -math.inf else x[i] * 0 for i in range(len(x))])


def rows(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return torch.stack([function(*row) for row in zip(*tensors, strict=True)])


@seeds
def test_softmax_is_its_taylor_expansion(seed: int) -> None:
    x = randn(3, 5, seed=seed)
    result = explain(lambda x: x.softmax(-1), x)
    assert_close(result.relevance[0], rows(taylor, x, result.y, result.y * result.g))
    first = explain(lambda x: torch.softmax(x, 0), x.T, g=result.g.T)
    assert_close(first.relevance[0].T, result.relevance[0])


def test_a_masked_logit_gets_nothing() -> None:
    x = randn(2, 4)
    mask = torch.tensor([[False, True, False, True], [False, False, False, False]])
    result = explain(lambda x: x.masked_fill(mask, -math.inf).softmax(-1), x)
    expected = rows(taylor, x.masked_fill(mask, -math.inf), result.y, result.y * result.g)
    assert_close(result.relevance[0], expected.nan_to_num())
    assert (result.relevance[0][mask] == 0).all()


@seeds
def test_log_softmax_and_logsumexp_are_their_taylor_expansions(seed: int) -> None:
    x = randn(3, 5, seed=seed)
    s = x.softmax(-1)
    result = explain(lambda x: F.log_softmax(x, dim=-1), x)
    assert_close(result.relevance[0], x * (result.g - s * result.g.sum(-1, keepdim=True)))
    result = explain(lambda x: torch.logsumexp(x, dim=-1), x)
    assert_close(result.relevance[0], x * s * result.g[:, None])


def test_softmin_is_the_softmax_of_the_negative() -> None:
    x = randn(3, 5)
    result = explain(lambda x: F.softmin(x, dim=-1), x)
    assert_close(result.relevance[0], rows(taylor, -x, result.y, result.y * result.g))


# --- attention --------------------------------------------------------------------------------------------------


def attention_relevance(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, g: Tensor, lives: str
) -> dict[str, Tensor]:
    """Matmul, softmax, matmul by the explicit rules, for one head; `lives` names the live operands."""
    z = torch.stack([torch.stack([sum(q[j] * k[i]) for i in range(len(k))]) for j in range(len(q))])
    s = z * scale if mask is None else z * scale + mask
    a = s.softmax(-1)
    output = a @ v
    weights_live = any(name in lives for name in "qkm")
    outer = 2 if weights_live and "v" in lives else 1
    inner = 2 if "q" in lives and "k" in lives else 1
    relevance = output * g  # (query, depth)
    r_a, r_v = torch.zeros_like(a), torch.zeros_like(v)
    for j in range(len(q)):
        for i in range(len(k)):
            for p in range(v.shape[1]):
                share = a[j, i] * v[i, p] * relevance[j, p] / (outer * output[j, p])
                r_a[j, i] += share
                r_v[i, p] += share
    r_s = rows(taylor, s, a, r_a).nan_to_num()
    r_q, r_k = torch.zeros_like(q), torch.zeros_like(k)
    for j in range(len(q)):
        for i in range(len(k)):
            if s[j, i] > -math.inf:
                r_z = z[j, i] * scale / s[j, i] * r_s[j, i]
                r_q[j] += q[j] * k[i] * r_z / (inner * z[j, i])
                r_k[i] += q[j] * k[i] * r_z / (inner * z[j, i])
    r_m = r_s * (mask / s).nan_to_num() if mask is not None else torch.zeros_like(s)
    return {"q": r_q, "k": r_k, "v": r_v, "m": r_m}


def operands(seed: int = 0) -> dict[str, Tensor]:
    shapes = {"q": (QUERIES, DEPTH), "k": (KEYS, DEPTH), "v": (KEYS, DEPTH), "m": (QUERIES, KEYS)}
    return {name: randn(*shape, seed=seed + 10 * n) for n, (name, shape) in enumerate(shapes.items())}


def check(
    function: Callable[..., Tensor], lives: str, mask: Tensor | None, scale: float = DEPTH**-0.5, seed: int = 0
) -> None:
    """Compare fused attention, batch and head dimensions added, with the explicit rules, on every live operand."""
    every = operands(seed)

    def attend(*live: Tensor) -> Tensor:
        tensors = every | dict(zip(lives, live, strict=True))
        return function(*(tensors[name][None, None] for name in "qkvm"))[0, 0]

    result = explain(attend, *(every[name] for name in lives))
    mask = every["m"] if "m" in lives else mask
    expected = attention_relevance(every["q"], every["k"], every["v"], mask, scale, result.g, lives)
    assert_close(result.relevance, [expected[name] for name in lives])


def sdpa(q: Tensor, k: Tensor, v: Tensor, _: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


@seeds
@pytest.mark.parametrize("lives", ["qkv", "qk", "qv", "kv", "q", "k", "v"])
def test_fused_attention_equals_the_explicit_rules(lives: str, seed: int) -> None:
    check(sdpa, lives, None, seed=seed)


@pytest.mark.parametrize("lives", ["qkv", "qk", "v", "q"])
@pytest.mark.parametrize("masking", ["boolean", "float", "positional", "causal", "scale"])
def test_fused_attention_with_masks_and_scale(masking: str, lives: str) -> None:
    allowed = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    added = randn(QUERIES, KEYS, seed=5).masked_fill(~allowed, -math.inf)
    hidden = torch.zeros(QUERIES, KEYS, dtype=torch.float64).masked_fill(~allowed, -math.inf)
    causal = torch.zeros(QUERIES, KEYS, dtype=torch.float64).masked_fill(
        torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1), -math.inf
    )
    options, mask, scale = {
        "boolean": ({"attn_mask": allowed}, hidden, DEPTH**-0.5),
        "float": ({"attn_mask": added}, added, DEPTH**-0.5),
        "positional": ({}, added, DEPTH**-0.5),
        "causal": ({"is_causal": True}, causal, DEPTH**-0.5),
        "scale": ({"scale": 0.3}, None, 0.3),
    }[masking]
    if masking == "positional":
        check(lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, added, 0.0, False), lives, mask, scale)
    else:
        check(lambda q, k, v, m: sdpa(q, k, v, m, **options), lives, mask, scale)


@pytest.mark.parametrize("lives", ["qkvm", "vm", "m", "qm", "qkm", "qvm"])
def test_a_live_mask_is_reached_through_the_softmax(lives: str) -> None:
    check(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), lives, None)
    check(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, 0.0), lives, None)


@pytest.mark.parametrize("rules", [ATTNLRP, CP_LRP, {}, ATTNLRP | {"matmul": gradient}, {"matmul": uniform}])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_queries_equal_attention_written_out(rules: Rules, causal: bool) -> None:
    q, k, v = randn(2, 4, 5, 3), randn(2, 2, 5, 3, seed=1), randn(2, 2, 5, 3, seed=2)

    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = torch.matmul(q, k.transpose(2, 3)) * 3**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
        return torch.softmax(scores, dim=-1) @ v

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=causal)

    assert_close(explain(fused, q, k, v, rules=rules).relevance, explain(written, q, k, v, rules=rules).relevance)


def test_cp_lrp_gives_everything_to_the_values() -> None:
    q, k, v = randn(1, 5, 3), randn(1, 5, 3, seed=1), randn(1, 5, 3, seed=2)
    result = explain(F.scaled_dot_product_attention, q, k, v, rules=CP_LRP)
    assert (result.relevance[0] == 0).all()
    assert (result.relevance[1] == 0).all()
    a = (q @ k.mT * 3**-0.5).softmax(-1)
    expected = torch.einsum("bji,bip,bjp->bip", a, v, result.g)
    assert_close(result.relevance[2], expected)
    assert_close(result.received, result.total)


@pytest.mark.parametrize("rules", [SOFTMAX_IDENTITY, SOFTMAX_DISTRIBUTE, SOFTMAX_OMIT])
@pytest.mark.parametrize("mask", ["none", "boolean", "empty row"])
def test_fused_attention_is_taken_apart_for_other_softmax_rules(rules: Rules, mask: str) -> None:
    q, k, v = randn(2, 4, 3), randn(2, 4, 3, seed=1), randn(2, 4, 3, seed=2)
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    allowed[0] = mask != "empty row"
    options = {} if mask == "none" else {"attn_mask": allowed}

    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * 3**-0.5
        if mask != "none":
            scores = scores.masked_fill(~allowed, -math.inf)
        weights = scores[:, 1:].softmax(-1) if mask == "empty row" else scores.softmax(-1)
        output = weights @ v
        return torch.cat([torch.zeros(2, 1, 3, dtype=q.dtype), output], 1) if mask == "empty row" else output

    fused = explain(lambda *t: F.scaled_dot_product_attention(*t, **options), q, k, v, rules=rules)
    assert_close(fused.y, F.scaled_dot_product_attention(q, k, v, **options))
    assert_close(fused.relevance, explain(written, q, k, v, rules=rules).relevance)


@pytest.mark.parametrize("rules", [ATTNLRP, CP_LRP, {}])
def test_multi_head_attention_module_equals_its_parts(rules: Rules) -> None:
    module = nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)
    nn.init.normal_(module.in_proj_bias)
    x = randn(1, 4, 6)

    def written(x: Tensor) -> Tensor:
        parts = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
        q, k, v = (p.view(1, 4, 2, 3).transpose(1, 2) for p in parts)
        output = (q @ k.mT * 3**-0.5).softmax(-1) @ v
        return F.linear(output.transpose(1, 2).reshape(1, 4, 6), module.out_proj.weight, module.out_proj.bias)

    for need_weights in (True, False):
        result = explain(lambda x, n=need_weights: module(x, x, x, need_weights=n)[0], x, rules=rules, module=module)
        expected = explain(written, x, rules=rules, module=module)
        assert_close(result.relevance, expected.relevance)


# --- appendix A.2.1: the variants that explode ------------------------------------------------------------------


@seeds
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", ["identity", "distribute", "omit"])
def test_softmax_variants_follow_their_formulas(variant: str, masked: bool, seed: int) -> None:
    x = randn(5, seed=seed) + 0.1
    if masked and variant != "identity":
        x[2] = -math.inf
    rules = {"identity": SOFTMAX_IDENTITY, "distribute": SOFTMAX_DISTRIBUTE, "omit": SOFTMAX_OMIT}[variant]
    result = explain(lambda x: x.softmax(-1), x, rules=rules)
    finite = [i for i in range(5) if x[i] > -math.inf]
    s, r = result.y, result.y * result.g
    mean = sum(s[i] * x[i] for i in finite)
    expected = torch.zeros_like(x)
    for i in finite:
        if variant == "identity":
            expected[i] = r[i]
        elif variant == "distribute":
            bias = sum((1 - x[j] + mean) * r[j] for j in finite)
            expected[i] = x[i] * (r[i] - s[i] * sum(r)) + bias / len(finite)
        else:
            expected[i] = x[i] * (r[i] / (x[i] - mean) - s[i] * sum(r[j] / (x[j] - mean) for j in finite))
    assert_close(result.relevance[0].nan_to_num(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("rules", "explodes"),
    [(ATTNLRP, False), (SOFTMAX_IDENTITY, True), (SOFTMAX_DISTRIBUTE, True), (SOFTMAX_OMIT, True)],
)
def test_softmax_variants_explode_with_depth_and_attnlrp_does_not(rules: Rules, explodes: bool) -> None:
    """The failure that the paper documents, kept reproducible: absolute relevance over the target, by depth."""

    def amplification(depth: int, seed: int) -> float:
        def chain(x: Tensor) -> Tensor:
            for layer in range(depth):
                h, w = F.layer_norm(x, (8,)), randn(8, 8, seed=layer) * 8**-0.5
                x = x + (0.3 * (h @ w @ h.mT)).softmax(-1) @ h @ w
            return x

        result = explain(chain, randn(6, 8, seed=seed), rules=rules)
        return float(result.relevance[0].abs().sum() / result.total.abs())

    shallow, deep = (sorted(amplification(depth, seed) for seed in (50, 51, 52))[1] for depth in (6, 24))
    if explodes:
        assert deep > 100
        assert deep > 5 * shallow
    else:
        assert max(shallow, deep) < 5

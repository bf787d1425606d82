"""Models in plain PyTorch: unchanged values, closed books, and the relevance of their written-out form."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import wrap_torch_function

from attnlrp import ATTNLRP, UnknownOperationError, audit, propagate
from attnlrp.rules import Rules, identity, stabilised_identity
from explained import randn

PAGE = Path(__file__).parents[1] / "docs" / "custom-models.md"
QUERY, MEMORY = randn(2, 3, 8), randn(2, 4, 8, seed=1)
PADDED = torch.tensor([[False, False, False, True], [False] * 4])
UNSEEN = torch.tensor([[False, False, False, True], [False] * 4, [True, False, False, False]])
FLOATS = randn(3, 4, seed=5)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def weigh(output: Any) -> Tensor:
    y = first(output)
    return (y * randn(*y.shape, seed=9)).sum()


def relevance(model: nn.Module, inputs: dict[str, Tensor], rules: Rules = ATTNLRP) -> dict[str, Tensor]:
    """Relevance of each input, after the books closed and the values were found unchanged."""
    model = model.double().eval()
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    expected = first(model(**leaves)).detach()
    with propagate(model, rules):
        output = model(**leaves)
    torch.testing.assert_close(first(output).detach(), expected, rtol=1e-13, atol=1e-13)
    grads = torch.autograd.grad(weigh(output), list(leaves.values()))
    found = {name: (x * g).detach() for (name, x), g in zip(leaves.items(), grads, strict=True)}
    ledger = audit(model, inputs, target=weigh, rules=rules)
    assert ledger.closes, ledger.leaks()
    assert {n: r.sum().item() for n, r in found.items()} == pytest.approx(ledger.inputs, rel=1e-9, abs=1e-11)
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-11)


# --- the layers of torch ----------------------------------------------------------------------------------------


class Attention(nn.Module):
    """nn.MultiheadAttention, or the same written out."""

    def __init__(self, masks: dict[str, Tensor], *, weights: bool, written_out: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core = nn.MultiheadAttention(8, 2, **options)
        nn.init.normal_(self.core.in_proj_bias)
        self.masks, self.weights, self.written_out = masks, weights, written_out

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not self.written_out:
            return self.core(query, key, value, need_weights=self.weights, **self.masks)[0]  # type: ignore[no-any-return]
        core = self.core
        if not core.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        weights = [core.q_proj_weight, core.k_proj_weight, core.v_proj_weight]
        if core.in_proj_weight is not None:
            weights = list(core.in_proj_weight.chunk(3))
        projected = zip((query, key, value), weights, core.in_proj_bias.chunk(3), strict=True)
        q, k, v = (F.linear(t, w, b) for t, w, b in projected)
        for added in ((core.bias_k, core.bias_v), (torch.zeros(1, 1, 8),) * 2 if core.add_zero_attn else (None, None)):
            if added[0] is not None:
                k, v = (torch.cat([t, a.to(t).expand(len(t), 1, 8)], 1) for t, a in zip((k, v), added, strict=True))
        scores = split(q) @ split(k).mT / 2 + self.mask(k.shape[1])
        result = core.out_proj(merge(F.softmax(scores, -1) @ split(v)))
        return result if core.batch_first else result.transpose(0, 1)  # type: ignore[no-any-return]

    def mask(self, keys: int) -> Tensor:
        total = torch.zeros(2, 1, 3, keys, dtype=torch.float64)
        for name, mask in self.masks.items():
            mask = mask if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(mask, -math.inf)
            total[..., : mask.shape[-1]] += mask[:, None, None] if name == "key_padding_mask" else mask
        return total


def split(t: Tensor) -> Tensor:
    return t.unflatten(-1, (2, -1)).transpose(1, 2)


def merge(t: Tensor) -> Tensor:
    return t.transpose(1, 2).flatten(2)


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "padding": {"key_padding_mask": PADDED},
    "boolean": {"attn_mask": UNSEEN},
    "float": {"attn_mask": FLOATS},
    "both": {"key_padding_mask": PADDED, "attn_mask": UNSEEN},
}


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_multi_head_attention(mask: str, batch_first: bool, weights: bool) -> None:
    order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    inputs = {"query": order(QUERY), "key": order(MEMORY), "value": order(MEMORY.flip(2))}
    fused, opened = (
        relevance(Attention(MASKS[mask], weights=weights, written_out=out, batch_first=batch_first), inputs)
        for out in (False, True)
    )
    assert_same(fused, opened)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 5, "vdim": 6}], ids=str)
def test_multi_head_attention_with_options(options: dict[str, Any], weights: bool) -> None:
    key, value = randn(2, 4, options.get("kdim", 8), seed=3), randn(2, 4, options.get("vdim", 8), seed=4)
    inputs = {"query": QUERY, "key": key, "value": value}
    fused, opened = (
        relevance(Attention({}, weights=weights, written_out=out, batch_first=True, **options), inputs)
        for out in (False, True)
    )
    assert_same(fused, opened)


class EncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer written out, with the weights of one."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def attend(self, x: Tensor) -> Tensor:
        core = self.layer.self_attn
        q, k, v = map(split, F.linear(x, core.in_proj_weight, core.in_proj_bias).chunk(3, -1))
        return core.out_proj(merge(F.softmax(q @ k.mT / 2, -1) @ v))  # type: ignore[no-any-return]

    def forward(self, src: Tensor) -> Tensor:
        layer, x = self.layer, src
        feed: Callable[[Tensor], Tensor] = lambda x: layer.linear2(F.gelu(layer.linear1(x)))  # noqa: E731
        if layer.norm_first:
            x = x + self.attend(layer.norm1(x))
            return x + feed(layer.norm2(x))
        x = layer.norm1(x + self.attend(x))
        return layer.norm2(x + feed(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_encoder_layer_of_torch_does_not_run_its_fused_kernel(norm_first: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first, activation="gelu")
    layer.requires_grad_(not frozen)
    assert_same(relevance(layer, {"src": QUERY}), relevance(EncoderLayer(layer), {"src": QUERY}))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_nested_tensors_of_the_encoder_stay_off_and_real_tokens_keep_their_values() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).double().eval()
    with torch.no_grad():
        nested = encoder(MEMORY, src_key_padding_mask=PADDED)
    assert (nested[0, 3] == 0).all()  # which is how it is seen that the fused kernel ran
    x = MEMORY.clone().requires_grad_()
    with propagate(encoder):
        y = encoder(x, src_key_padding_mask=PADDED)
    torch.testing.assert_close(y[~PADDED].detach(), nested[~PADDED])
    (grad,) = torch.autograd.grad((y * randn(*y.shape))[~PADDED].sum(), x)
    assert (grad[PADDED] == 0).all()
    target: Callable[[Tensor], Tensor] = lambda y: (y * randn(*y.shape))[~PADDED].sum()  # noqa: E731
    ledger = audit(encoder, {"src": MEMORY, "src_key_padding_mask": PADDED}, target=target)
    assert ledger.closes
    assert (x * grad).sum().item() == pytest.approx(ledger.inputs["src"], rel=1e-9)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_and_decoder_of_torch(norm_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True, norm_first=norm_first, activation=F.gelu)
    model.encoder.enable_nested_tensor = False
    relevance(model, {"src": MEMORY, "tgt": QUERY})


# --- attention and normalisation by hand ------------------------------------------------------------------------


class Patches(nn.Module):
    """A small vision transformer: patches, a class token, positions, one block with fused or separate projections."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.norm, self.last = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp, self.head = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Linear(8, 3)
        self.fused = fused

    def attend(self, x: Tensor) -> Tensor:
        core = self.attention
        if not self.fused:
            return core(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]
        packed = F.linear(x, core.in_proj_weight, core.in_proj_bias)
        q, k, v = packed.reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return core.out_proj(merge(F.scaled_dot_product_attention(q, k, v)))  # type: ignore[no-any-return]

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        x = x + self.attend(self.norm(x))
        return self.head(self.last(x + self.mlp(x))[:, 0])  # type: ignore[no-any-return]


def test_a_vision_transformer_with_either_attention() -> None:
    inputs = {"pixels": randn(2, 3, 8, 8)}
    assert_same(*(relevance(Patches(fused=fused), inputs) for fused in (True, False)))


class Layer(nn.Module):
    """A function of three projections of x."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.into, self.out = function, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(*self.into(x).chunk(3, -1)))  # type: ignore[no-any-return]


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merge(F.softmax(split(q) @ split(k).transpose(-2, -1) / math.sqrt(4), dim=-1) @ split(v))


def with_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", split(q), split(k)).mul(0.5)
    return merge(torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), split(v)))


def with_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (split(t).flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(torch.zeros(4, 3, 3, dtype=q.dtype), q, k.transpose(1, 2), beta=0, alpha=0.5)
    return merge(torch.bmm(scores.softmax(-1), v).unflatten(0, (2, 2)))


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merge(F.scaled_dot_product_attention(split(q), split(k), split(v)))


@pytest.mark.parametrize("form", [with_einsum, with_baddbmm, fused])
def test_attention_by_hand(form: Callable[..., Tensor]) -> None:
    assert_same(relevance(Layer(form), {"x": QUERY}), relevance(Layer(by_hand), {"x": QUERY}))


def test_grouped_queries() -> None:
    def shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return merge(F.scaled_dot_product_attention(split(q), split(k)[:, :1], split(v)[:, :1], enable_gqa=True))

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (split(t)[:, :1].expand(-1, 2, -1, -1) for t in (k, v))
        return merge(F.softmax(split(q) @ k.mT / 2, -1) @ v)

    assert_same(relevance(Layer(shared), {"x": QUERY}), relevance(Layer(repeated), {"x": QUERY}))


def test_softmax_as_exp_and_a_sum_closes_but_depends_on_the_shift() -> None:
    """Why the page says to write F.softmax."""

    def exponential(shift: float) -> Callable[..., Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = (split(q) @ split(k).mT / 2 - shift).exp()
            return merge(weights / weights.sum(-1, keepdim=True) @ split(v))

        return attention

    plain, zero, shifted = (relevance(Layer(f), {"x": QUERY})["x"] for f in (by_hand, exponential(0), exponential(3)))
    assert (plain - zero).abs().max() > 0.01
    assert (zero - shifted).abs().max() > 0.01


ROOT_MEAN_SQUARE: dict[str, Callable[..., Tensor]] = {
    "rsqrt": lambda x, *_: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "sqrt": lambda x, *_: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6),
    "power": lambda x, *_: x * ((x * x).mean(-1, keepdim=True) + 1e-6) ** -0.5,
    "inverse": lambda x, *_: x * (1 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
}
LAYER_NORM: dict[str, Callable[..., Tensor]] = {
    "var": lambda x, *_: (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt(),
    "mean": lambda x, *_: centred(x) / (centred(x).pow(2).mean(-1, keepdim=True) + 1e-5).sqrt(),
    "var_mean": lambda x, *_: with_var_mean(x),
}


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def with_var_mean(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5)


@pytest.mark.parametrize("form", ROOT_MEAN_SQUARE)
def test_rms_norm_by_hand(form: str) -> None:
    ready = Layer(lambda x, *_: F.rms_norm(x, (8,), eps=1e-6))
    assert_same(relevance(Layer(ROOT_MEAN_SQUARE[form]), {"x": QUERY}), relevance(ready, {"x": QUERY}))


@pytest.mark.parametrize("form", LAYER_NORM)
def test_layer_norm_by_hand(form: str) -> None:
    ready = Layer(lambda x, *_: F.layer_norm(x, (8,)))
    assert_same(relevance(Layer(LAYER_NORM[form]), {"x": QUERY}), relevance(ready, {"x": QUERY}))


def test_normalised_vectors() -> None:
    hand = Layer(lambda x, *_: x / x.norm(dim=-1, keepdim=True))
    assert_same(relevance(Layer(lambda x, *_: F.normalize(x, dim=-1)), {"x": QUERY}), relevance(hand, {"x": QUERY}))


# --- activations by hand ----------------------------------------------------------------------------------------


@wrap_torch_function(lambda x: (x,))
def shown_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def test_a_gelu_by_hand_loses_relevance_to_its_constant_unless_it_is_shown_as_one_operation() -> None:
    ready = relevance(Layer(lambda x, *_: F.gelu(x)), {"x": QUERY})
    shown = relevance(Layer(lambda x, *_: shown_gelu(x)), {"x": QUERY}, ATTNLRP | {shown_gelu: identity()})
    assert_same(shown, ready)
    hand = relevance(Layer(lambda x, *_: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))), {"x": QUERY})
    assert (hand["x"] - ready["x"]).abs().max() > 0.01
    with pytest.raises(UnknownOperationError, match="shown_gelu"), propagate(nn.Identity()):
        shown_gelu(QUERY.clone().requires_grad_())
    assert torch.equal(shown_gelu(QUERY), 0.5 * QUERY * (1 + torch.erf(QUERY / math.sqrt(2))))


def test_a_sigmoid_gate_by_hand_is_a_silu_up_to_its_product() -> None:
    """Half of the relevance goes through each factor; both end in x, but for the stabiliser at 0."""
    small = ATTNLRP | {"sigmoid": stabilised_identity(1e-8)}
    hand = relevance(Layer(lambda x, *_: x * torch.sigmoid(x)), {"x": QUERY}, small)
    ready = relevance(Layer(lambda x, *_: F.silu(x)), {"x": QUERY})
    torch.testing.assert_close(hand["x"], ready["x"], rtol=1e-5, atol=1e-5)


# --- the page ---------------------------------------------------------------------------------------------------


def blocks() -> list[tuple[int, str]]:
    text = PAGE.read_text(encoding="utf-8")
    return [(text[: m.start(1)].count("\n"), m[1]) for m in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)]


def test_the_page_runs_from_top_to_bottom() -> None:
    names: dict[str, Any] = {"__name__": "page"}
    found = blocks()
    assert len(found) >= 7
    for line, code in found:
        exec(compile("\n" * line + code, PAGE.name, "exec"), names)
    with propagate(nn.Identity(), names["with_silu"]):
        x = QUERY.clone().requires_grad_()
        y = names["fused_silu"](x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.sigmoid(QUERY))

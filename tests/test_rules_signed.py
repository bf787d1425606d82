"""gamma, z+ and alpha-beta against loops over single contributions, in float64; softmax's z+; the vision composites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from attnlrp import ATTNLRP, CP_LRP, audit, propagate
from attnlrp.layers import LayerRules
from attnlrp.rules import ROLES, VIT, VIT_CP, Layer, Rule, composite, gradient
from attnlrp.signed import alpha_beta, gamma, zplus

Share = Callable[[Tensor, Tensor], Tensor]
F64 = torch.float64


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gamma_share(value: float) -> Share:
    """Shares of the contributions of one output; the last is the bias."""

    def share(parts: Tensor, z: Tensor) -> Tensor:
        agreeing = parts.clamp(min=0) if z > 0 else parts.clamp(max=0)
        return (parts + value * agreeing) / (parts + value * agreeing).sum()

    return share


def alpha_beta_share(alpha: float, beta: float) -> Share:
    def share(parts: Tensor, z: Tensor) -> Tensor:
        up, down = parts.clamp(min=0), parts.clamp(max=0)
        return alpha * up / (up.sum() or 1) - beta * down / (down.sum() or 1)

    return share


RULES: dict[str, tuple[Rule, Share]] = {
    "gamma 0.25": (gamma(0.25), gamma_share(0.25)),
    "gamma 100": (gamma(100.0), gamma_share(100.0)),
    "z+": (zplus, alpha_beta_share(1, 0)),
    "alpha 2 beta 1": (alpha_beta(2.0, 1.0), alpha_beta_share(2, 1)),
}


def found(layer: Callable[[Tensor], Tensor], x: Tensor, relevance: Tensor, rule: Rule, operation: str) -> Tensor:
    leaf = x.clone().requires_grad_()
    with propagate(nn.Identity(), {operation: rule}):
        y = layer(leaf)
    assert_close(y, layer(x), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(y, leaf, relevance / y.detach())
    return x * grad


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("sign", ["both", "negative"])
def test_linear(name: str, biased: bool, sign: str) -> None:
    rule, share = RULES[name]
    x, w, b, r = numbers(3, 5), numbers(4, 5, seed=1), numbers(4, seed=2), numbers(3, 4, seed=3)
    x = -x.abs() if sign == "negative" else x
    expected = torch.zeros_like(x)
    for n in range(3):
        for j in range(4):
            parts = torch.cat([w[j] * x[n], b[j : j + 1] if biased else torch.zeros(1, dtype=F64)])
            expected[n] += share(parts, parts.sum())[:-1] * r[n, j]
    assert_close(found(lambda t: F.linear(t, w, b if biased else None), x, r, rule, "linear"), expected)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2, "padding": 2}])
def test_conv(name: str, options: dict[str, int]) -> None:
    rule, share = RULES[name]
    x, w, b = numbers(1, 4, 5, 5), numbers(6, 4 // options.get("groups", 1), 3, 3, seed=1), numbers(6, seed=2)

    def layer(t: Tensor) -> Tensor:
        return F.conv2d(t, w, b, **options)

    y = layer(x)
    r = numbers(*y.shape, seed=3)
    jacobian = torch.autograd.functional.jacobian(layer, x).reshape(y.numel(), x.numel())  # dz_j / dx_i = w_ji
    expected = torch.zeros(x.numel(), dtype=F64)
    biases = b[None, :, None, None].expand_as(y).flatten()
    for row, bias, relevance in zip(jacobian, biases, r.flatten(), strict=True):
        parts = torch.cat([row * x.flatten(), bias[None]])
        expected += share(parts, parts.sum())[:-1] * relevance
    assert_close(found(layer, x, r, rule, "conv"), expected.reshape(x.shape))


@pytest.mark.parametrize("name", RULES)
def test_addmm_and_matmul_are_linear_layers(name: str) -> None:
    rule, _ = RULES[name]
    x, w, b, r = numbers(3, 5), numbers(4, 5, seed=1), numbers(4, seed=2), numbers(3, 4, seed=3)
    linear = found(lambda t: F.linear(t, w, b), x, r, rule, "linear")
    assert_close(found(lambda t: torch.addmm(b, t, w.T), x, r, rule, "addmm"), linear)
    assert_close(found(lambda t: t @ w.T, x, r, rule, "matmul"), found(lambda t: F.linear(t, w), x, r, rule, "linear"))


def test_gamma_goes_to_the_gradient_and_to_one_sign() -> None:
    x, w, b, r = numbers(3, 5), numbers(4, 5, seed=1), numbers(4, seed=2), numbers(3, 4, seed=3)

    def under(rule: Rule) -> Tensor:
        return found(lambda t: F.linear(t, w, b), x, r, rule, "linear")

    assert_close(under(gamma(0.0)), under(gradient))
    assert_close(under(gamma(1e-9)), under(gradient), rtol=1e-6, atol=1e-6)
    positive = torch.where(F.linear(x, w, b) > 0, r, 0)  # z+ and large gamma agree on positive outputs
    r = positive
    assert_close(under(gamma(1e9)), under(zplus), rtol=1e-6, atol=1e-6)


def test_an_output_of_zero_passes_nothing_on() -> None:
    x = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=F64, requires_grad=True)
    w = torch.tensor([[1.0, -1.0]], dtype=F64)
    for rule in (gamma(0.5), zplus, alpha_beta(2.0, 1.0)):
        with propagate(nn.Identity(), {"linear": rule}):
            y = F.linear(x, w)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.isfinite(grad).all()
        assert_close((x * grad).sum(), torch.zeros((), dtype=F64))


def test_two_live_operands_are_refused() -> None:
    x, w = numbers(3, 5).requires_grad_(), numbers(4, 5).requires_grad_()
    with pytest.raises(ValueError, match="one live input, got 2"):
        gamma(0.1)(F.linear, x, w)


@pytest.mark.parametrize("wrong", [-0.1, float("nan")])
def test_wrong_parameters(wrong: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        gamma(wrong)
    with pytest.raises(ValueError, match="alpha - beta = 1"):
        alpha_beta(1.0, wrong)


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_positive(masked: bool) -> None:
    x, r = 2 * numbers(2, 6), numbers(2, 6, seed=1)
    counted = 4 if masked else 6
    expected = torch.zeros_like(x)
    for n in range(2):
        s = x[n, :counted].softmax(-1)
        for j in range(counted):
            parts = s[j] * (torch.eye(counted, dtype=F64)[j] - s) * x[n, :counted]
            parts = parts.clamp(min=0)
            expected[n, :counted] += parts / parts.sum() * r[n, j]
    x[:, counted:] = -torch.inf
    leaf = x.clone().requires_grad_()
    with propagate(nn.Identity(), composite(attention="z+")):
        s = leaf.softmax(-1)
    (grad,) = torch.autograd.grad(s, leaf, torch.where(s > 0, r / s.detach(), 0))
    result = torch.where(x.isneginf(), 0, x) * grad
    assert_close(result, expected)
    assert_close(result.sum(-1), r[:, :counted].sum(-1))


def vit(name: str = "ViT", **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = getattr(transformers, f"{name}Config")(**sizes, image_size=16, patch_size=8, num_labels=3, **more)
    return getattr(transformers, f"{name}ForImageClassification")(config).double().eval()


@pytest.mark.parametrize(
    "rules", [VIT, VIT_CP, composite(conv=1.0, mlp=1.0, qkv=1.0, out=1.0, head=1.0, attention="z+")]
)
def test_the_ledger_closes(rules: Any) -> None:
    ledger = audit(vit(), {"pixel_values": numbers(1, 3, 16, 16).requires_grad_()}, rules=rules)
    assert ledger.closes, ledger.leaks()
    assert ledger.error < 1e-9


def test_gammas_of_0_are_attnlrp() -> None:
    model, pixels = vit(), numbers(1, 3, 16, 16)

    def relevance(rules: Any) -> Tensor:
        leaf = pixels.clone().requires_grad_()
        with propagate(model, rules):
            logit = model(leaf).logits[0].max()
        return pixels * torch.autograd.grad(logit, leaf)[0]

    assert_close(relevance(composite()), relevance(ATTNLRP))
    assert_close(relevance(composite(attention="cp")), relevance(CP_LRP))
    assert not torch.allclose(relevance(VIT), relevance(ATTNLRP))


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Beit", "Dinov2", "Dinov2WithRegisters"])
def test_every_linear_layer_of_a_vision_transformer_has_a_role(name: str) -> None:
    assert_roles(vit(name))


def test_roles_of_other_models() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4}
    assert_roles(transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**swin)), but=("position_bias",))
    both = {"text_config": {**sizes, "vocab_size": 9}, "vision_config": {**sizes, "image_size": 16, "patch_size": 8}}
    text = {"bos_token_id": 0, "eos_token_id": 1}
    both["text_config"] |= text
    assert_roles(transformers.CLIPModel(transformers.CLIPConfig(**both)))


def assert_roles(model: nn.Module, but: tuple[str, ...] = ()) -> None:
    """Every linear layer finds a row, and that of its own role."""
    parts = {"mlp": "mlp intermediate fc1 fc2", "qkv": "query key value q_proj k_proj v_proj"}
    marks = {role: LayerRules(model, {Layer(p, optional=True): gamma(1.0) for p in ROLES[role]}) for role in ROLES}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not any(b in path for b in but):
            call = (torch.zeros(1), module.weight.detach())
            roles = [role for role, rules in marks.items() if rules.find("linear", call, {}) is not None]
            assert roles, f"{path} has no role"
            last = path.split(".")[-1]
            for role, names in parts.items():
                if last in names.split():
                    assert roles[-1] == role, (path, roles)


def test_gamma_keeps_no_second_copy_of_the_weights() -> None:
    layer = nn.Linear(64, 256).requires_grad_(False)
    x = torch.randn(2, 3, 64, requires_grad=True)
    kept: set[int] = set()

    def keep(saved: Tensor) -> Tensor:
        kept.update([saved.data_ptr()] if saved.numel() == layer.weight.numel() else [])
        return saved

    with (
        propagate(layer, {**ATTNLRP, "linear": gamma(0.25)}),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved),
    ):
        y = layer(x)
    assert kept == {layer.weight.data_ptr()}
    (found,) = torch.autograd.grad(y.sum(), x)
    with torch.no_grad():
        a, b = gamma(0.25)._factors(layer(x), F.linear(x.abs(), layer.weight.abs(), layer.bias.abs()))
    assert_close(found, a @ layer.weight + x.sign() * (b @ layer.weight.abs()))

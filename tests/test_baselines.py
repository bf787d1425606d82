"""Baselines on models whose answer is known in closed form: bags of embeddings."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import factorial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny
from attnlrp.baselines import (
    BASELINES,
    Gradient,
    GradientXInput,
    IntegratedGradients,
    KernelShap,
    LeaveOneOut,
    Lime,
    Random,
    SmoothGrad,
)
from bag import bag, first_class


def last_token(output: Any) -> Tensor:
    logits: Tensor = output.logits[:, -1, 5]
    return logits


EXACT = {
    "gradient-x-input": GradientXInput(),
    "integrated-gradients": IntegratedGradients(steps=3),
    "smoothgrad": SmoothGrad(samples=5),
    "kernel-shap": KernelShap(samples=60),
    "lime": Lime(samples=200, ridge=1e-6),
    "feature-ablation": LeaveOneOut(),
    "delete": LeaveOneOut(replacement="delete"),
}


@pytest.mark.parametrize("name", EXACT)
def test_of_a_linear_model_every_signed_method_finds_the_contributions(name: str) -> None:
    model, inputs, contribution = bag()
    relevance = EXACT[name](model, inputs, first_class)
    assert relevance.shape == (5,)
    assert relevance.dtype == torch.float32
    torch.testing.assert_close(relevance, contribution, atol=2e-4, rtol=2e-4)


def test_the_gradient_is_its_norm() -> None:
    model, inputs, _ = bag()
    torch.testing.assert_close(Gradient()(model, inputs, first_class), model.head.weight[0].detach().norm().expand(5))
    smooth = SmoothGrad(samples=4, reduce="norm")(model, inputs, first_class)
    torch.testing.assert_close(smooth, model.head.weight[0].detach().norm().expand(5))


def test_of_a_square_the_methods_differ_as_their_formulas_do() -> None:
    """f = s^2 with s the sum of contributions c_t: each formula worked out by hand."""
    model, inputs, c = bag(power=2)
    s = c.sum()
    expected = {
        GradientXInput(): 2 * s * c,
        IntegratedGradients(steps=4): s * c,
        KernelShap(samples=4000): s * c,
        LeaveOneOut(): s**2 - (s - c) ** 2,
        LeaveOneOut(replacement="delete"): s**2 - (s - c) ** 2,
    }
    for method, value in expected.items():
        tolerance = 0.05 * float(value.abs().max()) if isinstance(method, KernelShap) else 1e-5
        torch.testing.assert_close(method(model, inputs, first_class), value, atol=tolerance, rtol=1e-4)


def test_smoothgrad_averages_gradients_under_noise_of_the_stated_size() -> None:
    model, inputs, c = bag(power=2)
    method = SmoothGrad(noise=0.2, samples=300, batch_size=64)
    relevance = method(model, inputs, first_class)
    noisy = torch.cat(model.seen)
    spread = (noisy - model.table(inputs["input_ids"]).detach()).std()
    embeddings = model.table.weight.detach()[inputs["input_ids"]]
    torch.testing.assert_close(spread, 0.2 * (embeddings.max() - embeddings.min()), rtol=0.05, atol=0.0)
    mean = (noisy.sum(dim=1) @ model.head.weight[0].detach()).mean()
    torch.testing.assert_close(relevance, 2 * mean * c, rtol=1e-4, atol=1e-5)


def test_lime_is_a_weighted_ridge_regression() -> None:
    model, inputs, _ = bag(power=2)
    method = Lime(samples=150, width=0.4, ridge=0.7)
    relevance = method(model, inputs, first_class)
    seen = torch.cat(model.seen)
    kept = (seen != 0).any(dim=-1).double()
    assert kept[0].all(), "the first sample is the whole text"
    assert set(kept.sum(dim=1).tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}
    scores = (seen.sum(dim=1) @ model.head.weight[0].detach()).double() ** 2
    weight = torch.exp(-((1 - (kept.sum(dim=1) / 5).sqrt()) ** 2) / (2 * 0.4**2))
    centre = (weight[:, None] * kept).sum(dim=0) / weight.sum()
    x, y = kept - centre, scores - (weight * scores).sum() / weight.sum()
    solution = torch.linalg.solve(x.T @ (weight[:, None] * x) + 0.7 * torch.eye(5), x.T @ (weight * y))
    torch.testing.assert_close(relevance, solution.float(), rtol=1e-3, atol=1e-4)


def test_kernel_shap_approaches_the_shapley_values_of_a_transformer() -> None:
    model, inputs = tiny.build("bert"), tiny.inputs("bert", tokens=4)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    values = {}
    for size in range(5):
        for kept in combinations(range(4), size):
            mask = torch.tensor([float(k in kept) for k in range(4)])[None, :, None]
            output = model(inputs_embeds=embeddings * mask, attention_mask=inputs["attention_mask"])
            values[kept] = first_class(output).item()
    exact = [
        sum(
            factorial(len(kept)) * factorial(3 - len(kept)) / 24 * (values[tuple(sorted((*kept, t)))] - values[kept])
            for kept in values
            if t not in kept
        )
        for t in range(4)
    ]
    relevance = KernelShap(samples=2000, batch_size=200)(model, inputs, first_class)
    torch.testing.assert_close(relevance, torch.tensor(exact), atol=0.03 * max(map(abs, exact)), rtol=0.0)
    assert relevance.sum().item() == pytest.approx(values[0, 1, 2, 3] - values[()], abs=1e-3)


def test_one_token_has_what_the_whole_has() -> None:
    model, inputs, contribution = bag()
    single = {"input_ids": inputs["input_ids"][:, :1]}
    torch.testing.assert_close(KernelShap()(model, single, first_class), contribution[:1])
    torch.testing.assert_close(LeaveOneOut()(model, single, first_class), contribution[:1])


def test_integrated_gradients_sum_to_the_difference() -> None:
    model, inputs = tiny.build("gpt2"), tiny.inputs("gpt2")
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    ends = [
        last_token(model(inputs_embeds=e, attention_mask=inputs["attention_mask"]))
        for e in (embeddings, 0 * embeddings)
    ]
    relevance = IntegratedGradients(steps=200, batch_size=50)(model, inputs, last_token)
    assert relevance.sum().item() == pytest.approx((ends[0] - ends[1]).item(), rel=0.02)


@pytest.mark.parametrize("replacement", ["zero", "unk", "delete"])
def test_leave_one_out_against_one_forward_pass_each(replacement: str) -> None:
    model, inputs = tiny.build("llama"), tiny.inputs("llama")
    ids = inputs["input_ids"]
    expected = []
    for t in range(ids.shape[1]):
        changed: dict[str, Tensor] = {}
        if replacement == "zero":
            embeddings = model.get_input_embeddings()(ids).detach()
            embeddings[:, t] = 0
            changed = {"inputs_embeds": embeddings}
        elif replacement == "unk":
            changed = {"input_ids": torch.cat([ids[:, :t], torch.tensor([[9]]), ids[:, t + 1 :]], dim=1)}
        else:
            changed = {"input_ids": torch.cat([ids[:, :t], ids[:, t + 1 :]], dim=1)}
        expected.append((last_token(model(input_ids=ids)) - last_token(model(**changed))).item())
    method = LeaveOneOut(replacement=replacement, token=9, batch_size=3)
    torch.testing.assert_close(method(model, inputs, last_token), torch.tensor(expected), atol=1e-5, rtol=1e-4)


# --- images -------------------------------------------------------------------------------------------------------


class Picture(nn.Module):
    """Logits that are linear in the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 10 * 12, 2)

    def forward(self, pixel_values: Tensor) -> Any:
        return transformers.modeling_outputs.ImageClassifierOutput(logits=self.head(pixel_values.flatten(1)))


def patches_summed(image: Tensor, edge: int) -> Tensor:
    """Each pixel gets its share of its square, naively (height, width)."""
    result = torch.empty_like(image)
    for top in range(0, image.shape[0], edge):
        for left in range(0, image.shape[1], edge):
            square = image[top : top + edge, left : left + edge]
            result[top : top + edge, left : left + edge] = square.sum() / square.numel()
    return result


def test_of_linear_pixels_every_method_finds_the_contributions() -> None:
    torch.manual_seed(0)
    model, pixels = Picture().eval(), torch.randn(1, 3, 10, 12)
    contribution = (model.head.weight[0].reshape(3, 10, 12) * pixels[0]).sum(dim=0).detach()
    for method in (GradientXInput(), IntegratedGradients(steps=3), SmoothGrad(samples=4)):
        torch.testing.assert_close(
            method(model, {"pixel_values": pixels}, first_class), contribution, atol=1e-5, rtol=1e-4
        )
    squares = patches_summed(contribution, 4)  # 3 x 3 squares, the last row of which is cut off
    for method in (LeaveOneOut(patch=4), KernelShap(patch=4, samples=300), Lime(patch=4, ridge=1e-6)):
        torch.testing.assert_close(method(model, {"pixel_values": pixels}, first_class), squares, atol=1e-4, rtol=1e-3)
    gradient = Gradient()(model, {"pixel_values": pixels}, first_class)
    torch.testing.assert_close(gradient, model.head.weight[0].detach().reshape(3, 10, 12).norm(dim=0))


# --- chance -------------------------------------------------------------------------------------------------------


def test_random_depends_on_input_and_seed_alone() -> None:
    model, inputs, _ = bag()
    first = Random()(model, inputs, first_class)
    torch.manual_seed(5)
    assert torch.equal(first, Random()(model, inputs, first_class))
    assert not torch.equal(first, Random(seed=1)(model, inputs, first_class))
    other = {"input_ids": torch.tensor([[3, 7, 1, 12, 6]])}
    assert not torch.equal(first, Random()(model, other, first_class))
    pixels = {"pixel_values": torch.randn(1, 3, 10, 12)}
    assert Random()(Picture(), pixels, first_class).shape == (10, 12)


@pytest.mark.parametrize("name", ["smoothgrad", "kernel-shap", "lime"])
def test_sampling_depends_on_input_and_seed_alone(name: str) -> None:
    model, inputs = tiny.build("gpt2"), tiny.inputs("gpt2")
    method: Any = replace(BASELINES[name], samples=40)  # type: ignore[type-var]
    state = torch.get_rng_state()
    first = method(model, inputs, last_token)
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator is as it was"
    torch.manual_seed(5)
    assert torch.equal(first, method(model, inputs, last_token))
    assert not torch.equal(first, replace(method, seed=1)(model, inputs, last_token))

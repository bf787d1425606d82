"""Normalisations (prop. 3.4) against explicit sums: the statistic is a constant, mean and affine map are linear."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from attnlrp import GRADIENT
from explained import explain, randn

EPS = 1e-5
seeds = pytest.mark.parametrize("seed", [0, 1, 2])


def centred(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
    """R_i = sum_j (delta_ij - 1/N) x_i w_j / sigma * g_j, for one group of N values."""
    n, sigma = len(x), (x.var(correction=0) + EPS).sqrt()
    relevance = torch.zeros_like(x)
    for i in range(n):
        for j in range(n):
            relevance[i] += ((i == j) - 1 / n) * x[i] * w[j] / sigma * g[j]
    return relevance


def scaled(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
    """R_i = x_i w_i / RMS * g_i."""
    return torch.stack([x[i] * w[i] * g[i] / (sum(v**2 for v in x) / len(x) + EPS) ** 0.5 for i in range(len(x))])


class WrittenRMSNorm(nn.Module):
    def __init__(self, w: Tensor, form: str) -> None:
        super().__init__()
        self.w, self.form = nn.Parameter(w), form

    def forward(self, x: Tensor) -> Tensor:
        square = x.pow(2).mean(-1, keepdim=True) + EPS
        return {
            "rsqrt": lambda: self.w * (x * torch.rsqrt(square)),
            "sqrt": lambda: x / square.sqrt() * self.w,
            "power": lambda: x * square.pow(-0.5) * self.w,
            "reciprocal": lambda: x * (1 / square.sqrt()) * self.w,
            "square": lambda: x * torch.rsqrt(torch.square(x).mean(-1, keepdim=True) + EPS) * self.w,
            "product": lambda: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * self.w,
            "norm": lambda: x / x.norm(dim=-1, keepdim=True) * x.shape[-1] ** 0.5 * self.w,
            "vector_norm": lambda: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** 0.5 * self.w,
            "in place": lambda: x.clone().mul_(square.rsqrt()).mul_(self.w),
        }[self.form]()


class WrittenLayerNorm(nn.Module):
    def __init__(self, w: Tensor, b: Tensor, form: str) -> None:
        super().__init__()
        self.w, self.b, self.form = nn.Parameter(w), nn.Parameter(b), form

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        if self.form == "var":
            y = (x - mean) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)
        elif self.form == "var_mean":
            var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
            y = (x - mean) * (var + EPS).rsqrt()
        else:
            y = (x - mean) / ((x - mean).pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        return y * self.w + self.b


@seeds
def test_layer_norm(seed: int) -> None:
    x, w, b = randn(2, 5, seed=seed), randn(5, seed=seed + 10), randn(5, seed=seed + 20)
    result = explain(lambda x: F.layer_norm(x, (5,), w, b, EPS), x)
    assert_close(result.relevance[0], torch.stack([centred(x[n], w, result.g[n]) for n in range(2)]))
    assert_close(result.received + (b * result.g).sum(), result.total)
    bare = explain(lambda x: F.layer_norm(x, (5,)), x)
    assert_close(bare.received, bare.total)


@pytest.mark.parametrize("form", ["var", "var_mean", "written out"])
def test_layer_norm_written_by_hand(form: str) -> None:
    x, w, b = randn(2, 5), randn(5, seed=10), randn(5, seed=20)
    result = explain(WrittenLayerNorm(w, b, form), x)
    assert_close(result.relevance[0], torch.stack([centred(x[n], w, result.g[n]) for n in range(2)]))


def test_layer_norm_over_two_dimensions_is_one_group() -> None:
    x, w = randn(2, 3, 4), randn(3, 4, seed=1)
    result = explain(nn.LayerNorm((3, 4), eps=EPS, dtype=torch.float64, elementwise_affine=False), x)
    expected = torch.stack([centred(x[n].flatten(), torch.ones(12), result.g[n].flatten()) for n in range(2)])
    assert_close(result.relevance[0].flatten(1), expected)
    result = explain(lambda x: F.layer_norm(x, (3, 4), weight=w, eps=EPS), x)
    expected = torch.stack([centred(x[n].flatten(), w.flatten(), result.g[n].flatten()) for n in range(2)])
    assert_close(result.relevance[0].flatten(1), expected)


@seeds
def test_rms_norm(seed: int) -> None:
    x, w = randn(2, 5, seed=seed), randn(5, seed=seed + 10)
    result = explain(lambda x: F.rms_norm(x, (5,), w, EPS), x)
    assert_close(result.relevance[0], torch.stack([scaled(x[n], w, result.g[n]) for n in range(2)]))
    assert_close(result.relevance[0], result.y * result.g)
    default = explain(nn.RMSNorm(5, dtype=torch.float64), x)
    assert_close(default.relevance[0], default.y * default.g)


@pytest.mark.parametrize(
    "form", ["rsqrt", "sqrt", "power", "reciprocal", "square", "product", "norm", "vector_norm", "in place"]
)
def test_rms_norm_written_by_hand(form: str) -> None:
    x, w = randn(2, 5), randn(5, seed=10)
    result = explain(WrittenRMSNorm(w, form), x)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if "norm" in form else {}  # without the epsilon under the root
    expected = torch.stack([scaled(x[n], w, result.g[n]) for n in range(2)])
    assert_close(result.relevance[0], expected, **(tolerance or {"rtol": 1e-7, "atol": 1e-7}))
    assert_close(result.relevance[0], result.y * result.g)


def test_without_rules_a_norm_destroys_relevance() -> None:
    result = explain(lambda x: F.rms_norm(x, (5,)), randn(2, 5), rules=GRADIENT)
    assert_close(result.received, torch.tensor(0.0, dtype=torch.float64), rtol=0, atol=1e-12)


@seeds
def test_group_norm(seed: int) -> None:
    x, w, b = randn(2, 4, 3, seed=seed), randn(4, seed=seed + 10), randn(4, seed=seed + 20)
    result = explain(lambda x: F.group_norm(x, 2, w, b, EPS), x)
    spread = w.view(4, 1).expand(4, 3)
    for n in range(2):
        for group in (slice(0, 2), slice(2, 4)):
            expected = centred(x[n, group].flatten(), spread[group].flatten(), result.g[n, group].flatten())
            assert_close(result.relevance[0][n, group].flatten(), expected)
    assert_close(result.received + (b[:, None] * result.g).sum(), result.total)


@seeds
def test_batch_norm_in_training_normalises_over_the_batch(seed: int) -> None:
    x, w, b = randn(4, 2, 3, seed=seed), randn(2, seed=seed + 10), randn(2, seed=seed + 20)
    result = explain(lambda x: F.batch_norm(x, None, None, w, b, training=True, eps=EPS), x)
    for c in range(2):
        expected = centred(x[:, c].flatten(), w[c].expand(12), result.g[:, c].flatten())
        assert_close(result.relevance[0][:, c].flatten(), expected)


@pytest.mark.parametrize("function", ["functional", "torch"])
def test_batch_norm_in_evaluation_is_an_affine_map(function: str) -> None:
    x, mean, var, w, b = randn(4, 3), randn(3, seed=1), randn(3, seed=2).abs(), randn(3, seed=3), randn(3, seed=4)

    def norm(x: Tensor) -> Tensor:
        if function == "torch":
            return torch.batch_norm(x, w, b, mean, var, False, 0.1, EPS, False)
        return F.batch_norm(x, mean, var, w, b, eps=EPS)

    result = explain(norm, x)
    assert_close(result.relevance[0], x * w / (var + EPS).sqrt() * result.g)


def test_batch_norm_updates_its_running_statistics_once() -> None:
    x = randn(8, 3)
    plain, explained = nn.BatchNorm1d(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    expected = plain(x)
    result = explain(explained, x, module=explained)
    assert_close(result.y, expected.detach(), rtol=0, atol=0)
    assert_close(explained.running_var, plain.running_var, rtol=0, atol=0)
    assert explained.num_batches_tracked == 1


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("function", ["functional", "torch"])
def test_instance_norm(statistics: bool, function: str) -> None:
    x, w, b, mean, var = randn(2, 3, 4), randn(3, seed=1), randn(3, seed=2), randn(3, seed=3), randn(3, seed=4).abs()

    def norm(x: Tensor) -> Tensor:
        if function == "torch":
            return torch.instance_norm(x, w, b, mean.clone(), var.clone(), statistics, 0.1, EPS, False)
        return F.instance_norm(x, mean.clone(), var.clone(), w, b, use_input_stats=statistics, eps=EPS)

    result = explain(norm, x)
    if not statistics:
        assert_close(result.relevance[0], x * (w / (var + EPS).sqrt())[:, None] * result.g)
        return
    for n in range(2):
        for c in range(3):
            assert_close(result.relevance[0][n, c], centred(x[n, c], w[c].expand(4), result.g[n, c]))


def test_normalize_divides_by_a_constant() -> None:
    x = randn(3, 4)
    for p in (1.0, 2.0):
        result = explain(lambda x, p=p: F.normalize(x, p=p, dim=-1), x)
        assert_close(result.relevance[0], x / x.abs().pow(p).sum(-1, keepdim=True).pow(1 / p) * result.g)


@pytest.mark.parametrize("similarity", [F.cosine_similarity, torch.cosine_similarity, nn.CosineSimilarity(dim=1)])
def test_cosine_similarity_is_a_product_of_two_normalised_vectors(similarity: Callable[..., Tensor]) -> None:
    a, b = randn(3, 4), randn(3, 4, seed=1)
    result = explain(similarity, a, b)
    share = a * b / (a.norm(dim=1) * b.norm(dim=1))[:, None] * result.g[:, None] / 2
    assert_close(result.relevance, [share, share])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_agree_with_float64_in_lower_precision(dtype: torch.dtype) -> None:
    x, w, b = randn(3, 8), randn(8, seed=1), randn(8, seed=2)
    rounded = [t.to(dtype).double() for t in (x, w, b)]
    for function in (
        lambda x, w, b: F.layer_norm(x, (8,), w, b),
        lambda x, w, b: F.rms_norm(x, (8,), w, 1e-6),
        lambda x, w, b: F.group_norm(x, 4, w, b),
    ):
        exact = explain(lambda x, f=function: f(x, *rounded[1:]), rounded[0], g=torch.ones_like(x))
        low = explain(
            lambda x, f=function: f(x, w.to(dtype), b.to(dtype)), x.to(dtype), g=torch.ones_like(x, dtype=dtype)
        )
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        assert_close(low.gradients[0].double(), exact.gradients[0], **tolerance)

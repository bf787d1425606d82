"""Baselines from gradients of the features: token embeddings, or pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from attnlrp.baselines.libraries import captum_module
from attnlrp.baselines.sample import Sample, Score, as_result, opened, require_positive
from attnlrp.errors import InputError

__all__ = ["Gradient", "GradientXInput", "IntegratedGradients", "SmoothGrad"]


@dataclass(frozen=True)
class Gradient:
    """Sensitivity: R_t = || df/de_t ||, the Euclidean norm over the hidden dimension (the channels of a pixel).

    It has no sign. captum's `Saliency`. Costs 1 forward and 1 backward.

    Reference: Simonyan, Vedaldi & Zisserman, "Deep inside convolutional networks", 2014 (with the norm of Li et al.,
    "Visualizing and understanding neural models in NLP", 2016, in place of the largest value).
    """

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> Tensor:
        with opened(model, inputs, target) as sample:
            saliency = captum_module("attr").Saliency(sample.score)
            return _norm(sample, saliency.attribute(sample.features.requires_grad_(), abs=False))


@dataclass(frozen=True)
class GradientXInput:
    """R_t = e_t . df/de_t, summed over the hidden dimension (the channels of a pixel).

    captum's `InputXGradient`. Costs 1 forward and 1 backward.

    Reference: Shrikumar et al., "Not just a black box", 2016.
    """

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> Tensor:
        with opened(model, inputs, target) as sample:
            method = captum_module("attr").InputXGradient(sample.score)
            return sample.relevance(method.attribute(sample.features.requires_grad_()))


@dataclass(frozen=True)
class IntegratedGradients:
    """R_t = e_t . integral over a in [0, 1] of df/de_t (a e): along the line from zero embeddings (a black image).

    Sums to f(e) - f(0) with enough steps. captum's `IntegratedGradients`. Costs `steps` forwards and backwards.

    Reference: Sundararajan, Taly & Yan, "Axiomatic attribution for deep networks", ICML 2017.

    Args:
        steps: points of the Gauss-Legendre quadrature; the authors take 20 to 300.
        batch_size: points in one pass.
    """

    steps: int = 50
    batch_size: int = 16

    def __post_init__(self) -> None:
        require_positive(steps=self.steps, batch_size=self.batch_size)

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> Tensor:
        with opened(model, inputs, target) as sample:
            method = captum_module("attr").IntegratedGradients(sample.score)
            parts = {"n_steps": self.steps, "internal_batch_size": self.batch_size}
            return sample.relevance(method.attribute(sample.features.requires_grad_(), baselines=0.0, **parts))


@dataclass(frozen=True)
class SmoothGrad:
    """The mean gradient g_t over copies of the input with Gaussian noise; R_t = e_t . g_t, or || g_t ||.

    captum's `NoiseTunnel` around its `Saliency`. Costs `samples` forwards and backwards.

    Reference: Smilkov et al., "SmoothGrad: removing noise by adding noise", 2017, who describe the gradient and its
    product with the input.

    Args:
        noise: standard deviation of the noise, as a share of the range of the features (largest minus smallest value);
            the authors advise 0.1 to 0.2.
        samples: copies; the authors see little gain above 50.
        reduce: "input" for the product with the features, which has a sign; "norm" for the norm, which has none.
        seed: of the noise, together with the input.
        batch_size: copies in one pass.
    """

    noise: float = 0.15
    samples: int = 50
    reduce: Literal["input", "norm"] = "input"
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        require_positive(noise=self.noise, samples=self.samples, batch_size=self.batch_size)
        if self.reduce not in ("input", "norm"):
            raise InputError(f"reduce: got {self.reduce!r}, expected 'input' or 'norm'")

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> Tensor:
        with opened(model, inputs, target) as sample, sample.seeded(self.seed):
            captum, features = captum_module("attr"), sample.features
            spread = self.noise * float(features.max() - features.min())
            drawn = {"nt_samples": self.samples, "nt_samples_batch_size": self.batch_size, "stdevs": spread}
            gradient = captum.NoiseTunnel(captum.Saliency(sample.score)).attribute(features, abs=False, **drawn)
            return _norm(sample, gradient) if self.reduce == "norm" else sample.relevance(features * gradient)


def _norm(sample: Sample, gradient: Tensor) -> Tensor:
    return as_result(gradient[0].norm(dim=0 if sample.is_image else -1))

"""Baselines that fit a linear surrogate to the scores of inputs with random tokens or patches switched off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlrp.baselines.libraries import captum_module
from attnlrp.baselines.sample import Sample, Score, opened, require_positive

__all__ = ["KernelShap", "Lime"]


@dataclass(frozen=True)
class KernelShap:
    """Shapley values of tokens (squares of an image), by regression on random coalitions z of those that are kept.

    R minimises sum over z of k(z) (f(z) - R_0 - R . z)^2 with k(z) = (M - 1) / (C(M, |z|) |z| (M - |z|)) for M
    features, subject to R_0 = f(none) and sum R = f(all) - f(none). What is not kept is zero. captum's `KernelShap`,
    which samples coalitions by k. Costs `samples` forwards.

    Reference: Lundberg & Lee, "A unified approach to interpreting model predictions", NeurIPS 2017.

    Args:
        samples: coalitions; None for 2 M + 2048, the default of the authors' package.
        patch: edge of the squares of an image, in pixels.
        seed: of the coalitions, together with the input.
        batch_size: coalitions in one pass.
    """

    samples: int | None = None
    patch: int = 16
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        require_positive(samples=self.samples, patch=self.patch, batch_size=self.batch_size)

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> Tensor:
        with opened(model, inputs, target) as sample, sample.seeded(self.seed), torch.no_grad():
            count = int(sample.groups(self.patch).max()) + 1
            if count == 1:  # one player's Shapley value; a regression on proper subsets has no rows
                return sample.spread(sample.score(sample.features) - sample.score(0 * sample.features), self.patch)
            method = captum_module("attr").KernelShap(sample.score)
            return _coefficients(sample, method, self.samples or 2 * count + 2048, self.patch, self.batch_size)


@dataclass(frozen=True)
class Lime:
    """Weights of a local linear model: R minimises sum over z of p(z) (f(z) - R_0 - R . z)^2 + ridge |R|^2.

    z says which tokens (squares of an image) are kept, the others are zero; how many are switched off is drawn
    uniformly, then which. p(z) = exp(-d^2 / (2 width^2)), d the cosine distance of z to the whole. Sampling, kernel
    and ridge regression are those of the authors' package, without its selection of a few features. captum's `Lime`.
    Costs `samples` forwards.

    Reference: Ribeiro, Singh & Guestrin, "Why should I trust you?", KDD 2016.

    Args:
        samples: inputs to fit; the authors' package takes 1000 for images and 5000 for texts.
        width: of the kernel, in units of the cosine distance.
        ridge: strength of the regularisation.
        patch: edge of the squares of an image, in pixels.
        seed: of the samples, together with the input.
        batch_size: samples in one pass.
    """

    samples: int = 1000
    width: float = 0.25
    ridge: float = 1.0
    patch: int = 16
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        require_positive(samples=self.samples, width=self.width, patch=self.patch, batch_size=self.batch_size)
        require_positive(ridge=self.ridge)

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> Tensor:
        with opened(model, inputs, target) as sample, sample.seeded(self.seed), torch.no_grad():
            surrogate = captum_module("_utils.models.linear_model").SkLearnRidge(alpha=self.ridge)
            method = captum_module("attr").Lime(sample.score, surrogate, self._weight, _Subsets())
            return _coefficients(sample, method, self.samples, self.patch, self.batch_size)

    def _weight(self, original: Tensor, perturbed: Tensor, kept: Tensor, **_: Any) -> Tensor:
        distance = 1 - kept.float().mean().sqrt()  # cosine of a vector of 0 and 1 with the vector of ones
        return torch.exp(-(distance**2) / (2 * self.width**2))


class _Subsets:
    """What is kept: first everything, then all but a uniform number of features (1, feature) for each call."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, original: Tensor, *, num_interp_features: int, **_: Any) -> Tensor:
        kept = torch.ones(1, num_interp_features, dtype=torch.long)
        if self._begun:
            off = int(torch.randint(1, num_interp_features + 1, ()))
            kept[0, torch.randperm(num_interp_features)[:off]] = 0
        self._begun = True
        return kept.to(original.device)


def _coefficients(sample: Sample, method: Any, samples: int, patch: int, batch_size: int) -> Tensor:
    settings = {"feature_mask": sample.groups(patch), "n_samples": samples, "perturbations_per_eval": batch_size}
    values = method.attribute(sample.features, baselines=0.0, return_input_shape=False, **settings)
    return sample.spread(values.to(sample.features.device), patch)

"""Faithfulness by perturbation: does the output change most when the most relevant tokens go?

Tokens are taken away in the order of their signed relevance, the most relevant first (MoRF) and the least relevant
first (LeRF); squares of an image in that of the sum over their pixels. A faithful explanation makes the output fall
fast in the first order and slowly in the second: the area between the two curves is large (Samek et al., 2017;
Achtibat et al., 2024).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from attnlrp.errors import InputError
from attnlrp.evaluation.perturbation import Perturbation
from attnlrp.evaluation.pixels import PixelPerturbation
from attnlrp.evaluation.samples import Sample

__all__ = ["SPECIAL", "Curves", "Special", "curves", "order"]

_MOST_SQUARES = 4096  # of an image that are taken away one by one; more of them need a number of steps

Special: TypeAlias = Literal["rank", "keep", "first"]
SPECIAL: tuple[Special, ...] = ("rank", "keep", "first")
"""What happens to special tokens such as BOS: ranked as any other, never taken away, or ranked above all others."""


@dataclass(frozen=True)
class Curves:
    """The explained output while tokens are taken away; axis 1 is (logit, probability).

    Args:
        fractions: share of the tokens that is gone, from 0 to 1 (step,).
        morf: the output, most relevant tokens first (step, 2).
        lerf: the output, least relevant tokens first (step, 2).
    """

    fractions: Tensor
    morf: Tensor
    lerf: Tensor

    def metrics(self) -> dict[str, float]:
        """All figures that follow from the curves, in logits; those of the probability end with _probability.

        - area: between LeRF and MoRF (trapezoids over the fraction; higher is better), the authors' measure;
        - comprehensiveness: mean fall of the output over the steps of MoRF (AOPC; DeYoung et al., 2020; higher);
        - sufficiency: mean fall when only the most relevant tokens stay, the steps of LeRF (lower);
        - deletion: area under MoRF (Petsiuk et al., 2018; lower); insertion: area under LeRF, which is the curve of
          inserting the most relevant tokens first into an empty input, read backwards (higher).
        """
        found: dict[str, float] = {}
        for k, suffix in enumerate(("", "_probability")):
            morf, lerf = self.morf[:, k].double(), self.lerf[:, k].double()
            under_morf, under_lerf = (torch.trapezoid(y, self.fractions.double()).item() for y in (morf, lerf))
            found |= {
                f"area{suffix}": under_lerf - under_morf,
                f"comprehensiveness{suffix}": (morf[0] - morf[1:]).mean().item(),
                f"sufficiency{suffix}": (lerf[0] - lerf[1:]).mean().item(),
                f"deletion{suffix}": under_morf,
                f"insertion{suffix}": under_lerf,
            }
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name).tolist() for name in ("fractions", "morf", "lerf")}


def order(relevance: Tensor, sample: Sample, *, special: Special = "rank", seed: int = 0) -> Tensor:
    """The tokens that may go, most relevant first; equal ones in an order drawn from the seed and the sample's name.

    Args:
        relevance: signed relevance (token,).
        sample: the input that it explains.
        special: what happens to special tokens.
        seed: of the order of equal ones.
    """
    if relevance.shape != sample.special.shape:
        raise InputError(f"relevance: got shape {tuple(relevance.shape)}, expected {tuple(sample.special.shape)}")
    if not torch.isfinite(relevance).all():
        raise InputError(f"relevance of sample {sample.name} holds NaN or infinite values")
    if special not in SPECIAL:
        raise InputError(f"special: got {special!r}, expected one of {', '.join(SPECIAL)}")
    drawn = torch.Generator().manual_seed(seed + zlib.crc32(sample.name.encode()))
    shuffled = torch.randperm(len(relevance), generator=drawn)
    ranked = shuffled[relevance[shuffled].sort(descending=True, stable=True).indices]
    if special == "keep":
        return ranked[~sample.special[ranked]]
    if special == "first":
        return torch.cat([ranked[sample.special[ranked]], ranked[~sample.special[ranked]]])
    return ranked


def curves(
    perturbation: Perturbation | PixelPerturbation,
    sample: Sample,
    relevance: Tensor,
    *,
    steps: int | None = None,
    special: Special = "rank",
    seed: int = 0,
) -> Curves:
    """Take tokens, or squares of an image, away in both orders.

    Args:
        perturbation: how they are taken away.
        sample: the input.
        relevance: signed relevance (token,) or (height, width), whoever made it.
        steps: points of a curve besides its start; None for one per token or square.
        special: what happens to special tokens.
        seed: of the order of equally relevant tokens or squares.
    """
    if relevance.shape != sample.special.shape:
        raise InputError(f"relevance: got shape {tuple(relevance.shape)}, expected {tuple(sample.special.shape)}")
    marks = perturbation.pool(sample.special.float()) > 0
    image, relevance = relevance.dim() == 2, perturbation.pool(relevance.detach().float().cpu())
    ranked = order(relevance, replace(sample, special=marks), special=special, seed=seed)
    total = len(ranked)
    if image and steps is None and total > _MOST_SQUARES:
        raise InputError(f"steps: got None for {total} squares of an image, expected a number of steps, such as 100")
    if not total:
        raise InputError(f"sample {sample.name} has no token that may be taken away")
    count = total if steps is None else min(steps, total)
    gone = torch.linspace(0, total, count + 1).round().long()  # how many are gone at each point
    rank = torch.full((len(relevance),), total)
    rank[ranked] = torch.arange(total)
    back = torch.where(rank < total, total - 1 - rank, total)
    inner = gone[1:-1, None]
    kept = torch.cat([gone[:1, None] <= rank, rank >= inner, back >= inner, gone[-1:, None] <= rank])
    scores = perturbation.scores(sample, kept)
    start, morf, lerf, end = scores[:1], scores[1:count], scores[count:-1], scores[-1:]
    return Curves(gone / total, torch.cat([start, morf, end]), torch.cat([start, lerf, end]))

"""Baselines from attention weights. As published, none of them has a sign."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from attnlrp.baselines.maps import Layers, placed, prefix_length, read_maps
from attnlrp.baselines.sample import Score, opened

__all__ = ["Attention", "AttentionRollout", "GradCam", "GradientXAttentionRollout"]


@dataclass(frozen=True)
class Attention:
    """Weights of the last layer: R = mean over heads of A[p], p the explained position.

    Of an encoder-decoder, the last cross attention. Costs 1 forward, and 1 backward that finds p.

    Reference: the raw attention of Chefer, Gur & Wolf, ICCV 2021; discussed in Jain & Wallace, "Attention is not
    explanation", NAACL 2019.
    """

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> Tensor:
        with opened(model, inputs, target) as sample:
            maps = read_maps(sample)
            return placed(sample, maps.last.weights[-1].mean(dim=0)[maps.rows].mean(dim=0))


@dataclass(frozen=True)
class AttentionRollout:
    """Attention multiplied through the layers: R = (A'_L ... A'_1)[p] with A' = (mean over heads of A + I) / 2.

    p is the explained position. Of an encoder-decoder, D^T C E with the rollouts D and E of decoder and encoder and the
    last cross attention C, as Chefer et al. compute it for comparison. Costs 1 forward, and 1 backward that finds p.

    Reference: Abnar & Zuidema, "Quantifying attention flow in transformers", ACL 2020.
    """

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> Tensor:
        with opened(model, inputs, target) as sample:
            maps = read_maps(sample)
            flow = _rollout(maps.own)
            if maps.cross is not None and maps.decoder is not None:
                flow = _rollout(maps.decoder).T @ maps.cross.weights[-1].mean(dim=0) @ flow
            return placed(sample, flow[maps.rows].mean(dim=0))


@dataclass(frozen=True)
class GradientXAttentionRollout:
    """Generic attention explainability: R starts as I, each layer adds A' R; A' = mean over heads of max(0, dA * A).

    dA is the gradient of the score for the attention weights A. The result is row p of R, p the explained position.

    Of an encoder-decoder, S (decoder) and E (encoder) start as I, X (decoder to encoder) as 0. The encoder updates E.
    Each layer of the decoder updates S and X by its self-attention, (S, X) + A' (S, X), then adds N(S)^T C' N(E) to X
    for its cross attention C, where N scales the rows of R - I to a sum of 1 and adds I again (equations 8 to 10).
    The result is row p of X.

    Costs 1 forward and 1 backward.

    Reference: Chefer, Gur & Wolf, "Generic attention-model explainability for interpreting bi-modal and encoder-decoder
    transformers", ICCV 2021.
    """

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> Tensor:
        with opened(model, inputs, target) as sample:
            maps = read_maps(sample)
            own = [_positive(*layer) for layer in _each(maps.own)]
            relevance = reduce(lambda r, a: r + a @ r, own, _eye(own[0]))
            if maps.cross is not None and maps.decoder is not None:
                relevance = _bimodal(maps.decoder, maps.cross, relevance)
            return placed(sample, relevance[maps.rows].mean(dim=0))


@dataclass(frozen=True)
class GradCam:
    """Grad-CAM on the last attention layer: R = max(0, mean over heads of w_h A_h[p]), p the explained position.

    w_h is the mean over keys (patches, of an image) of dA_h[p], the gradient of the score for the attention weights A.
    This is the form that Chefer et al. compare with: a head is a channel, the class token's attention its activation.
    Of an encoder-decoder, the last cross attention. Costs 1 forward and 1 backward.

    Reference: Selvaraju et al., "Grad-CAM", ICCV 2017; for attention, Chefer, Gur & Wolf, CVPR 2021 and ICCV 2021.

    Args:
        rectify: whether what is below 0 becomes 0, as published; else relevance has a sign and fewer ties.
    """

    rectify: bool = True

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> Tensor:
        with opened(model, inputs, target) as sample:
            maps = read_maps(sample)
            activation, gradient = maps.last.weights[-1][:, maps.rows], maps.last.gradients[-1][:, maps.rows]
            first = prefix_length(sample, activation.shape[-1])
            weight = gradient[..., first:].mean(dim=-1, keepdim=True)
            signed = (weight * activation).mean(dim=0)
            return placed(sample, (signed.clamp(min=0) if self.rectify else signed).mean(dim=0))


def _rollout(layers: Layers) -> Tensor:
    flow = _eye(layers.weights[0])
    for weights in layers.weights:
        mixed = weights.mean(dim=0) + _eye(weights)
        flow = mixed / mixed.sum(dim=-1, keepdim=True) @ flow
    return flow


def _bimodal(decoder: Layers, cross: Layers, encoder: Tensor) -> Tensor:
    own = _eye(decoder.weights[0])
    across = torch.zeros_like(cross.weights[0][0])
    for self_layer, cross_layer in zip(_each(decoder), _each(cross), strict=True):
        weights = _positive(*self_layer)
        own, across = own + weights @ own, across + weights @ across
        across = across + _normalised(own).T @ _positive(*cross_layer) @ _normalised(encoder)
    return across


def _normalised(relevance: Tensor) -> Tensor:
    """Rows of R - I with a sum of 1, plus I; a row of I alone stays as it is."""
    identity = _eye(relevance)
    added = relevance - identity
    total = added.sum(dim=-1, keepdim=True)
    return added / torch.where(total > 0, total, 1) + identity


def _positive(weights: Tensor, gradients: Tensor) -> Tensor:
    return (gradients * weights).clamp(min=0).mean(dim=0)


def _each(layers: Layers) -> list[tuple[Tensor, Tensor]]:
    return list(zip(layers.weights, layers.gradients, strict=True))


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)

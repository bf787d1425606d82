"""Attention weights of one sample, their gradients, and the grid of an image's patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnlrp.baselines.sample import Sample, as_result
from attnlrp.eager import eager_attention
from attnlrp.errors import InputError, ModelError

__all__ = ["Layers", "Maps", "Scores", "placed", "prefix_length", "read_maps"]


_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}


@dataclass(frozen=True)
class Layers:
    """Attention weights and their gradients, one (head, query, key) for each layer."""

    weights: list[Tensor]
    gradients: list[Tensor]


@dataclass(frozen=True)
class Maps:
    """Attention of one forward pass.

    Args:
        own: self-attention of the model, or of the encoder of an encoder-decoder.
        decoder: self-attention of the decoder beside an encoder.
        cross: attention of the decoder to the encoder.
        rows: explained positions: queries of the last layer (of the decoder, if there is one) that the score depends
            on.
    """

    own: Layers
    decoder: Layers | None
    cross: Layers | None
    rows: Tensor

    @property
    def last(self) -> Layers:
        """What the explained positions look at the input with: the last attention to the input's tokens."""
        return self.own if self.cross is None else self.cross


def read_maps(sample: Sample) -> Maps:
    """Attention weights of a sample, by eager attention, with the gradient of the score for each of them.

    The explained positions need no knowledge of the target: of the queries of the last layer, the score depends on
    theirs alone, so that all others have a gradient of zero.

    Raises:
        ModelError: the model does not return its attention weights.
        InputError: the score depends on no attention weight.
    """
    names = (
        ("encoder_attentions", "decoder_attentions", "cross_attentions") if sample.encoder_decoder else ("attentions",)
    )
    with eager_attention(sample.model), Scores(_live):
        output = sample.output(sample.features.requires_grad_(), output_attentions=True)
        score = sample.value(output, 1).sum()
        maps = [_weights(sample.model, output, name) for name in names]
        flat = [weights for layers in maps for weights in layers]
        found = iter(torch.autograd.grad(score, flat, allow_unused=True, materialize_grads=True))
    layers = [Layers([w[0].detach() for w in weights], [next(found)[0] for _ in weights]) for weights in maps]
    (rows,) = layers[-1].gradients[-1].abs().sum(dim=(0, 2)).nonzero(as_tuple=True)
    if not len(rows):
        raise InputError("target: it depends on no attention weight of the last layer, so there is no row to explain")
    own, decoder, cross = layers if len(layers) == 3 else (layers[0], None, None)
    return Maps(own, decoder, cross, rows)


class Scores(TorchFunctionMode):
    """Attention scores (batch, head, query, key) on their way into a softmax, while the block is open.

    Args:
        change: gets them, gives what the softmax takes instead.
    """

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func in _SOFTMAX:
            scores, rest = (args[0], args[1:]) if args else (named.pop("input"), ())
            return func(self.change(scores) if scores.dim() == 4 else scores, *rest, **named)
        return func(*args, **named)


def placed(sample: Sample, row: Tensor) -> Tensor:
    """Relevance from that of each key of the model: tokens as they are, patches as pixels by bilinear interpolation."""
    if not sample.is_image:
        if len(row) != sample.size:
            raise ModelError(
                f"{type(sample.model).__name__} attends to {len(row)} keys, expected its {sample.size} tokens"
            )
        return as_result(row)
    height, width = sample.features.shape[-2:]
    down, across = _grid(sample)
    patches = row[prefix_length(sample, len(row)) :].reshape(1, 1, down, across).float()
    return as_result(F.interpolate(patches, size=(height, width), mode="bilinear", align_corners=False)[0, 0])


def prefix_length(sample: Sample, keys: int) -> int:
    """Number of keys before the first patch of an image: class and register tokens; 0 for a text.

    Raises:
        ModelError: the keys are not those tokens and the patches.
    """
    if not sample.is_image:
        return 0
    down, across = _grid(sample)
    if keys < down * across:
        raise ModelError(
            f"{type(sample.model).__name__} attends to {keys} keys, expected its {down * across} patches: windowed or "
            "pooled attention has no map of the whole image"
        )
    return keys - down * across


def _grid(sample: Sample) -> tuple[int, int]:
    """Patches along the height and the width."""
    config = sample.model.config
    size = getattr(config, "patch_size", None) or getattr(getattr(config, "vision_config", None), "patch_size", None)
    if size is None:
        raise ModelError(
            f"{type(sample.model).__name__}: its config names no patch_size, which the map of patches needs"
        )
    edges = size if isinstance(size, (list, tuple)) else (size, size)
    height, width = sample.features.shape[-2:]
    return height // int(edges[0]), width // int(edges[1])


def _live(scores: Tensor) -> Tensor:
    """Scores that take a gradient: those of a decoder's first layer depend on nothing else that does."""
    return scores if scores.requires_grad else scores.detach().requires_grad_()


def _weights(model: Any, output: Any, name: str) -> list[Tensor]:
    found = getattr(output, name, None)
    if not found or not all(isinstance(w, Tensor) and w.dim() == 4 and w.requires_grad for w in found):
        raise ModelError(
            f"{type(model).__name__} does not return the weights of each attention layer ({name}): use a method "
            "that needs none"
        )
    return list(found)

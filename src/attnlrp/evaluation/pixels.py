"""Perturbed images: squares of pixels that are replaced, and what the model makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlrp.errors import InputError
from attnlrp.evaluation.perturbation import expand
from attnlrp.evaluation.samples import Sample

__all__ = ["PIXEL_BASELINES", "PixelPerturbation", "blurred"]

PIXEL_BASELINES = ("zero", "mean", "blur")
"""What takes the place of pixels: zeros after normalisation (the mean colour of the training images), the mean colour
of the image itself, or the image after a Gaussian blur (Fong and Vedaldi, 2017)."""


@dataclass(frozen=True)
class PixelPerturbation:
    """Runs a model on an image of which some squares are taken away.

    Args:
        model: a model of `transformers` that reads `pixel_values`.
        baseline: what takes the place of pixels, one of `PIXEL_BASELINES`.
        batch_size: perturbed images in one forward pass.
        patch: edge of the squares in pixels of the model's input, 1 for single pixels; those at the right and bottom
            edges may be smaller.
        blur: standard deviation of the blur in pixels.
    """

    model: Any
    baseline: str = "zero"
    batch_size: int = 32
    patch: int = 16
    blur: float = 10.0

    def __post_init__(self) -> None:
        if self.baseline not in PIXEL_BASELINES:
            raise InputError(f"baseline: got {self.baseline!r}, expected one of {', '.join(PIXEL_BASELINES)}")
        for name in ("batch_size", "patch", "blur"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}: got {getattr(self, name)}, expected a number above 0")

    @property
    def settings(self) -> dict[str, Any]:
        """What results depend on."""
        blur = {"blur": self.blur} if self.baseline == "blur" else {}
        return {"baseline": self.baseline, "patch": self.patch, **blur}

    def pool(self, values: Tensor) -> Tensor:
        """Sum over each square (square,), row by row, of values of pixels (height, width)."""
        if values.dim() != 2:
            raise InputError(f"relevance: got shape {tuple(values.shape)}, expected (height, width) of the pixels")
        squares = self._squares(*values.shape).flatten()
        return values.new_zeros(int(squares.max()) + 1).index_add_(0, squares, values.flatten())

    def scores(self, sample: Sample, kept: Tensor) -> Tensor:
        """Logit and probability of the explained output for each variant (variant, 2), on the CPU in float32.

        Args:
            sample: the input, with `pixel_values`.
            kept: which squares keep their pixels (variant, square).
        """
        pixels = sample.inputs["pixel_values"]
        squares, other = self._squares(*pixels.shape[-2:]), self._other(pixels)
        found = []
        with torch.no_grad():
            for chunk in kept.cpu().split(self.batch_size):
                stays = chunk[:, squares][:, None].to(pixels.device)  # (variant, 1, height, width)
                inputs = expand(sample.inputs, len(chunk)) | {"pixel_values": torch.where(stays, pixels, other)}
                found.append(sample.output.both(self.model(**inputs)).cpu())
        return torch.cat(found)

    def _squares(self, height: int, width: int) -> Tensor:
        """Number of the square of each pixel (height, width)."""
        rows, columns = (torch.arange(n) // self.patch for n in (height, width))
        return rows[:, None] * (int(columns[-1]) + 1) + columns

    def _other(self, pixels: Tensor) -> Tensor:
        if self.baseline == "zero":
            return torch.zeros_like(pixels)
        if self.baseline == "mean":
            return pixels.float().mean(dim=(-2, -1), keepdim=True).to(pixels.dtype).expand_as(pixels)
        return blurred(pixels, self.blur)


def blurred(pixels: Tensor, deviation: float) -> Tensor:
    """Images (batch, channel, height, width) after a Gaussian blur; beyond an edge, its pixels go on.

    Args:
        pixels: the images.
        deviation: standard deviation in pixels; weights beyond four of them are left out.
    """
    reach = math.ceil(4 * deviation)
    distance = torch.arange(-reach, reach + 1, dtype=torch.float32, device=pixels.device)
    weights = (-0.5 * (distance / deviation) ** 2).exp()
    weights = weights / weights.sum()
    count = pixels.shape[1]
    x = F.pad(pixels.float(), (reach, reach, reach, reach), mode="replicate")
    x = F.conv2d(x, weights.view(1, 1, -1, 1).expand(count, -1, -1, -1), groups=count)
    x = F.conv2d(x, weights.view(1, 1, 1, -1).expand(count, -1, -1, -1), groups=count)
    return x.to(pixels.dtype)

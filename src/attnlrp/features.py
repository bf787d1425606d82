"""Features of sparse autoencoders: directions in the residual stream that a dictionary has learnt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from attnlrp.errors import InputError
from attnlrp.intervention import Direction

__all__ = ["SparseAutoencoder"]

# names of SAELens, of PyTorch's modules, of EleutherAI's sparsify; whether the matrix is (feature, hidden)
_MATRICES = {
    "encoder": {"encoder.weight": True, "W_enc": False},
    "decoder": {"W_dec": True, "decoder.weight": False},
}
_VECTORS = {
    "encoder_bias": ("b_enc", "encoder.bias"),
    "decoder_bias": ("b_dec", "decoder.bias"),
    "threshold": ("threshold",),
}


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """A dictionary of features: x = sum of f_i * decoder_i + decoder_bias + error.

    Args:
        place: what a layer is given or gives, such as "layers.10:before" or "layers.10:after".
        encoder: weights (feature, hidden).
        decoder: directions (feature, hidden).
        encoder_bias: (feature,); None for 0.
        decoder_bias: (hidden,); None for 0.
        threshold: below it a feature is 0 (JumpReLU), (feature,); None for ReLU.
        k: only the k largest features of a token are kept (TopK); None for all.
        centred: whether the decoder's bias is taken from x before it is encoded.

    Raises:
        InputError: shapes that do not fit together.

    Example:
        >>> sae = attnlrp.SparseAutoencoder.load("sae.safetensors", "layers.10:after")
        >>> explainer("The ice bear lives in the", latent=sae).top("features")
    """

    place: str
    encoder: Tensor
    decoder: Tensor
    encoder_bias: Tensor | None = None
    decoder_bias: Tensor | None = None
    threshold: Tensor | None = None
    k: int | None = None
    centred: bool = True

    def __post_init__(self) -> None:
        features, hidden = self.decoder.shape
        expected = {"encoder": (features, hidden), "encoder_bias": (features,), "decoder_bias": (hidden,)}
        for name, shape in (expected | {"threshold": (features,)}).items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise InputError(f"{name}: got shape {tuple(value.shape)}, expected {shape} beside this decoder")
        if self.k is not None and not 0 < self.k <= features:
            raise InputError(f"k: got {self.k}, expected 1 to {features}")

    @classmethod
    def load(cls, path: str | Path, place: str, *, k: int | None = None, centred: bool = True) -> SparseAutoencoder:
        """Read the weights from a safetensors file: `W_enc`, `W_dec`, `b_enc`, `b_dec`, `threshold`, or as modules.

        Args:
            path: the file.
            place, k, centred: what the file does not say; see the class.

        Raises:
            InputError: not such a file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: expected a safetensors file of a sparse autoencoder; {error}") from error
        matrices = {
            field: tensors[name].float() if whole else tensors[name].float().T
            for field, names in _MATRICES.items()
            for name, whole in names.items()
            if name in tensors and tensors[name].dim() == 2
        }
        if len(matrices) < 2:
            raise InputError(
                f"{path}: got {sorted(tensors)}, expected matrices W_enc and W_dec, or encoder.weight, decoder.weight"
            )
        vectors = {
            field: tensors[name].float().reshape(-1)
            for field, names in _VECTORS.items()
            for name in names
            if name in tensors
        }
        return cls(place, **matrices, **vectors, k=k, centred=centred)

    @property
    def features(self) -> int:
        """How many there are."""
        return len(self.decoder)

    def encode(self, x: Float[Tensor, "... hidden"]) -> Float[Tensor, "... feature"]:
        """Activations of all features.

        Raises:
            InputError: x has another size.
        """
        if x.shape[-1] != self.decoder.shape[1]:
            raise InputError(f"{self.place}: got {x.shape[-1]} numbers for a token, expected {self.decoder.shape[1]}")
        if self.centred and self.decoder_bias is not None:
            x = x - self.decoder_bias.to(x)
        before = x @ self.encoder.to(x).T
        if self.encoder_bias is not None:
            before = before + self.encoder_bias.to(x)
        found = before.relu()
        if self.threshold is not None:
            found = found * (before > self.threshold.to(x))
        if self.k is not None:
            values, indices = found.topk(self.k, dim=-1)
            found = torch.zeros_like(found).scatter(-1, indices, values)
        return found

    def decompose(
        self, x: Float[Tensor, "... hidden"], gradient: Float[Tensor, "... hidden"]
    ) -> tuple[Float[Tensor, "... unit"], Float[Tensor, "... unit"]]:
        """Activation and relevance of each feature, then of the error, then of the decoder's bias.

        Relevance of a feature is f_i * (decoder_i . gradient); all of them sum to x . gradient. The activation of the
        error is its norm, that of the bias 1.
        """
        found, decoder = self.encode(x), self.decoder.to(x)
        bias = torch.zeros_like(x) if self.decoder_bias is None else self.decoder_bias.to(x).expand_as(x)
        error = x - found @ decoder - bias
        parts = [found * (gradient @ decoder.T), *((v * gradient).sum(-1, keepdim=True) for v in (error, bias))]
        sizes = [found, error.norm(dim=-1, keepdim=True), torch.ones_like(x[..., :1])]
        return torch.cat(sizes, dim=-1), torch.cat(parts, dim=-1)

    def feature(self, index: int) -> Direction:
        """A feature as a direction, for `intervene`.

        Raises:
            InputError: no such feature.
        """
        if not 0 <= index < self.features:
            raise InputError(f"feature {index}: expected 0 to {self.features - 1}")
        return Direction(self.place, self.decoder[index], encode=lambda x: self.encode(x)[..., index])

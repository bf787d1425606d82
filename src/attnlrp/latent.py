"""Relevance inside the model: of neurons, heads, the residual stream, attention weights and dictionary features."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlrp.errors import InputError

__all__ = ["Latent", "LatentLayer", "UnitRelevance"]

_TENSORS = ("total", "indices", "relevance", "activation", "attention")


@dataclass(frozen=True)
class UnitRelevance:
    """One unit of an explanation.

    Args:
        unit: its address, such as "layers.16.mlp:394".
        relevance: summed over the tokens.
        token: index, into `Explanation.tokens`, of the token at which its relevance is largest in magnitude; a position
            in the layer where its positions are not tokens.
        activation: what it computes there; for a head the norm of its output.
    """

    unit: str
    relevance: float
    token: int
    activation: float


@dataclass(frozen=True)
class LatentLayer:
    """Relevance of the units of one layer. Unit: relevance.

    Args:
        name: address of the layer, such as "layers.16.mlp"; "layers.17:before" in the residual stream,
            "layers.17.self_attn.weights" of attention weights, "layers.17:after.features" of a dictionary.
        kind: "neurons", "heads", "residual", "attention" or "features".
        units: number of units in the layer; of a dictionary the last two are its error and its bias.
        total: relevance summed over all of its units, at each token; what the ledger books there.
        indices: the units that were kept, those of the largest |relevance| summed over tokens first.
        relevance: of each kept unit at each token.
        activation: of each kept unit at each token; of a head, the norm of its output.
        offset: index of its first token in `Explanation.tokens`; None where its positions are not tokens.
        attention: relevance of each attention weight; only of kind "attention".
    """

    name: str
    kind: str
    units: int
    total: Float[Tensor, "target token"]
    indices: Int[Tensor, "target kept"]
    relevance: Float[Tensor, "target kept token"]
    activation: Float[Tensor, "target kept token"]
    offset: int | None = 0
    attention: Float[Tensor, "target head query key"] | None = None

    def address(self, index: int) -> str:
        """Address of one of its units; the last two of a dictionary are its error and its bias."""
        if self.kind == "residual":
            return self.name
        beside = {self.units - 2: "error", self.units - 1: "bias"} if self.kind == "features" else {}
        return f"{self.name}:{beside.get(index, index)}"

    def merged(self, spans: Sequence[tuple[int, int]]) -> LatentLayer:
        """The same with neighbouring tokens joined: relevance summed, the largest activation kept.

        Args:
            spans: first token and the one behind the last, of all that the explanation has.
        """
        if self.offset is None:
            return self
        first, count = self.offset, self.total.shape[-1]
        within = [(a - first, b - first) for a, b in spans if first <= a and b <= first + count]
        activation = torch.stack([_largest(self.activation[..., a:b]) for a, b in within], dim=-1)
        attention = self.attention
        if attention is not None:
            attention = _joined(_joined(attention, within).transpose(2, 3), within).transpose(2, 3)
        return dataclasses.replace(
            self,
            total=_joined(self.total, within),
            relevance=_joined(self.relevance, within),
            activation=activation,
            offset=sum(b <= first for _, b in spans),
            attention=attention,
        )


@dataclass(frozen=True)
class Latent:
    """What was recorded inside the model while it was explained.

    Args:
        layers: in the order of computation.
    """

    layers: tuple[LatentLayer, ...]

    def __iter__(self) -> Iterator[LatentLayer]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> LatentLayer:
        """The layer with an address.

        Raises:
            InputError: it was not recorded.
        """
        found = [layer for layer in self.layers if layer.name == name]
        if not found:
            names = ", ".join(layer.name for layer in self.layers[:8])
            raise InputError(f"latent: no layer {name!r} was recorded; expected one of {names} and so on")
        return found[0]

    def of(self, kind: str) -> tuple[LatentLayer, ...]:
        """The layers of one kind.

        Raises:
            InputError: the kind was not recorded.
        """
        found = tuple(layer for layer in self.layers if layer.kind == kind)
        if not found:
            kinds = sorted({layer.kind for layer in self.layers})
            raise InputError(f"latent: got {kind!r}, expected one of {kinds}, or latent=({kind!r},) in the explanation")
        return found

    def top(self, kind: str, count: int = 10, *, target: int = 0) -> list[UnitRelevance]:
        """The units of the largest |relevance| in all layers, largest first.

        Raises:
            InputError: fewer units were kept in each layer.
        """
        layers = self.of(kind)
        short = next((x for x in layers if x.indices.shape[1] < min(count, x.units)), None)
        if short is not None:
            kept = short.indices.shape[1]
            raise InputError(f"latent: top {count} of layers that keep {kept} units; pass latent_top={count}")
        found = [
            (layer, k, total)
            for layer in layers
            for k, total in enumerate(layer.relevance[target].double().sum(dim=-1).tolist())
        ]
        found.sort(key=lambda entry: -abs(entry[2]))
        return [_unit(layer, target, k, total) for layer, k, total in found[:count]]

    def trace(self, kind: str = "residual", *, target: int = 0) -> tuple[list[str], Float[Tensor, "layer token"]]:
        """Names of the layers of a kind, and the relevance of each at each token; layers of other lengths are left out.

        Raises:
            InputError: the kind was not recorded.
        """
        layers = [layer for layer in self.of(kind) if layer.offset == self.of(kind)[0].offset]
        layers = [layer for layer in layers if layer.total.shape == layers[0].total.shape]
        return [layer.name for layer in layers], torch.stack([layer.total[target] for layer in layers])

    def merged(self, spans: Sequence[tuple[int, int]]) -> Latent:
        """The same with neighbouring tokens joined, see `LatentLayer.merged`."""
        return Latent(tuple(layer.merged(spans) for layer in self.layers))

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data, tensors as lists."""
        return [
            {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(layer).items()} for layer in self.layers
        ]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by a name."""
        return {
            f"latent.{k}.{name}": value.contiguous()
            for k, layer in enumerate(self.layers)
            for name in _TENSORS
            if (value := getattr(layer, name)) is not None
        }

    def described(self) -> list[dict[str, Any]]:
        """What `tensors` leaves out."""
        return [{k: v for k, v in vars(layer).items() if k not in _TENSORS} for layer in self.layers]

    @classmethod
    def from_dict(cls, data: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Latent:
        """The inverse of `to_dict`, or of `described` and `tensors`."""
        layers = []
        for k, fields in enumerate(data):
            own = dict(fields)
            for name in _TENSORS:
                value = own.get(name, tensors.get(f"latent.{k}.{name}"))
                own[name] = torch.tensor(value, dtype=_dtype(name, dtype)) if isinstance(value, list) else value
            layers.append(LatentLayer(**own))
        return cls(tuple(layers))


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if name == "indices" else dtype


def _unit(layer: LatentLayer, target: int, k: int, total: float) -> UnitRelevance:
    at = int(layer.relevance[target, k].abs().argmax())
    index = int(layer.indices[target, k])
    return UnitRelevance(layer.address(index), total, at + (layer.offset or 0), layer.activation[target, k, at].item())


def _joined(x: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    return torch.stack([x[..., a:b].sum(dim=-1) for a, b in spans], dim=-1)


def _largest(x: Tensor) -> Tensor:
    """The entry of the largest magnitude along the last axis."""
    return x.gather(-1, x.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)

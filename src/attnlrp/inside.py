"""What one explanation asks about the inside of the model: units to record, to go through, or to explain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlrp.errors import InputError, TargetError
from attnlrp.features import SparseAutoencoder
from attnlrp.latent import Latent
from attnlrp.recording import Recorder, is_in_decoder
from attnlrp.targets import Neuron
from attnlrp.units import Rows, Site, Taps, Unit, resolve

__all__ = ["Inside", "Wanted"]


@dataclass(frozen=True)
class Wanted:
    """Options of an explanation that look inside the model.

    Args:
        latent: kinds of units whose relevance is recorded, and dictionaries of features.
        top: units that are kept of each layer; None for all.
        through: units that relevance must go through.
    """

    latent: tuple[str | SparseAutoencoder, ...] = ()
    top: int | None = 32
    through: tuple[Unit, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.latent or self.through)


class Inside:
    """Records, conditions and reads units of one forward pass; open it inside of `propagate`.

    Args:
        model: the model that is explained.
        sites: its units.
        wanted: what is asked for.
        neurons: neurons that are explained themselves.
        batch: number of texts in the pass.

    Raises:
        InputError: a unit that the model does not have.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], wanted: Wanted, neurons: Sequence[Neuron], *, batch: int
    ) -> None:
        self._sites, self._batch = sites, batch
        self._recorder = Recorder(model, sites, wanted.latent, top=wanted.top, batch=batch) if wanted.latent else None
        self._units: dict[Site, list[int]] = {}
        for site, index in [resolve(sites, unit) for unit in wanted.through]:
            self._units.setdefault(site, []).append(index)
        read = [resolve(sites, neuron)[0] for neuron in neurons]
        self._live: dict[Site, list[tuple[Tensor, Rows | None]]] = {site: [] for site in (*self._units, *read)}
        self._taps = Taps(model, {site: partial(self._keep, site) for site in self._live})
        self._open = ExitStack()

    def __enter__(self) -> Inside:
        if self._recorder is not None:
            self._open.enter_context(self._recorder)
        if self._live:
            self._open.enter_context(self._taps)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.close()

    def _keep(self, site: Site, x: Tensor, rows: Rows | None) -> Tensor:
        live = x.view_as(x)
        self._live[site].append((live, rows))
        return live

    def activation(self, neuron: Neuron, row: int, position: int | None, length: int) -> tuple[Tensor, int]:
        """What a neuron computes for one text of the batch, live, and at which token.

        Args:
            neuron: the explained one.
            row: the text.
            position: the token; None for the one at which the neuron is the most active.
            length: number of tokens of the text.

        Raises:
            TargetError: the neuron is not computed at that token.
        """
        site, index = resolve(self._sites, neuron)
        values = [self._by_token(x[..., index], rows) for x, rows in self._live[site]]
        if not values:
            raise TargetError(f"target: {site.name} computes nothing for this text, as an expert that is not chosen")
        own = torch.stack(values).sum(dim=0)[row, :length]
        at = int(own.detach().abs().argmax()) if position is None else position
        return own[at], at

    def is_in_decoder(self, neuron: Neuron) -> bool:
        """Whether a neuron belongs to the decoder beside an encoder."""
        return is_in_decoder(resolve(self._sites, neuron)[0].name)

    def address(self, neuron: Neuron) -> str:
        """Its address, such as "layers.16.mlp:394"."""
        site, index = resolve(self._sites, neuron)
        return f"{site.name}:{index}"

    def _by_token(self, x: Tensor, rows: Rows | None) -> Tensor:
        if rows is not None:
            x = x.new_zeros(rows.size).index_add(0, rows.tokens, x)
        return x.reshape(self._batch, -1)

    def gradients(self, total: Tensor, leaves: Sequence[Tensor], target: int) -> tuple[Tensor, ...]:
        """Gradients of a target at the leaves, of what goes through the wanted units only; the graph is kept.

        From the target to the units of the last layer, then from these to the units of the layer before it, and so on:
        what goes past a layer, in the residual stream, is left out.

        Raises:
            InputError: the wanted units do not lead to the leaves.
        """
        if self._recorder is not None:
            self._recorder.begin(target)
        outputs: list[Tensor] = [total]
        weights: list[Tensor] | None = None
        for sites in reversed(self._layers()):
            live = [
                (x, _mask(site, x, self._units[site])) for site in sites for x, _ in self._live[site] if x.requires_grad
            ]
            outputs, weights = self._step(outputs, weights, live)
        found = torch.autograd.grad(outputs, leaves, weights, retain_graph=True, allow_unused=True)
        if self._units and all(gradient is None for gradient in found):
            names = ", ".join(site.name for site in self._units)
            raise InputError(f"through: {names} does not read the explained input, as the text half beside an image")
        return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))

    def _step(
        self, outputs: list[Tensor], weights: list[Tensor] | None, live: list[tuple[Tensor, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        xs = [x for x, _ in live]
        if not xs:
            raise InputError("through: the model computes none of these units for this text")
        found = self._grad(outputs, xs, weights)
        return xs, [g * mask for g, (_, mask) in zip(found, live, strict=True)]

    @staticmethod
    def _grad(
        outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor] | None
    ) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            outputs, inputs, weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    def _layers(self) -> list[list[Site]]:
        """Sites of the wanted units in the order of computation; experts of a layer side by side."""
        order = [site for site in self._sites if site in self._units]
        layers: dict[str, list[Site]] = {}
        for site in order:
            layers.setdefault(f"{site.kind} {re.sub(r'[.]experts[.][0-9]+$', '.experts', site.name)}", []).append(site)
        return list(layers.values())

    def latent(self, row: int, targets: int, lengths: Sequence[int]) -> Latent | None:
        """What was recorded for one text, see `Recorder.latent`; None if nothing was to be."""
        return None if self._recorder is None else self._recorder.latent(row, targets, lengths)


def _mask(site: Site, x: Tensor, units: Sequence[int]) -> Tensor:
    """1 at the numbers of the wanted units, 0 elsewhere: (width,)."""
    mask = x.new_zeros(site.units)
    mask[list(units)] = 1
    return mask.repeat_interleave(site.width // site.units)

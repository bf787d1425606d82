"""What is read off the output of a model: the logits of a slot, what a neuron computes, what the model says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from attnlrp.columns import widen
from attnlrp.explanation import ExplainedTarget
from attnlrp.inside import Inside
from attnlrp.latent import Latent
from attnlrp.targets import Neuron
from attnlrp.tasks import LOGITS, Request, Slot

__all__ = ["Outputs", "Prediction", "places_of"]


class Prediction(NamedTuple):
    """What a model says of a text.

    Args:
        logits: (output,), of the next token, the first mask, or the classes.
        generated: what it writes after the text.
        name: index of an output -> its name.
    """

    logits: Tensor
    generated: str
    name: Callable[[int], str]


@dataclass(frozen=True)
class Outputs:
    """The outputs of one text of a batch; called with a slot: its logits (output,)."""

    output: Any
    row: int
    kept: dict[int, int]
    request: Request
    inside: Inside | None = None

    def __call__(self, slot: Slot) -> Tensor:
        """The logits of a slot (output,); of a neuron its activation, alone."""
        if isinstance(slot.target, Neuron):
            return self._activation(slot.target, slot.position)[0].reshape(1)
        return self.at(slot.head, slot.position)

    def _activation(self, neuron: Neuron, position: int | None) -> tuple[Tensor, int]:
        """What a neuron computes, and the column of the token at which it does."""
        assert self.inside is not None
        decoder = self.inside.is_in_decoder(neuron) and bool(self.request.decoder)
        length = len(self.request.decoder) if decoder else len(self.request.ids)
        at = None if self.request.decoder and not decoder else position
        value, at = self.inside.activation(neuron, self.row, at, length)
        return value, at + len(self.request.ids) * decoder

    def explained(self, neuron: Neuron, slot: Slot, value: float) -> ExplainedTarget:
        """A neuron as a target."""
        assert self.inside is not None
        return ExplainedTarget(
            self.inside.address(neuron), None, self._activation(neuron, slot.position)[1], value, unit="activation"
        )

    def latent(self, targets: int) -> Latent | None:
        """What was recorded of this text."""
        lengths = [len(self.request.ids), *([len(self.request.decoder)] if self.request.decoder else [])]
        return None if self.inside is None else self.inside.latent(self.row, targets, lengths)

    def at(self, head: str, position: int | None) -> Tensor:
        """The logits of a head at a position; None where the whole text has one output."""
        logits: Tensor = getattr(self.output, head)[self.row]
        if position is not None:
            logits = logits[self.kept[position]]
        elif head != LOGITS:  # an output for each token of the text, without its padding
            logits = logits[: len(self.request.ids)]
        return widen(logits)


def places_of(requests: Sequence[Request], kept: dict[int, int]) -> list[set[tuple[int, int]]]:
    """For each row, over all texts: the rows (text, index) of the logits that it is made of."""
    found: list[set[tuple[int, int]]] = [set() for _ in range(max(len(r.rows) for r in requests))]
    for text, request in enumerate(requests):
        for own, slots in zip(found, request.rows, strict=False):
            own |= {(text, kept[s.position]) for s in slots if s.position is not None}
    return found

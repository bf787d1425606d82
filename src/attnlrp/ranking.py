"""The best samples of each unit of a layer, kept while a data set goes by; and what such a sample is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlrp.explanation import join_pieces

__all__ = ["Passage", "Ranking", "ReferenceSample"]

NONE = -1


@dataclass(frozen=True)
class Passage:
    """A text of the data set, as the model has read it.

    Args:
        name: of its record.
        text: what was read, cut to the length of the pass; of an image, its file.
        tokens: text of each token, see `attnlrp.tokens.pieces`; none of an image.
        words: index of the word that each token belongs to.
    """

    name: str
    text: str
    tokens: tuple[str, ...]
    words: tuple[int, ...]

    def word(self, position: int) -> str:
        """The word that a token is part of, without spaces around it unless it is all spaces; empty behind the last."""
        if not 0 <= position < len(self.tokens):
            return ""
        parts = tuple(t for t, w in zip(self.tokens, self.words, strict=True) if w == self.words[position])
        word = join_pieces(parts, "")
        return word.strip() or word

    def word_after(self, position: int) -> str:
        """The word behind the one that a token is part of; empty behind the last."""
        after = next((k for k, w in enumerate(self.words) if w > self.words[position]), len(self.words))
        return self.word(after)


@dataclass(frozen=True)
class ReferenceSample:
    """A text on which a unit is among its most active or most relevant.

    Args:
        unit: its address, such as "layers.16.mlp:394".
        by: what it is ranked by, such as "activation".
        rank: 1 for the best.
        value: activation at the peak, or relevance of the text; relevance is in logits.
        sample: number of the text in the data set.
        position: token at which the unit has its peak.
        passage: the text.
        activation: of the unit at each token; None if it was not computed again, 0 where a router leaves an expert out.
    """

    unit: str
    by: str
    rank: int
    value: float
    sample: int
    position: int
    passage: Passage
    activation: Float[Tensor, " token"] | None = None

    @property
    def word(self) -> str:
        """The word at the peak."""
        return self.passage.word(self.position)


@dataclass(frozen=True)
class Ranking:
    """The best samples of each unit of a layer, best first; of equal ones, those that came first.

    Args:
        values: what they are ranked by; -inf where there are fewer samples than places.
        samples: numbers of the samples; -1 where there is none.
        positions: their peaks.
    """

    values: Float[Tensor, "unit top"]
    samples: Int[Tensor, "unit top"]
    positions: Int[Tensor, "unit top"]

    @classmethod
    def empty(cls, units: int, top: int, dtype: torch.dtype) -> Ranking:
        """Places without samples."""
        none = torch.full((units, top), NONE, dtype=torch.int32)
        return cls(torch.full((units, top), -torch.inf, dtype=dtype), none, none.clone())

    def add(self, sample: int, values: Float[Tensor, " unit"], positions: Int[Tensor, " unit"]) -> None:
        """One more sample, in place; only the units that rank it above their last one are touched."""
        better = (values > self.values[:, -1]).nonzero().squeeze(-1)
        if not len(better):
            return
        new = values[better, None].to(self.values), torch.full((len(better), 1), sample), positions[better, None]
        own = self.values[better], self.samples[better], self.positions[better]
        merged = _best([torch.cat([a, b.to(a)], dim=1) for a, b in zip(own, new, strict=True)], self.values.shape[1])
        for kept, found in zip((self.values, self.samples, self.positions), merged, strict=True):
            kept[better] = found

    def merge(self, later: Ranking, offset: int) -> Ranking:
        """The ranking of both data sets, one after the other.

        Args:
            later: of the same units.
            offset: number of samples in this data set, by which those of the other are renumbered.
        """
        samples = torch.where(later.samples == NONE, NONE, later.samples + offset)
        pairs = (self.values, later.values), (self.samples, samples), (self.positions, later.positions)
        return Ranking(*_best([torch.cat([a, b.to(a)], dim=1) for a, b in pairs], self.values.shape[1]))


def _best(columns: Sequence[Tensor], top: int) -> list[Tensor]:
    """The best places of each row, by the first of the columns (unit, place); of equal ones the first."""
    order = columns[0].argsort(dim=1, descending=True, stable=True)[:, :top]
    return [column.gather(1, order).contiguous() for column in columns]

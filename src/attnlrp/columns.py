"""The columns of an explanation: what a model reads, from the embeddings that it looks up to their relevance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnlrp.errors import ModelError

__all__ = ["Columns", "arrange", "widen"]


@dataclass(frozen=True)
class Columns:
    """Tokens that are read at one place of the model.

    Args:
        ids: their indices (batch, token), padded on the right.
        embeddings: leaves that stand for them, each (batch, token, hidden); their relevance is summed.
        patches: leaves (patch, hidden) for the image patches among them, added again in deeper layers.
        images: whether a token stands for a patch (token,); only with `patches`.
    """

    ids: Tensor
    embeddings: list[Tensor] = field(default_factory=list)
    patches: list[Tensor] = field(default_factory=list)
    images: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """All that relevance is taken of."""
        return [*self.embeddings, *self.patches]

    def relevance(self, gradients: Sequence[Tensor]) -> Tensor:
        """value * gradient of the leaves, summed over the hidden dimension in float32 or better: (batch, token)."""
        rows = [(widen(x.detach()) * widen(g)).sum(dim=-1) for x, g in zip(self.leaves, gradients, strict=True)]
        count = len(self.embeddings)
        total = torch.stack([row.reshape(self.ids.shape) for row in rows[:count]]).sum(dim=0)
        for row in rows[count:]:
            total[0, self.images] += row
        return total


def arrange(
    looked_up: Sequence[tuple[Tensor, Tensor]], ids: Tensor, *, encoder_decoder: bool, name: str
) -> list[Columns]:
    """Sort look-ups by what they read: the text, and what the decoder beside an encoder reads.

    Args:
        looked_up: (token indices, embeddings) in order of execution; an encoder reads before its decoder.
        ids: what the model was given (batch, token).
        encoder_decoder: whether there is a decoder beside an encoder.
        name: what to call the model in an error.

    Raises:
        ModelError: the model does not look up its text, or something else too.
    """
    found: list[Columns] = []
    for shown, embeddings in looked_up:
        if not found:
            found.append(Columns(ids))
        elif encoder_decoder and len(found) == 1:
            found.append(Columns(shown))
        if found[-1].ids.numel() != shown.numel():
            raise ModelError(f"{name} looks up other tokens than those of its text: use attnlrp.propagate")
        found[-1].embeddings.append(embeddings)
    if not found:
        raise ModelError(f"{name} does not look its tokens up in get_input_embeddings(): use attnlrp.propagate")
    return found


def widen(x: Tensor) -> Tensor:
    """Half precision as float32; the rest as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

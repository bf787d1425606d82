"""A bag of embeddings: a text model whose explanation is known in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput


class Bag(nn.Module):
    """logits = g(sum of w . e_t) for each of two classes, with g the identity or the square."""

    def __init__(self, *, power: int = 1, vocab: int = 20, hidden: int = 6) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, hidden)
        self.head = nn.Linear(hidden, 2, bias=False)
        self.power = power
        self.seen: list[Tensor] = []  # the embeddings of each pass (batch, token, hidden)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        embeddings = self.table(input_ids)
        self.seen.append(embeddings.detach())
        if attention_mask is not None:
            embeddings = embeddings * attention_mask[..., None]
        return SequenceClassifierOutput(logits=self.head(embeddings.sum(dim=1)) ** self.power)


def first_class(output: Any) -> Tensor:
    logits: Tensor = output.logits[:, 0]
    return logits


def bag(power: int = 1) -> tuple[Bag, dict[str, Tensor], Tensor]:
    """The model, one text of five tokens, and the contribution w . e_t of each token (token,)."""
    torch.manual_seed(0)
    model = Bag(power=power).eval()
    ids = torch.tensor([[3, 7, 1, 12, 5]])
    contribution = model.table(ids)[0] @ model.head.weight[0]
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, contribution.detach()

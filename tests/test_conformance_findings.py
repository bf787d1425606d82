"""What the conformance suite has brought to light, each in the smallest model that shows it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnlrp


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_is_affine_in_either_memory_order(order: torch.memory_format) -> None:
    # torch's own backward pass is wrong on a CPU for a gradient in channels-last order
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    mean, weight, bias = torch.randn(3, 8, dtype=torch.float64, generator=generator)
    variance = torch.rand(8, dtype=torch.float64, generator=generator) + 0.5
    gradient = torch.randn(2, 8, 3, 3, dtype=torch.float64, generator=generator).contiguous(memory_format=order)
    with attnlrp.propagate(nn.Identity()):
        y = F.batch_norm(x, mean, variance, weight, bias)
    (found,) = torch.autograd.grad(y, x, gradient)
    torch.testing.assert_close(found, gradient * (weight / (variance + 1e-5).sqrt()).view(1, -1, 1, 1))


def test_a_gate_at_zero_does_not_blow_up_what_cancels_behind_it() -> None:
    x = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    with attnlrp.propagate(nn.Identity()):
        decay = (x[:, None] - x[None, :]).exp()
    (found,) = torch.autograd.grad(decay.diagonal().sum(), x)
    assert (found == 0).all()


class Lookup(nn.Module):
    """A model that does not tell its embedding, and makes a leaf of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=11)
        self.positions, self.tokens = nn.Embedding(5, 4), nn.Embedding(11, 4)
        self.head = nn.Linear(4, 3)

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        own = torch.ones_like(x).requires_grad_()
        return self.head(x + self.head.weight.mean() * own).mean(1)


def test_an_embedding_is_found_by_its_size_and_an_own_leaf_is_a_constant() -> None:
    torch.manual_seed(0)
    ledger = attnlrp.audit(Lookup().double(), {"ids": torch.tensor([[1, 2, 3]])})
    assert ledger.closes, ledger.leaks()
    assert set(ledger.inputs) == {"embeddings"}
    assert ledger.absorbed["constant"] != 0

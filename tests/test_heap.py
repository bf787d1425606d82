"""Freed memory given back to the system: when, and that checkpointing asks for it."""

from __future__ import annotations

import sys

import pytest
import torch

import tiny
from attnlrp import heap, propagate
from attnlrp.checkpoint import checkpointed
from attnlrp.heap import LARGE, SLACK


def test_memory_is_given_back_when_the_process_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, given_back = [0], []

    def trim(_: int) -> int:
        given_back.append(resident[0])
        resident[0] //= 2
        return 1

    monkeypatch.setattr(heap, "_floor", 10 * SLACK)
    monkeypatch.setattr(heap, "_trim", lambda: trim)
    monkeypatch.setattr(heap, "_anonymous", lambda: resident[0])
    for size in (10, 11, 12, 6.5, 7.1, 3, 4, 4.1):  # beyond 11 it is halved; what it shrinks to is the new floor
        resident[0] = int(size * SLACK)
        heap.give_back()
    assert [size / SLACK for size in given_back] == pytest.approx([12, 7.1, 4.1], abs=1e-6)


def test_systems_without_glibc_keep_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_trim", lambda: None)
    monkeypatch.setattr(heap, "_anonymous", lambda: pytest.fail("nothing is to be measured"))
    heap.give_back()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_is_measured() -> None:
    before = heap._anonymous()
    block = torch.ones(2**26)
    assert heap._anonymous() - before > 0.9 * block.nbytes


def test_each_layer_gives_back_before_it_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("attnlrp.checkpoint.give_back", lambda slack: calls.append(slack))
    model = tiny.build("llama", num_hidden_layers=4)
    with propagate(model) as propagation, checkpointed(model):
        total = model(input_ids=torch.arange(3, 20)[None], use_cache=False).logits.max()
    assert len(calls) == 4
    ((_, embeddings),) = propagation.embeddings
    torch.autograd.grad(total, embeddings)
    assert len(calls) == 8


def test_large_tensors_are_looked_after(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("attnlrp.engine.give_back", lambda: calls.append(1))
    linear = torch.nn.Linear(64, 64)
    for rows, expected in ((16, 0), (LARGE // 4 // 64, 2)):
        with propagate(linear):
            linear(torch.ones(rows, 64, requires_grad=True)).relu()
        assert len(calls) == expected

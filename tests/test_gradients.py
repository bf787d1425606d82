"""Many targets of one forward pass: batched backward passes against one for each, and what cannot be batched."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from attnlrp import Add, Explainer, Scale, gradients, intervene, propagate, weight_relevance
from attnlrp.checkpoint import checkpointed
from attnlrp.gradients import watch_head
from nearness import close
from tiny_tokenizers import build

TEXT = "Paris is the capital of France. Berlin is the capital of"


def explainer(name: str = "llama", **options: Any) -> Explainer:
    return Explainer(*build(name), **options)


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_batched_passes_equal_those_one_by_one(name: str, saving: bool) -> None:
    model = tiny.build(name)
    with propagate(model) as propagation, checkpointed(model) if saving else nullcontext(), watch_head(model) as head:
        logits = model(**tiny.inputs(name)).logits
    leaves = [x for _, x in propagation.embeddings]
    rows = logits[0] if logits.dim() == 3 else logits
    scalars = [rows[-1, 0], rows[-1, 2], rows[0, 1], rows[0, 2] - rows[-1, 1]]
    last = len(rows) - 1
    places = [{(0, last)}, {(0, last)}, {(0, 0)}, {(0, 0), (0, last)}] if logits.dim() == 3 else ()
    found = list(gradients.gradients(scalars, leaves, at_once=8, head=head, places=places))
    with propagate(model) as propagation:
        logits = model(**tiny.inputs(name)).logits
    rows = logits[0] if logits.dim() == 3 else logits
    leaves = [x for _, x in propagation.embeddings]
    for scalar, own in zip([rows[-1, 0], rows[-1, 2], rows[0, 1], rows[0, 2] - rows[-1, 1]], found, strict=True):
        expected = torch.autograd.grad(scalar, leaves, retain_graph=True)
        for a, b in zip(own, expected, strict=True):
            assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99999


@pytest.mark.parametrize("memory", ["full", "checkpoint"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_row_for_each_target(name: str, memory: Any) -> None:
    explain = explainer(name, memory=memory)
    together = explain(TEXT, target=[5, 9, 5, 20], position=[-1, -1, 3, 2])
    for row, (target, position) in zip(together.relevance, [(5, -1), (9, -1), (5, 3), (20, 2)], strict=True):
        assert close(row, explain(TEXT, target=target, position=position).relevance[0])


def test_batches_of_texts_with_several_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    explain = explainer()
    texts = [TEXT, "the film was great"]
    together = explain(texts, target=[5, 9])
    for text, found in zip(texts, together, strict=True):
        assert close(found.relevance, explain(text, target=[5, 9]).relevance)


def test_generated_tokens_share_backward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    explain, passes = explainer(), []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(k) or grad(*a, **k))
    found = explain(TEXT, generate=6)
    batched = [p for p in passes if p.get("is_grads_batched")]
    assert len(found.relevance) > 2
    assert len(batched) == 1
    assert len(passes) == 2  # the other one goes through the head, for all rows of the logits at once


def test_chunks_follow_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    explain, passes = explainer(), []
    expected = explain(TEXT, target=[3, 4, 5, 6, 7]).relevance
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(k) or grad(*a, **k))
    monkeypatch.setattr("attnlrp.memory.AT_ONCE", 2 * expected.shape[-1])
    assert close(explain(TEXT, target=[3, 4, 5, 6, 7]).relevance, expected)
    assert [p["is_grads_batched"] for p in passes] == [True, True, False]


def test_weights_hear_of_each_target() -> None:
    explain = Explainer(*build("llama", torch.float64))
    together = weight_relevance(explain, [TEXT], target=[5, 9])
    single = [weight_relevance(explain, [TEXT], target=target) for target in (5, 9)]
    for name, relevance in together.items():
        torch.testing.assert_close(relevance, single[0][name] + single[1][name])


def test_interventions_act_on_each_target() -> None:
    explain = explainer()
    plain = explain(TEXT, target=[5, 9]).relevance
    with intervene(explain.model, {"layers.1.mlp:3": Scale(0.5), "layers.0.mlp:1": Add(2.0)}):
        together = explain(TEXT, target=[5, 9]).relevance
        single = [explain(TEXT, target=target).relevance[0] for target in (5, 9)]
    assert close(together, torch.stack(single))
    assert not close(together, plain)


class _Unbatchable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if bool(torch.isnan(grad).any()):  # a value decides: vmap refuses
            raise ValueError("a gradient is not a number")
        return grad


class _Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ValueError("this backward pass is broken")


def test_what_cannot_be_batched_runs_one_by_one() -> None:
    x = torch.randn(4, requires_grad=True)
    y = _Unbatchable.apply(x) ** 2
    found = list(gradients.gradients([y[0], y[1] * y[2], y[3]], [x], at_once=8))
    z = x**2
    expected = [torch.autograd.grad(s, x, retain_graph=True)[0] for s in (z[0], z[1] * z[2], z[3])]
    torch.testing.assert_close(torch.stack([g for (g,) in found]), torch.stack(expected))


def test_a_real_error_is_not_hidden() -> None:
    x = torch.randn(4, requires_grad=True)
    y = _Broken.apply(x) ** 2
    with pytest.raises(ValueError, match="this backward pass is broken"):
        list(gradients.gradients([y[0], y[1]], [x], at_once=8))


def test_leaves_that_a_scalar_does_not_depend_on_get_zero() -> None:
    x, other = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    found = list(gradients.gradients([x[0], other.sum()], [x, other], at_once=8))
    assert [g.tolist() for g in found[0]] == [[1, 0, 0], [0, 0]]
    assert [g.tolist() for g in found[1]] == [[0, 0, 0], [1, 1]]


def test_a_way_around_the_head_is_noticed() -> None:
    model = tiny.build("llama")
    with propagate(model) as propagation, watch_head(model) as head:
        logits = model(**tiny.inputs("llama"), use_cache=False).logits
    ((_, embeddings),) = propagation.embeddings
    assert head.is_between([logits[0, -1, 5]], [embeddings])
    assert not head.is_between([logits[0, -1, 5] + embeddings.sum()], [embeddings])


def test_hooks_are_removed() -> None:
    model = tiny.build("llama")
    with watch_head(model):
        assert len(model.lm_head._forward_pre_hooks) == 1
    assert not model.lm_head._forward_pre_hooks

"""Relevance of weights: against the gradients of parameters, and against the neurons that they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnlrp import GRADIENT, Explainer, Explanation, InputError, weight_relevance
from test_latent import mixtral
from tiny_tokenizers import build

TEXT = "Paris is the capital of"
TEXTS = [TEXT, "he said not"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_without_rules_it_is_the_gradient_of_the_parameter(name: str) -> None:
    ours = Explainer(*build(name, torch.float64), rules=GRADIENT)
    found = weight_relevance(ours, [TEXT])
    explanation = ours(TEXT)
    assert isinstance(explanation, Explanation)
    logits = ours.model(input_ids=torch.tensor([explanation.token_ids])).logits[0]
    row = logits[-1] if logits.dim() == 2 else logits
    row[explanation.target.id].backward()
    parameters = dict(ours.model.named_parameters(remove_duplicate=False))
    assert len(found) > 8
    for key, relevance in found.items():
        gradient = parameters[key].grad
        assert gradient is not None
        if parameters[key] is ours.model.get_input_embeddings().weight:
            continue  # tied: its gradient is also that of the tokens
        torch.testing.assert_close(relevance, (parameters[key] * gradient).detach())
    ours.model.zero_grad()


@pytest.mark.parametrize("memory", ["full", "checkpoint"])
def test_weights_share_what_their_neurons_get(memory: Any) -> None:
    ours = Explainer(*build("llama", torch.float64), memory=memory)
    found = weight_relevance(ours, TEXTS, weights="*.down_proj.*")
    assert set(found) == {f"model.layers.{k}.mlp.down_proj.weight" for k in range(2)}
    for k in range(2):
        explained = [ours(text, latent="neurons", latent_top=None) for text in TEXTS]
        wanted = torch.zeros(48, dtype=torch.float64)
        for e in explained:
            layer = e.latent[f"layers.{k}.mlp"]
            wanted[layer.indices[0]] += layer.relevance[0].sum(-1)
        torch.testing.assert_close(found[f"model.layers.{k}.mlp.down_proj.weight"].sum(0), wanted)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_weights_of_experts(implementation: str) -> None:
    ours = mixtral(implementation)
    found = weight_relevance(ours, [TEXT], weights="*experts.down_proj")
    explanation = ours(TEXT, latent="neurons", latent_top=None)
    for k in range(2):
        relevance = found[f"model.layers.{k}.mlp.experts.down_proj"]
        assert relevance.shape == (4, 32, 48)
        for layer in explanation.latent.of("neurons"):
            if layer.name.startswith(f"layers.{k}."):
                own = relevance[int(layer.name[-1])].sum(0)[layer.indices[0]]
                torch.testing.assert_close(own, layer.relevance[0].sum(-1), rtol=1e-4, atol=1e-5)


def test_sums_over_texts_and_targets() -> None:
    ours = Explainer(*build("llama", torch.float64))
    both = weight_relevance(ours, TEXTS, weights="*q_proj*")
    one, other = (weight_relevance(ours, [text], weights="*q_proj*") for text in TEXTS)
    sizes = weight_relevance(ours, TEXTS, weights="*q_proj*", absolute=True)
    for name, relevance in both.items():
        torch.testing.assert_close(relevance, one[name] + other[name])
        torch.testing.assert_close(sizes[name], one[name].abs() + other[name].abs())
    two = weight_relevance(ours, [TEXT], weights="*q_proj*", target=["the", "is"])
    first, second = (weight_relevance(ours, [TEXT], weights="*q_proj*", target=t) for t in ("the", "is"))
    for name, relevance in two.items():
        torch.testing.assert_close(relevance, first[name] + second[name])


def test_the_explanation_stays_as_it_is() -> None:
    ours = Explainer(*build("llama"))
    before = ours(TEXT).relevance  # type: ignore[union-attr]
    weight_relevance(ours, [TEXT])
    assert torch.equal(ours(TEXT).relevance, before)  # type: ignore[union-attr]
    assert all(p.grad is None for p in ours.model.parameters())


def test_what_cannot_be_had_is_refused() -> None:
    ours = Explainer(*build("llama"))
    with pytest.raises(InputError, match="no weight is called 'mlp'; expected a pattern of names such as"):
        weight_relevance(ours, [TEXT], weights="mlp")
    with pytest.raises(InputError, match="got no texts"):
        weight_relevance(ours, [])
    with pytest.raises(InputError, match="no weight of that name reads what depends on the text"):
        weight_relevance(ours, [TEXT], weights="*embed_tokens*")

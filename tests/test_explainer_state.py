"""An explanation changes nothing: parameters, gradients, modes, hooks, and the forward pass stay as they were."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnlrp import Explainer, Explanation, ModelError, NumericalError
from nearness import close
from tiny_tokenizers import MODELS, build

TEXT = "Paris is the capital of"


def explain(explainer: Explainer, **options: Any) -> Explanation:
    explanation = explainer(TEXT, **options)
    assert isinstance(explanation, Explanation)
    return explanation


def everything(model: nn.Module) -> dict[str, Any]:
    """All that an explanation could leave behind in a model."""
    return {
        "parameters": {n: (id(p), p.requires_grad, p._version, p.dtype) for n, p in model.named_parameters()},
        "buffers": {n: (id(b), b._version) for n, b in model.named_buffers()},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: [len(v) for k, v in sorted(vars(m).items()) if k.endswith("_hooks")] for n, m in model.named_modules()
        },
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "classes": {n: (type(m), type(m).forward) for n, m in model.named_modules()},
        "config": model.config.to_dict(),
        "generation": getattr(model, "generation_config", None) and model.generation_config.to_dict(),
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_as_before(name: str) -> None:
    model, tokenizer = build(name)
    before = everything(model)
    explainer = Explainer(model, tokenizer)
    explain(explainer, target=[0, 1])
    explainer.audit(TEXT)
    if explainer.task == "causal-lm":
        explain(explainer, generate=2)
    assert everything(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_parameters_that_need_gradients_come_back_as_they_were(name: str) -> None:
    model, tokenizer = build(name)
    flags = random.Random(0)
    for parameter in model.parameters():
        parameter.requires_grad_(flags.random() < 0.7)
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    assert {flag for flag, _ in before.values()} == {True, False}
    explain(Explainer(model, tokenizer))
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == before[key][0]
        assert torch.equal(parameter, before[key][1])
        assert parameter.grad is None


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_frozen_parameters_give_the_same_relevance(name: str) -> None:
    model, tokenizer = build(name)
    relevance = explain(Explainer(model, tokenizer)).relevance
    model.requires_grad_(False)
    assert close(explain(Explainer(model, tokenizer)).relevance, relevance)


def test_gradients_of_a_training_step_survive() -> None:
    model, tokenizer = build("llama")
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    model(ids, labels=ids).loss.backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert before
    explain(Explainer(model, tokenizer))
    for key, parameter in model.named_parameters():
        assert parameter.grad is None if key not in before else torch.equal(parameter.grad, before[key])
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert all(close(dict(model.named_parameters())[n].grad, g) for n, g in before.items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays(name: str, training: bool) -> None:
    model, tokenizer = build(name)
    model.train(training)
    next(model.children()).train(not training)  # a mixture, as in fine-tuning with parts in evaluation mode
    before = everything(model)["training"]
    explain(Explainer(model, tokenizer))
    assert everything(model)["training"] == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_gradient_mode_of_the_caller_does_not_matter(mode: Any) -> None:
    model, tokenizer = build("gpt2")
    expected = explain(Explainer(model, tokenizer)).relevance
    with mode():
        before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        relevance = explain(Explainer(model, tokenizer)).relevance
        audited = Explainer(model, tokenizer).audit(TEXT)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert audited.closes
    assert close(relevance, expected)


def test_a_failure_leaves_the_model_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build("gpt2")
    explainer = Explainer(model, tokenizer)
    before = everything(model)
    with monkeypatch.context() as patched:

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise KeyError("from deep inside")

        patched.setattr(model.lm_head, "forward", fail)
        with pytest.raises(KeyError, match="from deep inside"):
            explain(explainer)
    assert everything(model) == before
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("name", MODELS)
def test_low_precision_keeps_wide_sums(name: str) -> None:
    exact = explain(Explainer(*build(name)), target=0).relevance[0]
    explanation = explain(Explainer(*build(name, torch.bfloat16)), target=0)
    assert explanation.relevance.dtype == torch.float32
    assert torch.cosine_similarity(explanation.relevance[0], exact, dim=0) > 0.99
    assert explain(Explainer(*build(name, torch.float64)), target=0).relevance.dtype == torch.float64


@pytest.mark.parametrize("name", MODELS)
def test_the_ledger_of_an_explainer_closes(name: str) -> None:
    model, tokenizer = build(name, torch.float64)
    explainer = Explainer(model, tokenizer)
    for target in (None, 1):
        explanation = explain(explainer, target=target)
        ledger = explainer.audit(TEXT, target=target)
        assert ledger.closes, ledger.leaks()
        # the ledger stays in float64 where the model's own normalisation goes through float32
        assert ledger.target == pytest.approx(explanation.logit, rel=1e-6)
        assert sum(ledger.inputs.values()) == pytest.approx(explanation.sum[0], rel=1e-5, abs=1e-6)


def leaking(model: nn.Module) -> Any:
    """A model of the same weights whose decision depends on all of its input, padding too."""

    class LeakyForCausalLM(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **options: Any) -> Any:
            output = super().forward(input_ids, **options)
            output.logits = output.logits + self.get_input_embeddings()(input_ids).sum((1, 2))[:, None, None]
            return output

    model.__class__ = LeakyForCausalLM
    return model


def test_a_model_that_reads_padding_is_refused() -> None:
    model, tokenizer = build("llama")
    explainer = Explainer(leaking(model), tokenizer)
    with pytest.raises(ModelError, match=r"lets padding take part in its decision: explain its texts one at a time"):
        explainer([TEXT, "the film"])
    assert explain(explainer).relevance.isfinite().all()


def test_every_look_up_of_the_tokens_counts() -> None:
    """A model that embeds its tokens twice has relevance at both."""
    model, tokenizer = build("llama")
    plain = explain(Explainer(model, tokenizer), target=1)
    ids = torch.tensor(plain.token_ids)
    direct = model.get_input_embeddings()(ids).sum(-1).detach()
    twice = explain(Explainer(leaking(model), tokenizer), target=1)
    assert torch.allclose(twice.relevance[0], plain.relevance[0] + direct, atol=1e-5)


def test_a_model_without_token_embeddings_is_told_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build("gpt2")
    other = nn.Embedding(3, 3)
    for part in (model, model.transformer):
        monkeypatch.setattr(type(part), "get_input_embeddings", lambda self: other)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with pytest.raises((ModelError, NumericalError), match=r"does not look its tokens up .*use attnlrp\.propagate"):
        explain(Explainer(model, tokenizer))

"""From a text to its explanation: the right numbers, in the right rows, and a model that stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnlrp
from attnlrp import ATTNLRP, CP_LRP, GRADIENT, OTHERS, Continuation, Explainer, Explanation
from nearness import close, same
from tiny_tokenizers import LABELS, MODELS, build

LANGUAGE = ("llama", "gpt2")
CLASSIFIERS = ("bert", "llama-classifier")
TEXT = "Paris is the capital of"
TEXTS = [
    "the film was great",
    "he said not",
    "Paris is the capital of France. Berlin is the capital of",
    "walking in the end",
]


def explainer(name: str, dtype: torch.dtype = torch.float32, rules: Any = ATTNLRP, **settings: Any) -> Explainer:
    model, tokenizer = build(name, dtype, **settings)
    return Explainer(model, tokenizer, rules=rules)


def explain(explainer: Explainer, text: str = TEXT, **options: Any) -> Explanation:
    explanation = explainer(text, **options)
    assert isinstance(explanation, Explanation)
    return explanation


def reference(
    explainer: Explainer, ids: tuple[int, ...], weights: dict[int, float], position: int = -1, rules: Any = ATTNLRP
) -> Tensor:
    """Relevance of a weighted sum of logits, by `propagate` on embeddings: no code of `Explainer`."""
    model = explainer.model
    embeddings = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
    with attnlrp.propagate(model, rules):
        logits = model(inputs_embeds=embeddings).logits[0]
    row = logits[position] if logits.dim() == 2 else logits
    scalar = torch.stack([weight * row[index] for index, weight in weights.items()]).sum()
    (gradient,) = torch.autograd.grad(scalar, embeddings)
    return (embeddings * gradient).sum(-1).detach()[0]


# --- one text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_relevance_is_that_of_propagate(name: str) -> None:
    ours = explainer(name)
    explanation = explain(ours)
    assert explanation.target.id is not None
    assert explanation.relevance.shape == (1, len(explanation.tokens))
    assert close(explanation.relevance[0], reference(ours, explanation.token_ids, {explanation.target.id: 1.0}))
    assert explanation.relevance.abs().max() > 1e-3
    assert not explanation.relevance.requires_grad


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rules", ["cp-lrp", "gradient"])
def test_other_rules_are_used_and_named(name: str, rules: str) -> None:
    table = {"cp-lrp": CP_LRP, "gradient": GRADIENT}[rules]
    ours = explainer(name, rules=table)
    explanation = explain(ours, target=1)
    assert explanation.rules == rules
    assert close(explanation.relevance[0], reference(ours, explanation.token_ids, {1: 1.0}, rules=table))
    assert not close(explanation.relevance, explain(explainer(name), target=1).relevance)


@pytest.mark.parametrize("name", LANGUAGE)
def test_gradient_is_plain_gradient_times_input(name: str) -> None:
    ours = explainer(name, rules=GRADIENT)
    explanation = explain(ours)
    embeddings = ours.model.get_input_embeddings()(torch.tensor([explanation.token_ids])).detach().requires_grad_()
    ours.model(inputs_embeds=embeddings).logits[0, -1].max().backward()
    assert embeddings.grad is not None
    assert close(explanation.relevance[0], (embeddings * embeddings.grad).sum(-1).detach()[0])


def test_a_table_of_your_own_is_called_custom() -> None:
    assert explain(explainer("gpt2", rules={**ATTNLRP, "softmax": attnlrp.rules.constant})).rules == "custom"
    assert explain(explainer("gpt2")).rules == "attnlrp"


@pytest.mark.parametrize("name", MODELS)
def test_the_target_is_the_prediction_with_its_logit_rank_and_runners_up(name: str) -> None:
    ours = explainer(name)
    explanation = explain(ours)
    target = explanation.target
    with torch.no_grad():
        logits = ours.model(torch.tensor([explanation.token_ids])).logits[0]
    row = logits[-1] if name in LANGUAGE else logits
    assert target.id == row.argmax()
    assert target.logit == explanation.logit == pytest.approx(row.max().item(), rel=1e-5)
    assert (target.rank, target.unit, target.against) == (1, "logit", None)
    best = row.topk(min(5, len(row)))
    assert [c.id for c in target.candidates] == best.indices.tolist()
    assert [c.logit for c in target.candidates] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert target.token == target.candidates[0].token
    assert target.position == (len(explanation.tokens) - 1 if name in LANGUAGE else None)
    worst = int(row.argmin())
    assert explain(ours, target=worst).target.rank == len(row)


def test_what_an_explanation_says_of_itself() -> None:
    model, tokenizer = build("llama")
    explanation = explain(Explainer(model, tokenizer, name="my/model"))
    assert explanation.tokens == ("<s>", " Par", "is", " is", " the", " capital", " of")
    assert list(explanation.token_ids) == tokenizer(TEXT).input_ids
    assert explanation.special == (True, *[False] * 6)
    assert explanation.segments == ("prompt",) * 7
    assert explanation.words == (0, 1, 1, 2, 3, 4, 5)
    assert (explanation.model, explanation.task) == ("my/model", "causal-lm")
    assert explanation.version == attnlrp.__version__
    assert explain(Explainer(model, tokenizer)).model == "LlamaForCausalLM"
    assert explain(explainer("bert")).task == "sequence-classification"


def test_a_token_is_named_with_its_leading_space() -> None:
    """Also where the tokenizer strips the space of a token that stands alone."""
    for name in LANGUAGE:
        assert explain(explainer(name), target=" capital").target.token == " capital"
    assert explain(explainer("gpt2"), target="is").target.token == "is"


# --- targets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_contrast_is_the_difference_of_two_explanations(name: str) -> None:
    ours = explainer(name)
    one, other, contrast = (
        explain(ours, **options) for options in ({"target": 2}, {"target": 0}, {"target": 2, "against": 0})
    )
    assert close(contrast.relevance, one.relevance - other.relevance)
    assert not close(contrast.relevance, one.relevance)
    assert contrast.logit == pytest.approx(one.logit - other.logit, abs=1e-5)
    assert contrast.target.against == (LABELS[0] if name in CLASSIFIERS else contrast.target.against)
    assert (contrast.target.id, contrast.target.token) == (2, one.target.token)


@pytest.mark.parametrize("name", MODELS)
def test_a_contrast_with_all_others_weights_them_by_minus_one_by_n(name: str) -> None:
    ours = explainer(name)
    explanation = explain(ours, target=1, against=OTHERS)
    size = ours.model.config.num_labels if name in CLASSIFIERS else ours.model.config.vocab_size
    weights = {k: 1.0 if k == 1 else -1 / (size - 1) for k in range(size)}
    assert close(explanation.relevance[0], reference(ours, explanation.token_ids, weights))
    assert explanation.target.against == OTHERS


@pytest.mark.parametrize("name", MODELS)
def test_several_targets_give_a_row_each(name: str) -> None:
    ours = explainer(name)
    explanation = explain(ours, target=[1, None, 0])
    for k, target in enumerate((1, None, 0)):
        single = explain(ours, target=target)
        assert close(explanation.relevance[k], single.relevance[0])
        assert explanation.targets[k].id == single.target.id
        assert explanation.targets[k].logit == pytest.approx(single.logit, rel=1e-5)


def test_targets_by_text_and_by_name() -> None:
    ours = explainer("gpt2")
    by_text, by_index = explain(ours, target=" capital"), explain(ours, target=ours.tokenizer.encode(" capital")[0])
    assert same(by_text, by_index)
    ours = explainer("bert")
    assert same(explain(ours, target="positive"), explain(ours, target=2))
    assert explain(ours, target="neutral", against="positive").target.against == "positive"


@pytest.mark.parametrize("name", LANGUAGE)
def test_several_positions_give_a_row_each(name: str) -> None:
    ours = explainer(name)
    explanation = explain(ours, position=[1, -1, 3])
    length = len(explanation.tokens)
    assert [t.position for t in explanation.targets] == [1, length - 1, 3]
    for row, target in zip(explanation.relevance, explanation.targets, strict=True):
        assert target.id is not None
        assert target.position is not None
        assert close(row, reference(ours, explanation.token_ids, {target.id: 1.0}, target.position))
        assert row[target.position + 1 :].count_nonzero() == 0
        assert target.rank == 1


def test_positions_and_targets_are_paired_or_repeated() -> None:
    ours = explainer("gpt2")
    paired = explain(ours, target=[5, 7], position=[0, 2])
    assert [(t.id, t.position) for t in paired.targets] == [(5, 0), (7, 2)]
    one_target = explain(ours, target=5, position=[0, 2])
    assert [(t.id, t.position) for t in one_target.targets] == [(5, 0), (5, 2)]
    one_position = explain(ours, target=[5, 7], position=2)
    assert [(t.id, t.position) for t in one_position.targets] == [(5, 2), (7, 2)]
    assert close(one_target.relevance[1], one_position.relevance[0])
    assert close(paired.relevance[1], one_position.relevance[1])


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_continuation_is_the_sum_over_its_tokens(name: str) -> None:
    ours = explainer(name)
    prompt, rest = "the capital of", " France is"
    explanation = explain(ours, prompt, target=Continuation(rest))
    ids, more = ours.tokenizer(prompt).input_ids, ours.tokenizer(prompt + rest).input_ids
    assert more[: len(ids)] == ids
    assert list(explanation.token_ids) == more[:-1]
    assert len(more) - len(ids) > 2, "the test needs several tokens"
    parts = [reference(ours, tuple(more[:-1]), {more[k]: 1.0}, k - 1) for k in range(len(ids), len(more))]
    assert close(explanation.relevance[0], torch.stack(parts).sum(0))
    assert explanation.target.token == rest
    assert (explanation.target.id, explanation.target.rank) == (None, None)
    assert explanation.target.position == len(ids) - 1
    assert explanation.segments == ("prompt",) * len(ids) + ("generated",) * (len(more) - len(ids) - 1)


def test_a_continuation_of_one_token_is_that_token() -> None:
    ours = explainer("gpt2")
    assert close(explain(ours, target=Continuation(" capital")).relevance, explain(ours, target=" capital").relevance)


def test_a_continuation_that_the_last_token_would_grow_into() -> None:
    """`Ber` + `lin` is another token; the prompt stays as it is."""
    ours = explainer("gpt2")
    ids = ours.tokenizer.encode("the capital of F")
    explanation = explain(ours, "the capital of F", target=Continuation("rance is"))
    assert list(explanation.token_ids[: len(ids)]) == ids
    assert explanation.target.token == "rance is"


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", MODELS)
def test_a_probability_explains_the_softmax_output(name: str, temperature: float) -> None:
    ours = explainer(name)
    explanation = explain(ours, target=1, output="probability", temperature=temperature)
    logits = ours.model(torch.tensor([explanation.token_ids])).logits[0].detach()
    shares = torch.softmax((logits[-1] if logits.dim() == 2 else logits) / temperature, dim=-1)
    assert explanation.logit == pytest.approx(shares[1].item(), rel=1e-5)
    assert explanation.target.unit == "probability"
    # d softmax_1 / d logit_k = s_1 (delta_1k - s_k) / temperature: relevance is this sum over logits
    weights = {k: (float(k == 1) - s) * shares[1].item() / temperature for k, s in enumerate(shares.tolist())}
    expected = reference(ours, explanation.token_ids, weights)
    assert torch.allclose(explanation.relevance[0], expected, rtol=1e-3, atol=1e-6)


# --- generation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_generated_token_is_explained_from_what_was_before_it(name: str) -> None:
    ours = explainer(name)
    explanation = explain(ours, generate=4)
    ids = ours.tokenizer(TEXT).input_ids
    produced = [t.id for t in explanation.targets]
    assert 2 <= len(produced) <= 4
    assert [*ids, *produced][:-1] == list(explanation.token_ids)
    assert explanation.segments == ("prompt",) * len(ids) + ("generated",) * (len(produced) - 1)
    for k, (row, target) in enumerate(zip(explanation.relevance, explanation.targets, strict=True)):
        prefix = explanation.token_ids[: len(ids) + k]
        assert target.id is not None
        assert target.position == len(prefix) - 1
        assert target.rank == 1, "generation is greedy"
        assert close(row[: len(prefix)], reference(ours, prefix, {target.id: 1.0}))
        assert row[len(prefix) :].count_nonzero() == 0


def test_generation_stops_at_the_end_of_the_text() -> None:
    model, tokenizer = build("gpt2")
    first = explain(Explainer(model, tokenizer)).target.id
    model.generation_config.eos_token_id = first
    explanation = explain(Explainer(model, tokenizer), generate=5)
    assert [t.id for t in explanation.targets] == [first]


def test_what_was_generated_is_explained_even_if_the_model_is_told_not_to_repeat_itself() -> None:
    ours = explainer("gpt2")
    first = explain(ours, generate=3)
    assert len({t.id for t in first.targets}) < 3, "the test needs a model that repeats itself"
    ours.model.generation_config.repetition_penalty = 50.0
    found = explain(ours, generate=3)
    assert list(found.token_ids) == [*found.token_ids[:-2], *(t.id for t in found.targets[:-1])]
    assert len({t.id for t in found.targets}) == 3
    assert {t.rank for t in found.targets} != {1}


def test_a_batch_of_generations_of_different_lengths() -> None:
    ours = explainer("gpt2")
    ours.model.generation_config.eos_token_id = explain(ours, TEXTS[0], generate=2).targets[1].id
    batch = ours(TEXTS, generate=3)
    assert isinstance(batch, list)
    assert len(batch[0].targets) < len(batch[1].targets)
    for text, explanation in zip(TEXTS, batch, strict=True):
        single = explain(ours, text, generate=3)
        assert close(explanation.relevance, single.relevance)
        assert [t.id for t in explanation.targets] == [t.id for t in single.targets]


# --- batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"), [*((n, {}) for n in MODELS), ("llama-classifier", {"pad_token_id": None})]
)
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1] * 2, TEXTS[:1]], ids=["lengths", "equal", "one"])
def test_a_batch_equals_one_by_one(name: str, settings: dict[str, Any], texts: list[str]) -> None:
    ours = explainer(name, **settings)
    batch = ours(texts)
    assert isinstance(batch, list)
    assert len(batch) == len(texts)
    for text, explanation in zip(texts, batch, strict=True):
        single = explain(ours, text)
        assert explanation.relevance.shape == single.relevance.shape
        assert close(explanation.relevance, single.relevance)
        assert explanation.tokens == single.tokens
        assert explanation.target.id == single.target.id
        assert explanation.logit == pytest.approx(single.logit, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_different_lengths_is_one_forward_pass(name: str) -> None:
    ours = explainer(name)
    shapes: list[torch.Size] = []
    hook = ours.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    ours(TEXTS)
    hook.remove()
    assert len(shapes) == 1
    assert shapes[0][0] == len(TEXTS)


def test_a_text_that_holds_the_padding_token_in_a_batch() -> None:
    ours = explainer("llama-classifier", pad_token_id=0)
    texts = ["the film<|endoftext|>", "<|endoftext|>the film was great", TEXTS[2]]
    batch = ours(texts)
    assert isinstance(batch, list)
    for text, explanation in zip(texts, batch, strict=True):
        assert close(explanation.relevance, explain(ours, text).relevance)


def test_options_apply_to_every_text_of_a_batch() -> None:
    ours = explainer("llama")
    for options in ({"target": [3, 4], "against": 5}, {"position": [0, -1]}, {"target": Continuation(" is the")}):
        batch = ours(TEXTS, **options)
        assert isinstance(batch, list)
        for text, explanation in zip(TEXTS, batch, strict=True):
            single = explain(ours, text, **options)
            assert close(explanation.relevance, single.relevance)
            assert [(t.id, t.position) for t in explanation.targets] == [(t.id, t.position) for t in single.targets]


def test_a_list_of_one_text_gives_a_list() -> None:
    ours = explainer("bert")
    for texts in ([TEXT], (TEXT,)):
        (explanation,) = ours(texts)
        assert isinstance(explanation, Explanation)
        assert same(explanation, explain(ours))


# --- cost -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize(
    ("options", "rows"), [({}, 1), ({"target": [1, 2]}, 1), ({"position": [0, 2, -1]}, 3), ({"position": [1, 1]}, 1)]
)
def test_only_the_explained_logits_are_computed(name: str, options: dict[str, Any], rows: int) -> None:
    ours = explainer(name)
    shapes: list[torch.Size] = []
    hook = ours.model.lm_head.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    explain(ours, **options)
    hook.remove()
    assert shapes == [(1, rows, 32)]


def test_no_cache_of_keys_and_values_is_kept() -> None:
    ours = explainer("llama")
    kept: list[Any] = []
    hook = ours.model.register_forward_hook(lambda _, args, output: kept.append(output.past_key_values))
    explain(ours)
    hook.remove()
    assert kept == [None]


def test_several_targets_are_one_forward_pass() -> None:
    ours = explainer("gpt2")
    calls: list[int] = []
    hook = ours.model.register_forward_pre_hook(lambda *_: calls.append(1))
    explain(ours, target=[1, 2, 3, 4])
    hook.remove()
    assert len(calls) == 1

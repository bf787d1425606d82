"""Explanations of every task: which outputs are explained, and relevance as `propagate` on embeddings has it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import attnlrp
from attnlrp import CP_LRP, Continuation, Explainer, Explanation, InputError, TargetError
from nearness import close, same
from tiny_tasks import build
from tiny_tokenizers import build as build_language_model

TEXT = "Paris is the capital of France"
WRITERS = ("t5", "bart", "marian")


def explain(ours: Explainer, text: Any = TEXT, **options: Any) -> Explanation:
    explanation = ours(text, **options)
    assert isinstance(explanation, Explanation)
    return explanation


def reference(ours: Explainer, scalar: Any, ids: Any, written: Any = None, **inputs: Any) -> Tensor:
    """Relevance of scalar(output), by `propagate` on embeddings, without the code of `Explainer`."""
    model = ours.model
    tables = [model.get_input_embeddings()]
    if written is not None:
        tables = [model.get_encoder().get_input_embeddings(), model.get_decoder().get_input_embeddings()]
    rows = [ids] if written is None else [ids, written]
    leaves = [t(torch.tensor([r])).detach().requires_grad_() for t, r in zip(tables, rows, strict=True)]
    names = ("inputs_embeds", "decoder_inputs_embeds")
    with attnlrp.propagate(model, ours.rules):
        value = scalar(model(**dict(zip(names, leaves, strict=False)), **inputs))
    gradients = torch.autograd.grad(value, leaves)
    return torch.cat([(x * g).sum(-1).detach()[0] for x, g in zip(leaves, gradients, strict=True)])


# --- masked language models ---------------------------------------------------------------------------------------


def test_a_masked_model_explains_its_masks() -> None:
    ours = build("bert-mlm")
    explanation = explain(ours, "Paris is the [MASK] of [MASK]")
    positions = [k for k, token in enumerate(explanation.tokens) if token == "[MASK]"]
    assert [t.position for t in explanation.targets] == positions
    assert len(positions) == 2
    for row, target in zip(explanation.relevance, explanation.targets, strict=True):
        expected = reference(ours, lambda o, t=target: o.logits[0, t.position, t.id], explanation.token_ids)
        assert close(row, expected)
        assert target.rank == 1


def test_a_masked_model_explains_any_position_and_target() -> None:
    ours = build("bert-mlm")
    explanation = explain(ours, position=2, target=" the", against="of")
    expected = reference(
        ours,
        lambda o: o.logits[0, 2, explanation.target.id] - o.logits[0, 2, ours.tokenizer.convert_tokens_to_ids("of")],
        explanation.token_ids,
    )
    assert close(explanation.relevance[0], expected)
    with pytest.raises(InputError, match=r"^text: 'Paris.* has no \[MASK\]; put it where a token .*or give position="):
        ours(TEXT)


# --- token classification -----------------------------------------------------------------------------------------


def test_a_tagger_explains_the_tokens_of_a_class_other_than_o() -> None:
    ours = build("bert-ner")
    with torch.no_grad():
        ours.model.classifier.bias[0] += 0.9  # so that some tokens are "O"
    explanation = explain(ours)
    logits = ours.model(torch.tensor([explanation.token_ids])).logits[0]
    tagged = [k for k in range(1, len(logits) - 1) if logits[k].argmax() != 0]
    assert 0 < len(tagged) < len(logits) - 2
    assert [t.position for t in explanation.targets] == tagged
    for row, target in zip(explanation.relevance, explanation.targets, strict=True):
        assert target.token in ("PER", "LOC")
        assert close(row, reference(ours, lambda o, t=target: o.logits[0, t.position, t.id], explanation.token_ids))


def test_a_tagger_explains_what_it_is_asked_for() -> None:
    ours = build("bert-ner")
    one = explain(ours, position=3, target="LOC", against="PER")
    assert (one.target.token, one.target.against, one.target.position) == ("LOC", "PER", 3)
    assert close(one.relevance[0], reference(ours, lambda o: o.logits[0, 3, 2] - o.logits[0, 3, 1], one.token_ids))
    every = explain(ours, target="LOC")
    assert len(every.targets) == len(every.tokens) - 2


def test_a_tagger_without_tags_explains_all_of_its_tokens() -> None:
    ours = build("bert-ner")
    ours.model.config.id2label = {0: "NOUN", 1: "VERB", 2: "DET"}
    assert len(explain(ours).targets) == len(explain(ours).tokens) - 2


# --- extractive question answering --------------------------------------------------------------------------------

CONTEXT_TEXT = "Berlin is the capital of Germany. Paris is the capital of France."


def test_question_answering_explains_start_and_end_of_the_best_answer() -> None:
    ours = build("bert-qa")
    explanation = explain(ours, "the capital of France", context=CONTEXT_TEXT)
    first = explanation.segments.index("context")
    assert set(explanation.segments) == {"question", "context"}
    types = torch.tensor([[0] * first + [1] * (len(explanation.tokens) - first)])
    output = ours.model(torch.tensor([explanation.token_ids]), token_type_ids=types)
    starts, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
    inside = range(first, len(explanation.tokens) - 1)
    best = max(((s, e) for s in inside for e in inside if s <= e < s + 30), key=lambda p: starts[p[0]] + ends[p[1]])
    assert tuple(t.position for t in explanation.targets) == best
    assert [t.token.split(":")[0] for t in explanation.targets] == ["start", "end"]
    for k, head in enumerate(("start_logits", "end_logits")):
        expected = reference(
            ours, lambda o, h=head, k=k: getattr(o, h)[0, best[k]], explanation.token_ids, token_type_ids=types
        )
        assert close(explanation.relevance[k], expected)


def test_an_answer_is_found_in_the_context_by_its_characters() -> None:
    ours = build("bert-qa")
    explanation = explain(ours, "Paris ?", context=CONTEXT_TEXT, target="capital of Germany")
    start, end = (t.position for t in explanation.targets)
    assert start is not None
    assert end is not None
    assert "".join(explanation.tokens[start : end + 1]).replace(" ", "") == "capitalofGermany"
    assert explanation.targets[0].token.startswith("start: ")
    against = explain(ours, "Paris ?", context=CONTEXT_TEXT, target="Germany", against="France")
    assert against.targets[0].logit == pytest.approx(
        explain(ours, "Paris ?", context=CONTEXT_TEXT, target="Germany").targets[0].logit
        - explain(ours, "Paris ?", context=CONTEXT_TEXT, target="France").targets[0].logit
    )


def test_question_answering_refuses_what_has_no_answer() -> None:
    ours = build("bert-qa")
    with pytest.raises(InputError, match=r"^context: got none, expected the text that the answer is part of"):
        ours("who")
    with pytest.raises(TargetError, match=r"^target: 'Rome' is not a part of the context; give the answer word for w"):
        ours("who", context=CONTEXT_TEXT, target="Rome")
    with pytest.raises(TargetError, match=r"^target: got 3, expected an answer"):
        ours("who", context=CONTEXT_TEXT, target=3)
    with pytest.raises(InputError, match=r"empty question or context"):
        ours("", context=CONTEXT_TEXT)
    with pytest.raises(InputError, match=r"^context: got 1 for 2 texts"):
        ours(["who", "what"], context=[CONTEXT_TEXT])


def test_a_batch_of_questions_equals_one_by_one() -> None:
    ours = build("bert-qa")
    contexts = [CONTEXT_TEXT, "The film was great."]
    batch = ours(["Paris", "was the film bad"], context=contexts)
    for text, context, explanation in zip(["Paris", "was the film bad"], contexts, batch, strict=True):
        alone = explain(ours, text, context=context)
        assert close(explanation.relevance, alone.relevance)
        assert [t.position for t in explanation.targets] == [t.position for t in alone.targets]


# --- encoder-decoders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_an_encoder_decoder_explains_both_of_its_inputs(name: str) -> None:
    ours = build(name)
    explanation = explain(ours)
    size = len(ours.tokenizer(TEXT).input_ids)
    assert explanation.segments[:size] == ("encoder",) * size
    assert set(explanation.segments[size:]) == {"decoder"}
    written = list(explanation.token_ids[size:])
    assert written == {"t5": [0], "bart": [3, 2], "marian": [0]}[name]
    assert explanation.target.position == len(explanation.tokens) - 1
    ids = explanation.token_ids[:size]
    assert close(
        explanation.relevance[0], reference(ours, lambda o: o.logits[0, -1, explanation.target.id], ids, written)
    )
    assert explanation.relevance[0, :size].abs().sum() > 0
    assert explanation.relevance[0, size:].abs().sum() > 0


@pytest.mark.parametrize("name", WRITERS)
def test_every_generated_token_against_input_and_prefix(name: str) -> None:
    ours = build(name)
    explanation = explain(ours, generate=4)
    size = len(ours.tokenizer(TEXT).input_ids)
    ids, written = explanation.token_ids[:size], explanation.token_ids[size:]
    generated = [t.id for t in explanation.targets]
    assert [*written, generated[-1]][-len(generated) :] == generated
    for k, target in enumerate(explanation.targets):
        at = len(written) - len(generated) + k
        assert target.position == size + at
        assert close(
            explanation.relevance[k], reference(ours, lambda o, a=at, t=target: o.logits[0, a, t.id], ids, written)
        )
        assert explanation.relevance[k, size + at + 1 :].count_nonzero() == 0  # what is written later cannot matter


def test_a_prefix_and_a_continuation_of_the_decoder() -> None:
    ours = build("t5")
    prefixed = explain(ours, prefix="the capital", target="of")
    assert "".join(prefixed.tokens[-2:]).split() == ["the", "capital"]
    summed = explain(ours, target=Continuation("the capital of"))
    parts = [
        explain(ours, target="the"),
        explain(ours, prefix="the", target="capital"),
        explain(ours, prefix="the capital", target="of"),
    ]
    assert summed.logit == pytest.approx(sum(p.logit for p in parts))
    total = torch.zeros_like(summed.relevance)
    for part in parts:
        total[:, : part.relevance.shape[1]] += part.relevance
    assert close(summed.relevance, total)


@pytest.mark.parametrize("name", WRITERS)
def test_a_batch_of_an_encoder_decoder_equals_one_by_one(name: str) -> None:
    ours = build(name)
    texts = [TEXT, "the film", "he said not to go there and walking in the garden"]
    for text, explanation in zip(texts, ours(texts, generate=2), strict=True):
        alone = explain(ours, text, generate=2)
        assert explanation.token_ids == alone.token_ids
        assert close(explanation.relevance, alone.relevance)


def test_a_decoder_that_reads_the_text_again_is_shown_apart() -> None:
    ours = build("bart-classifier")
    explanation = explain(ours, target=1)
    size = len(ours.tokenizer(TEXT).input_ids)
    assert (
        explanation.segments == ("encoder",) * size + ("decoder",) * size
        or explanation.segments == ("prompt",) * size + ("decoder",) * size
    )
    assert explanation.token_ids[size + 1 :] == explanation.token_ids[: size - 1]  # shifted by its start token
    assert explanation.target.position is None


@pytest.mark.parametrize("name", [*WRITERS, "bert-mlm"])
def test_the_audit_closes_and_agrees(name: str) -> None:
    ours = build(name)
    text = "Paris is the [MASK]" if name == "bert-mlm" else TEXT
    ledger = ours.audit(text)
    assert ledger.closes
    assert not ledger.leaks()
    explanation = explain(ours, text)
    assert ledger.target == pytest.approx(explanation.logit)
    assert sum(ledger.inputs.values()) == pytest.approx(explanation.sum[0])


def test_cp_lrp_hands_relevance_to_the_encoder_by_its_values() -> None:
    ours = build("bart", rules=CP_LRP)
    explanation = explain(ours)
    assert explanation.rules == "cp-lrp"
    assert explanation.relevance.isfinite().all()
    assert explanation.relevance[0, : len(ours.tokenizer(TEXT).input_ids)].abs().sum() > 0


# --- chat -----------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def test_a_chat_template_is_put_around_the_text() -> None:
    model, tokenizer = build_language_model("gpt2", torch.float64)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    ours = Explainer(model, tokenizer)
    chat = explain(ours, "Paris", chat=True)
    assert "".join(chat.tokens) == "<user> Paris <bot>"
    assert same(chat, explain(ours, "<user> Paris <bot>"))
    turns = [{"role": "user", "content": "Paris"}, {"role": "bot", "content": "is"}, {"role": "user", "content": "the"}]
    conversation = explain(ours, turns, generate=2)
    assert "".join(conversation.tokens).startswith("<user> Paris <bot> is <user> the <bot>")
    assert len(conversation.targets) == 2


@pytest.mark.parametrize(
    "model",
    [
        (transformers.RwkvConfig, transformers.RwkvForCausalLM, {"hidden_size": 32, "num_hidden_layers": 2}),
        (
            transformers.XLNetConfig,
            transformers.XLNetLMHeadModel,
            {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        ),
    ],
    ids=["no padding token", "no limit of length"],
)
def test_configurations_that_lack_what_most_have(model: tuple[type, type, dict[str, Any]]) -> None:
    config, kind, settings = model
    _, tokenizer = build_language_model("llama")
    explanation = Explainer(kind(config(vocab_size=len(tokenizer), **settings)).eval(), tokenizer)(TEXT)
    assert explanation.relevance.abs().sum() > 0

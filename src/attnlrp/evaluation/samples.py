"""What is evaluated: one input, the output that is explained, and what is known about its tokens."""

from __future__ import annotations

import inspect
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnlrp.errors import InputError, ModelError

__all__ = ["Output", "Sample", "answers_match", "classified", "extractive", "next_token", "question", "span_tokens"]

PROMPT = "Context: {context}\nQuestion: {question}\nAnswer:"
"""How a decoder is asked; an encoder-decoder gets the same without its last line."""


@dataclass(frozen=True)
class Output:
    """The explained output of a model; called with what the model returns: its logit for each row of a batch.

    Args:
        index: token of the vocabulary, class, or position of a start or end.
        last: whether the logits have one row per token, of which the last counts.
        head: field of the model's output.
    """

    index: int
    last: bool = True
    head: str = "logits"

    def __call__(self, output: Any) -> Tensor:
        """Logit of each row of the batch (batch,)."""
        return self._row(output)[:, self.index]

    def both(self, output: Any) -> Tensor:
        """Logit and probability of each row (batch, 2)."""
        row = self._row(output)
        return torch.stack([row[:, self.index], row.softmax(dim=-1)[:, self.index]], dim=1)

    def _row(self, output: Any) -> Tensor:
        logits: Tensor = getattr(output, self.head)
        return (logits[:, -1] if self.last else logits).float()


@dataclass(frozen=True)
class Sample:
    """One input of a model.

    Args:
        name: says which sample of its data set it is.
        inputs: keyword inputs of the model, batch of one; `input_ids` (1, token).
        output: what is explained.
        special: special tokens of the tokenizer (token,).
        answer: tokens of the answer (token,), for question answering.
        correct: whether the model's answer or class is right; None where that is not known.
        details: what else is known, such as what the model said.
    """

    name: str
    inputs: Mapping[str, Any]
    output: Output
    special: Tensor
    answer: Tensor | None = None
    correct: bool | None = None
    details: dict[str, Any] = field(default_factory=dict)


def next_token(model: Any, tokenizer: Any, record: Mapping[str, Any], *, name: str, length: int = 512) -> Sample:
    """The most likely next token after the first `length` tokens of a text."""
    ids = tokenizer(record["text"], verbose=False).input_ids[:length]
    inputs = _last_only(model, _tensors(model, ids))
    index = _predict(model, inputs)
    return Sample(name, inputs, Output(index), _special(tokenizer, ids), details={"target": tokenizer.decode([index])})


def classified(model: Any, tokenizer: Any, record: Mapping[str, Any], *, name: str, length: int = 512) -> Sample:
    """The predicted class of a text."""
    encoded = tokenizer(record["text"], verbose=False, truncation=True, max_length=length)
    inputs = _tensors(model, **encoded)
    with torch.no_grad():
        index = int(model(**inputs).logits[0].argmax())
    correct = None if record.get("label") is None else index == int(record["label"])
    output = Output(index, last=False)
    return Sample(
        name, inputs, output, _special(tokenizer, encoded.input_ids), correct=correct, details={"class": index}
    )


def question(
    model: Any, tokenizer: Any, record: Mapping[str, Any], *, name: str, prompt: str = PROMPT, longest: int = 12
) -> Sample:
    """The first token of a language model's answer to a question about a context.

    Explained is the model's own first token; `correct` says whether what it generates is one of the answers.

    Args:
        model: a decoder, or an encoder-decoder (then the encoder's tokens are evaluated).
        tokenizer: its tokenizer, one that knows characters.
        record: question, context, answers (texts).
        name: of the sample.
        prompt: format with {context} and {question}.
        longest: tokens of the generated answer.
    """
    text = prompt.format(context=record["context"], question=record["question"])
    encoded = _with_offsets(tokenizer, text)
    ids = encoded["input_ids"]
    inputs = _tensors(model, ids)
    options = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    mask = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        written = model.generate(**inputs, attention_mask=mask, max_new_tokens=longest, pad_token_id=pad, **options)[0]
    if model.config.is_encoder_decoder:
        index, answer = _first_word(tokenizer, written[1:].tolist())
        inputs["decoder_input_ids"] = written[None, : 1 + answer]
    else:
        index = int(written[len(ids)])
        inputs = _last_only(model, inputs)
    said = tokenizer.decode(
        written if model.config.is_encoder_decoder else written[len(ids) :], skip_special_tokens=True
    )
    spans = _answer_spans(text, record, prompt)
    return Sample(
        name,
        inputs,
        Output(index),
        _special(tokenizer, ids),
        answer=span_tokens(encoded["offset_mapping"], spans),
        correct=answers_match(said.split("\n")[0], record["answers"]),
        details={"said": said, "answers": list(record["answers"])},
    )


def extractive(model: Any, tokenizer: Any, record: Mapping[str, Any], *, name: str, length: int = 512) -> Sample:
    """The start of the answer that an extractive head points to."""
    options = {"truncation": "only_second", "max_length": length, "return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer(record["question"], record["context"], **options)
    inside = [part == 1 for part in encoded.sequence_ids()]
    offsets = [span if part else (0, 0) for span, part in zip(encoded["offset_mapping"], inside, strict=True)]
    inputs = _tensors(model, **{k: v for k, v in encoded.items() if k != "offset_mapping"})
    with torch.no_grad():
        output = model(**inputs)
    outside = ~torch.tensor(inside, device=model.device)
    start, end = (int(x[0].masked_fill(outside, -torch.inf).argmax()) for x in (output.start_logits, output.end_logits))
    said = record["context"][offsets[start][0] : offsets[max(start, end)][1]]
    spans = [m.span() for a in record["answers"] for m in re.finditer(re.escape(a), record["context"])]
    return Sample(
        name,
        inputs,
        Output(start, last=False, head="start_logits"),
        _special(tokenizer, encoded["input_ids"]),
        answer=span_tokens(offsets, spans),
        correct=answers_match(said, record["answers"]),
        details={"said": said, "answers": list(record["answers"])},
    )


def span_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Tensor:
    """Which tokens overlap one of the spans of characters (token,)."""
    return torch.tensor([any(a < end and b > begin for begin, end in spans) for a, b in offsets], dtype=torch.bool)


def answers_match(said: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers is what was said, or begins it, after SQuAD's normalisation.

    Lower case, without punctuation and articles (Rajpurkar et al., 2016). A language model goes on after its answer,
    so a beginning counts.
    """
    words = _normalised(said)
    return any(bool(a) and words[: len(a)] == a for a in map(_normalised, answers))


def _normalised(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def _answer_spans(text: str, record: Mapping[str, Any], prompt: str) -> list[tuple[int, int]]:
    """Characters of every occurrence of an answer inside of the context, in the prompt."""
    begin = text.index(record["context"]) if "{context}" in prompt else 0
    found = [m.span() for a in record["answers"] if a for m in re.finditer(re.escape(a), record["context"])]
    return [(begin + a, begin + b) for a, b in found]


def _with_offsets(tokenizer: Any, text: str) -> Mapping[str, Any]:
    if not tokenizer.is_fast:
        raise ModelError("answers are found by characters: this needs a tokenizer of the tokenizers library")
    encoded: Mapping[str, Any] = tokenizer(text, return_offsets_mapping=True, verbose=False)
    return encoded


def _first_word(tokenizer: Any, ids: list[int]) -> tuple[int, int]:
    """The first token that is not special, and how many come before it."""
    special = set(tokenizer.all_special_ids)
    at = next((k for k, token in enumerate(ids) if token not in special), 0)
    return ids[at], at


def _tensors(model: Any, input_ids: Sequence[int], **more: Sequence[int]) -> dict[str, Any]:
    if not input_ids:
        raise InputError("text: got an empty text, expected at least one token")
    rows = {"input_ids": input_ids, **{k: v for k, v in more.items() if k in ("attention_mask", "token_type_ids")}}
    return {k: torch.tensor([v], device=model.device) for k, v in rows.items()}


def _last_only(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Compute the last row of logits only, where the model can.

    As an index: the number 1 takes a slice, and a frozen head multiplies a slice of a batch ten times as slowly, since
    torch copies the weight for each row.
    """
    accepted = inspect.signature(model.forward).parameters
    last = torch.tensor([-1], device=model.device)
    return inputs | ({"logits_to_keep": last} if "logits_to_keep" in accepted else {})


def _predict(model: Any, inputs: Mapping[str, Any]) -> int:
    with torch.no_grad():
        return int(model(**inputs).logits[0, -1].argmax())


def _special(tokenizer: Any, ids: Sequence[int]) -> Tensor:
    special = set(tokenizer.all_special_ids)
    return torch.tensor([token in special for token in ids])

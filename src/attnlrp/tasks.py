"""What a task adds: from what is asked to token indices and outputs to explain, and the names of these outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlrp.errors import InputError, ModelError, TargetError
from attnlrp.targets import Continuation, class_index, token_index
from attnlrp.tokens import name_of

__all__ = ["TASKS", "Question", "Request", "Slot", "Task"]

LOGITS = "logits"
_LONGEST_ANSWER = 30  # tokens


@dataclass(frozen=True)
class Slot:
    """An output that is not decided yet.

    Args:
        position: token whose output is explained; None where the whole text has one.
        target: which output; None for the prediction.
        head: field of the model's output that holds its logits.
    """

    position: int | None
    target: Any
    head: str = LOGITS


@dataclass(frozen=True)
class Question:
    """What a user asks of one text."""

    text: Any
    targets: list[Any]
    position: int | Sequence[int] | None = None
    generate: int = 0
    context: str | None = None
    prefix: str | None = None
    images: tuple[Any, ...] = ()
    chat: bool = False


@dataclass(frozen=True)
class Request:
    """One text, tokenised, and what to explain of it: each row is a sum over slots.

    Args:
        ids: token indices that the model reads.
        rows: what to explain.
        segments: origin of each of `ids`.
        decoder: token indices that a decoder beside the encoder has written so far.
        types: token type of each of `ids`, for models that have such.
        spans: characters of the context (start, end) of each of `ids`; None for a token outside of it.
        context: the text that the spans point into.
        extra: further inputs of the model, such as pixel values.
        read: how many of `ids` the model is given; None for all.
    """

    ids: list[int]
    rows: list[list[Slot]]
    segments: tuple[str, ...]
    decoder: list[int] = field(default_factory=list)
    types: list[int] | None = None
    spans: tuple[tuple[int, int] | None, ...] = ()
    context: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    read: int | None = None


Outputs = Callable[[str, int | None], Tensor]
"""Logits (output,) of one text, by head and position."""


class Task:
    """A kind of model: the base serves classifiers of whole texts.

    Args:
        model: a model of `transformers`.
        tokenizer: its tokenizer.
        processor: what turns images into its inputs; None for models of text alone.
        name: what errors call the model.
    """

    accepts: tuple[str, ...] = ()
    """Options that only some tasks have: position, generate, continuation, context, prefix, image, chat."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any, name: str) -> None:
        self.model, self.tokenizer, self.processor, self.model_name = model, tokenizer, processor, name

    def request(self, question: Question) -> Request:
        """Tokenise a text and lay out its rows."""
        ids, types = self.encode(question.text)
        return Request(ids, [[Slot(None, t)] for t in question.targets], ("prompt",) * len(ids), types=types)

    def choose(self, slot: Slot, outputs: Outputs, request: Request) -> int:
        """The output that the model predicts."""
        return int(outputs(slot.head, slot.position).argmax())

    def index(self, target: Any, slot: Slot, size: int, request: Request, option: str) -> int:
        """The output that a user names."""
        return class_index(target, self.labels, option=option)

    def name(self, ids: Sequence[int], slot: Slot, request: Request) -> str:
        """What to call an output, or the sum of several."""
        return self.labels[ids[0]]

    def column(self, slot: Slot, id: int, request: Request) -> int | None:
        """Index of the token whose output is explained, among all that the model has read."""
        return slot.position

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return [self.model.config.id2label[k] for k in range(self.model.config.num_labels)]

    def encode(self, text: str, room: int = 0) -> tuple[list[int], list[int] | None]:
        """Token indices and token types of a text, with room for more tokens after it."""
        encoded = self.tokenizer(text, verbose=False)
        ids: list[int] = encoded.input_ids
        if not set(ids) - set(self.tokenizer.all_special_ids):
            raise InputError(f"text: {text!r} has nothing to explain; give at least one token")
        self.check_length(len(ids) + room)
        return ids, encoded.get("token_type_ids")

    def check_length(self, length: int) -> None:
        """Raise an `InputError` if the model cannot read as many tokens."""
        config = self.model.config.get_text_config()
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
        limit = min([n for n in (*limits, self.tokenizer.model_max_length) if n and n > 0], default=math.inf)
        if length > limit:
            raise InputError(
                f"text: {length} tokens are more than the context of {self.model_name}, {limit}; shorten it"
            )


class _Vocabulary(Task):
    """Outputs are tokens of the vocabulary."""

    accepts: tuple[str, ...] = ("position",)

    def index(self, target: Any, slot: Slot, size: int, request: Request, option: str) -> int:
        return token_index(target, self.tokenizer, size, option=option)

    def name(self, ids: Sequence[int], slot: Slot, request: Request) -> str:
        return name_of(self.tokenizer, ids)


class CausalLM(_Vocabulary):
    """A decoder: the output after each token is the next token."""

    accepts: tuple[str, ...] = ("position", "generate", "continuation", "chat")

    def request(self, question: Question) -> Request:
        ids, extra = self._read(question)
        if question.generate:
            sequence = generate(self.model, self.tokenizer, ids, question.generate, extra=extra)
            rows = [[Slot(k - 1, sequence[k])] for k in range(len(ids), len(sequence))]
            return self._request(ids, sequence[len(ids) : -1], rows, extra)
        if any(isinstance(t, Continuation) for t in question.targets):
            more = self._continuation(question, ids)
            slots = [Slot(len(ids) - 1 + k, token) for k, token in enumerate(more)]
            return self._request(ids, more[:-1], [slots], extra)
        return self._request(ids, [], pair_up(question, len(ids), [len(ids) - 1]), extra)

    def _read(self, question: Question) -> tuple[list[int], dict[str, Tensor]]:
        """Token indices of a prompt or a conversation, and what the model reads beside them."""
        if not question.chat:
            return self.encode(question.text, question.generate)[0], {}
        template = chat_template(self.tokenizer)
        ids = template(messages(question), add_generation_prompt=True, tokenize=True, return_dict=False)
        self.check_length(len(ids) + question.generate)
        return ids, {}

    def _continuation(self, question: Question, ids: list[int]) -> list[int]:
        only = positions_of(question.position, len(ids), [len(ids) - 1]) == [len(ids) - 1]
        if len(question.targets) != 1 or not only:
            raise InputError("target: a Continuation follows the whole prompt and must be the only target")
        following, plain = question.targets[0].text, not (question.chat or question.images)
        whole = self.tokenizer(question.text + following, verbose=False).input_ids if plain else []
        if plain and whole[: len(ids)] == ids:
            more = whole[len(ids) :]
        else:  # the last token of the prompt would grow into the continuation
            more = self.tokenizer.encode(following, add_special_tokens=False)
        require_tokens(more, following)
        self.check_length(len(ids) + len(more) - 1)
        return more

    def _placeholder(self) -> int | None:
        """The token in whose place a patch of an image is read."""
        return None

    def _request(self, prompt: list[int], more: list[int], rows: list[list[Slot]], extra: dict[str, Tensor]) -> Request:
        placeholder = self._placeholder()
        segments = tuple("image" if extra and token == placeholder else "prompt" for token in prompt)
        return Request(
            [*prompt, *more], rows, segments + ("generated",) * len(more), extra=lengthened(extra, prompt, more)
        )


class ImageTextToText(CausalLM):
    """A decoder that reads patches of images in the place of tokens."""

    accepts = (*CausalLM.accepts, "image")

    def _read(self, question: Question) -> tuple[list[int], dict[str, Tensor]]:
        if not question.images:
            return super()._read(question)
        if self.processor is None or self._placeholder() is None:
            raise ModelError(
                "image: expected a vision-language model whose images take the place of tokens, and its processor "
                "(Explainer(model, processor)); other models are explained by attnlrp.propagate with live pixel_values"
            )
        if question.chat:
            template = chat_template(self.processor)
            text = template(messages(question), add_generation_prompt=True, tokenize=False)
        else:
            mark = getattr(self.processor, "image_token", None) or self.tokenizer.decode([self._placeholder()])
            text = question.text if mark in question.text else mark * len(question.images) + question.text
        try:
            encoded = self.processor(text=text, images=list(question.images), return_tensors="pt")
        except (ValueError, IndexError) as error:
            raise InputError(
                f"image: the model's processor cannot read {len(question.images)} images: {error}"
            ) from error
        extra = {k: v.to(self.model.device) for k, v in encoded.items() if k not in ("input_ids", "attention_mask")}
        ids = encoded["input_ids"][0].tolist()
        self.check_length(len(ids) + question.generate)
        return ids, extra

    def _placeholder(self) -> int | None:
        found = (getattr(self.model.config, name, None) for name in ("image_token_id", "image_token_index"))
        return next((index for index in found if index is not None), None)


class MaskedLM(_Vocabulary):
    """An encoder that fills in masks: one row for each mask, or for each position asked for."""

    def request(self, question: Question) -> Request:
        ids, types = self.encode(question.text)
        mask = self.tokenizer.mask_token_id
        masks = [k for k, token in enumerate(ids) if token == mask]
        if question.position is None and not masks:
            raise InputError(
                f"text: {question.text!r:.60} has no {self.tokenizer.mask_token or 'mask token'}; put it where a token "
                "is to be predicted, or give position= to explain the prediction at another token"
            )
        rows = pair_up(question, len(ids), masks)
        return Request(ids, rows, ("prompt",) * len(ids), types=types)


class Seq2SeqLM(_Vocabulary):
    """An encoder and a decoder: each output token against the encoder's input and what the decoder has written."""

    accepts = ("generate", "continuation", "prefix")

    def request(self, question: Question) -> Request:
        ids, _ = self.encode(question.text)
        written = self._start() + (self._target_ids(question.prefix) if question.prefix else [])
        if question.generate:
            sequence = generate(self.model, self.tokenizer, ids, question.generate, written=written)
            rows = [[Slot(k - 1, sequence[k])] for k in range(len(written), len(sequence))]
            return self._request(ids, sequence[:-1], rows)
        if any(isinstance(t, Continuation) for t in question.targets):
            if len(question.targets) != 1:
                raise InputError("target: a Continuation must be the only target")
            more = self._target_ids(question.targets[0].text)
            require_tokens(more, question.targets[0].text)
            slots = [Slot(len(written) - 1 + k, token) for k, token in enumerate(more)]
            return self._request(ids, written + more[:-1], [slots])
        return self._request(ids, written, [[Slot(len(written) - 1, t)] for t in question.targets])

    def _request(self, ids: list[int], decoder: list[int], rows: list[list[Slot]]) -> Request:
        self.check_length(len(decoder))
        return Request(ids, rows, ("encoder",) * len(ids), decoder=decoder)

    def column(self, slot: Slot, id: int, request: Request) -> int | None:
        return len(request.ids) + (slot.position or 0)

    def _start(self) -> list[int]:
        """What the decoder starts from: its start token, and a token that the model's settings force after it."""
        settings = (
            getattr(self.model, "generation_config", None),
            self.model.config.get_text_config(),
            self.model.config,
        )
        found = {}
        for name in ("decoder_start_token_id", "bos_token_id", "forced_bos_token_id"):
            values = [getattr(s, name, None) for s in settings]
            found[name] = next((v for v in values if v is not None), None)
        start = found["decoder_start_token_id"]
        start = found["bos_token_id"] if start is None else start
        if start is None:
            raise ModelError("the model's config has no decoder_start_token_id: set it, so that the decoder can start")
        forced = found["forced_bos_token_id"]
        return [int(start), *([] if forced is None or forced == start else [int(forced)])]

    def _target_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text_target=text, add_special_tokens=False, verbose=False).input_ids
        return ids


class TokenClassification(Task):
    """A class for each token: by default one row for each token that is predicted to be something."""

    accepts = ("position",)

    def request(self, question: Question) -> Request:
        ids, types = self.encode(question.text)
        special = set(self.tokenizer.all_special_ids)
        text = [k for k, token in enumerate(ids) if token not in special]
        if question.position is None and question.targets == [None]:
            text = self._entities(ids, types, text)
        rows = pair_up(question, len(ids), text)
        return Request(ids, rows, ("prompt",) * len(ids), types=types)

    def _entities(self, ids: list[int], types: list[int] | None, text: list[int]) -> list[int]:
        """The tokens of a class other than "O"; all of the text if there are none."""
        if "O" not in self.labels:
            return text
        device = self.model.device
        inputs = {"input_ids": torch.tensor([ids], device=device)}
        if types is not None:
            inputs["token_type_ids"] = torch.tensor([types], device=device)
        with torch.no_grad():
            predicted = self.model(**inputs).logits[0].argmax(-1).tolist()
        return [k for k in text if self.labels[predicted[k]] != "O"] or text


class QuestionAnswering(Task):
    """Extractive answers: the logits of the answer's first and last token, as two rows."""

    accepts = ("context",)
    heads = ("start_logits", "end_logits")

    def request(self, question: Question) -> Request:
        if not question.context:
            raise InputError("context: got none, expected the text that the answer is part of (--context)")
        if not self.tokenizer.is_fast:
            raise ModelError("question answering needs a tokenizer of the tokenizers library, which knows characters")
        encoded = self.tokenizer(question.text, question.context, return_offsets_mapping=True, verbose=False)
        self.check_length(len(encoded.input_ids))
        parts = encoded.sequence_ids()
        if not {0, 1} <= set(parts):
            raise InputError("text: got an empty question or context, expected at least one token of each")
        spans = tuple(span if part == 1 else None for part, span in zip(parts, encoded["offset_mapping"], strict=True))
        rows = [[Slot(None, target, head)] for target in question.targets for head in self.heads]
        return Request(
            encoded.input_ids,
            rows,
            _sides(parts),
            types=encoded.get("token_type_ids"),
            spans=spans,
            context=question.context,
        )

    def choose(self, slot: Slot, outputs: Outputs, request: Request) -> int:
        """Start or end of the most likely answer inside the context."""
        starts, ends = (outputs(head, None).detach().float() for head in self.heads)
        inside = torch.tensor([span is not None for span in request.spans], device=starts.device)
        scores = starts[:, None] + ends[None, :]  # (start, end)
        allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(_LONGEST_ANSWER - 1)
        scores = scores.masked_fill(~(allowed & inside[:, None] & inside[None, :]), -math.inf)
        start, end = divmod(int(scores.argmax()), len(ends))
        return start if slot.head == self.heads[0] else end

    def index(self, target: Any, slot: Slot, size: int, request: Request, option: str) -> int:
        if not isinstance(target, str) or not target.strip():
            raise TargetError(f"{option}: got {target!r}, expected an answer: a part of the context, word for word")
        begin = request.context.find(target.strip())
        if begin < 0:
            raise TargetError(f"{option}: {target!r} is not a part of the context; give the answer word for word")
        end = begin + len(target.strip())
        inside = [k for k, span in enumerate(request.spans) if span and span[0] < end and span[1] > begin]
        return inside[0] if slot.head == self.heads[0] else inside[-1]

    def column(self, slot: Slot, id: int, request: Request) -> int | None:
        return id

    def name(self, ids: Sequence[int], slot: Slot, request: Request) -> str:
        token = name_of(self.tokenizer, [request.ids[ids[0]]]).strip()
        return f"{slot.head.removesuffix('_logits')}: {token}"


TASKS: dict[str, type[Task]] = {
    "causal-lm": CausalLM,
    "image-text-to-text": ImageTextToText,
    "seq2seq-lm": Seq2SeqLM,
    "masked-lm": MaskedLM,
    "sequence-classification": Task,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
}


def generate(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    count: int,
    *,
    written: list[int] | None = None,
    extra: dict[str, Tensor] | None = None,
) -> list[int]:
    """Greedy continuation: all ids of a decoder, or what the decoder beside an encoder has `written` then."""
    prompt = torch.tensor([ids], device=model.device)
    inputs: dict[str, Any] = {"attention_mask": torch.ones_like(prompt)} | (extra or {})
    if written is not None:
        inputs["decoder_input_ids"] = torch.tensor([written], device=model.device)
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    pad = pad_of(model, tokenizer)
    with torch.no_grad():
        sequence = model.generate(prompt, **inputs, max_new_tokens=count, pad_token_id=pad, **greedy)
    return sequence[0].tolist()  # type: ignore[no-any-return]


def messages(question: Question) -> list[dict[str, Any]]:
    """A conversation: as it was given, or the text as what the user says, after the images."""
    if not isinstance(question.text, str):
        return list(question.text)
    said: Any = question.text
    if question.images:
        said = [{"type": "image"}] * len(question.images) + [{"type": "text", "text": question.text}]
    return [{"role": "user", "content": said}]


def chat_template(tokenizer: Any) -> Callable[..., Any]:
    """The chat template of a tokenizer or processor."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("chat: this model's tokenizer has no chat template; give the prompt as one text, without chat")
    return tokenizer.apply_chat_template  # type: ignore[no-any-return]


def lengthened(extra: dict[str, Tensor], prompt: list[int], more: list[int]) -> dict[str, Tensor]:
    """Inputs with a value for each token (their types), as long as the text with what follows the prompt."""
    shape = (1, len(prompt))
    return {k: F.pad(v, (0, len(more))) if v.shape == shape else v for k, v in extra.items()}


def pad_of(model: Any, tokenizer: Any) -> int:
    """The token that fills up shorter texts."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return int(next((i for i in (pad, tokenizer.pad_token_id) if i is not None), 0))


def pair_up(question: Question, length: int, default: list[int]) -> list[list[Slot]]:
    """One row for each target at each position, of which there are as many, or one."""
    positions, targets = positions_of(question.position, length, default), question.targets
    count = max(len(positions), len(targets))
    if {len(positions), len(targets)} - {1, count}:
        raise InputError(f"got {len(targets)} targets and {len(positions)} positions, expected as many, or one of them")
    positions, targets = positions * (count // len(positions)), targets * (count // len(targets))
    return [[Slot(p, t)] for p, t in zip(positions, targets, strict=True)]


def positions_of(position: int | Sequence[int] | None, length: int, default: list[int]) -> list[int]:
    """Positions from the start."""
    if position is None:
        return default
    wanted = list(position) if isinstance(position, Iterable) else [position]
    for p in wanted:
        if not isinstance(p, int) or not -length <= p < length:
            raise InputError(f"position: got {p!r}, expected {-length} to {length - 1} for a text of {length} tokens")
    if not wanted:
        raise InputError("position: got an empty list, expected at least one position")
    return [p % length for p in wanted]


def require_tokens(ids: list[int], text: str) -> None:
    """Refuse an empty continuation."""
    if not ids:
        raise TargetError(f"target: the continuation {text!r} has no token")


def _sides(parts: Sequence[int | None]) -> tuple[str, ...]:
    """The side of each token; special tokens belong to what is before them."""
    sides, side = [], "question"
    for part in parts:
        side = side if part is None else ("question", "context")[part]
        sides.append(side)
    return tuple(sides)

"""What is evaluated: one input, the output that is explained, and what is known about its tokens."""

from __future__ import annotations

import inspect
import io
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attnlrp.errors import InputError, ModelError
from attnlrp.evaluation.image_data import Packed
from attnlrp.images import read_images

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Output",
    "Sample",
    "answers_match",
    "classified",
    "extractive",
    "image_classified",
    "next_token",
    "question",
    "span_tokens",
]

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
        inputs: keyword inputs of the model, batch of one; `input_ids` (1, token), or `pixel_values` (1, channel,
            height, width).
        output: what is explained.
        special: special tokens of the tokenizer (token,); of an image, no pixel is special (height, width).
        answer: tokens of the answer (token,), for question answering.
        correct: whether the model's answer or class is right; None where that is not known.
        details: what else is known, such as what the model said.
        mask: pixels of the object in an image, as the model reads it (height, width).
    """

    name: str
    inputs: Mapping[str, Any]
    output: Output
    special: Tensor
    answer: Tensor | None = None
    correct: bool | None = None
    details: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None


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


def image_classified(model: Any, processor: Any, record: Mapping[str, Any], *, name: str) -> Sample:
    """The predicted class of an image.

    The object is marked where the model reads it: the box or mask goes through the resizing and cropping of the
    processor. `correct` is None if the label is not one of the model's.

    Args:
        model: an image classifier.
        processor: its image processor.
        record: image (file, `Packed`, or PIL image); optional label (name or index of a class); optional box (x0, y0,
            x1, y1) in pixels of the image, upright, whose corner pixels belong to it; or mask (file, `Packed`, or PIL
            image of the same size, not 0 on the object).
        name: of the sample.

    Raises:
        InputError: no image, or a box or mask that does not fit it.
    """
    (picture,) = read_images(_opened(record["image"]))
    process = getattr(processor, "image_processor", processor)
    pixels = process(images=picture, return_tensors="pt")["pixel_values"]
    if pixels.dim() != 4 or len(pixels) != 1:
        raise ModelError(f"{type(process).__name__} gives pixels {tuple(pixels.shape)}, expected one image for a model")
    inputs = {"pixel_values": pixels.to(model.device, model.dtype)}
    with torch.no_grad():
        logits = model(**inputs).logits
    index = int(logits[0].argmax())
    mask = _object(process, picture, record, name)
    return Sample(
        name,
        inputs,
        Output(index, last=False),
        torch.zeros(pixels.shape[-2:], dtype=torch.bool),
        correct=_same_class(model.config, index, record.get("label")),
        details={"class": index, "label": record.get("label")},
        mask=mask,
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


def _opened(image: Any) -> Any:
    """An image that is inside of a zip file, opened; anything else as it is."""
    if not isinstance(image, Packed):
        return image
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(image.read()))
    except (UnidentifiedImageError, OSError, KeyError, SyntaxError) as error:
        raise InputError(f"image: cannot read {image}: {error}") from error


def _object(process: Any, picture: Image, record: Mapping[str, Any], name: str) -> Tensor | None:
    """Pixels of the object where the processor puts them (height, width)."""
    from PIL import Image

    if record.get("mask") is not None:
        marked = _mask(record["mask"], picture, name)
    elif record.get("box") is not None:
        marked = _box(record["box"], picture, name)
    else:
        return None
    drawn = Image.fromarray(255 * marked.byte().numpy()).convert("RGB")
    # nearest: the object has no grey edges; 255 and 0 stay as they are
    options = {"do_rescale": False, "do_normalize": False, "resample": Image.Resampling.NEAREST}
    found = process(images=drawn, return_tensors="pt", **options)["pixel_values"]
    inside: Tensor = found[0].float().mean(dim=0) > 127
    return inside


def _mask(mask: Any, picture: Image, name: str) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    opened = _opened(mask)
    try:
        if isinstance(opened, Image.Image):
            found = opened
        else:
            with Image.open(opened) as file:
                found = file.copy()
        values = np.asarray(
            found.convert("L") if found.mode in ("LA", "RGB", "RGBA") else found
        )  # indices of a palette
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(f"sample {name}: cannot read the mask {mask}: {error}") from error
    if found.size != picture.size:
        raise InputError(f"sample {name}: its mask has {found.size} pixels, expected {picture.size} as its image")
    return torch.from_numpy(values > 0)


def _box(box: Any, picture: Image, name: str) -> Tensor:
    wide, high = picture.size
    try:
        x0, y0, x1, y1 = (round(float(corner)) for corner in box)
        fits = x0 <= x1 and y0 <= y1 and x1 >= 0 and y1 >= 0 and x0 < wide and y0 < high
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise InputError(f"sample {name}: got the box {box}, expected x0 <= x1 and y0 <= y1 inside of {wide} x {high}")
    marked = torch.zeros(high, wide, dtype=torch.bool)
    marked[max(y0, 0) : y1 + 1, max(x0, 0) : x1 + 1] = True
    return marked


def _same_class(config: Any, index: int, label: str | int | None) -> bool | None:
    """Whether a class has this label: its index, its name, or one of the names that commas separate."""
    if label is None or isinstance(label, int):
        return None if label is None else index == label
    names = {int(k): [name.strip() for name in [v, *v.split(",")]] for k, v in config.id2label.items()}
    known = {k for k, found in names.items() if label.casefold() in [name.casefold() for name in found]}
    return index in known if known else None


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

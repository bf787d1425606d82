"""From the records of a data set to passes through a model: what it reads, and the scalar that is explained."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attnlrp.columns import widen
from attnlrp.errors import InputError
from attnlrp.explainer import Explainer
from attnlrp.explainer import _Form as Form
from attnlrp.image_explainer import ImageExplainer
from attnlrp.image_explainer import _Scores as Scores
from attnlrp.images import read_image
from attnlrp.inside import Wanted
from attnlrp.ranking import Passage
from attnlrp.readout import Outputs
from attnlrp.tasks import Question, Request
from attnlrp.tokens import pieces, words

__all__ = ["Named", "Pass", "Record", "readers"]

Record: TypeAlias = "str | Path | Mapping[str, Any]"


@dataclass(frozen=True)
class Named:
    """One record: its name, its text or image, and what tells it from others."""

    name: str
    content: Any
    digest: str


@dataclass(frozen=True)
class Pass:
    """One run of a model.

    Args:
        inputs: its keyword inputs.
        passages: what is read, one for each text of the batch.
        lengths: tokens of each text without padding; of an encoder-decoder, of both; None for all positions.
        total: from the model's output to the scalar that is explained, summed over the batch.
        leaves: inputs that relevance is propagated to; none for token indices.
    """

    inputs: dict[str, Any]
    passages: list[Passage]
    lengths: list[tuple[int | None, ...]]
    total: Callable[[Any], Tensor]
    leaves: tuple[Tensor, ...] = ()


def readers(explainer: Explainer | ImageExplainer, target: str | None, length: int) -> tuple[Texts | Images, str]:
    """What turns records into passes for this model, and what these explain: "every" prediction, or its "own".

    Raises:
        InputError: every prediction of a model that has one for the whole text.
    """
    positions = isinstance(explainer, Explainer) and "position" in explainer._task.accepts
    if target == "every" and not positions:
        raise InputError(f"target: {explainer.name} is a model for {explainer.task}, which has no output at each token")
    chosen = target or ("every" if positions else "own")
    if isinstance(explainer, ImageExplainer):
        return Images(explainer), chosen
    return Texts(explainer, every=chosen == "every", length=length), chosen


class Texts:
    """Reads texts."""

    def __init__(self, explainer: Explainer, *, every: bool, length: int) -> None:
        self._explainer, self._every, self._length = explainer, every, length
        self._specials = set(explainer.tokenizer.all_special_ids)

    def named(self, records: Iterable[Record]) -> Iterator[Named]:
        """Texts with names; one without is called by its number."""
        if isinstance(records, (str, Mapping)):
            raise InputError(f"texts: got {records!r:.60}, expected a list of texts")
        for number, record in enumerate(records):
            text = record.get("text") if isinstance(record, Mapping) else record
            name = str(record.get("name", number)) if isinstance(record, Mapping) else str(number)
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"text {name}: got {text!r:.60}, expected a text, or a mapping with text")
            cut = _cut(self._explainer.tokenizer, text, self._length)
            yield Named(name, cut, hashlib.sha256(cut.encode()).hexdigest())

    def passes(self, records: Sequence[Named]) -> Iterator[Pass]:
        """One pass for the batch; one for each text where the model cannot read several at a time."""
        read = [(record, self._request(record)) for record in records]
        together = self._explainer._can_share([request for _, request in read])
        for batch in [read] if together else [[one] for one in read]:
            requests = [request for _, request in batch]
            inputs, kept = self._explainer._inputs(requests)
            total = partial(self._total, requests, kept)
            passages = [self._passage(record, request) for record, request in batch]
            lengths: list[tuple[int | None, ...]] = [
                (len(r.ids), len(r.decoder)) if r.decoder else (len(r.ids),) for r in requests
            ]
            yield Pass(inputs, passages, lengths, total)

    def _request(self, record: Named) -> Request:
        task = self._explainer._task
        if not self._every:
            return task.request(Question(record.content, [None]))
        ids, types = task.encode(record.content)
        return Request(ids, [], ("prompt",) * len(ids), types=types)

    def _passage(self, record: Named, request: Request) -> Passage:
        ids = [*request.ids, *request.decoder]
        texts = tuple(map(sys.intern, pieces(self._explainer.tokenizer, ids)))  # many texts share few tokens
        special = [i in self._specials for i in ids]
        sides = ["encoder"] * len(request.ids) + ["decoder"] * len(request.decoder)
        return Passage(record.name, record.content, texts, words(texts, special, sides))

    def _total(self, requests: Sequence[Request], kept: dict[int, int], output: Any) -> Tensor:
        if self._every:
            best = widen(output.logits).max(dim=-1).values
            explained = [
                [k < len(r.ids) and r.ids[k] not in self._specials for k in range(best.shape[1])] for r in requests
            ]
            return best[torch.tensor(explained, device=best.device)].sum()
        form = Form(None, "logit", 1.0, Wanted())
        values: list[Tensor] = []
        for k, request in enumerate(requests):
            outputs = Outputs(output, k, kept, request)
            slots = [slot for row in request.rows for slot in row]
            scalars = [self._explainer._scalar(slot, outputs, request, form) for slot in slots]
            values += [scalar.value(outputs(slot)) for scalar, slot in zip(scalars, slots, strict=True)]
        return torch.stack(values).sum()


class Images:
    """Reads images, one at a time."""

    def __init__(self, explainer: ImageExplainer) -> None:
        self._explainer = explainer

    def named(self, records: Iterable[Record]) -> Iterator[Named]:
        """Files of images, called by their names if they have no other."""
        for number, record in enumerate(records):
            image = record.get("image") if isinstance(record, Mapping) else record
            if not isinstance(image, (str, Path)):
                raise InputError(f"image {number}: got {image!r:.60}, expected the name of a file")
            name = record.get("name") if isinstance(record, Mapping) else None
            yield Named(str(name or Path(image).name), str(image), str(image))

    def passes(self, records: Sequence[Named]) -> Iterator[Pass]:
        """One pass for each image."""
        for record in records:
            picture, _ = read_image(record.content)
            inputs = self._explainer._inputs(picture, None)
            pixels = inputs["pixel_values"].requires_grad_()
            passage = Passage(record.name, record.content, (), ())
            yield Pass(inputs, [passage], [(None,)], self._total, (pixels,))

    def _total(self, output: Any) -> Tensor:
        scores = Scores(self._explainer, output, None)
        (best,) = self._explainer._scalars(scores, None, None, None)
        return best.value(scores.of(best.id))


def _cut(tokenizer: Any, text: str, length: int) -> str:
    """The beginning of a text that has this many tokens."""
    encoded = tokenizer(text, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    ids = encoded["input_ids"]
    if len(ids) <= length:
        return text
    if not tokenizer.is_fast:
        return str(tokenizer.decode(ids[:length], skip_special_tokens=True))
    spans = [span for span in encoded["offset_mapping"] if span[1] > span[0]]
    room = length - (len(ids) - len(spans))
    return text[: spans[max(room, 1) - 1][1]]

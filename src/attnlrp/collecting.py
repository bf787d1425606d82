"""`reference_samples`: one pass over a data set for all units of a model, with memory that does not grow with it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlrp import checkpoint
from attnlrp.columns import widen
from attnlrp.contexts import explaining
from attnlrp.engine import propagate
from attnlrp.errors import InputError, ModelError, NumericalError
from attnlrp.explainer import Explainer
from attnlrp.image_explainer import ImageExplainer
from attnlrp.passes import Pass, Record, readers
from attnlrp.ranking import Ranking, ReferenceSample
from attnlrp.recording import is_in_decoder
from attnlrp.reference import By, ReferenceSamples, Settings
from attnlrp.rules import PRESETS
from attnlrp.units import Rows, Site, Taps, example_inputs, find_sites, resolve

__all__ = ["activation_maps", "name_of_model", "reference_samples", "select"]

Progress: TypeAlias = Callable[[int, str], None]


def reference_samples(
    explainer: Explainer | ImageExplainer,
    texts: Iterable[Record],
    *,
    units: str | Sequence[str] = "neurons",
    by: By | Sequence[By] = ("activation", "relevance"),
    reduce: Literal["sum", "max"] = "sum",
    top: int = 10,
    target: Literal["every", "own"] | None = None,
    length: int = 128,
    batch_size: int = 1,
    folder: str | Path | None = None,
    save_every: int = 100,
    progress: Progress | None = None,
) -> ReferenceSamples:
    """The texts on which each unit is the most active (ActMax), and the most relevant (RelMax).

    One forward and one backward pass for each text (or batch), in which every unit is read; without relevance, the
    forward pass alone. A text has one place among the samples of a unit: its value is the largest activation over its
    tokens, or the relevance of the unit for it. Kept are `top` numbers of each unit, and the texts that they are of.

    Args:
        explainer: of a model that reads texts, or images.
        texts: texts, or mappings with "text" and optional "name"; for an `ImageExplainer` names of files, or mappings
            with "image" and optional "name". They are read once, one batch after the other. The tokens of an image are
            the positions in a layer: patches, and what it reads besides.
        units: "neurons", "heads", or addresses of layers with wildcards, such as "layers.1?.mlp"; several of them.
        by: what units are ranked by: "activation", "relevance"; with a minus, the lowest come first: neurons with a
            gate have a meaning at either sign. The activation of a head is the norm of its output.
        reduce: how relevance is read off the tokens of a text: their "sum", or the "max" of them.
        top: samples that are kept of each unit.
        target: what is explained: the prediction at "every" token but special ones, summed, or the model's "own" of
            the task, as `Explainer` explains it: of a language model the next token after the text. Default: "every"
            where the model has an output at each token.
        length: tokens that texts are cut to.
        batch_size: texts in one pass.
        folder: where to keep what was found; the same call goes on from there after an interruption, and from the end
            if there are more texts now.
        save_every: texts after which the folder is written.
        progress: called with the number of texts that are done, and the name of the last.

    Returns:
        The samples of each unit.

    Raises:
        InputError: no such layer, a text without tokens, or a folder that was collected in another way.
        NumericalError: NaN or infinite activations or relevance.

    Reference:
        Achtibat et al. 2023 (CRP) for ranking by relevance; the paper names neurons by the texts that activate them.
    """
    rules = next((name for name, table in PRESETS.items() if table is explainer.rules), "custom")
    reader, chosen = readers(explainer, target, length)
    orders: tuple[By, ...] = (by,) if isinstance(by, str) else tuple(by)
    dtype = str(explainer.model.dtype).removeprefix("torch.")
    settings = Settings(name_of_model(explainer), rules, dtype, orders, reduce, chosen, length, top)
    if batch_size < 1 or save_every < 1:
        raise InputError(f"batch_size, save_every: got {batch_size}, {save_every}, expected at least 1")
    sites = select(find_sites(explainer.model, example_inputs(explainer.model)), units)
    state = _State(settings, sites, widen(torch.empty(0, dtype=explainer.model.dtype)).dtype, folder)
    records = state.behind(reader.named(texts))
    while batch := list(itertools.islice(records, batch_size)):
        with explaining():
            for found in reader.passes(batch):
                state.add(found, _collect(explainer, found, sites, settings))
        if state.count % save_every < len(batch):
            state.save()
        if progress is not None:
            progress(state.count, batch[-1].name)
    return state.save()


def name_of_model(explainer: Explainer | ImageExplainer) -> str:
    """The name of a model in its samples, the same wherever its file lies."""
    return Path(explainer.name).name if Path(explainer.name).exists() else explainer.name


def select(sites: Sequence[Site], units: str | Sequence[str]) -> tuple[Site, ...]:
    """The layers of a kind, or whose address matches a pattern.

    Raises:
        InputError: nothing matches.
    """
    patterns = [units] if isinstance(units, str) else list(units)
    for pattern in patterns or ["an empty list"]:
        if not any(pattern == site.kind or fnmatchcase(site.name, pattern) for site in sites):
            known = ", ".join(site.name for site in sites[:4])
            raise InputError(f"units: got {pattern}, expected neurons, heads, or a pattern of layers such as {known}")
    return tuple(s for s in sites if any(p == s.kind or fnmatchcase(s.name, p) for p in patterns))


def activation_maps(explainer: Explainer | ImageExplainer, samples: Sequence[ReferenceSample]) -> list[ReferenceSample]:
    """The same samples, each with what its unit computes at every token (or patch): one pass forwards for each of them.

    Args:
        explainer: of the model that they were collected from.
        samples: of any units.

    Raises:
        InputError: a unit that the model does not have.
    """
    sites = find_sites(explainer.model, example_inputs(explainer.model))
    reader, _ = readers(explainer, None, sys.maxsize)
    found = []
    for sample in samples:
        site, unit = resolve(sites, sample.unit)
        (one,) = reader.passes(list(reader.named([sample.passage.text])))
        seen = _Seen(site, unit)
        with torch.no_grad(), Taps(explainer.model, {site: seen}):
            explainer.model(**one.inputs)
        before, after = (0, 0) if len(lengths := one.lengths[0]) == 1 else (lengths[0] or 0, lengths[1] or 0)
        own = seen.strongest(lengths[_side(site)])
        padding = (before, 0) if _side(site) else (0, after)  # the other side of an encoder-decoder
        found.append(dataclasses.replace(sample, activation=F.pad(own, padding)))
    return found


class _Seen:
    """A tap that notes what one unit computes."""

    def __init__(self, site: Site, unit: int) -> None:
        self._site, self._unit = site, unit
        self._uses: list[Tensor] = []

    def __call__(self, x: Tensor, rows: Rows | None) -> Tensor:
        own = _activation(self._site, x)[..., self._unit].reshape(-1)
        self._uses.append(own if rows is None else own.new_zeros(rows.size).index_put((rows.tokens,), own))
        return x

    def strongest(self, length: int | None) -> Tensor:
        """At each token (token,); of several uses of a layer in one pass, the value of the largest magnitude."""
        if not self._uses:  # an expert that no token came to
            return torch.zeros(length or 0)
        each = torch.stack(self._uses)
        return each.gather(0, each.abs().argmax(dim=0, keepdim=True))[0].cpu()


class _Best(NamedTuple):
    """What a unit is ranked by, its value at its peak, and where that is: each (unit,)."""

    value: Tensor
    peak: Tensor
    position: Tensor


_Found: TypeAlias = "dict[tuple[By, Site, int], _Best]"
"""By, layer, text of the batch -> what was found."""


class _State:
    """What is kept of the texts that were read so far."""

    def __init__(self, settings: Settings, sites: tuple[Site, ...], dtype: torch.dtype, folder: str | Path | None):
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None and self._folder.is_dir() and any(self._folder.iterdir()):
            self._samples = ReferenceSamples.load(self._folder)
            self._samples.settings.require_same(settings, str(self._folder))
            if self._samples.sites != sites:
                raise InputError(
                    f"{self._folder}: holds samples of other units; give another folder, or the same units"
                )
        else:
            rankings = {
                by: {site.name: Ranking.empty(site.units, settings.top, dtype) for site in sites} for by in settings.by
            }
            self._samples = ReferenceSamples(settings, sites, rankings, {}, 0, "")
        self.count, self._digest = self._samples.count, self._samples.digest
        self._passages = dict(self._samples.passages)

    def behind(self, records: Iterable[Any]) -> Iterator[Any]:
        """The records that were not read yet, after those that were.

        Raises:
            InputError: other texts were read.
        """
        digest, number = "", 0
        for number, record in enumerate(records, start=1):
            digest = _digest(digest, record)
            if number == self.count and digest != self._digest:
                raise InputError(
                    f"{self._folder}: its {self.count} texts are not those that were given; expected the same"
                )
            if number > self.count:
                self._digest = digest
                yield record
        if number < self.count:
            raise InputError(
                f"{self._folder}: holds samples of {self.count} texts, got {number}; expected the same texts"
            )

    def add(self, one: Pass, found: _Found) -> None:
        """What one pass has found."""
        for (by, site, text), best in found.items():
            values, positions = best.value.cpu(), best.position.cpu()
            if not torch.isfinite(values).all():
                what = one.passages[text].name
                raise NumericalError(
                    f"{what}: {by} of {site.name} is NaN or infinite; use float32 or bfloat16 (--dtype)"
                )
            self._samples.rankings[by][site.name].add(self.count + text, values, positions)
        self._passages |= {self.count + k: passage for k, passage in enumerate(one.passages)}
        self.count += len(one.passages)

    def save(self) -> ReferenceSamples:
        """What is kept now, also in the folder."""
        self._passages = self._samples.used(self._passages)
        changed = self.count != self._samples.count
        self._samples = dataclasses.replace(
            self._samples, passages=dict(self._passages), count=self.count, digest=self._digest
        )
        if self._folder is not None and (changed or not self._folder.exists()):
            self._samples.save(self._folder)
        return self._samples


def _digest(before: str, record: Any) -> str:
    return hashlib.sha256(json.dumps([before, record.name, record.digest]).encode()).hexdigest()


# --- one pass -----------------------------------------------------------------------------------------------------


def _collect(explainer: Explainer | ImageExplainer, one: Pass, sites: Sequence[Site], settings: Settings) -> _Found:
    """What one pass finds of every unit."""
    collector = _Collector(settings, one.lengths)
    taps = Taps(explainer.model, {site: partial(collector.tap, site) for site in sites})
    if not collector.relevance:
        with torch.no_grad(), taps:
            explainer.model(**one.inputs)
        return collector.found
    with ExitStack() as entered:
        propagation = entered.enter_context(propagate(explainer.model, explainer.rules))
        if getattr(explainer, "memory", "full") == "checkpoint":
            entered.enter_context(checkpoint.checkpointed(explainer.model))
        entered.enter_context(taps)
        total = one.total(explainer.model(**one.inputs))
    leaves = [x for _, x in propagation.embeddings if x.requires_grad] or list(one.leaves)
    if not leaves:
        raise ModelError(
            f"{explainer.name} does not look its tokens up in get_input_embeddings(): use attnlrp.propagate"
        )
    torch.autograd.grad(total, leaves, allow_unused=True)
    collector.finish()
    return collector.found


class _Collector:
    """Reads units as they are computed, and their relevance as it comes back; one layer at a time."""

    def __init__(self, settings: Settings, lengths: Sequence[tuple[int | None, ...]]) -> None:
        self.relevance = any("relevance" in by for by in settings.by)
        self.found: _Found = {}
        self._settings, self._lengths = settings, lengths
        # those whose relevance is to come
        self._waiting: dict[int, tuple[Site, Tensor, Rows | None, int]] = {}
        self._numbers = itertools.count()

    def tap(self, site: Site, x: Tensor, rows: Rows | None) -> Tensor:
        """Read the units of a layer, or watch them until their relevance is known."""
        if not self.relevance or not x.requires_grad:
            self._take(site, "activation", _activation(site, x.detach()), rows)
            return x
        live, number = x.view_as(x), next(self._numbers)
        self._waiting[number] = (site, x.detach(), rows, x._version)
        live.register_hook(partial(self._note, number))
        return live

    def _note(self, number: int, grad: Tensor) -> None:
        site, x, rows, version = self._waiting.pop(number)
        if x._version != version:
            raise ModelError(f"{site.name}: the model writes into its units after it has used them")
        relevance = (widen(x) * widen(grad)).unflatten(-1, (site.units, -1)).sum(dim=-1)
        self._take(site, "relevance", relevance, rows)
        self._take(site, "activation", _activation(site, x), rows)

    def finish(self) -> None:
        """Read the activations of the units that no relevance came to."""
        for site, x, rows, _ in self._waiting.values():
            self._take(site, "activation", _activation(site, x), rows)
        self._waiting.clear()

    def _take(self, site: Site, what: str, x: Tensor, rows: Rows | None) -> None:
        """The largest values of units (..., unit) over the tokens of each text, or their sums."""
        orders = [by for by in self._settings.by if by.removeprefix("-") == what]
        total = what == "relevance" and self._settings.reduce == "sum"
        for text, own, tokens in _by_text(x, rows, [lengths[_side(site)] for lengths in self._lengths]):
            positions = tokens + self._start(site, text)
            for by in orders if len(own) else ():
                signed = -own if by.startswith("-") else own
                peak, at = signed.max(dim=0)
                best = _Best(signed.sum(dim=0) if total else peak, peak, positions[at])
                before = self.found.get((by, site, text))
                self.found[by, site, text] = best if before is None else _joined(before, best, total)

    def _start(self, site: Site, text: int) -> int:
        """Where the tokens of a layer begin among all that was read: a decoder's come after those of its encoder."""
        first, *others = self._lengths[text]
        return (first or 0) if others and _side(site) else 0


def _activation(site: Site, x: Tensor) -> Tensor:
    """What each unit computes (..., unit); of a head, the norm of its output."""
    own = widen(x).unflatten(-1, (site.units, -1))
    activation: Tensor = own.squeeze(-1) if own.shape[-1] == 1 else own.norm(dim=-1)
    return activation


def _joined(before: _Best, best: _Best, total: bool) -> _Best:
    """A layer that is used several times in one pass."""
    higher = best.peak > before.peak
    peak = torch.where(higher, best.peak, before.peak)
    return _Best(
        before.value + best.value if total else peak, peak, torch.where(higher, best.position, before.position)
    )


def _by_text(x: Tensor, rows: Rows | None, lengths: Sequence[int | None]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Text of the batch, its values (row, unit) without padding, and the token of each row."""
    flat, batch = x.reshape(-1, x.shape[-1]), len(lengths)
    if rows is None:
        each = flat.unflatten(0, (batch, -1))
        positions = torch.arange(each.shape[1], device=x.device)
        for text, length in enumerate(lengths):
            yield text, each[text, :length], positions[:length]
        return
    width = rows.size // batch
    of, positions = rows.tokens // width, rows.tokens % width
    for text, length in enumerate(lengths):
        chosen = (of == text) & (positions < (width if length is None else length))
        yield text, flat[chosen], positions[chosen]


def _side(site: Site) -> int:
    """Which length of a text a layer has: the last for a decoder beside an encoder, else the first."""
    return -1 if is_in_decoder(site.name) else 0

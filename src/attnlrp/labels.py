"""What a neuron stands for: tokens that its weights promote, words of its reference samples; and neurons for a word."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attnlrp.errors import InputError, ModelError
from attnlrp.explainer import Explainer
from attnlrp.ranking import NONE
from attnlrp.reference import By, ReferenceSamples
from attnlrp.tokens import name_of
from attnlrp.units import Site, Unit, example_inputs, find_sites, resolve

__all__ = ["Label", "LogitLens", "Match", "TokenLogit", "has_lens", "label", "search"]

_FULL = 10.0  # standard deviations of promotion that count as much as all reference samples
_TASKS = ("causal-lm", "image-text-to-text")


@dataclass(frozen=True)
class TokenLogit:
    """A token of the vocabulary, and how far a neuron moves its logit.

    Args:
        token: its text, with its leading space.
        id: its index.
        deviation: of its logit from the mean of the vocabulary, in standard deviations of the vocabulary.
    """

    token: str
    id: int
    deviation: float


@dataclass(frozen=True)
class Label:
    """What is known of a unit.

    Args:
        unit: its address.
        words: words at the peaks of its reference samples, with the share of the samples; commonest first.
        after: words behind these.
        promotes: tokens whose logits its output weights raise the most; none without a `LogitLens`.
        suppresses: those that they lower the most.
    """

    unit: str
    words: list[tuple[str, float]]
    after: list[tuple[str, float]]
    promotes: list[TokenLogit]
    suppresses: list[TokenLogit]


@dataclass(frozen=True)
class Match:
    """A unit that a search has found.

    Args:
        unit: its address.
        score: the larger of `at` and `after`, plus promotes / 10, which is kept between 0 and 1.
        at: share of its reference samples with their peak at the word.
        after: share of those with their peak at the word before it.
        promotes: how far its output weights raise the word's logit, in standard deviations of the vocabulary (of the
            forms with and without a space or capital, the largest); 0 without a `LogitLens`, or if no form is a token.
    """

    unit: str
    score: float
    at: float
    after: float
    promotes: float


class LogitLens:
    """Tokens that the output weights of a neuron promote: logits of a residual stream that holds nothing else.

    W_U N(w): w is the neuron's column of the last linear layer of its MLP, scaled to a root mean square of 1; N is the
    model's last norm without its bias (of the weight of an RMSNorm g it gives g w; a LayerNorm takes the mean off too),
    after the norm that the output of the MLP goes through on its own, if there is one; W_U is the unembedding without
    bias. For a neuron with a negative activation, promoted and suppressed change places.

    Args:
        explainer: of a language model without an encoder.

    Raises:
        ModelError: another kind of model, or more than a norm between its last layer and its output embedding.

    Reference:
        nostalgebraist 2020 (logit lens); Geva et al. 2022 for the columns of an MLP.
    """

    def __init__(self, explainer: Explainer) -> None:
        if not has_lens(explainer):
            raise ModelError(f"{explainer.name} is a model for {explainer.task}; a logit lens is for {_TASKS[0]}")
        self._model, self._tokenizer = explainer.model, explainer.tokenizer
        head = self._model.get_output_embeddings()
        inputs = example_inputs(self._model)
        self.sites = find_sites(self._model, inputs)
        with torch.no_grad(), _Trace(self._model) as trace:
            self._model(**inputs, use_cache=False)
        self._norm = trace.norm_before(head)
        self._norm_after = {s: trace.norm_after(s.weight.rpartition(".")[0]) for s in self.sites}
        self._unembedding: Tensor = head.weight.detach()

    def __call__(self, unit: Unit, count: int = 10) -> tuple[list[TokenLogit], list[TokenLogit]]:
        """The tokens that a neuron promotes, and those that it suppresses; the strongest first.

        Raises:
            InputError: no such neuron, or a head, whose output is no single direction.
        """
        site, index = resolve(self.sites, unit)
        logits = F.linear(self._seen(site)[index], self._unembedding).float()
        logits = (logits - logits.mean()) / logits.std(correction=0)
        return self._named(logits.topk(count)), self._named(logits.topk(count, largest=False))

    def promotion(self, site: Site, word: str) -> Float[Tensor, " unit"]:
        """How far each neuron of a layer raises the logit of a word, in standard deviations of the vocabulary.

        Of the forms of the word (with a space before it or none, with a capital or none) that are one token, the one
        that is raised the most; 0 if none is one token.
        """
        forms = {start + form for start in (" ", "") for form in (word, word.lower(), word.capitalize())}
        encoded = [self._tokenizer.encode(form, add_special_tokens=False) for form in sorted(forms)]
        ids = sorted({ids[0] for ids in encoded if len(ids) == 1})
        seen = self._seen(site).float()
        if not ids:
            return seen.new_zeros(len(seen))
        mean, spread = self._vocabulary
        deviation = ((seen @ spread) * seen).sum(dim=-1).clamp(min=torch.finfo(seen.dtype).tiny).sqrt()
        raised: Tensor = (seen @ (self._unembedding[ids].float() - mean).T).max(dim=-1).values
        return raised / deviation

    @functools.cached_property
    def _vocabulary(self) -> tuple[Tensor, Tensor]:
        """Mean (hidden,) and covariance (hidden, hidden) of the unembedding over the vocabulary."""
        unembedding = self._unembedding.float()
        mean = unembedding.mean(dim=0)
        return mean, unembedding.T @ unembedding / len(unembedding) - mean[:, None] * mean

    def _seen(self, site: Site) -> Tensor:
        """What the unembedding reads of each neuron (unit, hidden)."""
        if site.kind != "neurons":
            raise InputError(f"logit lens: {site.name} has {site.kind}, whose output is no single direction")
        columns = _columns(self._model, site, self._unembedding.shape[1])
        between = self._norm_after[site]
        return _through(self._norm, columns if between is None else _through(between, columns))

    def _named(self, found: Any) -> list[TokenLogit]:
        return [
            TokenLogit(name_of(self._tokenizer, [index]), index, value)
            for value, index in zip(found.values.tolist(), found.indices.tolist(), strict=True)
        ]


def has_lens(explainer: Any) -> bool:
    """Whether a model is one for `LogitLens`."""
    return explainer.task in _TASKS


def label(
    samples: ReferenceSamples, unit: Unit, *, lens: LogitLens | None = None, by: By | None = None, count: int = 10
) -> Label:
    """What reference samples and weights say about a unit.

    Args:
        samples: which were collected of it.
        unit: such as "layers.16.mlp:394".
        lens: of the same model.
        by: which of its samples; default: the first that was collected.
        count: words and tokens of each kind.

    Raises:
        InputError: a unit or an order that was not collected.
    """
    site, index = resolve(samples.sites, unit)
    name = f"{site.name}:{index}"
    promotes, suppresses = ([], []) if lens is None or site.kind != "neurons" else lens(name, count)
    words, after = (samples.words(name, by, after=behind)[:count] for behind in (False, True))
    return Label(name, words, after, promotes, suppresses)


def search(
    samples: ReferenceSamples, word: str, *, lens: LogitLens | None = None, by: By | None = None, count: int = 10
) -> list[Match]:
    """The units that stand for a word, by their reference samples and weights, best first; see `Match` for the score.

    Args:
        samples: of all units that are searched.
        word: a word, in any case.
        lens: of the same model; without it, samples decide alone.
        by: which samples; default: the first that was collected.
        count: units that are listed.

    Raises:
        InputError: no word, or an order that was not collected.
    """
    if not word.strip() or len(word.split()) != 1:
        raise InputError(f"word: got {word!r}, expected one word")
    word, by = word.strip(), samples.order(by)
    at = _Places(samples, word, after=False)
    after = _Places(samples, word, after=True)
    sign = -1 if by == "-activation" else 1
    found: list[Match] = []
    for site in samples.sites:
        ranking = samples.rankings[by][site.name]
        shares = [places.share(ranking.samples, ranking.positions) for places in (at, after)]
        promotes = torch.zeros(site.units)
        if lens is not None and site.kind == "neurons":
            promotes = sign * lens.promotion(site, word).cpu()
        score = torch.maximum(*shares) + (promotes / _FULL).clamp(0, 1)
        best = score.topk(min(count, site.units)).indices.tolist()
        columns = [column.tolist() for column in (score, *shares, promotes)]
        found += [Match(f"{site.name}:{k}", *(column[k] for column in columns)) for k in best]
    return heapq.nlargest(count, found, key=lambda match: match.score)


class _Places:
    """Where a word is in the texts that were kept."""

    def __init__(self, samples: ReferenceSamples, word: str, *, after: bool) -> None:
        wanted = word.casefold()
        rows = {
            number: [k for k, own in enumerate(_by_token(passage, after)) if own.casefold() == wanted]
            for number, passage in samples.passages.items()
        }
        self._stride = 1 + max((len(p.tokens) for p in samples.passages.values()), default=0)
        self._keys = torch.tensor([n * self._stride + k for n, own in rows.items() for k in own], dtype=torch.int64)

    def share(self, samples: Tensor, positions: Tensor) -> Tensor:
        """Share of the samples (unit, top) that have their peak there (unit,)."""
        keys = samples.long() * self._stride + positions
        there = (torch.isin(keys, self._keys) & (samples != NONE)).sum(dim=1)
        return there / (samples != NONE).sum(dim=1).clamp(min=1)


def _by_token(passage: Any, after: bool) -> list[str]:
    """The word at each token, or the one behind it."""
    found: dict[int, str] = {}
    for k, index in enumerate(passage.words):
        if index not in found:
            found[index] = passage.word(k)
    return [found.get(index + after, "") for index in passage.words]


# --- weights and norms ----------------------------------------------------------------------------------------------


def _columns(model: Any, site: Site, hidden: int) -> Tensor:
    """What each neuron of a layer writes, per unit of its activation (unit, hidden)."""
    module = model.get_submodule(site.weight.rpartition(".")[0])
    weight: Tensor = model.get_parameter(site.weight).detach()
    if type(module) is nn.Linear:
        written = weight.T
    elif site.expert is None:  # whatever way its weight lies, and however it is stored
        eye = torch.eye(site.units, dtype=model.dtype, device=weight.device)
        written = _linear(module, eye, site.weight)
    else:
        own = weight[site.expert]
        transposed = getattr(module, "is_transposed", False) if site.units == hidden else own.shape[0] == site.units
        written = own if transposed else own.T
    if written.shape != (site.units, hidden):
        raise ModelError(f"{site.weight}: writes {tuple(written.shape)}, expected ({site.units}, {hidden})")
    return written


def _through(norm: nn.Module, columns: Tensor) -> Tensor:
    """Columns (unit, hidden) of root mean square 1 through a norm, without its bias."""
    wide = columns.float() if columns.dtype in (torch.float16, torch.bfloat16) else columns
    size = wide.square().mean(dim=-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny).sqrt()
    return _linear(norm, (wide / size).to(columns.dtype), type(norm).__name__)


def _linear(module: Any, x: Tensor, name: str) -> Tensor:
    """What a module makes of each row, without its bias."""
    try:
        with torch.no_grad():
            result: Tensor = module(x) - module(torch.zeros_like(x[:1]))
    except TypeError as error:
        raise ModelError(f"logit lens: {name} belongs to a module that reads more than one tensor ({error})") from error
    return result


class _Trace:
    """What every module reads and gives in one pass, by where it lies in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._given: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> _Trace:
        hook: Mapping[str, Any] = {"with_kwargs": True}
        self._hooks = [m.register_forward_hook(self._note, **hook) for m in self._model.modules()]
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        read = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
        given = output if isinstance(output, (tuple, list)) else (output,)
        result = next((v for v in given if isinstance(v, Tensor) and v.is_floating_point()), None)
        self._given[self._names[module]] = (read[0] if len(read) == 1 else None), result

    def norm_before(self, head: Any) -> nn.Module:
        """The norm whose result the output embedding reads, of what the last layer gives.

        Raises:
            ModelError: something else is between the last layer and the output embedding.
        """
        read = self._given.get(self._names.get(head, ""), (None, None))[0]
        streams = [result for name, (_, result) in self._given.items() if name.rpartition(".")[2].isdecimal()]
        found = [m for m, x, result in self._norms() if _same(result, read) and any(_same(x, s) for s in streams)]
        if not found:
            raise ModelError(
                f"{type(self._model).__name__}: a logit lens expects a norm, and nothing else, between its last "
                "layer and its output embedding"
            )
        return found[-1]

    def norm_after(self, linear: str) -> nn.Module | None:
        """The norm that reads what an MLP gives, before it is added to the stream."""
        path: list[str] = linear.split(".")
        within: list[str] = []
        while path and (not path[-1].isdecimal() or path[-2:-1] == ["experts"]):
            within.append(".".join(path))
            path.pop()
        results = [self._given[name][1] for name in within if name in self._given]
        return next((m for m, read, _ in self._norms() if any(_same(read, result) for result in results)), None)

    def _norms(self) -> Iterable[tuple[nn.Module, Tensor | None, Tensor | None]]:
        """Modules without parts and matrices that give something new, of the shape of what they read."""
        for name, (read, result) in self._given.items():
            module = self._model.get_submodule(name)
            plain = not any(True for _ in module.children()) and all(p.dim() < 2 for p in module.parameters())
            shaped = read is not None and result is not None and read.shape == result.shape
            if plain and shaped and not _same(read, result):
                yield module, read, result


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()

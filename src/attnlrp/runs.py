"""One run: methods on the records of one source, explained on one model; with tuning, cost and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from attnlrp.errors import AttnLRPError, InputError, ModelError
from attnlrp.evaluation import data, samples
from attnlrp.evaluation.cost import Method, peak_memory
from attnlrp.evaluation.experiment import Progress, Report, faithfulness, localise, question_answering
from attnlrp.evaluation.flipping import SPECIAL, Special
from attnlrp.evaluation.image_data import read_image_records
from attnlrp.evaluation.journal import Journal
from attnlrp.evaluation.perturbation import BASELINES, Perturbation
from attnlrp.evaluation.pixels import PIXEL_BASELINES, PixelPerturbation
from attnlrp.evaluation.samples import Sample
from attnlrp.image_explainer import square_of
from attnlrp.methods import parameters, vary
from attnlrp.models import IMAGE_TASKS, task_of
from attnlrp.tuning import GRIDS, Choice, Grid, tune

__all__ = ["KINDS", "Kind", "Run", "Setup", "evaluate", "shown"]

Kind: TypeAlias = Literal["faithfulness", "qa", "localisation"]
KINDS: tuple[Kind, ...] = ("faithfulness", "qa", "localisation")

_RANKED = {  # what says which method is best; larger is better
    "faithfulness": ("area",),
    "qa": ("top1", "iou"),
    "localisation": ("mass",),
}
_TUNED = {"faithfulness": "area", "qa": "iou", "localisation": "mass"}  # IoU has more levels than top-1 on few records


@dataclass(frozen=True)
class Setup:
    """What is measured, and on what.

    Args:
        source: file or hub data set; see `attnlrp.evaluation.read`; of images `attnlrp.evaluation.read_image_records`.
        kind: "faithfulness"; "qa" for questions; "localisation" for images with boxes or masks.
        samples: records that are drawn.
        length: tokens that a text is cut to; records with a question that have more are not drawn.
        steps: points of a curve; None for one per token.
        baseline: what takes the place of an embedding, or of the pixels of a square.
        special: what happens to special tokens.
        seed: of the draw, and of the order of equally relevant tokens.
        batch_size: perturbed inputs in one pass.
        tune: records, apart from the samples, on which the parameters of baselines are chosen; 0 for none.
        grids: method -> parameter -> values.
        memory: whether to measure peak memory, on the first sample.
        patch: edge of the squares that are taken from images, in pixels; None for the model's patches (several, if they
            are smaller than 14 pixels).
        split: value of the column "split" of a table of images; None for all of them.
    """

    source: str
    kind: Kind = "faithfulness"
    samples: int = 200
    length: int = 512
    steps: int | None = None
    baseline: str = "zero"
    special: Special = "rank"
    seed: int = 0
    batch_size: int = 32
    tune: int = 0
    grids: Mapping[str, Grid] = field(default_factory=lambda: GRIDS)
    memory: bool = False
    patch: int | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        baselines = tuple(dict.fromkeys((*BASELINES, *PIXEL_BASELINES)))
        for name, known in {"kind": KINDS, "baseline": baselines, "special": SPECIAL}.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name, least in {"samples": 1, "length": 1, "steps": 1, "batch_size": 1, "tune": 0, "patch": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name}: got {value}, expected at least {least}")


@dataclass(frozen=True)
class Run:
    """Results of methods on one model and one source.

    Args:
        report: per-sample results, means and costs.
        setup: what was measured.
        choices: parameters that were tuned.
        memory: method -> peak bytes on the first sample.
        failed: method -> why it could not run; it is not part of the report.
    """

    report: Report
    setup: Setup
    choices: tuple[Choice, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """The figure that methods are ranked by."""
        return _RANKED[self.setup.kind][0]

    @property
    def counts(self) -> dict[str, int]:
        """Samples, and those of them that the model answers or classifies correctly, where that is known."""
        known = {row["sample"]: row["correct"] for row in self.report.rows}
        correct = [c for c in known.values() if c is not None]
        return {"samples": len(known)} | ({"correct": sum(correct)} if correct else {})

    @property
    def correct_only(self) -> bool:
        """Whether methods are ranked on correctly answered samples: those of questions, if there are any."""
        return self.setup.kind == "qa" and bool(self.counts.get("correct"))

    @property
    def ranking(self) -> list[str]:
        """Methods, the best first."""

        def figures(method: str) -> tuple[float, ...]:
            found = (self.report.mean(method, m, correct_only=self.correct_only) for m in _RANKED[self.setup.kind])
            return tuple(f.mean for f in found)

        return sorted(self.report.methods, key=figures, reverse=True)

    def differences(self) -> dict[str, Any]:
        """Paired differences of the best method to every other."""
        best, *others = self.ranking
        compared = {m: self.report.compare(best, m, self.metric, correct_only=self.correct_only) for m in others}
        return {
            "best": best,
            "metric": self.metric,
            "correct_only": self.correct_only,
            "to": {method: found.to_dict() for method, found in compared.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the per-sample figures."""
        found = self.report.to_dict()
        for method, bytes_ in self.memory.items():
            found["methods"][method]["cost"]["peak_bytes"] = bytes_
        return found | {
            "counts": self.counts,
            "ranking": self.ranking,
            "differences": self.differences(),
            "tuning": [choice.to_dict() for choice in self.choices],
            "failed": dict(self.failed),
        }


def evaluate(
    model: Any,
    tokenizer: Any,
    methods: Mapping[str, Method],
    setup: Setup,
    *,
    name: str = "model",
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Run:
    """Measure methods; one that raises is left out, with its reason, and the others go on.

    Args:
        model: what is explained.
        tokenizer: its tokenizer, or image processor.
        methods: name -> method.
        setup: what is measured.
        name: of the model, kept with the results.
        journal: file of per-sample results, which a later run continues; beside it, those of tuning and memory.
        progress: called with what is done, of how many, and what was last.

    Raises:
        InputError: data that the model cannot be evaluated on, or every method failed.
    """
    records = _usable(model, tokenizer, setup)
    make = partial(_samples, model, tokenizer, setup, progress=progress)
    described: dict[str, Any] = {
        "model": name,
        "task": task_of(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    described |= {"data": shown(setup.source)}
    described |= {"split": setup.split} if _sees(model) else {"length": setup.length}
    measure = partial(_measure, setup, _perturbation(model, tokenizer, setup), described)
    with _kept(journal) as path:
        choices: list[Choice] = []
        if setup.tune:
            split = data.draw(records, setup.tune, seed=setup.seed, skip=_apart(records, setup))
            tried = path.with_suffix(".tuning.jsonl")
            tuning = partial(_guarded, partial(measure, make(split)), tried, _tuning(progress))
            choices = tune(methods, setup.grids, tuning, _TUNED[setup.kind])
            methods = {**methods, **{c.method: vary(methods[c.method], c.method, c.parameters) for c in choices}}
        found = make(data.draw(records, setup.samples, seed=setup.seed))
        report, failed = _guarded(partial(measure, found), path, progress, methods)
        if not report.rows:
            reasons = "; ".join(f"{method}: {reason}" for method, reason in failed.items())
            raise ModelError(f"no method can run on this model: {reasons}")
        used = {m: methods[m] for m in report.methods}
        memory = _memory(model, found[0], used, path, report.settings) if setup.memory else {}
    return Run(report, setup, tuple(choices), memory, failed)


def shown(source: str | Path) -> str:
    """The name of a source or model in results, the same wherever the file lies."""
    return Path(source).name if Path(source).expanduser().exists() else str(source)


def _apart(records: Sequence[Any], setup: Setup) -> int:
    """Tuning records are the last of the shuffled ones, so that the samples are the same with and without tuning."""
    if setup.samples + setup.tune > len(records):
        raise InputError(
            f"data: got {len(records)} records, expected at least {setup.samples} samples and {setup.tune} to tune on"
        )
    return len(records) - setup.tune


def _tuning(progress: Progress | None) -> Progress | None:
    return None if progress is None else lambda done, total, last: progress(done, total, f"tuning: {last}")


def _measure(
    setup: Setup,
    perturbation: Perturbation | PixelPerturbation,
    described: Mapping[str, Any],
    found: Sequence[Sample],
    methods: Mapping[str, _Guard],
    journal: Path,
    progress: Progress | None,
) -> Report:
    settings = {**described, "methods": {name: parameters(guard.method) for name, guard in methods.items()}}
    kept: dict[str, Any] = {"settings": settings, "journal": journal, "progress": progress}
    if setup.kind == "qa":
        return question_answering(found, methods, perturbation.model, **kept)
    if setup.kind == "localisation":
        return localise(found, methods, perturbation.model, **kept)
    options: dict[str, Any] = {"steps": setup.steps, "special": setup.special, "seed": setup.seed}
    return faithfulness(found, methods, perturbation, **options, **kept)


def _perturbation(model: Any, tokenizer: Any, setup: Setup) -> Perturbation | PixelPerturbation:
    if _sees(model):
        return PixelPerturbation(model, setup.baseline, setup.batch_size, setup.patch or square_of(model))
    return Perturbation(model, tokenizer, setup.baseline, setup.batch_size)


def _sees(model: Any) -> bool:
    return task_of(model) in IMAGE_TASKS


# --- methods that fail --------------------------------------------------------------------------------------------


class _MethodError(Exception):
    """A method that could not explain a sample."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


@dataclass(frozen=True)
class _Guard:
    """A method of any author: whatever it raises, and relevance that is not finite, is told apart from other errors."""

    name: str
    method: Method

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Callable[[Any], Tensor]) -> Tensor:
        try:
            relevance = self.method(model, inputs, target)
        except Exception as error:
            kind = "" if isinstance(error, AttnLRPError) else f"{type(error).__name__}: "
            raise _MethodError(self.name, f"{kind}{error}") from error
        if not torch.isfinite(relevance).all():
            raise _MethodError(self.name, "its relevance holds NaN or infinite values")
        return relevance


def _guarded(
    measure: Callable[..., Report], journal: Path, progress: Progress | None, methods: Mapping[str, Method]
) -> tuple[Report, dict[str, str]]:
    """The report of the methods that can run, and the reasons of the others; the journal keeps what was done."""
    guards = {name: _Guard(name, method) for name, method in methods.items()}
    failed: dict[str, str] = {}
    while guards:
        try:
            return measure(guards, journal, progress), failed
        except _MethodError as error:  # noqa: PERF203 - once per method that fails
            failed[error.name] = error.reason
            del guards[error.name]
    return Report({}, ()), failed


def _memory(
    model: Any, sample: Sample, methods: Mapping[str, Method], journal: Path, settings: Mapping[str, Any]
) -> dict[str, int]:
    book = Journal(journal.with_suffix(".memory.jsonl"), {**settings, "metric": "peak memory"})
    for name, method in methods.items():
        if (sample.name, name) not in book:
            used = peak_memory(method, model, sample.inputs, sample.output)
            book.add({"sample": sample.name, "method": name, "bytes": used})
    return {row["method"]: row["bytes"] for row in book if row["sample"] == sample.name and row["method"] in methods}


@contextmanager
def _kept(journal: Path | None) -> Iterator[Path]:
    """The file of results; one that is thrown away, if none is given."""
    if journal is not None:
        yield journal
        return
    with tempfile.TemporaryDirectory(prefix="attnlrp-") as folder:
        yield Path(folder) / "results.jsonl"


# --- samples ------------------------------------------------------------------------------------------------------


def _usable(model: Any, tokenizer: Any, setup: Setup) -> list[data.Record]:
    """The records that the model can be evaluated on."""
    if _sees(model):
        return _images(model, setup)
    if setup.kind == "localisation":
        raise InputError(f"localisation: got a model for {task_of(model)}, expected one for image-classification")
    records = data.read(setup.source, seed=setup.seed)
    asks = bool(records) and "question" in records[0]
    _maker(model, asks, setup)
    if not asks:
        found = [r for r in records if r.get("text", "").strip()]
    else:
        found = [r for r in records if _has_answer(r) and _tokens(tokenizer, r) <= setup.length]
    if not found:
        raise InputError(
            f"{setup.source}: none of its {len(records)} records can be used; expected "
            + (f"questions with an answer in a context, of at most {setup.length} tokens" if asks else "texts")
        )
    return found


def _images(model: Any, setup: Setup) -> list[data.Record]:
    _maker(model, False, setup)
    records = read_image_records(setup.source, split=setup.split)
    if setup.kind == "localisation":
        records = [r for r in records if r.get("box") is not None or r.get("mask") is not None]
    if not records:
        raise InputError(f"{setup.source}: no image has a box or a mask, which localisation needs")
    return records


def _has_answer(record: data.Record) -> bool:
    return any(answer and answer in record.get("context", "") for answer in record.get("answers", ()))


def _tokens(tokenizer: Any, record: data.Record) -> int:
    prompt = samples.PROMPT.format(context=record["context"], question=record["question"])
    return len(tokenizer(prompt, verbose=False).input_ids)


def _maker(model: Any, asks: bool, setup: Setup) -> Callable[..., Sample]:
    """What turns a record into a sample of this model's task."""
    task = task_of(model)
    if setup.kind == "qa" and not asks:
        what = "images" if _sees(model) else "texts"
        raise InputError(f"{setup.source}: got {what}, expected records with question, context and answers")
    makers: dict[tuple[str, bool], Callable[..., Sample]] = {
        ("causal-lm", False): partial(samples.next_token, length=setup.length),
        ("causal-lm", True): samples.question,
        ("seq2seq-lm", True): samples.question,
        ("sequence-classification", False): partial(samples.classified, length=setup.length),
        ("question-answering", True): partial(samples.extractive, length=setup.length),
        ("image-classification", False): samples.image_classified,
    }
    if (task, asks) not in makers:
        wanted = [kind for kind, questions in makers if questions == asks]
        raise InputError(
            f"{setup.source}: holds {'' if asks else 'no '}questions, got a model for {task}; expected one for "
            + ", ".join(wanted)
        )
    return makers[task, asks]


def _samples(
    model: Any, tokenizer: Any, setup: Setup, records: Sequence[data.Record], *, progress: Progress | None
) -> list[Sample]:
    make = _maker(model, "question" in records[0], setup)
    found = []
    for done, record in enumerate(records, start=1):
        found.append(make(model, tokenizer, record, name=record["name"]))
        if progress is not None:
            progress(done, len(records), "asking the model")
    return found

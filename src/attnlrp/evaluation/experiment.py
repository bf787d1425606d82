"""Methods over samples: per-sample results as they come, then their means and differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnlrp.errors import InputError
from attnlrp.evaluation.answers import pointing
from attnlrp.evaluation.cost import Method, measured
from attnlrp.evaluation.flipping import Special, curves
from attnlrp.evaluation.journal import Journal
from attnlrp.evaluation.localisation import locating
from attnlrp.evaluation.perturbation import Perturbation
from attnlrp.evaluation.pixels import PixelPerturbation
from attnlrp.evaluation.samples import Sample
from attnlrp.evaluation.statistics import Difference, Mean, compare, mean

__all__ = ["Progress", "Report", "faithfulness", "localise", "question_answering"]

Progress = Callable[[int, int, str], None]
"""Called with what is done, of how many, and what was last."""


@dataclass(frozen=True)
class Report:
    """Results of methods on the same samples.

    Args:
        settings: what they depend on.
        rows: one for each sample and method: sample, method, metrics, cost, correct, curves.
    """

    settings: dict[str, Any]
    rows: tuple[dict[str, Any], ...]

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order of the run."""
        return list(dict.fromkeys(row["method"] for row in self.rows))

    @property
    def metrics(self) -> list[str]:
        """Names of the figures."""
        return list(dict.fromkeys(name for row in self.rows for name in row["metrics"]))

    def values(self, method: str, metric: str, *, correct_only: bool = False) -> dict[str, float]:
        """Sample -> figure of one method; optionally of the samples only that the model answers correctly."""
        rows = [r for r in self.rows if r["method"] == method and (r["correct"] or not correct_only)]
        return {row["sample"]: row["metrics"][metric] for row in rows}

    def mean(self, method: str, metric: str, *, correct_only: bool = False) -> Mean:
        """Mean and standard error over samples."""
        return mean(list(self.values(method, metric, correct_only=correct_only).values()))

    def compare(self, method: str, other: str, metric: str, *, correct_only: bool = False) -> Difference:
        """Paired difference over the samples that both methods have."""
        a = self.values(method, metric, correct_only=correct_only)
        b = self.values(other, metric, correct_only=correct_only)
        shared = [name for name in a if name in b]
        return compare([a[n] for n in shared], [b[n] for n in shared])

    def cost(self, method: str) -> dict[str, float]:
        """Mean passes and seconds per sample."""
        rows = [row["cost"] for row in self.rows if row["method"] == method]
        return {name: mean([float(row[name]) for row in rows]).mean for name in rows[0]}

    def to_dict(self) -> dict[str, Any]:
        """Settings, means, costs, and the per-sample figures without their curves."""
        correct = any(row["correct"] is not None for row in self.rows)
        table = {}
        for method in self.methods:
            figures: dict[str, Any] = {m: self.mean(method, m).to_dict() for m in self.metrics}
            if correct and any(row["correct"] for row in self.rows):
                figures |= {f"{m} (correct)": self.mean(method, m, correct_only=True).to_dict() for m in self.metrics}
            table[method] = {"metrics": figures, "cost": self.cost(method)}
        rows = [{k: v for k, v in row.items() if k != "curves"} for row in self.rows]
        return {"settings": self.settings, "methods": table, "samples": rows}


def faithfulness(
    samples: Iterable[Sample],
    methods: Mapping[str, Method],
    perturbation: Perturbation | PixelPerturbation,
    *,
    steps: int | None = None,
    special: Special = "rank",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    journal: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Faithfulness of methods on the same samples. See `attnlrp.evaluation.Curves`.

    Args:
        samples: what is explained.
        methods: name -> method(model, inputs, target) -> relevance.
        perturbation: the model, and how tokens, or squares of an image, are taken away.
        steps: points of a curve besides its start; None for one per token or square.
        special: "rank" treats special tokens as any other, "keep" never takes them away, "first" takes them first in
            MoRF and last in LeRF.
        seed: of the order of equally relevant tokens or squares.
        settings: what else the results depend on, to be kept with them.
        journal: file of per-sample results, which a later run continues.
        progress: called after each result.

    Returns:
        A report with area, comprehensiveness, sufficiency, deletion and insertion, of logit and probability.
    """
    known = {"metric": "faithfulness", **perturbation.settings, "steps": steps, "special": special}

    def measure(sample: Sample, relevance: torch.Tensor) -> dict[str, Any]:
        found = curves(perturbation, sample, relevance, steps=steps, special=special, seed=seed)
        return {"metrics": found.metrics(), "curves": found.to_dict()}

    book = Journal(None if journal is None else Path(journal), {**known, "seed": seed, **(settings or {})})
    return _run(list(samples), methods, perturbation.model, measure, book, progress)


def question_answering(
    samples: Iterable[Sample],
    methods: Mapping[str, Method],
    model: Any,
    *,
    settings: Mapping[str, Any] | None = None,
    journal: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Top-1 accuracy, IoU and positive mass on the answer, over samples that hold it. See `pointing`."""
    book = Journal(None if journal is None else Path(journal), {"metric": "question answering", **(settings or {})})
    found = [s for s in samples if s.answer is not None and bool(s.answer.any())]
    return _run(found, methods, model, lambda s, r: {"metrics": pointing(s, r)}, book, progress)


def localise(
    samples: Iterable[Sample],
    methods: Mapping[str, Method],
    model: Any,
    *,
    k: int = 1000,
    settings: Mapping[str, Any] | None = None,
    journal: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Positive mass, pointing game, IoU and top-k intersection with the object of an image. See `locating`.

    Args:
        samples: images; those without an object in what the model reads are left out.
        methods: name -> method(model, inputs, target) -> relevance (height, width).
        model: what is explained.
        k: pixels for the top-k intersection.
        settings: what else the results depend on, to be kept with them.
        journal: file of per-sample results, which a later run continues.
        progress: called after each result.
    """
    known = {"metric": "localisation", "k": k, **(settings or {})}
    found = [s for s in samples if s.mask is not None and bool(s.mask.any())]
    book = Journal(None if journal is None else Path(journal), known)
    return _run(found, methods, model, lambda s, r: {"metrics": locating(s, r, k=k)}, book, progress)


def _run(
    samples: Sequence[Sample],
    methods: Mapping[str, Method],
    model: Any,
    measure: Callable[[Sample, torch.Tensor], dict[str, Any]],
    book: Journal,
    progress: Progress | None,
) -> Report:
    names = [s.name for s in samples]
    if not samples or not methods:
        raise InputError(f"got {len(samples)} samples and {len(methods)} methods, expected at least one of each")
    if len(set(names)) != len(names):
        raise InputError("samples: two have the same name; results are kept by name")
    done = 0
    for sample in samples:
        for name, method in methods.items():
            if (sample.name, name) not in book:
                relevance, cost = measured(method, model, sample.inputs, sample.output)
                row = {"sample": sample.name, "method": name, "correct": sample.correct, "cost": cost.to_dict()}
                book.add(row | measure(sample, relevance))
            done += 1
            if progress is not None:
                progress(done, len(samples) * len(methods), f"{name} on {sample.name}")
    wanted = {(s, m) for s in names for m in methods}
    return Report(book.settings, tuple(row for row in book if (row["sample"], row["method"]) in wanted))

"""Gamma rules for a vision transformer, chosen by their faithfulness on images of the user's own."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from attnlrp.errors import InputError
from attnlrp.evaluation.experiment import Progress, faithfulness
from attnlrp.evaluation.image_data import Packed
from attnlrp.evaluation.pixels import PixelPerturbation
from attnlrp.evaluation.samples import Sample, image_classified
from attnlrp.evaluation.statistics import Mean
from attnlrp.image_explainer import square_of
from attnlrp.images import Picture
from attnlrp.methods import Gammas
from attnlrp.models import task_of
from attnlrp.rules import SOFTMAX, Rules

__all__ = ["Gammas", "Search", "search_gamma", "search_images"]

CONV = (0.0, 0.25, 1.0)
MLP = (0.0, 0.05, 0.25, 1.0)
"""Coarse stage: every combination of these with every way through softmax."""
FINER: dict[str, tuple[float, ...]] = {
    "conv": (0.0, 0.1, 0.25, 0.5, 1.0, 10.0),
    "mlp": (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 10.0),
    "qkv": (0.0, 0.05, 0.25, 1.0),
    "out": (0.0, 0.05, 0.25, 1.0),
    "head": (0.0, 0.25),
}
"""Fine stage: one role after the other, from the best of the coarse stage."""
SHOWN = 5  # of what was tried, in a summary
KEPT = 4  # of the coarse stage that are measured again on all images


@dataclass(frozen=True)
class Search:
    """What a search found.

    Args:
        best: the gammas with the largest mean area on all images.
        area: that area.
        tried: gammas, images, mean and standard error of everything that was measured, in its order.
        images: number of images of the last stage.
        seconds: what it took.
        complete: whether it ended before its budget did.
    """

    best: Gammas
    area: Mean
    tried: tuple[dict[str, Any], ...]
    images: int
    seconds: float
    complete: bool

    @property
    def rules(self) -> Rules:
        """The table of the best gammas."""
        return self.best.rules

    @property
    def summary(self) -> str:
        """What was found, and the best of what was tried on the most images, as lines for people."""
        end = "" if self.complete else ", the budget ended before the search"
        lines = [f"gammas: {self.best}; {len(self.tried)} tried in {self.seconds:.0f} s{end}"]
        last = [t for t in self.tried if t["images"] == self.images]
        for one in sorted(last, key=lambda t: -t["mean"])[:SHOWN]:
            error = "" if one["standard_error"] is None else f" ± {one['standard_error']:.3f}"
            count = f"{self.images} image" if self.images == 1 else f"{self.images} images"
            lines.append(f"  area {one['mean']:.3f}{error} on {count}: {Gammas(**one['gammas'])}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write JSON, which `Search.load` and `attnlrp image --gamma FILE` read."""
        Path(path).write_text(json.dumps({"attnlrp": "gamma", **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Search:
        """Read what `save` has written.

        Raises:
            InputError: not such a file.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            kind = found.pop("attnlrp")
            found |= {"best": Gammas(**found["best"]), "area": Mean(**found["area"]), "tried": tuple(found["tried"])}
            search = cls(**found)
            search.best.rules  # noqa: B018 - an unknown softmax, or a gamma below 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"gamma: cannot read {path} ({error!r}); expected a file of search_gamma") from error
        if kind != "gamma":
            raise InputError(f"gamma: {path} is not a file of search_gamma")
        return search


def search_gamma(
    samples: Sequence[Sample],
    perturbation: Any,
    *,
    seconds: float | None = None,
    coarse: int = 8,
    steps: int | None = 16,
    seed: int = 0,
    journal: str | Path | None = None,
    progress: Progress | None = None,
) -> Search:
    """Choose gammas by the area between LeRF and MoRF.

    First every combination of a few gammas of convolutions and MLPs with every way through softmax on few images;
    then the best of them on all images; then each role in turn, from the best.

    Args:
        samples: images, as `evaluation.image_classified` makes them; others than those that results are reported on.
        perturbation: the model, and how squares of an image are taken away.
        seconds: budget; when it ends, the best so far is returned. None for no limit.
        coarse: images of the first stage.
        steps: points of a curve.
        seed: of the order of equally relevant squares.
        journal: file of per-image results, which a later search continues.
        progress: called after each gammas with what is done, of at most how many, and the last.

    Raises:
        InputError: no samples.
    """
    if not samples:
        raise InputError("search_gamma: got no images, expected at least one")
    run = _Run(perturbation, seconds, steps, seed, journal, progress)
    images, few = list(samples), list(samples[:coarse])
    first: list[Gammas] = []
    for gammas in _coarse():
        if first and run.over():
            break
        run.area(gammas, few)
        first.append(gammas)
    ranked = sorted(first, key=lambda g: -run.area(g, few))
    if run.over():
        images = few
    best = ranked[0]
    run.area(best, images)
    for gammas in ranked[1:KEPT]:
        if run.over():
            break
        best = max(best, gammas, key=lambda g: run.area(g, images))
    for role, value in ((role, value) for role, values in FINER.items() for value in values):
        if run.over():
            break
        best = max(best, _with(best, role, value), key=lambda g: run.area(g, images))
    return Search(best, run.scores[best, len(images)], tuple(run.tried), len(images), run.seconds, not run.over())


def search_images(
    model: Any,
    processor: Any,
    images: Sequence[Picture | Packed],
    *,
    seconds: float | None = None,
    journal: str | Path | None = None,
    progress: Progress | None = None,
) -> Search:
    """`search_gamma` on image files: zero takes the place of squares of `square_of`.

    Args:
        model: an image classifier.
        processor: its image processor.
        images: file names, PIL images, or files inside of a zip file.
        seconds: budget; None for no limit.
        journal: file of per-image results, which a later search on the same images continues.
        progress: called after each gammas with what is done, of at most how many, and the last.

    Raises:
        InputError: no images, or a model for something else than classification.
    """
    if task_of(model) != "image-classification":
        raise InputError(f"gamma: got a model for {task_of(model)}, expected one for image-classification; give a file")
    perturbation = PixelPerturbation(model, patch=square_of(model))
    samples = [image_classified(model, processor, {"image": x}, name=f"{k} {x}") for k, x in enumerate(images)]
    return search_gamma(samples, perturbation, seconds=seconds, journal=journal, progress=progress)


class _Run:
    """What a search has measured, and how long it took."""

    def __init__(
        self,
        perturbation: Any,
        budget: float | None,
        steps: int | None,
        seed: int,
        journal: str | Path | None,
        progress: Progress | None,
    ) -> None:
        self.budget, self.progress = budget, progress
        self.measure = partial(faithfulness, perturbation=perturbation, steps=steps, seed=seed, journal=journal)
        self.start = time.perf_counter()
        self.tried: list[dict[str, Any]] = []
        self.scores: dict[tuple[Gammas, int], Mean] = {}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def over(self) -> bool:
        return self.budget is not None and self.seconds > self.budget

    def area(self, gammas: Gammas, images: Sequence[Sample]) -> float:
        key, name = (gammas, len(images)), str(gammas)
        if key not in self.scores:
            self.scores[key] = self.measure(images, {name: gammas}).mean(name, "area")
            self.tried.append({"gammas": asdict(gammas), "images": len(images), **self.scores[key].to_dict()})
            if self.progress is not None:
                self.progress(len(self.tried), _count(), name)
        return self.scores[key].mean


def _with(gammas: Gammas, role: str, value: float) -> Gammas:
    changed: dict[str, Any] = {role: value}
    return replace(gammas, **changed)


def _coarse() -> Iterator[Gammas]:
    # the paper's values first: a budget that ends early has them
    grid = [Gammas(c, m, attention=a) for a, c, m in itertools.product(SOFTMAX, CONV, MLP)]
    yield from sorted(grid, key=lambda g: (g.conv, g.mlp) != (0.25, 0.05))


def _count() -> int:
    return len(SOFTMAX) * len(CONV) * len(MLP) + KEPT + sum(len(values) - 1 for values in FINER.values())

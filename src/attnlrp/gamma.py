"""Gamma rules for a vision transformer, chosen by their faithfulness on images of the user's own."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from attnlrp.errors import InputError
from attnlrp.evaluation.experiment import Progress, faithfulness
from attnlrp.evaluation.samples import Sample
from attnlrp.evaluation.statistics import Mean
from attnlrp.methods import Propagated
from attnlrp.rules import SOFTMAX, Rules, composite

__all__ = ["Gammas", "Search", "search_gamma"]

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
KEPT = 4  # of the coarse stage that are measured again on all images


@dataclass(frozen=True)
class Gammas:
    """Arguments of `attnlrp.rules.composite`: a gamma for each role of a layer, and the way through softmax."""

    conv: float = 0.0
    mlp: float = 0.0
    qkv: float = 0.0
    out: float = 0.0
    head: float = 0.0
    attention: str = "attnlrp"

    @property
    def rules(self) -> Rules:
        """The table."""
        return composite(**asdict(self))

    def __str__(self) -> str:
        values = [f"{f.name} {getattr(self, f.name):g}" for f in fields(self) if f.name != "attention"]
        return ", ".join([*values, f"softmax {self.attention}"])


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
    start = time.perf_counter()
    tried: list[dict[str, Any]] = []
    scores: dict[tuple[Gammas, int], Mean] = {}
    few, total = list(samples[:coarse]), _count()

    def over() -> bool:
        return seconds is not None and time.perf_counter() - start > seconds

    def area(gammas: Gammas, images: Sequence[Sample]) -> float:
        key = (gammas, len(images))
        if key not in scores:
            report = faithfulness(
                images, {str(gammas): Propagated(gammas.rules)}, perturbation, steps=steps, seed=seed, journal=journal
            )
            scores[key] = report.mean(str(gammas), "area")
            tried.append({"gammas": asdict(gammas), "images": len(images), **scores[key].to_dict()})
            if progress is not None:
                progress(len(tried), total, str(gammas))
        return scores[key].mean

    first: list[Gammas] = []
    for gammas in _coarse():
        if first and over():
            break
        area(gammas, few)
        first.append(gammas)
    ranked = sorted(first, key=lambda g: -area(g, few))
    images = list(samples)
    if over():
        images = few
    else:
        ranked = ranked[:KEPT]
    best = ranked[0]
    area(best, images)
    for gammas in ranked[1:]:
        if over():
            break
        best = max(best, gammas, key=lambda g: area(g, images))
    for role, values in FINER.items():
        for value in values:
            if over():
                break
            best = max(best, _with(best, role, value), key=lambda g: area(g, images))
    took = time.perf_counter() - start
    return Search(best, scores[best, len(images)], tuple(tried), len(images), took, not over())


def _with(gammas: Gammas, role: str, value: float) -> Gammas:
    changed: dict[str, Any] = {role: value}
    return replace(gammas, **changed)


def _coarse() -> Iterator[Gammas]:
    # the paper's values first: a budget that ends early has them
    grid = [Gammas(c, m, attention=a) for a, c, m in itertools.product(SOFTMAX, CONV, MLP)]
    yield from sorted(grid, key=lambda g: (g.conv, g.mlp) != (0.25, 0.05))


def _count() -> int:
    return len(SOFTMAX) * len(CONV) * len(MLP) + KEPT + sum(len(values) - 1 for values in FINER.values())

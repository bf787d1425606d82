"""Parameters of methods, chosen on records that are kept apart from those that they are tested on.

A grid is data: parameter -> values. Every combination is tried; the one with the largest mean of the metric is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnlrp.errors import InputError
from attnlrp.evaluation.cost import Method
from attnlrp.evaluation.experiment import Report
from attnlrp.methods import vary

__all__ = ["GRIDS", "Choice", "Grid", "open_grids", "tune"]

Grid = Mapping[str, Sequence[Any]]

GRIDS: dict[str, Grid] = {
    "integrated-gradients": {"steps": (20, 50, 100)},
    "smoothgrad": {"noise": (0.01, 0.05, 0.15), "reduce": ("input", "norm")},
    "kernel-shap": {"samples": (256, 1024, None)},
    "lime": {"samples": (256, 1000), "width": (0.25, 1.0)},
    "grad-cam": {"rectify": (True, False)},
    "atman": {"factor": (0.5, 0.9), "similarity": (None, 0.7), "form": ("multiplicative", "additive")},
}
"""Baseline -> its grid; each grid holds the published values. What is not here has no parameter to choose."""


@dataclass(frozen=True)
class Choice:
    """What was tried for one method, and what was chosen.

    Args:
        method: its name.
        metric: what is maximised.
        records: how many it was measured on.
        parameters: the chosen ones.
        tried: parameters, mean and standard error of each combination; of one that failed, the reason.
    """

    method: str
    metric: str
    records: int
    parameters: dict[str, Any]
    tried: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


Evaluate = Callable[[Mapping[str, Method]], tuple[Report, Mapping[str, str]]]
"""Methods -> their report on the tuning records, and the reasons of those that failed."""


def tune(methods: Mapping[str, Method], grids: Mapping[str, Grid], evaluate: Evaluate, metric: str) -> list[Choice]:
    """Choose the parameters of the methods that have a grid; of equally good ones, the first of the grid.

    Args:
        methods: name -> method, a dataclass.
        grids: name -> parameter -> values.
        evaluate: measures methods on the tuning records.
        metric: of the report; larger is better.

    Raises:
        InputError: a grid for a parameter that a method does not have.
    """
    combinations = {name: _combinations(grids[name]) for name in methods if grids.get(name)}
    variants = {
        _label(name, parameters): vary(methods[name], name, parameters)
        for name, found in combinations.items()
        for parameters in found
    }
    if not variants:
        return []
    report, failed = evaluate(variants)
    return [_choice(name, found, report, failed, metric) for name, found in combinations.items()]


def open_grids(names: Sequence[str | Mapping[str, Any]], grids: Mapping[str, Grid]) -> dict[str, Grid]:
    """The grid of each method of a list, as `find_methods` takes it; a parameter that is given is not tuned."""
    found: dict[str, Grid] = {}
    for entry in names:
        given: dict[str, Any] = {"name": entry} if isinstance(entry, str) else dict(entry)
        name: str = given.pop("name", given.get("method"))
        base: str = given.pop("method", name)
        grid = grids.get(name, grids.get(base, {}))
        found[name] = {parameter: values for parameter, values in grid.items() if parameter not in given}
    return found


def _choice(
    name: str, combinations: list[dict[str, Any]], report: Report, failed: Mapping[str, str], metric: str
) -> Choice:
    tried: list[dict[str, Any]] = []
    best: tuple[float, dict[str, Any]] | None = None
    records = 0
    for parameters in combinations:
        label = _label(name, parameters)
        if label in failed:
            tried.append({"parameters": parameters, "failed": failed[label]})
            continue
        found = report.mean(label, metric)
        records = found.count
        tried.append({"parameters": parameters, "mean": found.mean, "standard_error": found.standard_error})
        if best is None or found.mean > best[0]:
            best = (found.mean, parameters)
    return Choice(name, metric, records, {} if best is None else best[1], tuple(tried))


def _combinations(grid: Grid) -> list[dict[str, Any]]:
    for parameter, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise InputError(f"grid: got {parameter}: {values!r}, expected a list of values")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _label(name: str, parameters: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in parameters.items())])

"""The table: methods x data sets x models from one configuration, as JSON, Markdown and a figure."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnlrp.configuration import Config, DataEntry, ModelEntry
from attnlrp.errors import AttnLRPError, InputError
from attnlrp.evaluation.cost import Method
from attnlrp.evaluation.experiment import Progress
from attnlrp.runs import Run, Setup, evaluate

__all__ = [
    "Cell",
    "Table",
    "cost_texts",
    "difference_text",
    "figure",
    "markdown",
    "mean_curves",
    "mean_text",
    "run_table",
    "save_figure",
]


@dataclass(frozen=True)
class Cell:
    """One model on one data set.

    Args:
        model: name of the model.
        data: name of the data set.
        run: what was found; None if nothing could be.
        error: why nothing was found.
    """

    model: str
    data: str
    run: Run | None = None
    error: str | None = None

    @property
    def title(self) -> str:
        """Model and data set."""
        return f"{self.model}, {self.data}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; per-sample figures stay in the journal."""
        found: dict[str, Any] = {"model": self.model, "data": self.data, "error": self.error}
        if self.run is not None:
            found |= {k: v for k, v in self.run.to_dict().items() if k != "samples"}
            found |= {"kind": self.run.setup.kind, "curves": mean_curves(self.run)}
        return found


@dataclass(frozen=True)
class Table:
    """All cells, and where and how long they ran.

    Args:
        cells: in the order of the run.
        machine: versions and processor.
        seconds: wall clock of this run; of a continued one, the last part.
    """

    cells: tuple[Cell, ...]
    machine: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> list[str]:
        """Everything that could not run, and why."""
        whole = [f"{c.title}: {c.error}" for c in self.cells if c.error]
        parts = [f"{c.title}, {m}: {why}" for c in self.cells if c.run for m, why in c.run.failed.items()]
        return whole + parts

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"machine": dict(self.machine), "seconds": self.seconds, "cells": [c.to_dict() for c in self.cells]}

    def save(self, folder: Path) -> None:
        """Write table.json, table.md and, if there is anything to draw, curves.png."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        (folder / "table.md").write_text(markdown(self), encoding="utf-8")
        drawn = {c.title: c.run for c in self.cells if c.run is not None}
        if drawn:
            save_figure(drawn, folder / "curves.png")


def run_table(
    config: Config,
    folder: Path,
    load: Callable[[ModelEntry], tuple[Any, Any]],
    *,
    methods: Mapping[str, Method],
    progress: Callable[[str], Progress] | None = None,
) -> Table:
    """Run every model on its data sets; the files in the folder are whole after each of them.

    A model or a data set that cannot be used is a cell with an error, and the others go on.

    Args:
        config: what to run.
        folder: gets the table, and one journal per cell, from which a later run continues.
        load: model entry -> model, tokenizer.
        methods: name -> method.
        progress: title of a cell -> what is called with its progress.
    """
    start = time.perf_counter()
    cells: list[Cell] = []
    for entry in config.models:
        try:
            loaded = load(entry)
        except (AttnLRPError, OSError) as error:
            cells += [Cell(entry.name, d.name, error=str(error)) for d in config.data_of(entry)]
            continue
        for source in config.data_of(entry):
            cells.append(_cell(config, entry, source, loaded, methods, folder, progress))
            table = Table(tuple(cells), _machine(), time.perf_counter() - start)
            table.save(folder)
    table = Table(tuple(cells), _machine(), time.perf_counter() - start)
    table.save(folder)
    return table


def _cell(
    config: Config,
    entry: ModelEntry,
    source: DataEntry,
    loaded: tuple[Any, Any],
    methods: Mapping[str, Method],
    folder: Path,
    progress: Callable[[str], Progress] | None,
) -> Cell:
    cell = Cell(entry.name, source.name)
    setup = Setup(**source.setup, seed=config.seed, tune=config.tune, grids=config.grids, memory=True)
    kept = folder / f"{_slug(entry.name)}--{_slug(source.name)}.jsonl"
    told = None if progress is None else progress(cell.title)
    methods = {name: methods[name] for name in source.methods or methods}
    try:
        run = evaluate(*loaded, methods, setup, name=entry.name, journal=kept, progress=told)
    except (AttnLRPError, OSError) as error:
        return Cell(entry.name, source.name, error=str(error))
    return Cell(entry.name, source.name, run)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def _machine() -> dict[str, Any]:
    import torch
    import transformers

    import attnlrp

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {"attnlrp": attnlrp.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return versions | {"device": device, "threads": torch.get_num_threads()}


# --- Markdown -----------------------------------------------------------------------------------------------------

_HEADINGS = {
    "area": "area",
    "top1": "top-1",
    "iou": "IoU",
    "mass": "mass",
    "pointing": "pointing game",
    "top_k": "top-k",
    "area_probability": "area (probability)",
}
_SHORT = {"faithfulness": ("area",), "qa": ("top1", "iou"), "localisation": ("mass", "iou")}
_LOWER = ("sufficiency", "deletion")  # the smaller, the better


def markdown(table: Table) -> str:
    """The table of all cells, then every cell with its figures, differences, costs and tuning."""
    parts = ["# Evaluation\n", _overview(table)]
    parts += [_details(cell) for cell in table.cells]
    where = ", ".join(f"{k} {v}" for k, v in table.machine.items())
    parts.append(f"Measured with {where}; {table.seconds:.0f} s for what this run added.\n")
    return "\n".join(parts)


def _overview(table: Table) -> str:
    columns = [(c, m) for c in table.cells if c.run for m in _SHORT[c.run.setup.kind]]
    methods = list(dict.fromkeys(m for c in table.cells if c.run for m in c.run.report.methods))
    head = ["method", *(f"{c.title}: {_HEADINGS[m]}" for c, m in columns)]
    return _rows(head, [[method, *(_overview_figure(c, m, method) for c, m in columns)] for method in methods])


def _overview_figure(cell: Cell, metric: str, method: str) -> str:
    run = cell.run
    assert run is not None
    if method in run.failed or method not in run.report.methods:
        return "-"
    figures = {m: run.report.mean(m, metric, correct_only=run.correct_only).mean for m in run.report.methods}
    written = mean_text(run, method, metric, correct_only=run.correct_only)
    return f"**{written}**" if figures[method] == max(figures.values()) else written


def _details(cell: Cell) -> str:
    title = f"## {cell.title}\n"
    run = cell.run
    if run is None:
        return f"{title}\nNot run: {cell.error}\n"
    parts = [title, _about(run), _figures(run), _compared(run)]
    parts += [f"Not run: {method}: {reason}\n" for method, reason in run.failed.items()]
    if run.choices:
        parts.append(_tuning(run))
    return "\n".join(parts)


def _about(run: Run) -> str:
    facts = {**run.counts, **{k: v for k, v in run.report.settings.items() if k not in ("methods", "model")}}
    return ", ".join(f"{key} {'all' if value is None else value}" for key, value in facts.items()) + ".\n"


def _figures(run: Run) -> str:
    metrics = run.report.metrics
    both = [False, True] if run.correct_only else [False]
    columns = [(m, only) for only in both for m in metrics]
    head = ["method", *(_heading(m) + (" (correct)" if only else "") for m, only in columns)]
    head += ["forwards", "backwards", "seconds", *(["peak MiB"] if run.memory else [])]
    rows = []
    for method in run.ranking:
        figures = [mean_text(run, method, m, correct_only=only) for m, only in columns]
        rows.append([method, *figures, *cost_texts(run, method)])
    return _rows(head, rows)


def _heading(metric: str) -> str:
    plain = metric.removesuffix("_probability")
    shown = _HEADINGS.get(plain, plain) + (" of probability" if plain != metric else "")
    return f"{shown} (lower)" if plain in _LOWER else shown


def _compared(run: Run) -> str:
    found = run.differences()
    if not found["to"]:
        return ""
    over = " over correctly answered samples" if found["correct_only"] else ""
    what = f"Paired difference of {found['best']} to the others, {_HEADINGS[found['metric']]}{over}:\n"
    rows = [[m, *difference_text(d)] for m, d in found["to"].items()]
    return what + "\n" + _rows(["method", "difference", "95 % interval", "decided"], rows)


def _tuning(run: Run) -> str:
    rows = []
    for choice in run.choices:
        for one in choice.tried:
            settings = ", ".join(f"{k} {v}" for k, v in one["parameters"].items())
            taken = "chosen" if one["parameters"] == choice.parameters else ""
            rows.append([choice.method, settings, one.get("failed") or f"{one['mean']:.3f}", taken])
    first = run.choices[0]
    what = f"Tuned on {first.records} other records by {_HEADINGS[first.metric]}:\n"
    return what + "\n" + _rows(["method", "parameters", "mean", ""], rows)


def mean_text(run: Run, method: str, metric: str, *, correct_only: bool = False) -> str:
    """Mean ± standard error."""
    found = run.report.mean(method, metric, correct_only=correct_only)
    error = "" if found.standard_error is None else f" ± {found.standard_error:.3f}"
    return f"{found.mean:.3f}{error}"


def cost_texts(run: Run, method: str) -> list[str]:
    """Mean forwards, backwards and seconds of a sample, and peak memory in MiB if it was measured."""
    cost = run.report.cost(method)
    spent = [f"{cost['forwards']:.0f}", f"{cost['backwards']:.0f}", f"{cost['seconds']:.3f}"]
    return spent + ([f"{run.memory[method] / 2**20:.0f}"] if run.memory else [])


def difference_text(found: Mapping[str, Any]) -> tuple[str, str, str]:
    """Mean, interval, and whether it excludes 0."""
    interval = f"{found['low']:+.3f} to {found['high']:+.3f}"
    return f"{found['mean']:+.3f}", interval, "yes" if found["decided"] else "no"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(head) - 1)]
    clean = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, marks, *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in clean)


# --- figure -------------------------------------------------------------------------------------------------------

_POINTS = 101


def mean_curves(run: Run) -> dict[str, Any]:
    """Mean logit over samples while tokens go, on a common grid of fractions; empty for others."""
    import numpy as np

    grid = np.linspace(0, 1, _POINTS)
    found: dict[str, Any] = {}
    for method in run.report.methods:
        rows = [r["curves"] for r in run.report.rows if r["method"] == method and "curves" in r]
        if rows:
            found[method] = {
                way: np.mean([np.interp(grid, r["fractions"], [p[0] for p in r[way]]) for r in rows], axis=0).tolist()
                for way in ("morf", "lerf")
            }
    return {"fractions": grid.tolist(), "methods": found} if found else {}


def save_figure(runs: Mapping[str, Run], path: Path) -> None:
    """Write the figure; the suffix says in which format.

    Raises:
        InputError: matplotlib is not installed, or does not write this format.
    """
    drawing = figure(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        drawing.savefig(path, dpi=150)
    except ValueError as error:
        raise InputError(
            f"figure: cannot write {path} ({error}); expected a name that ends with .png, .pdf or .svg"
        ) from error


def figure(runs: Mapping[str, Run]) -> Any:
    """One panel per run: mean curves (MoRF solid, LeRF dashed), or bars for questions and localisation.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('figures need matplotlib, which is not installed: pip install "attnlrp[plot]"') from error
    methods = list(dict.fromkeys(m for run in runs.values() for m in run.report.methods))
    colours = {m: colormaps["tab20"](k % 20) for k, m in enumerate(methods)}
    drawing = Figure(figsize=(5.2 * len(runs) + 2.4, 4.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(1, len(runs), squeeze=False)[0]
    for axes, (title, run) in zip(panels, runs.items(), strict=True):
        axes.set_title(title, fontsize=10)
        (_draw_curves if run.setup.kind == "faithfulness" else _draw_bars)(axes, run, colours)
    marks = [panels[0].plot([], [], color=colours[m], label=m)[0] for m in methods]
    drawing.legend(handles=marks, loc="outside right upper", fontsize=8, frameon=False)
    return drawing


def _draw_curves(axes: Any, run: Run, colours: Mapping[str, Any]) -> None:
    found = mean_curves(run)
    for method, curves in found["methods"].items():
        axes.plot(found["fractions"], curves["morf"], color=colours[method], linewidth=1.2)
        axes.plot(found["fractions"], curves["lerf"], color=colours[method], linewidth=1.2, linestyle="--")
    axes.set_xlabel("share of the input gone (solid: most relevant first, dashed: least)", fontsize=8)
    axes.set_ylabel("mean logit", fontsize=8)
    axes.tick_params(labelsize=8)


def _draw_bars(axes: Any, run: Run, colours: Mapping[str, Any]) -> None:
    first, second = _SHORT[run.setup.kind]
    for place, method in enumerate(reversed(run.ranking)):
        for offset, shade, metric in ((0.2, 1.0, first), (-0.2, 0.5, second)):
            value = run.report.mean(method, metric, correct_only=run.correct_only).mean
            axes.barh(place + offset, value, height=0.38, color=colours[method], alpha=shade)
    axes.set_yticks(range(len(run.ranking)), list(reversed(run.ranking)), fontsize=7)
    axes.set_xlabel(f"{_HEADINGS[first]} (full colour) and {_HEADINGS[second]} (pale)", fontsize=8)
    axes.set_xlim(0, 1)

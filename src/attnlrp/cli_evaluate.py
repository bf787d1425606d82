"""The command `attnlrp evaluate`: arguments and calls, no logic."""

from __future__ import annotations

import enum
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attnlrp.cli_options import Device, Dtype, Json, Model, errors, write_json

if TYPE_CHECKING:
    from attnlrp.runs import Kind, Run

__all__ = ["app"]

app = typer.Typer(
    name="evaluate",
    help="Which explanation is the most faithful, on a model and data of your own.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Data = Annotated[
    str,
    typer.Option(
        help="A .jsonl file, a SQuAD .json file, or a data set of the hub; for vision models a folder, .zip or .csv of "
        "images.",
        show_default=False,
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(help="Names with commas between; default: all baselines, cp-lrp and attnlrp.", show_default=False),
]
Samples = Annotated[int, typer.Option(min=1, help="Records that are drawn.")]
Length = Annotated[
    int, typer.Option(min=1, help="Tokens that texts are cut to; records with a question that have more are not drawn.")
]
Split = Annotated[str | None, typer.Option(help="Split of a table of images; default: all of it.", show_default=False)]
Seed = Annotated[int, typer.Option(min=0, help="Of the draw, and of the order of equally relevant tokens.")]
Tune = Annotated[
    int, typer.Option(min=0, help="Records, apart from the samples, on which parameters of baselines are chosen.")
]
Memory = Annotated[bool, typer.Option("--memory", help="Measure peak memory too, on the first sample.")]
Out = Annotated[
    Path | None,
    typer.Option(help="JSON lines of per-sample results; the same command goes on from them.", show_default=False),
]
Figure = Annotated[Path | None, typer.Option(help="Write a figure: .png, .pdf or .svg.", show_default=False)]


class Baseline(str, enum.Enum):
    """What takes the place of an embedding, or of pixels."""

    zero = "zero"
    mean = "mean"
    unknown = "unknown"
    mask = "mask"
    blur = "blur"


class SpecialTokens(str, enum.Enum):
    """What happens to special tokens."""

    rank = "rank"
    keep = "keep"
    first = "first"


@app.command()
def faithfulness(
    data: Data,
    model: Model = None,
    methods: Methods = None,
    samples: Samples = 200,
    length: Length = 512,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Points of a curve; default: one per token.", show_default=False)
    ] = None,
    baseline: Annotated[
        Baseline, typer.Option(help="What takes the place of an embedding; blur is for images.")
    ] = Baseline.zero,
    special: Annotated[
        SpecialTokens, typer.Option(help="Special tokens: ranked as others, never taken away, or first of all.")
    ] = SpecialTokens.rank,
    patch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Edge of the squares of an image in pixels; default: its patches.", show_default=False
        ),
    ] = None,
    split: Split = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Perturbed inputs in one pass.")] = 32,
    tune: Tune = 0,
    memory: Memory = False,
    out: Out = None,
    json_to: Json = None,
    figure: Figure = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Take tokens or squares of an image away, the most and the least relevant first: the area between the curves."""
    options = {"samples": samples, "length": length, "steps": steps, "baseline": baseline.value, "seed": seed}
    options |= {"special": special.value, "batch_size": batch_size, "tune": tune, "memory": memory}
    options |= {"patch": patch, "split": split}
    _measure("faithfulness", data, model, methods, options, out, json_to, figure, device, dtype)


@app.command()
def qa(
    data: Data,
    model: Model = None,
    methods: Methods = None,
    samples: Samples = 200,
    length: Length = 512,
    seed: Seed = 0,
    tune: Tune = 0,
    memory: Memory = False,
    out: Out = None,
    json_to: Json = None,
    figure: Figure = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Does the explanation of an answer point at it: top-1, IoU and mass, over all and correctly answered samples."""
    options = {"samples": samples, "length": length, "seed": seed, "tune": tune, "memory": memory}
    _measure("qa", data, model, methods, options, out, json_to, figure, device, dtype)


@app.command()
def localisation(
    data: Data,
    model: Model = None,
    methods: Methods = None,
    samples: Samples = 200,
    split: Split = None,
    seed: Seed = 0,
    tune: Tune = 0,
    memory: Memory = False,
    out: Out = None,
    json_to: Json = None,
    figure: Figure = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Is the explanation of an image on the object: relevance mass, pointing game, IoU and top-k."""
    options = {"samples": samples, "split": split, "seed": seed, "tune": tune, "memory": memory}
    _measure("localisation", data, model, methods, options, out, json_to, figure, device, dtype)


@app.command()
def table(
    config: Annotated[Path, typer.Option(help="YAML file of models, data and methods.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of table.json, table.md, curves.png and journals.")] = Path(
        "evaluation"
    ),
    data_folder: Annotated[
        Path | None,
        typer.Option(help="What ${DATA} stands for; default: $ATTNLRP_DATA.", show_default=False),
    ] = None,
    json_to: Json = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Methods x data sets x models; the same command goes on after an interruption."""
    _quieten()
    from attnlrp import demo
    from attnlrp.configuration import ModelEntry, read_config
    from attnlrp.methods import find_methods
    from attnlrp.models import load
    from attnlrp.tables import markdown, run_table

    found = read_config(config, data_folder=data_folder)
    methods = find_methods(found.methods)
    with _progress(out) as told:

        def loaded(entry: ModelEntry) -> tuple[Any, Any]:
            path = None if entry.path == demo.NAME else entry.path
            return load(path, device=device, dtype=dtype or entry.dtype, report=lambda step: told("")(0, 0, step))[:2]

        result = run_table(found, out, loaded, methods=methods, progress=told)
    if json_to is not None:
        write_json(result.to_dict(), json_to)
    if json_to != "-":
        sys.stdout.write(markdown(result))
    for reason in result.failed:
        errors.print(f"[bold red]not run[/] {escape(reason)}", highlight=False)
    if result.failed:
        raise typer.Exit(1)


def _measure(
    kind: Kind,
    data: str,
    name: str | None,
    names: str | None,
    options: dict[str, Any],
    out: Path | None,
    json_to: str | None,
    figure: Path | None,
    device: str | None,
    dtype: str | None,
) -> None:
    _quieten()
    from attnlrp.methods import find_methods
    from attnlrp.models import load
    from attnlrp.runs import Setup, evaluate, shown

    setup = Setup(data, kind, **options)
    methods = find_methods(None if names is None else [part.strip() for part in names.split(",")])
    with _progress(out) as told:
        report = told("")
        model, tokenizer, title = load(name, device=device, dtype=dtype, report=lambda step: report(0, 0, step))
        run = evaluate(model, tokenizer, methods, setup, name=shown(title), journal=out, progress=report)
    if figure is not None:
        from attnlrp.tables import save_figure

        save_figure({f"{shown(title)}, {shown(data)}": run}, figure)
    if json_to is not None:
        write_json(run.to_dict(), json_to)
    if json_to != "-":
        _show(run)
    for method, reason in run.failed.items():
        errors.print(f"[bold red]not run[/] {escape(f'{method}: {reason}')}", highlight=False)
    if run.failed and names is not None:
        raise typer.Exit(1)


def _quieten() -> None:
    """Torch's profiler, which measures memory, writes what it does to standard error unless told before torch loads."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@contextmanager
def _progress(out: Path | None) -> Iterator[Callable[[str], Callable[[int, int, str], None]]]:
    """A bar on standard error, for work longer than a second; an interruption says how to go on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    start = time.monotonic()
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("starting", total=None, visible=False)

        def told(title: str) -> Callable[[int, int, str], None]:
            def tell(done: int, total: int, last: str) -> None:
                what = escape(f"{title}: {last}" if title else last)
                shown = time.monotonic() - start > 1
                bar.update(task, completed=done, total=total or None, description=what, visible=shown)

            return tell

        try:
            yield told
        except KeyboardInterrupt:
            kept = f"; {out} keeps what was done, the same command goes on from there" if out is not None else ""
            errors.print(f"interrupted{escape(kept)}", highlight=False)
            raise typer.Exit(1) from None


def _show(run: Run) -> None:
    from attnlrp.tables import difference_text

    console = Console(highlight=False, width=200)  # a narrow terminal wraps lines; cells stay whole
    console.print(", ".join(f"{key} {value}" for key, value in run.counts.items()), markup=False)
    _show_figures(console, run)
    found = run.differences()
    if found["to"]:
        over = " over correctly answered samples" if found["correct_only"] else ""
        console.print(f"\n{found['best']} less the others, {found['metric']}{over}:", markup=False)
        table = _table("method", "difference", "95 % interval", "decided")
        for method, difference in found["to"].items():
            table.add_row(escape(method), *difference_text(difference))
        console.print(table)
    for choice in run.choices:
        chosen = ", ".join(f"{key} {value}" for key, value in choice.parameters.items()) or "none of its grid can run"
        console.print(f"tuned on {choice.records} other records: {choice.method}: {chosen}", markup=False)


_SHORT = {"comprehensiveness": "compr.", "sufficiency": "suff.", "area_probability": "area (prob.)"}


def _show_figures(console: Console, run: Run) -> None:
    """Those that rank the methods with their standard errors; all of them are in the JSON."""
    from attnlrp.tables import cost_texts, mean_text

    metrics = [m for m in run.report.metrics if m == "area_probability" or not m.endswith("_probability")]
    columns = [(m, only) for only in ([False, True] if run.correct_only else [False]) for m in metrics]
    heads = [_SHORT.get(m, m) + (" (correct)" if only else "") for m, only in columns]
    table = _table("method", *heads, "forwards", "backwards", "seconds", *(["peak MiB"] if run.memory else []))
    for method in run.ranking:
        figures = [
            mean_text(run, method, m, correct_only=only)
            if run.setup.kind != "faithfulness" or m == run.metric
            else f"{run.report.mean(method, m).mean:.3f}"
            for m, only in columns
        ]
        table.add_row(escape(method), *figures, *cost_texts(run, method))
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    return table

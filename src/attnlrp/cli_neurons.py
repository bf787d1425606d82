"""The command `attnlrp neurons`: arguments and calls, no logic."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from attnlrp.cli_options import (
    Device,
    Dictionaries,
    Dtype,
    File,
    Json,
    Kind,
    Model,
    Target,
    Through,
    dictionaries,
    errors,
    number,
    progress,
    read_text,
    write_json,
)
from attnlrp.cli_options import Text as Prompt
from attnlrp.errors import InputError

if TYPE_CHECKING:
    from attnlrp.explainer import Explainer
    from attnlrp.explanation import Explanation
    from attnlrp.image_explainer import ImageExplainer
    from attnlrp.labels import Label, Match
    from attnlrp.ranking import ReferenceSample
    from attnlrp.reference import ReferenceSamples

__all__ = ["app"]

_KEPT = 32  # units of each layer, at least

app = typer.Typer(
    name="neurons", help="What the units inside of a model stand for.", no_args_is_help=True, rich_markup_mode=None
)

SameModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The model of the samples, for heat maps and weights; default: the packaged one, if they are of it.",
        show_default=False,
    ),
]
Folder = Annotated[Path, typer.Option("--samples", help="Folder of attnlrp neurons collect.", show_default=False)]
Out = Annotated[Path, typer.Option(help="Folder to keep them in.", show_default=False)]


class Order(str, enum.Enum):
    """What samples are ranked by."""

    activation = "activation"
    relevance = "relevance"
    low_activation = "-activation"
    low_relevance = "-relevance"


class Reduce(str, enum.Enum):
    """How relevance is read off the tokens of a text."""

    sum = "sum"
    max = "max"


class Explained(str, enum.Enum):
    """What relevance is of."""

    every = "every"
    own = "own"


By = Annotated[
    Order | None,
    typer.Option(help="Which samples; a minus for the lowest; default: the first collected.", show_default=False),
]


@app.command()
def explain(
    text: Prompt = None,
    file: File = None,
    model: Model = None,
    kind: Annotated[
        list[Kind] | None,
        typer.Option(
            help="What to record; may be repeated; default: neurons and heads, with --sae its features alone.",
            show_default=False,
        ),
    ] = None,
    sae: Dictionaries = None,
    through: Through = None,
    unit: Annotated[
        str | None,
        typer.Option(
            help="Explain what this neuron computes, such as layers.16.mlp:394, instead of an output.",
            show_default=False,
        ),
    ] = None,
    target: Target = None,
    position: Annotated[
        int | None,
        typer.Option(
            help="Token whose prediction is explained, or where the neuron of --unit is read; -1 the last.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Folder of attnlrp neurons collect: words say what units stand for.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Units that are listed.")] = 10,
    save: Annotated[
        Path | None, typer.Option(help="Write .safetensors, .json, .html, .png, .pdf or .svg.", show_default=False)
    ] = None,
    json_to: Json = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Show which neurons, heads and features inside the model have made its prediction."""
    prompt = read_text(text, file)
    if unit is not None and target is not None:
        raise InputError("--unit and --target exclude each other: --unit explains a neuron, --target an output")
    with progress() as report:
        from attnlrp.explainer import Explainer
        from attnlrp.targets import Neuron

        kinds = [k.value for k in kind or ()] or ([] if sae else ["neurons", "heads"])
        explainer = Explainer.from_pretrained(model, device=device, dtype=dtype, report=report)
        report("explaining")
        explanation = explainer(
            prompt,
            target=number(target) if unit is None else Neuron(*_parts(unit)),
            position=position,
            through=through or (),
            latent=[*kinds, *dictionaries(sae)],
            latent_top=max(top, _KEPT),
        )
        labels = {} if samples is None else _words(samples, explainer, explanation, max(top, _KEPT))
        if save is not None:
            report(f"writing {save}")
            explanation.save(save, labels=labels)
    if json_to is not None:
        write_json(explanation.to_dict(), json_to)
    if json_to != "-":
        from attnlrp import show

        show.show(explanation, top=top, labels=labels)


@app.command()
def collect(
    data: Annotated[
        str,
        typer.Argument(
            help="A .jsonl file with text on each line, or a data set of the hub; for vision models a folder of "
            "images.",
            show_default=False,
        ),
    ],
    out: Out,
    model: Model = None,
    units: Annotated[
        list[str] | None,
        typer.Option(
            help='neurons, heads, or layers such as "layers.1?.mlp"; may be repeated; default: neurons.',
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        list[Order] | None,
        typer.Option(help="May be repeated; default: activation and relevance.", show_default=False),
    ] = None,
    reduce: Annotated[Reduce, typer.Option(help="Relevance of a text: the sum over its tokens, or the largest.")] = (
        Reduce.sum
    ),
    top: Annotated[int, typer.Option(min=1, help="Samples that are kept of each unit.")] = 10,
    target: Annotated[
        Explained | None,
        typer.Option(help="Explain every prediction of a text, or the own one of the task.", show_default=False),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="The first N texts only; default: all.", show_default=False)
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens that texts are cut to.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in one pass.")] = 1,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Keep the texts on which each unit is the most active and the most relevant; the same command goes on."""
    with _kept(out) as report:
        report("reading")
        explainer = _load(model, device, dtype, report)
        records = _records(explainer, data)[:samples]
        from attnlrp.collecting import reference_samples

        found = reference_samples(
            explainer,
            records,
            units=units or "neurons",
            by=[order.value for order in by or (Order.activation, Order.relevance)],
            reduce=reduce.value,
            top=top,
            target=None if target is None else target.value,
            length=length,
            batch_size=batch_size,
            folder=out,
            progress=lambda done, last: report(f"{done} of {len(records)}: {last}"),
        )
    _summary(found, out)


@app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Folders, in the order of their texts.", show_default=False)],
    out: Out,
) -> None:
    """Join the samples of several parts of a data set."""
    from attnlrp.reference import ReferenceSamples

    found = ReferenceSamples.load(folders[0])
    for folder in folders[1:]:
        found = found.merge(ReferenceSamples.load(folder))
    _summary(found, found.save(out))


@app.command()
def label(
    units: Annotated[
        list[str], typer.Argument(help="Addresses such as layers.16.mlp:394.", metavar="UNIT...", show_default=False)
    ],
    samples: Folder,
    model: SameModel = None,
    by: By = None,
    top: Annotated[int, typer.Option(min=1, help="Samples that are shown of each unit.")] = 10,
    json_to: Json = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Say what units stand for: their reference samples, the words there, and the tokens that their weights promote."""
    from attnlrp import labels
    from attnlrp.reference import ReferenceSamples

    found = ReferenceSamples.load(samples)
    order: Any = None if by is None else by.value
    shown: list[tuple[Label, list[ReferenceSample]]] = []
    with progress() as report:
        explainer = _same(found, model, device, dtype, report)
        lens = _lens(explainer)
        for unit in units:
            report(f"reading {unit}")
            own = found.of(unit, order)[:top]
            shown.append((labels.label(found, unit, lens=lens, by=order), _mapped(explainer, own)))
    if json_to is not None:
        write_json([_described(*one) for one in shown], json_to)
    if json_to != "-":
        console = Console(highlight=False)
        for one in shown:
            _show_label(console, *one)


@app.command()
def search(
    word: Annotated[str, typer.Argument(help="A word, in any case.", show_default=False)],
    samples: Folder,
    model: SameModel = None,
    by: By = None,
    top: Annotated[int, typer.Option(min=1, help="Units that are listed.")] = 10,
    json_to: Json = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """List the units that stand for a word: active at it or before it, and with weights that promote it."""
    from attnlrp import labels
    from attnlrp.reference import ReferenceSamples

    found = ReferenceSamples.load(samples)
    order: Any = None if by is None else by.value
    with progress() as report:
        lens = _lens(_same(found, model, device, dtype, report))
        report("searching")
        matches = labels.search(found, word, lens=lens, by=order, count=top)
    if json_to is not None:
        write_json([vars(match) for match in matches], json_to)
    if json_to != "-":
        _show_matches(Console(highlight=False), found, matches, order)


# --- reading --------------------------------------------------------------------------------------------------------


def _parts(address: str) -> tuple[str, int]:
    name, _, index = address.rpartition(":")
    if not name or not index.isdecimal():
        raise InputError(f"--unit: got {address!r}, expected an address such as layers.16.mlp:394")
    return name, int(index)


def _words(folder: Path, explainer: Explainer, explanation: Explanation, count: int) -> dict[str, str]:
    """Words at the peaks of the strongest units, where they were collected."""
    from attnlrp.collecting import name_of_model
    from attnlrp.reference import ReferenceSamples

    found = ReferenceSamples.load(folder)
    if name_of_model(explainer) != found.settings.model:
        raise InputError(f"--samples: {folder} is of {found.settings.model}, expected {name_of_model(explainer)}")
    collected = {site.name for site in found.sites}
    kinds = {layer.kind for layer in explanation.latent or ()} & {"neurons", "heads"}
    units = [u.unit for kind in kinds for u in explanation.top(kind, count)]
    return {
        unit: ", ".join([word for word, _ in found.words(unit) if word.strip()][:4])
        for unit in units
        if unit.rpartition(":")[0] in collected
    }


def _load(model: str | None, device: str | None, dtype: str | None, report: Any) -> Explainer | ImageExplainer:
    from attnlrp import models
    from attnlrp.explainer import Explainer
    from attnlrp.image_explainer import ImageExplainer

    found, reader, shown = models.load(model, device=device, dtype=dtype, report=report)
    kind = ImageExplainer if models.task_of(found) in models.IMAGE_TASKS else Explainer
    return kind(found, reader, name=shown)


def _same(
    samples: ReferenceSamples, model: str | None, device: str | None, dtype: str | None, report: Any
) -> Explainer | ImageExplainer | None:
    """The model that the samples are of; None if it is not named, and not the packaged one."""
    from attnlrp import demo
    from attnlrp.collecting import name_of_model

    expected = samples.settings.model
    if model is None and expected != demo.NAME:
        errors.print(escape(f"without --model {expected}: neither heat maps nor weights"), highlight=False)
        return None
    explainer = _load(model, device, dtype, report)
    if name_of_model(explainer) != expected:
        raise InputError(f"--model: got {name_of_model(explainer)}, the samples are of {expected}")
    return explainer


def _records(explainer: Explainer | ImageExplainer, data: str) -> list[Any]:
    from attnlrp.evaluation.data import read
    from attnlrp.evaluation.image_data import files_of
    from attnlrp.image_explainer import ImageExplainer

    if isinstance(explainer, ImageExplainer):
        return [path for path in files_of(data) if isinstance(path, Path)]
    return [record for record in read(data) if record.get("text", "").strip()]


def _lens(explainer: Any) -> Any:
    """The logit lens of a language model; None for other models."""
    from attnlrp import labels

    return labels.LogitLens(explainer) if explainer is not None and labels.has_lens(explainer) else None


def _mapped(explainer: Any, samples: list[ReferenceSample]) -> list[ReferenceSample]:
    from attnlrp.collecting import activation_maps

    return samples if explainer is None else activation_maps(explainer, samples)


# --- showing --------------------------------------------------------------------------------------------------------


def _summary(found: ReferenceSamples, folder: Path) -> None:
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    layers = f"{len(found.sites)} layers, {found.units} units, {', '.join(found.settings.by)}"
    errors.print(escape(f"{found.count} texts, {layers}: {folder} ({size:.1f} MiB)"), highlight=False)


def _show_label(console: Console, found: Label, samples: list[ReferenceSample]) -> None:
    from attnlrp.show.samples import listed, render

    console.print(Text(found.unit, "bold"))
    for title, words in {"at": found.words, "before": found.after}.items():
        console.print(Text(f"{title:<11}", "dim"), listed([(w, f"{s:.0%}") for w, s in words]), sep="")
    for title, tokens in {"promotes": found.promotes, "suppresses": found.suppresses}.items():
        if tokens:
            pairs = [(t.token, f"{t.deviation:+.1f}") for t in tokens]
            console.print(Text(f"{title:<11}", "dim"), listed(pairs), sep="")
    console.print(render(samples))
    console.print()


def _show_matches(console: Console, samples: ReferenceSamples, matches: list[Match], by: Any) -> None:
    from attnlrp.show.samples import listed

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("unit", "score", "at", "before", "promotes", "words at its peaks"):
        table.add_column(column, justify="right" if column not in ("unit", "words at its peaks") else "left")
    for match in matches:
        words = itertools.islice(samples.words(match.unit, by), 4)
        numbers = f"{match.score:.2f}", f"{match.at:.0%}", f"{match.after:.0%}", f"{match.promotes:+.1f}"
        table.add_row(match.unit, *numbers, listed([(w, f"{s:.0%}") for w, s in words]))
    console.print(table)


def _described(found: Label, samples: list[ReferenceSample]) -> dict[str, Any]:
    """Plain data of a label and its samples."""
    rows = [
        {k: getattr(s, k) for k in ("by", "rank", "value", "sample", "position", "word")}
        | {"name": s.passage.name, "text": s.passage.text, "tokens": s.passage.tokens}
        | {"activation": None if s.activation is None else s.activation.tolist()}
        for s in samples
    ]
    tokens = {kind: [vars(t) for t in getattr(found, kind)] for kind in ("promotes", "suppresses")}
    return {"unit": found.unit, "words": found.words, "after": found.after, **tokens, "samples": rows}


@contextmanager
def _kept(folder: Path) -> Iterator[Any]:
    """Progress; an interruption says how to go on."""
    try:
        with progress() as report:
            yield report
    except KeyboardInterrupt:
        errors.print(f"interrupted; {escape(str(folder))} keeps what was done, the same command goes on from there")
        raise typer.Exit(1) from None

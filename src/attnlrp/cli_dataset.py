"""`attnlrp explain-dataset`: every text of a data set, into one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnlrp.cli_options import (
    Device,
    Dtype,
    Keep,
    Memory,
    Model,
    Preset,
    Rules,
    Target,
    errors,
    load_explainer,
    number,
    progress,
)

__all__ = ["explain_dataset"]


def explain_dataset(
    data: Annotated[
        str,
        typer.Argument(
            help="A .jsonl file with text on each line, or a data set of the hub.", metavar="DATA", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSON lines to append to.", show_default=False)],
    model: Model = None,
    target: Target = None,
    against: Annotated[
        str | None, typer.Option(help="Token or class to compare with, of every text.", show_default=False)
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="The first N texts only; default: all.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one batch, with padding.")] = 512,
    rules: Rules = Preset.attnlrp,
    memory: Keep = Memory.full,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Explain every text of a data set, in batches of texts of like length; the same command goes on."""
    with progress() as report:
        from attnlrp.dataset import explain_dataset
        from attnlrp.evaluation.data import read

        report("reading")
        texts = [record["text"] for record in read(data) if record.get("text", "").strip()][:samples]
        explainer = load_explainer(model, rules, device, dtype, report, memory)
        done = explain_dataset(
            explainer,
            texts,
            out,
            tokens=tokens,
            progress=lambda done, count: report(f"{done} of {count} texts"),
            target=number(target),
            against=number(against),
        )
    errors.print(f"{done} texts explained, {len(texts)} in {out}", highlight=False)

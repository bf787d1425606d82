"""Explanations of many texts: batches of texts of like length, written to a file as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from attnlrp.errors import InputError
from attnlrp.explainer import Explainer
from attnlrp.explanation import Explanation

__all__ = ["explain_dataset", "read_dataset"]

_PER_TEXT = ("context", "image")

Progress = Callable[[int, int], None]


def explain_dataset(
    explainer: Explainer,
    texts: Sequence[str],
    path: str | Path,
    *,
    tokens: int = 512,
    progress: Progress | None = None,
    **options: Any,
) -> int:
    """Explain every text of a data set that a file does not hold yet, and append the explanations to it.

    Texts are sorted by length, so that those of a batch need little padding. Each batch is written when it is done: a
    run that was killed is continued by the same call.

    Args:
        explainer: what explains.
        texts: the data set.
        path: JSON lines; the first says what the others depend on, then one for each text, in any order.
        tokens: of a batch, with padding; a longer text is a batch of its own.
        progress: called with the number of texts that are done, and of all.
        options: of the explanation (see `Explainer.__call__`), the same for each text; not `context` and `image`.

    Returns:
        The number of texts that were explained in this call.

    Raises:
        InputError: no texts, an option of single texts, or a file with other texts, options or another model.

    Example:
        >>> attnlrp.explain_dataset(explainer, texts, "relevance.jsonl", target=" yes")
        >>> for index, explanation in attnlrp.read_dataset("relevance.jsonl"):
        ...     ...
    """
    given = sorted(set(options) & set(_PER_TEXT))
    if given or tokens < 1 or isinstance(texts, str) or not len(texts):
        got = f"{given[0]}=" if given else f"{len(texts)} texts, tokens={tokens}"
        raise InputError(
            f"explain_dataset: got {got}, expected a list of texts, a positive number of tokens, and options that "
            "all texts share"
        )
    path, settings = Path(path), _settings(explainer, options)
    done = _done(path, settings, texts)
    todo = [k for k in range(len(texts)) if k not in done]
    with path.open("a", encoding="utf-8") as file:
        if path.stat().st_size == 0:
            file.write(json.dumps(settings) + "\n")
        for batch in _batches([(len(explainer.tokenizer(texts[k], verbose=False).input_ids), k) for k in todo], tokens):
            explanations = explainer([texts[k] for k in batch], **options)
            for k, explanation in zip(batch, explanations, strict=True):
                file.write(json.dumps({"index": k, "text": _key(texts[k])} | explanation.to_dict()) + "\n")
                done.add(k)
            file.flush()
            if progress is not None:
                progress(len(done), len(texts))
    return len(todo)


def read_dataset(path: str | Path) -> Iterator[tuple[int, Explanation]]:
    """Index of a text, and its explanation, one after the other as they stand in a file of `explain_dataset`.

    Raises:
        InputError: not such a file.
    """
    for row in _rows(Path(path)):
        yield row["index"], Explanation.from_dict(row)


def _batches(lengths: list[tuple[int, int]], tokens: int) -> Iterator[list[int]]:
    """Indices of texts of like length (length, index), as many as fit; the longest first, which shows what fits."""
    batch: list[int] = []
    width = 0
    for length, k in sorted(lengths, reverse=True):
        if batch and width * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        width = width if batch else max(1, length)
        batch.append(k)
    if batch:
        yield batch


def _settings(explainer: Explainer, options: dict[str, Any]) -> dict[str, Any]:
    rules = {str(key): repr(getattr(rule, "__name__", rule)) for key, rule in explainer.rules.items()}
    table = hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:12]
    shown = {name: repr(value) for name, value in sorted(options.items()) if value is not None}
    return {"model": explainer.name, "rules": table, "dtype": str(explainer.model.dtype), "options": shown}


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _done(path: Path, settings: dict[str, Any], texts: Sequence[str]) -> set[int]:
    """Texts that a file holds already; a line that was cut off while it was written is removed."""
    if not path.exists() or not path.stat().st_size:
        return set()
    _cut(path)
    done = set()
    for row in _rows(path, settings):
        k = row["index"]
        if k >= len(texts) or row["text"] != _key(texts[k]):
            raise InputError(f"{path}: holds the explanation of another text as number {k}; give another file")
        done.add(k)
    return done


def _rows(path: Path, settings: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(next(file, "{}"))
            found = {key: head[key] for key in ("model", "rules", "dtype", "options")}
            for key, value in (settings or {}).items():
                if found[key] != value:
                    raise InputError(
                        f"{path}: holds explanations with {key} {found[key]!r}, now {value!r}; give another file"
                    )
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a file of explain_dataset ({error!r}); give another name") from error


def _cut(path: Path) -> None:
    """Remove what follows the last end of a line."""
    with path.open("rb+") as file:
        end = 0
        for line in file:
            end += len(line) if line.endswith(b"\n") else 0
        file.truncate(end)

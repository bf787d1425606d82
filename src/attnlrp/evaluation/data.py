"""Records to evaluate on: JSON lines, SQuAD files, and data sets of a hub by name."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnlrp.errors import InputError

__all__ = ["HUB", "draw", "read"]

Record = dict[str, Any]
"""name; text, optional label; or question, context, answers (texts)."""

HUB: dict[str, tuple[str, str | None, str]] = {
    "imdb": ("stanfordnlp/imdb", None, "test"),
    "wikipedia": ("wikimedia/wikipedia", "20231101.en", "train"),
    "squad_v2": ("rajpurkar/squad_v2", None, "validation"),
}
"""Short name -> data set on the hub, configuration, split."""

_EXPECTED = (
    "a .jsonl file (also .gz) with text and optional label, or question, context and answers, on each line; a .json "
    f"file in SQuAD format; or a data set of the hub: {', '.join(HUB)}, or name:split"
)


def read(source: str | Path, *, most: int = 20_000, seed: int = 0) -> list[Record]:
    """All records of a file, in its order; of a data set of the hub, a random choice if it is large.

    Args:
        source: file, or name on the hub, optionally with :split.
        most: rows of a data set of the hub that are read.
        seed: of their choice.

    Raises:
        InputError: not there, or a line without the fields; says which line.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return _from_hub(str(source), most, seed)
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    if path.name.removesuffix(".gz").endswith(".json"):
        return _squad(path, text)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise InputError(f"{path}: holds no record; expected {_EXPECTED}")
    return [_record(path, number, line) for number, line in lines]


def draw(records: list[Record], count: int, *, seed: int = 0, skip: int = 0) -> list[Record]:
    """A random choice: `count` records after the first `skip` of a shuffled order, so that choices can be kept apart.

    Raises:
        InputError: fewer records than asked for.
    """
    if skip + count > len(records):
        raise InputError(f"data: got {len(records)} records, expected at least {skip + count} ({count} of them new)")
    shuffled = random.Random(seed).sample(records, len(records))
    return shuffled[skip : skip + count]


def _record(path: Path, number: int, line: str) -> Record:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}:{number}: not JSON ({error}); expected {_EXPECTED}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}:{number}: got {line[:40]!r}, expected an object")
    return _checked(found, f"{path}:{number}", str(found.get("id", number)))


def _checked(found: Mapping[str, Any], where: str, name: str) -> Record:
    record: Record = {"name": name}
    if isinstance(found.get("text"), str):
        return record | {"text": found["text"], "label": found.get("label")}
    if isinstance(found.get("question"), str) and isinstance(found.get("context"), str):
        answers = found.get("answers", [])
        answers = answers.get("text", []) if isinstance(answers, Mapping) else answers
        texts = [a["text"] if isinstance(a, Mapping) else str(a) for a in answers]
        return record | {
            "question": found["question"],
            "context": found["context"],
            "answers": list(dict.fromkeys(texts)),
        }
    raise InputError(f"{where}: has the fields {sorted(found)}, expected text, or question, context and answers")


def _squad(path: Path, text: str) -> list[Record]:
    """The records of a file in SQuAD format that have an answer."""
    try:
        articles = json.loads(text)["data"]
        found = [
            {"id": q["id"], "question": q["question"], "context": p["context"], "answers": q["answers"]}
            for article in articles
            for p in article["paragraphs"]
            for q in p["qas"]
            if q["answers"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not in SQuAD format ({error!r}); expected {_EXPECTED}") from error
    return [_checked(record, str(path), str(record["id"])) for record in found]


def _from_hub(source: str, most: int, seed: int) -> list[Record]:
    try:
        import datasets
    except ImportError as error:
        install = 'pip install "attnlrp[evaluation]"'
        raise InputError(f"data: no file {source!r}; for a hub data set, {install}; expected {_EXPECTED}") from error
    name, _, split = source.partition(":")
    known, configuration, usual = HUB.get(name, (name, None, "validation"))
    try:
        rows = datasets.load_dataset(known, configuration, split=split or usual)
    except Exception as error:  # the library raises whatever its network and file systems raise
        raise InputError(f"data: no file {source!r}, and the hub gave {error}; expected {_EXPECTED}") from error
    chosen: Sequence[int] = range(len(rows))
    if len(chosen) > most:  # Wikipedia has millions of rows
        chosen = sorted(random.Random(seed).sample(chosen, most))
    records = [_checked(row, source, str(row.get("id", k))) for k, row in ((k, rows[k]) for k in chosen)]
    return [r for r in records if "text" in r or r["answers"]]

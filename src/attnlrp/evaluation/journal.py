"""Results as they come: one line of JSON for each sample and method, so that a run that is killed loses nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attnlrp.errors import InputError

__all__ = ["Journal"]


class Journal:
    """A file of results that a run continues.

    Args:
        path: JSON lines, appended to; None keeps the results in memory only.
        settings: what the results depend on; a file with other settings is refused.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}
        if path is not None and path.exists() and path.stat().st_size:
            self._read(path)
        elif path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"settings": self.settings})

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows.values())

    def add(self, row: dict[str, Any]) -> None:
        """Keep the result of row["sample"] by row["method"]."""
        self._rows[row["sample"], row["method"]] = row
        if self.path is not None:
            self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _read(self, path: Path) -> None:
        whole, _, rest = path.read_text(encoding="utf-8").rpartition("\n")
        try:
            head, *rows = [json.loads(line) for line in whole.splitlines()]
            settings = head["settings"]
            self._rows = {(row["sample"], row["method"]): row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a file of results ({error!r}); give another name") from error
        changed = {k for k in {*settings, *self.settings} if settings.get(k) != self.settings.get(k)}
        if changed:
            described = ", ".join(f"{k} {settings.get(k)!r} (now {self.settings.get(k)!r})" for k in sorted(changed))
            raise InputError(f"{path}: holds results with {described}; give another file, or the same settings")
        if rest:  # the line that was being written when the run was killed
            path.write_text(whole + "\n", encoding="utf-8")

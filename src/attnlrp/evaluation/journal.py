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
        settings: what the results depend on; a file with other settings is refused. Those that are a mapping, such as
            the parameters of each method, may gain entries: methods can be added to a file.
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
            for row in rows:
                if "settings" in row:
                    settings = _joined(settings, row["settings"])
                else:
                    self._rows[row["sample"], row["method"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a file of results ({error!r}); give another name") from error
        changed = _contradictions(settings, self.settings)
        if changed:
            raise InputError(
                f"{path}: holds results with {', '.join(changed)}; give another file, or the same settings"
            )
        if rest:  # the line that was being written when the run was killed
            path.write_text(whole + "\n", encoding="utf-8")
        if _joined(settings, self.settings) != settings:
            self._append({"settings": self.settings})


def _joined(settings: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Settings with the entries that a later run has added."""
    both = {k: {**v, **later[k]} for k, v in settings.items() if isinstance(v, dict) and isinstance(later.get(k), dict)}
    return {**settings, **later, **both}


def _contradictions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that are not the same, in words; an entry that only one of two mappings has is no contradiction."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key}.{k} {a[k]!r} (now {b[k]!r})" for k in sorted(a.keys() & b.keys()) if a[k] != b[k]]
        elif a != b:
            found.append(f"{key} {a!r} (now {b!r})")
    return found

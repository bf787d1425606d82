"""Images to evaluate on: folders with a subfolder for each class, and tables with labels and boxes; also in a zip."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from attnlrp.errors import InputError

__all__ = ["IMAGES", "Packed", "files_of", "read_image_records"]

Record = dict[str, Any]
"""name, image (file), optional label, box (x0, y0, x1, y1), mask (file)."""

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Endings of files that are taken from folders of classes."""

_CORNERS = ("x0", "y0", "x1", "y1")
_EXPECTED = (
    "a folder or .zip file with one subfolder of images for each class, or a .csv file with the columns file, "
    "optional label, x0, y0, x1, y1, mask, split"
)


@dataclass(frozen=True)
class Packed:
    """A file inside of a zip file, which is opened when it is read.

    Args:
        archive: the zip file.
        member: name of the file in it.
    """

    archive: Path
    member: str

    def __str__(self) -> str:
        return f"{self.archive}/{self.member}"

    def read(self) -> bytes:
        """Content of the file."""
        with zipfile.ZipFile(self.archive) as archive:
            return archive.read(self.member)


def read_image_records(
    source: str | Path, *, images: str | Path | None = None, split: str | None = None
) -> list[Record]:
    """Records of images for `image_classified`, in the order of their table or of their names.

    A box is (x0, y0, x1, y1) in pixels of the image; the pixels of both corners belong to it. Empty fields of a table
    are the same as none. Files of a table are looked for beside it, or else in the one zip file that is beside it.

    Args:
        source: a folder or zip file with one subfolder for each class, or with one .csv file; or a .csv file.
        images: folder or zip file with the files that a table names; None for beside it.
        split: rows of a table to take, by their column split; None for all.

    Raises:
        InputError: not there, no images, or a row that cannot be read; says which line.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected {_EXPECTED}")
    if path.suffix.lower() != ".csv" and not path.is_dir() and not zipfile.is_zipfile(path):
        raise InputError(f"{path}: neither a folder nor a .zip or .csv file; expected {_EXPECTED}")
    place = path if path.suffix.lower() != ".csv" else path.parent
    tables = [path.name] if place != path else [n for n in _names(path) if "/" not in n and n.lower().endswith(".csv")]
    if len(tables) > 1:
        raise InputError(f"{path}: holds the tables {', '.join(tables)}; give the name of one of them")
    if tables:
        return _from_table(place, tables[0], None if images is None else Path(images).expanduser(), split)
    if images is not None or split is not None:
        raise InputError(f"{path}: images and split belong to a .csv file, and there is none")
    return _from_folders(path)


def _from_folders(place: Path) -> list[Record]:
    found: list[Record] = []
    for name in _names(place):
        parts = PurePosixPath(name)
        if len(parts.parts) > 1 and parts.suffix.lower() in IMAGES:
            found.append({"name": name, "image": _file(place, name), "label": parts.parts[0]})
    if not found:
        raise InputError(f"{place}: holds no image in a subfolder; expected {_EXPECTED}")
    return found


def _from_table(place: Path, table: str, images: Path | None, split: str | None) -> list[Record]:
    where = f"{place}/{table}"
    found = _file(place, table)
    raw = found.read() if isinstance(found, Packed) else found.read_bytes()
    try:
        lines = csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline=""))
        rows = [(lines.line_num, {k: (v or "").strip() for k, v in row.items() if isinstance(k, str)}) for row in lines]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{where}: not a table in UTF-8 ({error}); expected {_EXPECTED}") from error
    columns = list(lines.fieldnames or ())
    if "file" not in columns:
        raise InputError(f"{where}: has the columns {', '.join(columns) or 'none'}; expected {_EXPECTED}")
    if split is not None:
        known = sorted({row.get("split", "") for _, row in rows} - {""})
        if split not in known:
            raise InputError(f"{where}: got the split {split!r}, expected one of {', '.join(known) or 'none (None)'}")
        rows = [(number, row) for number, row in rows if row["split"] == split]
    if not rows:
        raise InputError(f"{where}: holds no row; expected {_EXPECTED}")
    files = _Files(place, images)
    return [_record(row, f"{where}:{number}", files) for number, row in rows]


def files_of(source: str | Path) -> list[Path | Packed]:
    """Images without labels: one file, or every image of a folder or zip file, by name.

    Raises:
        InputError: not there, or no image in it.
    """
    place = Path(source)
    if place.is_file() and not zipfile.is_zipfile(place):
        return [place]
    if not place.exists():
        raise InputError(f"{source}: no such file or folder; expected an image, or a folder or .zip file of images")
    found = [_file(place, name) for name in _names(place) if name.lower().endswith(IMAGES)]
    if not found:
        raise InputError(f"{source}: no image in it; expected files that end in {', '.join(IMAGES)}")
    return found


class _Files:
    """Where the files of a table are."""

    def __init__(self, place: Path, images: Path | None) -> None:
        self.places = [place if images is None else images]
        if images is None and place.is_dir():
            archives = sorted(place.glob("*.zip"))
            self.places += archives if len(archives) == 1 else []
        missing = next((p for p in self.places if not p.is_dir() and not zipfile.is_zipfile(p)), None)
        if missing is not None:
            raise InputError(f"images: {missing} is neither a folder nor a .zip file")
        self._packed = {p: set(_names(p)) for p in self.places if not p.is_dir()}

    def find(self, name: str, where: str) -> Path | Packed:
        for place in self.places:
            if name in self._packed[place] if place in self._packed else (place / name).is_file():
                return _file(place, name)
        raise InputError(f"{where}: no file {name!r} in {' or '.join(map(str, self.places))}; give the place of images")


def _record(row: Mapping[str, str], where: str, files: _Files) -> Record:
    if not row["file"]:
        raise InputError(f"{where}: the column file is empty")
    record: Record = {"name": row["file"], "image": files.find(row["file"], where), "label": row.get("label") or None}
    corners = [row.get(name, "") for name in _CORNERS]
    if any(corners):
        record["box"] = _box(corners, where)
    if row.get("mask"):
        record["mask"] = files.find(row["mask"], where)
    return record


def _box(corners: Sequence[str], where: str) -> tuple[float, float, float, float]:
    try:
        x0, y0, x1, y1 = (float(corner) for corner in corners)
    except ValueError as error:
        raise InputError(f"{where}: got the box {', '.join(corners)}, expected four numbers x0, y0, x1, y1") from error
    return x0, y0, x1, y1


def _file(place: Path, name: str) -> Path | Packed:
    return place / name if place.is_dir() else Packed(place, name)


def _names(place: Path) -> list[str]:
    """Names of the files of a folder or zip file, sorted, with / between their parts; without hidden ones."""

    def every() -> Iterator[str]:
        if place.is_dir():
            yield from (p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
        else:
            with zipfile.ZipFile(place) as archive:
                yield from (name for name in archive.namelist() if not name.endswith("/"))

    return sorted(n for n in every() if not any(p.startswith((".", "__MACOSX")) for p in n.split("/")))

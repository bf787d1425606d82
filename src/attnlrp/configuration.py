"""What a table runs: a YAML (or JSON) file of models, data and methods. Every key is checked before anything runs."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnlrp.errors import InputError
from attnlrp.evaluation.flipping import SPECIAL
from attnlrp.evaluation.perturbation import BASELINES
from attnlrp.evaluation.pixels import PIXEL_BASELINES
from attnlrp.methods import find_methods
from attnlrp.models import DTYPES
from attnlrp.runs import KINDS
from attnlrp.tuning import GRIDS, Grid, open_grids

__all__ = ["DATA_FOLDER", "Config", "DataEntry", "ModelEntry", "read_config"]

DATA_FOLDER = "ATTNLRP_DATA"
"""Environment variable for the folder that ${DATA} stands for."""


@dataclass(frozen=True)
class ModelEntry:
    """A model: a name to show, where it is, the names of the data sets that it runs on (all by default), its dtype."""

    name: str
    path: str
    data: tuple[str, ...] | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class DataEntry:
    """A data set: a name to show, its part of a `Setup`, the names of its methods (all by default)."""

    name: str
    setup: Mapping[str, Any]
    methods: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Config:
    """A checked configuration."""

    models: tuple[ModelEntry, ...]
    data: tuple[DataEntry, ...]
    methods: tuple[Any, ...] | None = None
    seed: int = 0
    tune: int = 0
    grids: Mapping[str, Grid] = field(default_factory=lambda: GRIDS)

    def data_of(self, model: ModelEntry) -> list[DataEntry]:
        """The data sets that a model runs on."""
        return [d for d in self.data if model.data is None or d.name in model.data]


@dataclass(frozen=True)
class _Key:
    """What a key of the file must hold."""

    expected: str
    valid: Callable[[Any], bool]
    required: bool = False


def _number(least: int, what: str) -> _Key:
    return _Key(f"a whole number of {what}, at least {least}", lambda v: _whole(v, least))


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _choice(known: tuple[str, ...], *, required: bool = False) -> _Key:
    return _Key(f"one of {', '.join(known)}", lambda v: v in known, required)


def _text(what: str) -> _Key:
    return _Key(what, lambda v: isinstance(v, str) and bool(v), required=True)


def _names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _list(what: str, *, required: bool = False) -> _Key:
    return _Key(what, lambda v: isinstance(v, list) and bool(v), required)


_TOP = {
    "models": _list("a list of models, each with name and path", required=True),
    "data": _list("a list of data sets, each with name, source and kind", required=True),
    "methods": _list("a list of methods, each a name or a mapping with name and parameters"),
    "seed": _Key("a whole number, at least 0", lambda v: _whole(v, 0)),
    "tune": _Key(
        "a number of records, or a mapping with records and grids",
        lambda v: isinstance(v, Mapping) or _whole(v, 0),
    ),
}
_MODEL = {
    "name": _text("a name to show"),
    "path": _text("a hub name, a folder, a GGUF file, package:NAME/FILE, or gemma-3-270m for the packaged model"),
    "data": _Key("a list of names of data sets", _names),
    "dtype": _choice(DTYPES),
}
_DATA = {
    "name": _text("a name to show"),
    "source": _text("a .jsonl file, a SQuAD .json file, a data set of the hub, or a folder, .zip or .csv of images"),
    "kind": _choice(KINDS, required=True),
    "samples": _number(1, "records"),
    "length": _number(1, "tokens"),
    "steps": _Key("a whole number, at least 1, or null for one per token", lambda v: v is None or _whole(v, 1)),
    "baseline": _choice(tuple(dict.fromkeys((*BASELINES, *PIXEL_BASELINES)))),
    "patch": _number(1, "pixels"),
    "split": _Key("the name of a split of a table of images", lambda v: isinstance(v, str) and bool(v)),
    "special": _choice(SPECIAL),
    "batch_size": _number(1, "inputs"),
    "methods": _Key("a list of names of methods", _names),
}
_TUNE = {
    "records": _Key("a whole number of records, at least 1", lambda v: _whole(v, 1), required=True),
    "grids": _Key("a mapping: method -> parameter -> list of values", lambda v: isinstance(v, Mapping)),
}


def read_config(path: str | Path, *, data_folder: str | Path | None = None) -> Config:
    """Read and check a configuration.

    ${NAME} in paths and sources stands for the environment variable of that name; ${DATA} for the data folder.

    Args:
        path: of the file.
        data_folder: what ${DATA} stands for; default: the environment variable ATTNLRP_DATA.

    Raises:
        InputError: not there, or a key that is missing, unknown or wrong; names it and says what is expected.
    """
    found = _checked(_parsed(Path(path)), str(path), _TOP)
    folder = str(data_folder) if data_folder is not None else os.environ.get(DATA_FOLDER)
    known = {**os.environ, **({} if folder is None else {"DATA": folder})}
    models = []
    for k, entry in enumerate(found["models"]):
        where = f"{path}: models[{k}]"
        one = _checked(entry, where, _MODEL)
        place = _packaged(_filled(one["path"], f"{where}.path", known), f"{where}.path")
        models.append(ModelEntry(one["name"], place, tuple(one["data"]) if "data" in one else None, one.get("dtype")))
    data = []
    for k, entry in enumerate(found["data"]):
        where = f"{path}: data[{k}]"
        one = _checked(entry, where, _DATA)
        setup = {key: value for key, value in one.items() if key not in ("name", "methods")}
        setup["source"] = _filled(one["source"], f"{where}.source", known)
        data.append(DataEntry(one["name"], setup, tuple(one["methods"]) if "methods" in one else None))
    tune, grids = _tuning(found.get("tune", 0), f"{path}: tune")
    methods = tuple(found["methods"]) if "methods" in found else None
    _require_names(str(path), models, data, list(find_methods(methods)))
    if methods is not None:
        grids = open_grids(methods, grids)
    return Config(tuple(models), tuple(data), methods, found.get("seed", 0), tune, grids)


def _parsed(path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise InputError('a table needs PyYAML, which is not installed: pip install "attnlrp[evaluation]"') from error
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config: {path}: {error.strerror}; expected a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config: {path}: not YAML ({error})") from error


def _checked(found: Any, where: str, keys: Mapping[str, _Key]) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise InputError(f"{where}: got {found!r}, expected a mapping with {', '.join(keys)}")
    for key in found:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise InputError(f"{where}: unknown key {key!r}{hint}, expected some of {', '.join(keys)}")
    for name, key in keys.items():
        if name not in found:
            if key.required:
                raise InputError(f"{where}: the key {name!r} is missing, expected {key.expected}")
        elif not key.valid(found[name]):
            raise InputError(f"{where}.{name}: got {found[name]!r}, expected {key.expected}")
    return dict(found)


def _require_names(path: str, models: list[ModelEntry], data: list[DataEntry], methods: list[str]) -> None:
    """Names are unique, and those that an entry refers to are there."""
    for what, names in {"models": [m.name for m in models], "data": [d.name for d in data]}.items():
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InputError(f"{path}: {what}: two have the name {twice[0]!r}, expected different ones")
    sources = [d.name for d in data]
    referred = [(f"models[{k}].data", m.data, sources) for k, m in enumerate(models)]
    referred += [(f"data[{k}].methods", d.methods, methods) for k, d in enumerate(data)]
    for where, given, known in referred:
        for name in given or ():
            if name not in known:
                raise InputError(f"{path}: {where}: got {name!r}, expected some of {', '.join(known)}")


def _tuning(found: Any, where: str) -> tuple[int, Mapping[str, Grid]]:
    if isinstance(found, int):
        return found, GRIDS
    one = _checked(found, where, _TUNE)
    grids = {**GRIDS, **one.get("grids", {})}
    for method, grid in grids.items():
        for parameter, values in grid.items() if isinstance(grid, Mapping) else [("", grid)]:
            if not isinstance(values, (list, tuple)) or not values:
                raise InputError(
                    f"{where}.grids.{method}: got {parameter}: {values!r}, expected parameter -> list of values"
                )
    return one["records"], grids


def _filled(text: str, where: str, known: Mapping[str, str]) -> str:
    """${NAME} replaced; what is not set is an error."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in known:
            given = f"give --data-folder, or set {DATA_FOLDER}" if name == "DATA" else "set this environment variable"
            raise InputError(f"{where}: got {text!r}, but ${{{name}}} is not set: {given}")
        return known[name]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _packaged(path: str, where: str) -> str:
    """The file of package:NAME/FILE."""
    if not path.startswith("package:"):
        return path
    package, _, file = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise InputError(f"{where}: got {path!r}, but the package {package} is not installed: pip install it")
    return str(Path(spec.origin).parent / file)

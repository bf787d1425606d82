"""`ReferenceSamples`: what was found of every unit in a data set; merged, written, and read again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from attnlrp.errors import InputError
from attnlrp.ranking import NONE, Passage, Ranking, ReferenceSample
from attnlrp.units import Site, Unit, resolve

__all__ = ["CRITERIA", "By", "ReferenceSamples", "Settings"]

By: TypeAlias = Literal["activation", "relevance", "-activation", "-relevance"]
CRITERIA: tuple[By, ...] = ("activation", "relevance", "-activation", "-relevance")

_RANKINGS = "rankings.safetensors"
_COLUMNS = ("values", "samples", "positions")


@dataclass(frozen=True)
class Settings:
    """What reference samples depend on, besides the texts.

    Args:
        model: its name.
        rules: name of the table of rules.
        dtype: in which the model computes.
        by: what samples are ranked by.
        reduce: how the relevance of a unit for one text is read off its tokens: "sum" or "max".
        target: what is explained: "every" prediction of a text, or the "own" one of the task.
        length: tokens that texts are cut to.
        top: samples that are kept of each unit.
    """

    model: str
    rules: str
    dtype: str
    by: tuple[By, ...]
    reduce: str
    target: str
    length: int
    top: int

    def __post_init__(self) -> None:
        unknown = [name for name in self.by if name not in CRITERIA]
        if unknown or not self.by:
            raise InputError(f"by: got {unknown or 'nothing'}, expected any of {', '.join(CRITERIA)}")
        for name, known in {"reduce": ("sum", "max"), "target": ("every", "own")}.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("length", "top"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}, expected at least 1")

    def require_same(self, other: Settings, what: str) -> None:
        """Refuse to continue or merge what was collected in another way.

        Raises:
            InputError: names every setting that differs.
        """
        pairs = {name: (value, getattr(other, name)) for name, value in vars(self).items()}
        changed = [f"{name} {a!r} (now {b!r})" for name, (a, b) in pairs.items() if a != b]
        if changed:
            raise InputError(f"{what}: collected with {', '.join(changed)}; expected the same settings")


@dataclass(frozen=True)
class ReferenceSamples:
    """The texts on which each unit of a model is the most active, or the most relevant.

    Args:
        settings: how they were collected.
        sites: the layers whose units they are of.
        rankings: by what -> address of the layer -> its ranking.
        passages: number of a text in the data set -> the text; those that a unit has kept.
        count: number of texts that were read.
        digest: of their names and texts, in their order.
    """

    settings: Settings
    sites: tuple[Site, ...]
    rankings: Mapping[By, Mapping[str, Ranking]]
    passages: Mapping[int, Passage]
    count: int
    digest: str

    @property
    def units(self) -> int:
        """Number of units."""
        return sum(site.units for site in self.sites)

    def of(self, unit: Unit, by: By | None = None) -> list[ReferenceSample]:
        """The samples of a unit, best first.

        Args:
            unit: such as "layers.16.mlp:394", or `Neuron(16, 394)`.
            by: "activation" or "relevance", with a minus for the lowest; default: the first that was collected.

        Raises:
            InputError: a unit or an order that was not collected.
        """
        by = self.order(by)
        site, index = resolve(self.sites, unit)
        ranking, sign = self.rankings[by][site.name], -1 if by.startswith("-") else 1
        rows = zip(*(getattr(ranking, name)[index].tolist() for name in _COLUMNS), strict=True)
        return [
            ReferenceSample(f"{site.name}:{index}", by, rank, sign * value, sample, position, self.passages[sample])
            for rank, (value, sample, position) in enumerate(rows, start=1)
            if sample != NONE
        ]

    def words(self, unit: Unit, by: By | None = None, *, after: bool = False) -> list[tuple[str, float]]:
        """The words at the peaks of a unit, and the share of its samples that have their peak there; commonest first.

        Args:
            unit: the unit.
            by: which of its samples.
            after: the words behind these instead: what a language model reads next.

        Raises:
            InputError: as `of`.
        """
        found = self.of(unit, by)
        counted = Counter(s.passage.word_after(s.position) if after else s.word for s in found)
        return [(word, count / len(found)) for word, count in counted.most_common() if word]

    def merge(self, later: ReferenceSamples) -> ReferenceSamples:
        """As if the texts of the other had followed in the same pass.

        Raises:
            InputError: collected from another model, of other units, or with other settings.
        """
        self.settings.require_same(later.settings, "reference samples to merge")
        if self.sites != later.sites:
            a, b = ({site.name for site in found.sites} for found in (self, later))
            other = ", ".join(sorted(a ^ b)[:4]) or "of the same names, with other numbers of units"
            raise InputError(f"reference samples to merge: of other layers ({other}); expected the same units")
        rankings = {
            by: {name: own.merge(later.rankings[by][name], self.count) for name, own in layers.items()}
            for by, layers in self.rankings.items()
        }
        passages = {**self.passages, **{self.count + k: passage for k, passage in later.passages.items()}}
        digest = hashlib.sha256(f"{self.digest} {later.digest}".encode()).hexdigest()
        merged = dataclasses.replace(self, rankings=rankings, count=self.count + later.count, digest=digest)
        return dataclasses.replace(merged, passages=merged.used(passages))

    def used(self, passages: Mapping[int, Passage]) -> dict[int, Passage]:
        """Those of the passages that a unit has kept."""
        rankings = [ranking for layers in self.rankings.values() for ranking in layers.values()]
        wanted = {number for ranking in rankings for number in ranking.samples.unique().tolist()}
        return {number: passage for number, passage in sorted(passages.items()) if number in wanted}

    def order(self, by: By | None = None) -> By:
        """What samples are ranked by: as asked for, else the first that was collected.

        Raises:
            InputError: it was not collected.
        """
        chosen = by or self.settings.by[0]
        if chosen not in self.rankings:
            raise InputError(f"by: got {chosen!r}, collected was {', '.join(self.settings.by)}")
        return chosen

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write a folder: the texts as Parquet, the rankings as safetensors, one of which takes effect last.

        Raises:
            InputError: pyarrow is not installed.
        """
        from safetensors.torch import save_file

        parquet, arrow = _parquet()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"passages-{self.count}.parquet"
        rows = [{"sample": number, **vars(passage)} for number, passage in sorted(self.passages.items())]
        parquet.write_table(arrow.Table.from_pylist(rows, schema=_schema(arrow)), folder / name, compression="zstd")
        tensors = {
            f"{by}/{layer}/{column}": getattr(ranking, column)
            for by, layers in self.rankings.items()
            for layer, ranking in layers.items()
            for column in _COLUMNS
        }
        described: dict[str, Any] = {"settings": vars(self.settings), "sites": [vars(site) for site in self.sites]}
        described |= {"count": self.count, "digest": self.digest, "passages": name}
        partial = folder / f".{_RANKINGS}"
        save_file(tensors, partial, {"attnlrp": json.dumps(described)})
        os.replace(partial, folder / _RANKINGS)
        for old in folder.glob("passages-*.parquet"):
            if old.name != name:
                old.unlink()
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> ReferenceSamples:
        """Read a folder that `save` wrote.

        Raises:
            InputError: not such a folder, or pyarrow is not installed.
        """
        from safetensors import SafetensorError, safe_open

        parquet, _ = _parquet()
        path = Path(folder) / _RANKINGS
        try:
            with safe_open(path, framework="pt") as file:
                described = json.loads((file.metadata() or {})["attnlrp"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no dict
            rows = parquet.read_table(Path(folder) / described["passages"]).to_pylist()
            return cls._read(described, tensors, rows)
        except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder}: no reference samples ({error!r}); expected a folder that attnlrp neurons collect, or "
                "ReferenceSamples.save, wrote"
            ) from error

    @classmethod
    def _read(
        cls, described: Mapping[str, Any], tensors: Mapping[str, Any], rows: list[dict[str, Any]]
    ) -> ReferenceSamples:
        settings = Settings(**described["settings"] | {"by": tuple(described["settings"]["by"])})
        sites = tuple(Site(**fields) for fields in described["sites"])
        rankings = {
            by: {site.name: Ranking(*(tensors[f"{by}/{site.name}/{column}"] for column in _COLUMNS)) for site in sites}
            for by in settings.by
        }
        passages = {
            row["sample"]: Passage(row["name"], row["text"], tuple(row["tokens"]), tuple(row["words"])) for row in rows
        }
        return cls(settings, sites, rankings, passages, described["count"], described["digest"])


def _parquet() -> tuple[Any, Any]:
    """The modules `pyarrow.parquet` and `pyarrow`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError('reference samples are kept in Parquet: pip install "attnlrp[neurons]"') from error
    return pyarrow.parquet, pyarrow


def _schema(arrow: Any) -> Any:
    fields = {"sample": arrow.int64(), "name": arrow.string(), "text": arrow.string()}
    fields |= {"tokens": arrow.list_(arrow.string()), "words": arrow.list_(arrow.int32())}
    return arrow.schema(list(fields.items()))

"""The result of an explanation: frozen tensors and plain data, saved as safetensors or JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from attnlrp.errors import InputError
from attnlrp.latent import Latent, UnitRelevance

__all__ = ["Candidate", "ExplainedTarget", "Explanation", "join_pieces"]

FORMAT = 1
_PART = re.compile(r"(?P<text>.+)\[(?P<index>\d+)/\d+\]", re.DOTALL)


@dataclass(frozen=True)
class Candidate:
    """One entry of the model's output at the explained position.

    Args:
        token: text of the vocabulary entry, or name of the class.
        id: index in the vocabulary, or of the class.
        logit: the model's logit.
    """

    token: str
    id: int
    logit: float


@dataclass(frozen=True)
class ExplainedTarget:
    """The scalar that one row of relevance explains.

    Args:
        token: text of the explained token, name of the class, or address of the neuron.
        id: its index; None where the target is a sum over several.
        position: index into `Explanation.tokens` of the token whose prediction is explained; None if the whole text has
            one output.
        logit: value of the explained scalar, in `unit`; without `against`, the model's logit.
        rank: 1 for the most likely output; None where the target is a sum over several.
        against: what a contrastive target was compared with, else None.
        unit: "logit", "probability", or "activation" of a neuron.
        candidates: the largest outputs at this position, best first.
    """

    token: str
    id: int | None
    position: int | None
    logit: float
    rank: int | None = None
    against: str | None = None
    unit: str = "logit"
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """Relevance of every input token for one or several targets.

    Args:
        tokens: text of each input token; a token that holds a part of a character reads "é[1/2]".
        token_ids: vocabulary index of each token.
        relevance: relevance of token t for target k; unit: relevance, a row sums to the target
            less what biases, softmax and constants absorb.
        targets: what each row explains.
        special: whether a token is a special token of the tokenizer (such as `<bos>`).
        segments: origin of each token: "prompt", "generated" or "image" (a patch); "question" or "context"; "encoder"
            or "decoder".
        words: index of the word that each token belongs to, never decreasing.
        model: name of the model.
        rules: name of the rules.
        task: such as "causal-lm" or "sequence-classification".
        version: version of attnlrp that made it.
        latent: relevance inside the model, if it was asked for.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    relevance: Float[Tensor, "target token"]
    targets: tuple[ExplainedTarget, ...]
    special: tuple[bool, ...]
    segments: tuple[str, ...]
    words: tuple[int, ...]
    model: str
    rules: str
    task: str
    version: str
    latent: Latent | None = None

    def __post_init__(self) -> None:
        rows, columns = self.relevance.shape
        lengths = {len(self.tokens), len(self.token_ids), len(self.special), len(self.segments), len(self.words)}
        if lengths != {columns} or rows != len(self.targets):
            raise InputError(
                f"explanation: relevance of shape {rows} x {columns} needs {rows} targets and {columns} tokens, "
                f"got {len(self.targets)} targets and token fields of lengths {sorted(lengths)}"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Explanation):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.token_ids, self.targets))

    @property
    def target(self) -> ExplainedTarget:
        """The only target; with several, pick one of `targets`."""
        if len(self.targets) != 1:
            raise InputError(f"explanation.target: this explanation has {len(self.targets)} targets; use .targets[k]")
        return self.targets[0]

    @property
    def logit(self) -> float:
        """Value of the only target."""
        return self.target.logit

    @property
    def sum(self) -> tuple[float, ...]:
        """Relevance that reached the input, per target."""
        return tuple(self.relevance.double().sum(dim=1).tolist())

    @overload
    def top(self, kind: int = 10, *, target: int = 0) -> list[tuple[int, str, float]]: ...
    @overload
    def top(self, kind: str, count: int = 10, *, target: int = 0) -> list[UnitRelevance]: ...
    def top(
        self, kind: int | str = 10, count: int = 10, *, target: int = 0
    ) -> list[tuple[int, str, float]] | list[UnitRelevance]:
        """The most relevant by magnitude, largest first: tokens as (index, text, relevance), or units inside the model.

        Args:
            kind: number of tokens; or "neurons", "heads" and so on, see `Latent.top`.
            count: number of units.
            target: row of relevance.

        Raises:
            InputError: the units were not recorded.
        """
        if isinstance(kind, str):
            if self.latent is None:
                raise InputError(f"explanation.top: no {kind} were recorded; explain with latent=({kind!r},)")
            return self.latent.top(kind, count, target=target)
        row = self.relevance[target]
        order = row.abs().argsort(descending=True)[:kind].tolist()
        return [(i, self.tokens[i], row[i].item()) for i in order]

    def merge_words(self) -> Explanation:
        """Join the pieces of each word, and the patches of each image; relevance is summed, so nothing is lost.

        `token_ids` keeps the first piece's index; a target's position moves to the word that holds it.
        """
        return self._merge(self.words)

    def merge_images(self) -> Explanation:
        """Join the patches of each image to one column."""
        return self._merge(
            [w if s == "image" else -k for k, (w, s) in enumerate(zip(self.words, self.segments, strict=True), 1)]
        )

    def _merge(self, keys: Sequence[int]) -> Explanation:
        """Join neighbours with the same key."""
        starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
        ends = [*starts[1:], len(keys)]
        spans = list(zip(starts, ends, strict=True))
        column_of = [k for k, (a, b) in enumerate(spans) for _ in range(a, b)]
        relevance = torch.stack([self.relevance[:, a:b].sum(dim=1) for a, b in spans], dim=1)
        words = [self.words[a] for a in starts]
        return dataclasses.replace(
            self,
            tokens=tuple(join_pieces(self.tokens[a:b], self.segments[a]) for a, b in spans),
            token_ids=tuple(self.token_ids[a] for a in starts),
            relevance=relevance,
            targets=tuple(
                t if t.position is None else dataclasses.replace(t, position=column_of[t.position])
                for t in self.targets
            ),
            special=tuple(self.special[a] for a in starts),
            segments=tuple(self.segments[a] for a in starts),
            words=tuple(words),
            latent=self.latent and self.latent.merged(spans),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to JSON: relevance is a list of rows, one per target."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields |= {"relevance": self.relevance.tolist(), "targets": [dataclasses.asdict(t) for t in self.targets]}
        fields |= {"latent": self.latent and self.latent.to_dict()}
        dtype = str(self.relevance.dtype).removeprefix("torch.")
        return {"format": FORMAT} | fields | {"sum": list(self.sum), "dtype": dtype}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Explanation:
        """The inverse of `to_dict`."""
        if data.get("format") != FORMAT:
            raise InputError(f"explanation: format {data.get('format')!r} is not known, expected {FORMAT}")
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name != "latent"}
        for name in ("tokens", "token_ids", "special", "segments", "words"):
            fields[name] = tuple(fields[name])
        fields["targets"] = tuple(
            ExplainedTarget(**(t | {"candidates": tuple(Candidate(**c) for c in t["candidates"])}))
            for t in data["targets"]
        )
        relevance, dtype = fields["relevance"], getattr(torch, data["dtype"])
        if data.get("latent") is not None:
            fields["latent"] = Latent.from_dict(data["latent"], data.get("tensors", {}), dtype)
        if not isinstance(relevance, Tensor):
            shape = len(fields["targets"]), len(fields["tokens"])
            fields["relevance"] = torch.tensor(relevance, dtype=dtype).reshape(shape)
        return cls(**fields)

    def save(self, path: str | Path, *, labels: Mapping[str, str] | None = None) -> Path:
        """Write a file; its suffix chooses: .safetensors .json (both load again), .html .png .pdf .svg.

        Args:
            path: of the file.
            labels: what units stand for, by address, such as {"layers.16.mlp:394": "cold"}; pictures show it.

        Raises:
            InputError: another suffix.
        """
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.to_dict(), ensure_ascii=False, indent=1), encoding="utf-8")
        elif path.suffix == ".safetensors":
            from safetensors.torch import save_file

            bare = dataclasses.replace(self, latent=None).to_dict()
            metadata = bare | {"relevance": None, "latent": self.latent and self.latent.described()}
            tensors = {"relevance": self.relevance.contiguous()} | (self.latent.tensors() if self.latent else {})
            save_file(tensors, path, {"attnlrp": json.dumps(metadata)})
        else:
            from attnlrp import show  # results do not draw: the renderers load on first use

            show.save(self, path, labels=labels)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Explanation:
        """Read a .safetensors or .json file that `save` wrote.

        Raises:
            InputError: the file is not an explanation.
        """
        from safetensors import SafetensorError

        path = Path(path)
        if path.suffix not in (".json", ".safetensors"):
            raise InputError(
                f"{path}: cannot load {path.suffix or 'a file without suffix'}; expected .safetensors or .json"
            )
        try:
            return cls.from_dict(_read(path))
        except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: not an explanation saved by attnlrp ({error!r}); expected a file that Explanation.save wrote"
            ) from error

    def show(self, *, labels: Mapping[str, str] | None = None) -> None:
        """Print the heat map to the terminal (in a notebook, the object shows itself), and units with their labels."""
        from attnlrp import show

        show.show(self, labels=labels)

    def _repr_html_(self) -> str:
        from attnlrp import show

        return show.fragment(self)


def _read(path: Path) -> dict[str, Any]:
    """The data of `to_dict`; from .safetensors, with its relevance as a tensor."""
    if path.suffix == ".json":
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return data
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        data = json.loads((file.metadata() or {})["attnlrp"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no dict
        return data | {"relevance": tensors["relevance"], "tensors": tensors}


def join_pieces(pieces: tuple[str, ...], segment: str) -> str:
    """Text of a word; the parts "é[1/2]", "é[2/2]" of one character read "é" again, the patches of an image once."""
    if segment == "image":
        return pieces[0] if len(pieces) == 1 else f"{pieces[0]}×{len(pieces)}"
    text = []
    for piece in pieces:
        part = _PART.fullmatch(piece)
        text.append(piece if part is None else part["text"] if part["index"] == "1" else "")
    return "".join(text)

"""The explanation of an image: relevance of each pixel that the model reads, saved as safetensors or JSON."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from attnlrp.errors import InputError
from attnlrp.explanation import Candidate, ExplainedTarget
from attnlrp.latent import Latent, UnitRelevance

__all__ = ["ImageExplanation"]

FORMAT = 1
_IN_FRONT = 8  # tokens in front of the patches, at most: class, distillation, registers


@dataclass(frozen=True)
class ImageExplanation:
    """Relevance of every pixel of an image, as the model reads it, for one or several targets.

    Args:
        relevance: signed relevance of each pixel, the sum over its colours; unit: that of the target.
        picture: what the model reads, resized and cropped as it wants: red, green and blue from 0 to 255.
        targets: what each map explains.
        patch: edge of the model's patches in pixels; 1 if it has none.
        size: width and height of the image before it was resized.
        notes: what was done to the image while it was read.
        model: name of the model.
        rules: name of the rules.
        task: such as "image-classification".
        version: version of attnlrp that made it.
        latent: relevance inside the model, if it was asked for. Where `LatentLayer` says token it is a position of the
            model: first tokens in front such as the class token, then patches line by line (`offset` 0), see
            `of_patches`; windows one after the other where attention is computed in windows (`offset` None).
    """

    relevance: Float[Tensor, "target height width"]
    picture: UInt8[Tensor, "height width 3"]
    targets: tuple[ExplainedTarget, ...]
    patch: int
    size: tuple[int, int]
    notes: tuple[str, ...]
    model: str
    rules: str
    task: str
    version: str
    latent: Latent | None = None

    def __post_init__(self) -> None:
        if len(self.relevance) != len(self.targets) or self.relevance.shape[1:] != self.picture.shape[:2]:
            raise InputError(
                f"explanation: got relevance {tuple(self.relevance.shape)}, a picture {tuple(self.picture.shape)} and "
                f"{len(self.targets)} targets, expected (target, height, width) and (height, width, 3)"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImageExplanation):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.size, self.targets))

    @property
    def patches(self) -> Float[Tensor, "target row column"]:
        """Relevance of each patch, the sum over its pixels; those at the right and bottom edges may be smaller."""
        height, width = self.relevance.shape[1:]
        pad = (0, -width % self.patch, 0, -height % self.patch)
        padded = torch.nn.functional.pad(self.relevance, pad)
        return padded.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch).sum(dim=(-2, -1))

    @property
    def target(self) -> ExplainedTarget:
        """The only target; with several, pick one of `targets`."""
        if len(self.targets) != 1:
            raise InputError(f"explanation.target: this explanation has {len(self.targets)} targets; use .targets[k]")
        return self.targets[0]

    @property
    def sum(self) -> tuple[float, ...]:
        """Relevance that reached the image, per target."""
        return tuple(self.relevance.double().sum(dim=(1, 2)).tolist())

    @overload
    def top(self, kind: int = 10, *, target: int = 0) -> list[tuple[int, int, float]]: ...
    @overload
    def top(self, kind: str, count: int = 10, *, target: int = 0) -> list[UnitRelevance]: ...
    def top(
        self, kind: int | str = 10, count: int = 10, *, target: int = 0
    ) -> list[tuple[int, int, float]] | list[UnitRelevance]:
        """The most relevant by magnitude, largest first: patches as (row, column, relevance), or units.

        Args:
            kind: number of patches; or "neurons", "heads" and so on, see `Latent.top`; `token` is then a position.
            count: number of units.
            target: which of the targets.

        Raises:
            InputError: the units were not recorded.
        """
        if isinstance(kind, str):
            if self.latent is None:
                raise InputError(f"explanation.top: no {kind} were recorded; explain with latent=({kind!r},)")
            return self.latent.top(kind, count, target=target)
        patches = self.patches[target]
        order = patches.abs().flatten().argsort(descending=True)[:kind].tolist()
        width = patches.shape[1]
        return [(i // width, i % width, patches[i // width, i % width].item()) for i in order]

    def in_front(self, positions: int, offset: int | None) -> int | None:
        """Tokens in front of the patches, such as the class token, in a layer of this many positions.

        Args:
            positions: of the layer.
            offset: of the layer.

        Returns:
            None where its positions are not the patches, as where patches have been merged.
        """
        rows, columns = self.patches.shape[1:]
        front = positions - rows * columns
        return front if offset is not None and self.patch > 1 and 0 <= front <= _IN_FRONT else None

    def of_patches(self, values: Float[Tensor, " position"], offset: int | None) -> Float[Tensor, "row column"] | None:
        """Values at the positions of a layer, such as relevance of a unit, by patch; what is in front is left out.

        Args:
            values: at each position.
            offset: of the layer.

        Returns:
            None where its positions are not the patches.
        """
        front = self.in_front(len(values), offset)
        return None if front is None else values[front:].reshape(self.patches.shape[1:])

    def smoothed(self, deviation: float) -> ImageExplanation:
        """Relevance after a Gaussian filter, for a calmer picture; its sum stays, and the notes say it.

        Args:
            deviation: standard deviation in pixels; 0 changes nothing.

        Raises:
            InputError: below 0, or not finite.
        """
        if not (math.isfinite(deviation) and deviation >= 0):
            raise InputError(f"smooth: got {deviation}, expected a standard deviation of 0 pixels or more")
        if deviation == 0:
            return self
        height, width = self.relevance.shape[1:]
        rows, columns = _filter(height, deviation), _filter(width, deviation)
        relevance = (rows @ self.relevance.double() @ columns.T).to(self.relevance.dtype)
        note = f"relevance smoothed (Gaussian, standard deviation {deviation:g} pixels)"
        return dataclasses.replace(self, relevance=relevance, notes=(*self.notes, note))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to JSON: relevance as target x row x column, the picture as a PNG in base64."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields |= {"relevance": self.relevance.tolist(), "targets": [dataclasses.asdict(t) for t in self.targets]}
        fields |= {"picture": base64.b64encode(_png(self.picture)).decode(), "sum": list(self.sum)}
        fields |= {"latent": self.latent and self.latent.to_dict()}
        return {"attnlrp": "image", "format": FORMAT} | fields | {"dtype": str(self.relevance.dtype)[len("torch.") :]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ImageExplanation:
        """The inverse of `to_dict`."""
        if (data.get("attnlrp"), data.get("format")) != ("image", FORMAT):
            raise InputError(f"explanation: format {data.get('format')!r} is not known, expected {FORMAT} of an image")
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name != "latent"}
        fields["targets"] = tuple(
            ExplainedTarget(**(t | {"candidates": tuple(Candidate(**c) for c in t["candidates"])}))
            for t in data["targets"]
        )
        fields |= {"size": tuple(data["size"]), "notes": tuple(data["notes"])}
        fields["picture"] = _pixels(base64.b64decode(data["picture"]))
        dtype = getattr(torch, data["dtype"])
        if not isinstance(data["relevance"], Tensor):
            fields["relevance"] = torch.tensor(data["relevance"], dtype=dtype)
        if data.get("latent") is not None:
            fields["latent"] = Latent.from_dict(data["latent"], data.get("tensors", {}), dtype)
        return cls(**fields)

    def save(self, path: str | Path, *, labels: Mapping[str, str] | None = None) -> Path:
        """Write a file; its suffix chooses: .safetensors .json (both load again), .html .png .pdf .svg.

        Args:
            path: of the file.
            labels: what units stand for, by address; a page shows it.

        Raises:
            InputError: another suffix.
        """
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.to_dict(), ensure_ascii=False), encoding="utf-8")
        elif path.suffix == ".safetensors":
            from safetensors.torch import save_file

            bare = dataclasses.replace(self, latent=None).to_dict()
            metadata = bare | {"relevance": None, "latent": self.latent and self.latent.described()}
            tensors = {"relevance": self.relevance.contiguous()} | (self.latent.tensors() if self.latent else {})
            save_file(tensors, path, {"attnlrp": json.dumps(metadata)})
        else:
            from attnlrp.show import heat

            heat.save(self, path, labels=labels)
        return path

    @classmethod
    def load(cls, path: str | Path) -> ImageExplanation:
        """Read a .safetensors or .json file that `save` wrote.

        Raises:
            InputError: the file is not the explanation of an image.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            if path.suffix == ".json":
                return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
            with safe_open(path, framework="pt") as file:
                data = json.loads((file.metadata() or {})["attnlrp"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no dict
                return cls.from_dict(data | {"relevance": tensors["relevance"], "tensors": tensors})
        except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: not the explanation of an image ({error!r}); expected a file that ImageExplanation.save wrote"
            ) from error

    def show(self, *, labels: Mapping[str, str] | None = None) -> None:
        """Print the heat map to the terminal (in a notebook, the object shows itself), and units with their labels."""
        from attnlrp.show import heat

        heat.show(self, labels=labels)

    def _repr_html_(self) -> str:
        from attnlrp.show import heat

        return heat.fragment(self)


def _filter(length: int, deviation: float) -> Tensor:
    """A Gaussian filter along one axis as a matrix; each column sums to 1, so nothing is lost at the edges."""
    at = torch.arange(length, dtype=torch.float64)
    weights = (-0.5 * ((at[:, None] - at) / deviation) ** 2).exp()
    return weights / weights.sum(dim=0)


def _png(picture: Tensor) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture.numpy()).save(file, "PNG")
    return file.getvalue()


def _pixels(png: bytes) -> Tensor:
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB")))

"""Images beside a text: reading them, and finding where a vision-language model reads their patches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from attnlrp.columns import Columns
from attnlrp.errors import InputError, ModelError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MergedInputs", "Picture", "read_images"]

Picture: TypeAlias = "str | Path | Image"

_DEEP = "deepstack_visual_embeds"  # image features that some models add in deeper layers too
_NEUTRAL = ("mask", "position", "per_layer", "past", "cache")  # parts of names of what is not an image


def read_images(image: Picture | Sequence[Picture] | None) -> tuple[Image, ...]:
    """Images in RGB, from files or as they are.

    Raises:
        InputError: a file is missing or holds no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if image is None:
        return ()
    found = []
    for item in image if isinstance(image, (list, tuple)) else [image]:
        if not isinstance(item, (str, Path, Image.Image)):
            raise InputError(f"image: got {type(item).__name__}, expected a file name or a PIL image")
        try:
            with nullcontext(item) if isinstance(item, Image.Image) else Image.open(item) as opened:
                found.append(ImageOps.exif_transpose(opened).convert("RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise InputError(f"image: cannot read {item}: {error}") from error
    return tuple(found)


class MergedInputs:
    """What enters the language model of a vision-language model: text and image patches side by side.

    Args:
        model: a model whose `get_decoder()` is called once with `inputs_embeds`.

    Raises:
        ModelError: images reach the language model in another way.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokens: list[Tensor] = []  # leaves (batch, token, hidden)
        self.patches: list[
            Tensor
        ] = []  # leaves (patch, hidden), for each time that patches are added in a deeper layer

    def __enter__(self) -> MergedInputs:
        self._handle = self.model.get_decoder().register_forward_pre_hook(self._enter, with_kwargs=True)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._handle.remove()

    def columns(self, ids: Tensor, segments: Sequence[str]) -> Columns:
        """The columns of an explanation: one for each token and patch."""
        if not self.tokens:
            raise ModelError(f"{type(self.model).__name__} does not call its get_decoder(): {_INSTEAD}")
        images = torch.tensor([s == "image" for s in segments], device=ids.device)
        return Columns(ids, self.tokens, self.patches, images)

    def _enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        name = type(self.model).__name__
        if not isinstance(kwargs.get("inputs_embeds"), Tensor):
            raise ModelError(f"{name} does not hand inputs_embeds to its language model: {_INSTEAD}")
        for key, value in kwargs.items():
            if key not in ("inputs_embeds", _DEEP) and _is_float(value) and not any(n in key for n in _NEUTRAL):
                raise ModelError(f"{name} hands images to its language model as {key}: {_INSTEAD}")
        changed: dict[str, Any] = {"inputs_embeds": _leaf(self.tokens, kwargs["inputs_embeds"])}
        if kwargs.get(_DEEP) is not None:
            changed[_DEEP] = [_leaf(self.patches, x) for x in kwargs[_DEEP]]
        return args, kwargs | changed


def _leaf(leaves: list[Tensor], x: Tensor) -> Tensor:
    leaves.append(x.detach().requires_grad_())
    return leaves[-1].clone()  # models may write into it


_INSTEAD = "use attnlrp.propagate with live pixel_values"


def _is_float(value: Any) -> bool:
    items = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, Tensor) and torch.is_floating_point(item) for item in items)

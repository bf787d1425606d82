"""Images: reading them, and finding where a vision-language model reads their patches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from attnlrp.columns import Columns
from attnlrp.errors import InputError, ModelError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MergedInputs", "Picture", "read_image", "read_images"]

Picture: TypeAlias = "str | Path | Image"

_ORIENTATION = 0x0112  # EXIF tag
_DEEP = "deepstack_visual_embeds"  # image features that some models add in deeper layers too
_NEUTRAL = ("mask", "position", "per_layer", "past", "cache")  # parts of names of what is not an image


def read_images(image: Picture | Sequence[Picture] | None) -> tuple[Image, ...]:
    """Images in RGB, from files or as they are. See `read_image`."""
    if image is None:
        return ()
    items: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]
    return tuple(read_image(item)[0] for item in items)


def read_image(item: Picture) -> tuple[Image, tuple[str, ...]]:
    """An image in RGB, upright, and what was done to make it so.

    Of an animation the first frame is read, transparent pixels lie on white, 16 bits for each channel become 8.

    Raises:
        InputError: the file is missing, truncated or holds no image; Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise InputError('images need Pillow, which is not installed: pip install "attnlrp[vision]"') from error
    if not isinstance(item, (str, Path, Image.Image)):
        raise InputError(f"image: got {type(item).__name__}, expected a file name or a PIL image")
    try:
        with nullcontext(item) if isinstance(item, Image.Image) else Image.open(item) as opened:
            frames = getattr(opened, "n_frames", 1) if getattr(opened, "is_animated", False) else 1
            notes = [f"first of {frames} frames"] if frames > 1 else []
            notes += ["turned upright as its EXIF data says"] if opened.getexif().get(_ORIENTATION, 1) != 1 else []
            if frames > 1:
                opened.seek(0)
            upright = ImageOps.exif_transpose(opened)
            if upright.mode == "F":
                raise InputError(f"image: {item} has 32-bit floats for pixels; expected 8 or 16 bits for each channel")
            if upright.mode.startswith("I"):
                upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 257).astype(np.uint8))
                notes.append("16 bits for each pixel reduced to 8")
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                if upright.getchannel("A").getextrema()[0] != 255:
                    notes.append("transparent pixels on white")
                    upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return upright.convert("RGB"), tuple(notes)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image: cannot read {item}: {error}") from error


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

"""`ImageExplainer`: from an image to its explanation; the task follows from the model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnlrp import __version__, models
from attnlrp.columns import widen
from attnlrp.contexts import explaining
from attnlrp.engine import propagate
from attnlrp.errors import InputError, ModelError, NumericalError
from attnlrp.explanation import Candidate, ExplainedTarget
from attnlrp.image_explanation import ImageExplanation
from attnlrp.images import Picture, read_image
from attnlrp.inside import Inside, Wanted
from attnlrp.ledger import Ledger, audit
from attnlrp.rules import PRESETS, VIT, Rules
from attnlrp.targets import OTHERS, Head, Neuron, Scalar, class_index
from attnlrp.units import Site, Unit, find_sites

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageExplainer", "patch_of", "square_of"]

CANDIDATES = 5
SQUARE = 14


class ImageExplainer:
    """Explains what a model sees in an image.

    Args:
        model: a model of `transformers` for image classification, for semantic segmentation, or one that compares an
            image with texts (CLIP, SigLIP); neither it nor its parameters are changed.
        processor: its image processor; for a model that compares with texts, its processor.
        rules: table of rules.
        rules_name: what to call it in explanations; default: its name if it is a preset.
        name: name of the model to keep with its explanations.

    Raises:
        ModelError: the model has no output that can be explained.

    Example:
        >>> explainer = ImageExplainer.from_pretrained("google/vit-base-patch16-224")
        >>> explainer("cat.jpg", top=3).save("cat.png")
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        rules: Rules = VIT,
        rules_name: str | None = None,
        name: str | None = None,
    ) -> None:
        self.task = models.task_of(model)
        if self.task not in models.IMAGE_TASKS:
            raise ModelError(
                f"{type(model).__name__} is a model for {self.task}, expected one of {', '.join(models.IMAGE_TASKS)}; "
                "texts are explained by attnlrp.Explainer (attnlrp explain)"
            )
        self.model, self.processor, self.rules = model, processor, rules
        preset = next((name for name, table in PRESETS.items() if table is rules), "custom")
        self.rules_name = rules_name or preset
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self._sites: tuple[Site, ...] | None = None
        self._accepted = set(inspect.signature(models.unwrapped(model).forward).parameters)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        rules: Rules = VIT,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        report: models.Report | None = None,
    ) -> ImageExplainer:
        """Load a model by hub name or folder (see `models.load`)."""
        model, processor, shown = models.load(name, device=device, dtype=dtype, report=report)
        return cls(model, processor, rules=rules, name=shown)

    def __call__(
        self,
        image: Picture,
        *,
        target: str | int | Sequence[str | int] | None = None,
        top: int | None = None,
        against: str | int | None = None,
        texts: Sequence[str] | None = None,
        latent: str | Sequence[str] = (),
        latent_top: int | None = 32,
        through: Unit | Sequence[Unit] = (),
    ) -> ImageExplanation:
        """Explain one image.

        Args:
            image: file name or PIL image of any size and mode.
            target: name or index of a class, or of one of `texts`; a list gives one map each; None for the prediction.
            top: explain this many of the most likely classes instead.
            against: a class to compare with (the difference of logits is explained), or `attnlrp.OTHERS`.
            texts: for a model that compares an image with texts: what the image may show. Explained is the logit of a
                text, its scaled similarity.
            latent: record relevance inside the model, as `ImageExplanation.latent`: any of "neurons", "heads",
                "residual" and "attention", see `Explainer`. Positions are the model's own: those of tokens in front,
                such as the class token, then those of patches.
            latent_top: neurons that are kept of each layer; None for all.
            through: units that relevance must go through to reach the pixels; of several layers, through each of them.

        Raises:
            InputError: not an image, or options that exclude each other.
            ModelError: units are asked for of a model that has none, such as a convolutional network, or attention
                weights of one that computes them in windows.
            TargetError: a class that the model does not have.
            NumericalError: NaN or infinite logits or relevance.
        """
        picture, notes = read_image(image)
        wanted = _wanted(latent, latent_top, through)
        with explaining():
            inputs = self._inputs(picture, texts)
            inside = self._inside(inputs, wanted)
            pixels = inputs["pixel_values"].requires_grad_()
            with propagate(self.model, self.rules), inside or nullcontext():
                output = self.model(**inputs)
                scores = _Scores(self, output, texts)
                scalars = self._scalars(scores, target, top, against)
                values = [s.value(scores.of(s.id)) for s in scalars]
            relevance = self._relevance(pixels, values, inside)
        return ImageExplanation(
            relevance=relevance,
            picture=self._as_read(picture),
            targets=tuple(scores.target(s, v.item()) for s, v in zip(scalars, values, strict=True)),
            patch=patch_of(self.model),
            size=picture.size,
            notes=notes,
            model=self.name,
            rules=self.rules_name,
            task=self.task,
            version=__version__,
            latent=None if inside is None else inside.latent(0, len(values), ()),
        )

    def audit(self, image: Picture, *, target: str | int | None = None, texts: Sequence[str] | None = None) -> Ledger:
        """Account for every unit of relevance of one explanation. See `attnlrp.audit`."""

        def explained(output: Any) -> Tensor:
            scores = _Scores(self, output, texts)
            (scalar,) = self._scalars(scores, target, None, None)
            return scalar.value(scores.of(scalar.id))

        picture, _ = read_image(image)
        with explaining():
            return audit(self.model, self._inputs(picture, texts), target=explained, rules=self.rules)

    def _inside(self, inputs: dict[str, Any], wanted: Wanted) -> Inside | None:
        if not wanted:
            return None
        if self._sites is None:
            self._sites = find_sites(self.model, inputs)
        return Inside(self.model, self._sites, wanted, [], batch=1)

    def _relevance(self, pixels: Tensor, values: list[Tensor], inside: Inside | None) -> Tensor:
        """Relevance of each pixel (target, height, width)."""
        maps = []
        for k, value in enumerate(values):
            if inside is None:
                (gradient,) = torch.autograd.grad(value, pixels, retain_graph=k < len(values) - 1)
            else:
                (gradient,) = inside.gradients(value, [pixels], k)
            maps.append((widen(pixels) * widen(gradient)).detach().sum(dim=1)[0].cpu())
        relevance = torch.stack(maps)
        if not torch.isfinite(relevance).all():
            raise NumericalError(
                f"{self.name}: relevance overflows in {self.model.dtype}; use float32 or bfloat16 (--dtype)"
            )
        return relevance

    # --- from an image to inputs ------------------------------------------------------------------------------------

    def _inputs(self, picture: Image, texts: Sequence[str] | None) -> dict[str, Any]:
        zero_shot = self.task == "zero-shot-image-classification"
        if zero_shot != (texts is not None):
            raise InputError(
                f"texts: {self.name} compares an image with texts, expected at least one"
                if zero_shot
                else f"texts: {self.name} is a model for {self.task}, which has its own classes"
            )
        if texts is not None and (isinstance(texts, str) or not texts or not all(map(str.strip, texts))):
            raise InputError(f"texts: got {texts!r:.80}, expected a list of texts that are not empty")
        found = self._process(picture)
        if texts is not None:
            padding = "max_length" if "siglip" in self.model.config.model_type else True  # as SigLIP was trained
            found |= self.processor.tokenizer(list(texts), return_tensors="pt", padding=padding, truncation=True)
        inputs = {k: v.to(self.model.device) for k, v in found.items() if k in self._accepted}
        pixels = inputs.get("pixel_values")
        if pixels is None or pixels.dim() != 4 or len(pixels) != 1:
            shape = None if pixels is None else tuple(pixels.shape)
            raise ModelError(f"{self.name}: its processor gives pixels {shape}, expected (1, channel, height, width)")
        return inputs | {"pixel_values": pixels.to(self.model.dtype)}

    def _process(self, picture: Image, **options: Any) -> dict[str, Any]:
        process = getattr(self.processor, "image_processor", self.processor)
        try:
            return dict(process(images=picture, return_tensors="pt", **options))
        except ValueError as error:
            wide, high = picture.size
            raise InputError(
                f"image: {type(process).__name__} cannot read an image of {wide} x {high} pixels: {error}"
            ) from error

    def _as_read(self, picture: Image) -> Tensor:
        """What the model reads, before colours are normalised (height, width, 3)."""
        seen = self._process(picture, do_normalize=False)["pixel_values"][0].float()
        seen = seen if seen.max() > 1 else 255 * seen
        levels: Tensor = seen.round().clamp(0, 255).to(torch.uint8)
        return levels.permute(1, 2, 0)

    # --- what is explained ------------------------------------------------------------------------------------------

    def _scalars(
        self,
        scores: _Scores,
        target: str | int | Sequence[str | int] | None,
        top: int | None,
        against: str | int | None,
    ) -> list[Scalar]:
        if top is not None and (target is not None or top < 1):
            raise InputError(f"top: got {top}, expected a number of classes above 0, and no target")
        if target is None:
            ids = scores.best[: top or 1]
        else:
            wanted = [target] if isinstance(target, (str, int)) else list(target)
            ids = [class_index(t, scores.labels) for t in wanted]
        if not ids:
            raise InputError("target: got an empty list, expected at least one class, or None for the prediction")
        other = class_index(against, scores.labels, option="against") if against not in (None, OTHERS) else against
        return [Scalar(None, i, other) for i in ids]


class _Scores:
    """The logits of each class, from what a model returns.

    Of a segmentation, they are means over the pixels where the model sees the class that is asked for (over all pixels
    if it sees it nowhere).
    """

    def __init__(self, explainer: ImageExplainer, output: Any, texts: Sequence[str] | None) -> None:
        self.dense = explainer.task == "semantic-segmentation"
        logits = widen(output.logits_per_image[0] if texts is not None else output.logits[0])
        if not torch.isfinite(logits).all():
            raise NumericalError(
                f"{explainer.name}: the logits hold NaN or infinite values in {explainer.model.dtype}; "
                "use float32 or bfloat16 (--dtype), which have the range that float16 lacks"
            )
        self.logits = logits
        names = explainer.model.config.id2label
        self.labels = list(texts) if texts is not None else [names.get(i, str(i)) for i in range(len(logits))]
        if self.dense:
            self.seen = logits.argmax(dim=0)
            ranked = torch.bincount(self.seen.flatten(), minlength=len(logits))
        else:
            ranked = logits.detach()
        self.best: list[int] = ranked.argsort(descending=True, stable=True).tolist()

    def of(self, index: int) -> Tensor:
        """Logits (class,) where a class is seen."""
        if not self.dense:
            return self.logits
        where = self.seen == index
        return self.logits[:, where if where.any() else torch.ones_like(where)].mean(dim=1)

    def target(self, scalar: Scalar, value: float) -> ExplainedTarget:
        """What a map explains."""
        logits = self.of(scalar.id).detach()
        best = logits.topk(min(CANDIDATES, len(logits)))
        against = scalar.against
        return ExplainedTarget(
            token=self.labels[scalar.id],
            id=scalar.id,
            position=None,
            logit=value,
            rank=self.best.index(scalar.id) + 1,
            against=self.labels[against] if isinstance(against, int) else against,
            candidates=tuple(Candidate(self.labels[i], i, v) for v, i in zip(*(t.tolist() for t in best), strict=True)),
        )


def _wanted(latent: str | Sequence[str], top: int | None, through: Unit | Sequence[Unit]) -> Wanted:
    kinds = (latent,) if isinstance(latent, str) else tuple(latent)
    units = (through,) if isinstance(through, (str, Neuron, Head)) else tuple(through)
    return Wanted(kinds, top, units)


def patch_of(model: Any) -> int:
    """Edge of a model's patches in pixels, from its config; 1 if it has none."""
    config = getattr(model.config, "vision_config", model.config)
    patch = getattr(config, "patch_size", None) or (getattr(config, "patch_sizes", None) or [1])[0]
    return int(patch[0] if isinstance(patch, (list, tuple)) else patch)


def square_of(model: Any) -> int:
    """Edge of the squares that an evaluation takes from images: whole patches, at least SQUARE pixels."""
    patch = patch_of(model)
    return patch * math.ceil(SQUARE / patch)

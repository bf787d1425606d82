"""From an image to the relevance of its pixels, for every family of vision models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import attnlrp
from attnlrp import ATTNLRP, Explainer, ImageExplainer, ImageExplanation, InputError, ModelError, TargetError
from attnlrp.image_explainer import patch_of, square_of
from attnlrp.images import read_image
from tiny_tasks import build as build_text
from tiny_vision import CLASSIFIERS, DENSE, SIZE, TEXTS, ZERO_SHOT, build, photo


def options(name: str) -> dict[str, Any]:
    return {"texts": TEXTS} if name in ZERO_SHOT else {}


def output(explainer: ImageExplainer, image: Image.Image, name: str) -> torch.Tensor:
    """What the model says without any rules: logits (class,), of a segmentation (class, height, width)."""
    with torch.no_grad():
        found = explainer.model(**explainer._inputs(image, options(name).get("texts")))
    return (found.logits_per_image if name in ZERO_SHOT else found.logits)[0]


@pytest.mark.parametrize("name", [*CLASSIFIERS, *ZERO_SHOT])
def test_the_logit_of_the_prediction_is_explained(name: str) -> None:
    explainer, image = build(name), photo()
    logits = output(explainer, image, name)
    found = explainer(image, **options(name))
    assert found.relevance.shape == (1, SIZE, SIZE)
    assert found.relevance.abs().max() > 0
    assert found.target.id == logits.argmax()
    assert found.target.logit == pytest.approx(logits.max().item(), rel=1e-9)
    assert found.target.rank == 1
    assert [c.logit for c in found.target.candidates] == pytest.approx(logits.sort(descending=True).values.tolist())
    assert explainer(image, **options(name)) == found
    assert all(p.grad is None for p in explainer.model.parameters())


@pytest.mark.parametrize("name", [*CLASSIFIERS, *DENSE, *ZERO_SHOT])
def test_every_unit_of_relevance_is_accounted_for(name: str) -> None:
    explainer, image = build(name), photo()
    ledger = explainer.audit(image, **options(name))
    assert ledger.closes, ledger.leaks()
    assert ledger.inputs["pixel_values"] == pytest.approx(explainer(image, **options(name)).sum[0], rel=1e-6, abs=1e-9)


def test_relevance_is_pixels_times_their_gradient_under_the_rules() -> None:
    explainer, image = build("ViT"), photo()
    pixels = explainer._inputs(image, None)["pixel_values"].requires_grad_()
    with attnlrp.propagate(explainer.model, attnlrp.VIT):
        logits = explainer.model(pixels).logits[0]
    gradients = [torch.autograd.grad(logits[k], pixels, retain_graph=True)[0] for k in (2, 0)]
    found = explainer(image, target=["lion", 0])
    assert_close(found.relevance, torch.stack([(pixels * g).sum(1)[0] for g in gradients]).detach())
    assert found.rules == "vit"


def test_a_segmentation_explains_a_class_where_it_is_seen() -> None:
    explainer, image = build("Segformer"), photo()
    logits = output(explainer, image, "Segformer")
    seen = logits.argmax(dim=0)
    most = int(torch.bincount(seen.flatten(), minlength=3).argmax())
    found = explainer(image)
    assert found.target.id == most
    assert found.target.logit == pytest.approx(logits[most][seen == most].mean().item(), rel=1e-9)
    assert explainer(image, target=most) == found
    nowhere = [k for k in range(3) if not (seen == k).any()]
    for k in nowhere:
        assert explainer(image, target=k).target.logit == pytest.approx(logits[k].mean().item(), rel=1e-9)


def test_targets() -> None:
    explainer, image = build("ViT"), photo()
    logits = output(explainer, image, "ViT")
    by_name = explainer(image, target="tabby")
    assert by_name == explainer(image, target=1) == explainer(image, target="tabby, tabby cat")
    best = explainer(image, top=2)
    assert [t.id for t in best.targets] == logits.argsort(descending=True)[:2].tolist()
    with pytest.raises(InputError, match="has 2 targets"):
        _ = best.target
    contrast = explainer(image, target="lion", against="goldfish")
    assert contrast.target.logit == pytest.approx((logits[2] - logits[0]).item())
    assert contrast.target.against == "goldfish, Carassius auratus"
    each = explainer(image, target=[2, 0])
    assert_close(contrast.relevance[0], each.relevance[0] - each.relevance[1])
    others = explainer(image, target=2, against=attnlrp.OTHERS)
    assert others.target.logit == pytest.approx((logits[2] - logits[:2].mean()).item())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"target": "dog"}, r"target: got 'dog', expected one of the classes \['goldfish"),
        ({"target": 3}, "target: got 3, .* an index below 3"),
        ({"against": "dog"}, "against: got 'dog'"),
        ({"target": []}, "target: got an empty list"),
        ({"target": 1, "top": 2}, "top: got 2, expected a number of classes above 0, and no target"),
        ({"top": 0}, "top: got 0"),
        ({"texts": ["cat"]}, "texts: ViT is a model for image-classification, which has its own classes"),
    ],
)
def test_what_a_classifier_does_not_have(asked: dict[str, Any], said: str) -> None:
    with pytest.raises((TargetError, InputError), match=said):
        build("ViT")(photo(), **asked)


def test_a_name_of_several_classes() -> None:
    explainer = build("ViT")
    explainer.model.config.id2label = {0: "crane", 1: "heron", 2: "crane, machine"}
    assert explainer(photo(), target="crane").target.id == 0
    assert explainer(photo(), target="machine").target.id == 2
    explainer.model.config.id2label = {0: "bird, crane", 1: "heron", 2: "crane, machine"}
    with pytest.raises(TargetError, match="name of several classes, #0 'bird, crane', #2 'crane, machine'; give an"):
        explainer(photo(), target="crane")


@pytest.mark.parametrize("texts", [None, [], "cat", ["cat", " "]])
def test_texts_that_are_missing(texts: Any) -> None:
    with pytest.raises(InputError, match=r"^texts: "):
        build("CLIP")(photo(), texts=texts)


def test_each_explainer_says_which_models_are_for_the_other() -> None:
    vision, text = build("ViT"), build_text("bert-mlm")
    with pytest.raises(ModelError, match=r"a model for image-classification: use attnlrp.ImageExplainer"):
        Explainer(vision.model, vision.processor)
    with pytest.raises(
        ModelError, match=r"a model for masked-lm, expected .*; texts are explained by attnlrp.Explainer"
    ):
        ImageExplainer(text.model, text.tokenizer)


def test_patches_and_squares() -> None:
    assert [patch_of(build(n).model) for n in ("ViT", "Swin", "CLIP", "ConvNext", "Segformer")] == [8, 4, 8, 4, 7]
    assert [square_of(build(n).model) for n in ("ViT", "Swin")] == [16, 16]


def test_other_dtypes_have_the_same_relevance() -> None:
    expected = build("ViT", rules=ATTNLRP)(photo())
    found = build("ViT", rules=ATTNLRP, dtype=torch.float32)(photo())
    assert_close(
        found.relevance.double(), expected.relevance, rtol=1e-3, atol=1e-4 * expected.relevance.abs().max().item()
    )
    assert build("ViT", dtype=torch.bfloat16)(photo()).relevance.dtype == torch.float32


# --- any image ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (500, 40), (32, 32)])
def test_any_size(size: tuple[int, int]) -> None:
    found = build("ViT")(photo(*size))
    assert found.size == size
    assert found.picture.shape == (SIZE, SIZE, 3)


def test_the_picture_is_what_the_model_reads() -> None:
    explainer, image = build("ViT"), photo(SIZE, SIZE)
    found = explainer(image)
    assert_close(found.picture, torch.from_numpy(np.array(image)))
    pixels = explainer._inputs(image, None)["pixel_values"][0]
    assert_close((pixels * 0.5 + 0.5).permute(1, 2, 0), found.picture / 255.0, rtol=0, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr"])
def test_modes(mode: str, tmp_path: Path) -> None:
    image = photo().convert(mode)
    found, notes = read_image(image)
    assert found.mode == "RGB"
    assert notes == ()
    ending = {"CMYK": "tiff", "YCbCr": "tiff"}.get(mode, "png")
    image.save(tmp_path / f"file.{ending}")
    assert np.array_equal(np.array(read_image(tmp_path / f"file.{ending}")[0]), np.array(found))


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    colours = np.array([[[255, 0, 0, 0], [255, 0, 0, 255]]], dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "clear.png")
    found, notes = read_image(tmp_path / "clear.png")
    assert np.array(found).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    assert notes == ("transparent pixels on white",)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.array(read_image(tmp_path / "palette.png")[0]).tolist() == [[[255, 255, 255], [255, 0, 0]]]


def test_sixteen_bits(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    found, notes = read_image(tmp_path / "deep.png")
    assert np.array(found)[0, :, 0].tolist() == [0, 1, 255]
    assert notes == ("16 bits for each pixel reduced to 8",)
    with pytest.raises(InputError, match="32-bit floats"):
        read_image(Image.new("F", (2, 2)))


def test_a_rotated_photo_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(20, 10).save(tmp_path / "turned.png", exif=exif)
    found, notes = read_image(tmp_path / "turned.png")
    assert found.size == (10, 20)
    assert notes == ("turned upright as its EXIF data says",)
    assert build("ViT")(tmp_path / "turned.png").notes == notes


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    opened = Image.open(tmp_path / "moving.gif")
    opened.seek(1)
    for image in (tmp_path / "moving.gif", opened):
        found, notes = read_image(image)
        assert np.array(found)[0, 0].tolist() == [254, 0, 0] or np.array(found)[0, 0].tolist() == [255, 0, 0]
        assert notes == ("first of 2 frames",)
    opened.close()


def test_files_that_are_no_image(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    photo(200, 200).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:5000])
    for name, said in {"text.png": "cannot identify", "half.jpg": "truncated", "none.png": "No such file"}.items():
        with pytest.raises(InputError, match=rf"^image: cannot read .*{name}.*{said}"):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match="got int, expected a file name or a PIL image"):
        read_image(3)  # type: ignore[arg-type]


# --- the explanation ----------------------------------------------------------------------------------------------


def explanation(height: int = 5, width: int = 7, patch: int = 3, targets: int = 1) -> ImageExplanation:
    torch.manual_seed(0)
    one = attnlrp.explanation.ExplainedTarget("lion", 2, None, 1.5, 1)
    return ImageExplanation(
        relevance=torch.randn(targets, height, width),
        picture=torch.randint(0, 256, (height, width, 3), dtype=torch.uint8),
        targets=(one,) * targets,
        patch=patch,
        size=(70, 50),
        notes=("first of 2 frames",),
        model="tiny",
        rules="vit",
        task="image-classification",
        version="0",
    )


def test_patches_are_sums_also_at_the_edges() -> None:
    found = explanation()
    assert found.patches.shape == (1, 2, 3)
    assert_close(found.patches[0, 1, 2], found.relevance[0, 3:, 6:].sum())
    assert_close(found.patches.sum().double(), torch.tensor(found.sum[0], dtype=torch.float64), rtol=1e-5, atol=1e-5)
    row, column, value = found.top(1)[0]
    assert abs(value) == found.patches.abs().max().item()
    assert value == found.patches[0, row, column].item()
    assert len(found.top(100)) == 6


def test_smoothing_keeps_the_sum_and_says_so() -> None:
    found = explanation()
    smooth = found.smoothed(2.0)
    assert smooth.sum == pytest.approx(found.sum, abs=1e-5)
    assert smooth.relevance.std() < found.relevance.std() / 2
    assert smooth.notes == ("first of 2 frames", "relevance smoothed (Gaussian, standard deviation 2 pixels)")
    assert found.smoothed(0.0) is found
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"^smooth: "):
            found.smoothed(wrong)


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_what_is_saved_is_loaded(tmp_path: Path, ending: str) -> None:
    found = explanation(targets=2)
    again = ImageExplanation.load(found.save(tmp_path / f"it.{ending}"))
    assert again == found
    assert torch.equal(again.relevance, found.relevance)
    assert torch.equal(again.picture, found.picture)


def test_files_that_are_no_explanation(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"format": 1}')
    (tmp_path / "none.safetensors").write_text("x")
    for name in ("other.json", "none.safetensors"):
        with pytest.raises(InputError):
            ImageExplanation.load(tmp_path / name)
    with pytest.raises(InputError, match=r"expected \.html, .json, .pdf, .png, .safetensors or .svg"):
        explanation().save(tmp_path / "it.bmp")


def test_shapes_that_do_not_fit() -> None:
    found = explanation()
    with pytest.raises(InputError, match=r"got relevance \(1, 5, 7\), a picture \(5, 7, 3\) and 2 targets"):
        ImageExplanation(**{**vars(found), "targets": found.targets * 2})

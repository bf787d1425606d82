"""Vision-language models: patches of an image and tokens of the text share the relevance."""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

import attnlrp
from attnlrp import Explainer, Explanation, InputError, ModelError
from attnlrp.images import read_images
from nearness import close
from tiny_tokenizers import CONTEXT, build_tokenizer

TEXT_SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT_SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
PATCHES = 16
MARK = "<image>"


class Processor:
    """As the processors of `transformers`: a mark in the text becomes a token for each patch."""

    image_token = MARK
    chat_template = None

    def __init__(self, tokenizer: Any, patches: int, **more: Any) -> None:
        self.tokenizer, self.patches, self.more = tokenizer, patches, more

    def __call__(self, text: str, images: list[Any], return_tensors: str) -> dict[str, Tensor]:
        if text.count(MARK) != len(images):
            raise ValueError(f"{text.count(MARK)} marks for {len(images)} images")
        encoded = self.tokenizer(text.replace(MARK, MARK * self.patches), return_tensors=return_tensors)
        generator = torch.Generator().manual_seed(images[0].getpixel((0, 0))[0])
        shape = self.more.get("shape", (len(images), 3, 16, 16))
        pixels = torch.randn(shape, generator=generator)
        more = {k: v for k, v in self.more.items() if k != "shape"}
        if "image_grid_thw" in more:
            mark = self.tokenizer.convert_tokens_to_ids(MARK)
            more["mm_token_type_ids"] = (encoded["input_ids"] == mark).int()
        return dict(encoded) | {"pixel_values": pixels} | more


def build(kind: str) -> Explainer:
    tokenizer = copy.deepcopy(build_tokenizer("sentencepiece"))
    tokenizer.add_special_tokens({"additional_special_tokens": [MARK, "<v>", "</v>"]})
    mark = tokenizer.convert_tokens_to_ids(MARK)
    text = TEXT_SHAPE | {"vocab_size": len(tokenizer)}
    vision = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "patch_size": 4}
    torch.manual_seed(0)
    more: dict[str, Any] = {}
    if kind == "llava":
        config: Any = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision, num_hidden_layers=2, image_size=16),
            text_config=transformers.LlamaConfig(**text),
            image_token_id=mark,
        )
        model: Any = transformers.LlavaForConditionalGeneration(config)
    else:
        config = transformers.Qwen3VLConfig(
            text_config=text | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
            vision_config=vision
            | {"depth": 3, "num_heads": 4, "out_hidden_size": 32, "spatial_merge_size": 1, "temporal_patch_size": 1}
            | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16, "in_channels": 3},
            image_token_id=mark,
            vision_start_token_id=mark + 1,
            vision_end_token_id=mark + 2,
        )
        model = transformers.Qwen3VLForConditionalGeneration(config)
        more = {"shape": (PATCHES, 48), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Explainer(model.eval(), Processor(tokenizer, PATCHES, **more))


def explain(ours: Explainer, text: Any = "the capital of", **options: Any) -> Explanation:
    explanation = ours(text, **options)
    assert isinstance(explanation, Explanation)
    return explanation


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (20, 10), (7, 2, 3)).save(path)
    return path


@pytest.mark.parametrize("kind", ["llava", "qwen3-vl"])
def test_text_and_patches_get_relevance(kind: str, photo: Path) -> None:
    ours = build(kind)
    explanation = explain(ours, image=photo)
    patches = torch.tensor([s == "image" for s in explanation.segments])
    assert int(patches.sum()) == PATCHES
    assert bool((explanation.relevance[0, patches] != 0).all())
    assert bool((explanation.relevance[0, ~patches] != 0).all())
    assert explanation.target.position == len(explanation.tokens) - 1


def test_relevance_of_patches_is_that_of_the_image_features(photo: Path) -> None:
    """The text part as `propagate` on the look-up has it, the image part as it arrives at the projector's output."""
    ours = build("llava")
    explanation = explain(ours, image=photo)
    encoded = ours._task.processor(MARK + "the capital of", [Image.open(photo)], "pt")
    pixels = encoded.pop("pixel_values").requires_grad_()
    features: list[Tensor] = []
    projector = ours.model.model.multi_modal_projector
    handle = projector.register_forward_hook(lambda m, a, y: features.append(y))
    with attnlrp.propagate(ours.model) as propagation:
        logits = ours.model(**encoded, pixel_values=pixels).logits[0, -1]
    handle.remove()
    text = propagation.embeddings[0][1]
    of_text, of_image = torch.autograd.grad(logits[explanation.target.id], [text, features[0]])
    patches = torch.tensor([s == "image" for s in explanation.segments])
    assert close(explanation.relevance[0, ~patches], (text * of_text).sum(-1)[0, ~patches].detach())
    assert close(explanation.relevance[0, patches], (features[0] * of_image).sum(-1).flatten().detach())


def test_patches_that_are_added_again_in_deeper_layers_count(photo: Path) -> None:
    """All that reaches the image features of a model with deep stacking: the sum over its patches."""
    ours = build("qwen3-vl")
    explanation = explain(ours, image=photo)
    encoded = ours._task.processor(MARK + "the capital of", [Image.open(photo)], "pt")
    pixels = encoded.pop("pixel_values").requires_grad_()
    leaves: list[Tensor] = []
    merger, deep = ours.model.model.visual.merger, ours.model.model.visual.deepstack_merger_list

    def cut(module: Any, arguments: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handles = [m.register_forward_hook(cut) for m in (merger, *deep)]
    with attnlrp.propagate(ours.model):
        logits = ours.model(**encoded, pixel_values=pixels).logits[0, -1]
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(logits[explanation.target.id], leaves)
    expected = torch.stack([(x * g).sum(-1).detach() for x, g in zip(leaves, gradients, strict=True)])
    assert len(leaves) == 3
    assert bool((expected.abs().sum(dim=1) > 0).all())
    patches = torch.tensor([s == "image" for s in explanation.segments])
    assert close(explanation.relevance[0, patches], expected.sum(dim=0))


def test_images_are_one_word_and_one_column_of_a_picture(photo: Path) -> None:
    explanation = explain(build("llava"), image=photo)
    merged = explanation.merge_images()
    assert merged.tokens.count(f"{MARK}×{PATCHES}") == 1
    assert merged.segments.count("image") == 1
    assert len(merged.tokens) == len(explanation.tokens) - PATCHES + 1
    assert merged.sum == pytest.approx(explanation.sum)
    assert merged.target.position == len(merged.tokens) - 1
    words = explanation.merge_words()
    assert words.segments.count("image") == 1


@pytest.mark.parametrize("kind", ["llava", "qwen3-vl"])
def test_generated_tokens_with_an_image(kind: str, photo: Path) -> None:
    explanation = explain(build(kind), image=photo, generate=3)
    assert len(explanation.targets) == 3
    assert explanation.segments.count("generated") == 2
    one = explain(build(kind), image=photo)
    assert close(explanation.relevance[0, : len(one.tokens)], one.relevance[0])


def test_the_image_matters(tmp_path: Path, photo: Path) -> None:
    other = tmp_path / "other.png"
    Image.new("L", (5, 5), 200).save(other)
    ours = build("llava")
    assert not close(explain(ours, image=photo).relevance, explain(ours, image=other, target=3).relevance)


def test_a_model_of_images_explains_texts_alone() -> None:
    explanation = explain(build("llava"))
    assert set(explanation.segments) == {"prompt"}


def test_what_cannot_be_read(tmp_path: Path, photo: Path) -> None:
    ours = build("llava")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"^image: cannot read .*broken.png"):
        explain(ours, image=broken)
    with pytest.raises(InputError, match=r"^image: cannot read .*missing.png"):
        explain(ours, image=tmp_path / "missing.png")
    with pytest.raises(InputError, match=r"^image: got int, expected a file name or a PIL image$"):
        explain(ours, image=3)
    with pytest.raises(InputError, match=r"^image: the model's processor cannot read 1 images: 2 marks"):
        explain(ours, f"{MARK} {MARK} the", image=photo)
    with pytest.raises(ModelError, match=r"^image: expected a vision-language model .* and its processor"):
        explain(Explainer(ours.model, ours.tokenizer), image=photo)


def test_an_animation_is_read_and_closed(tmp_path: Path) -> None:
    frames = [Image.new("P", (4, 4), colour) for colour in (1, 2, 3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        (picture,) = read_images(tmp_path / "moving.gif")
        gc.collect()
    assert picture.mode == "RGB"
    assert picture.size == (4, 4)
    (again,) = read_images(picture)
    again.load()  # an image that is given stays open
    picture.load()

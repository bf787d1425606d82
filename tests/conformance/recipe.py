"""Tiny models with random weights for every model type, and inputs for them: one generic recipe, no code per model."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .rows import ROWS
from .sizes import GROWING, HEAD_COUNTS, HEADS, LAYER_COUNTS, LAYERS, SIZES, TOKEN_IDS

TASKS = {
    "causal-lm": "CAUSAL_LM",
    "masked-lm": "MASKED_LM",
    "sequence-classification": "SEQUENCE_CLASSIFICATION",
    "token-classification": "TOKEN_CLASSIFICATION",
    "question-answering": "QUESTION_ANSWERING",
    "seq2seq-lm": "SEQ_TO_SEQ_CAUSAL_LM",
    "image-classification": "IMAGE_CLASSIFICATION",
    "image-text-to-text": "IMAGE_TEXT_TO_TEXT",
}
TOKENS, DECODER_TOKENS, FIRST_FREE, LAST_FREE = 7, 3, 10, 90


def pairs() -> list[tuple[str, str]]:
    """Every (task, model type) that transformers maps to a class."""
    return [(task, kind) for task in TASKS for kind in _mapping(task)]


def _mapping(task: str) -> dict[str, Any]:
    return getattr(modeling_auto, f"MODEL_FOR_{TASKS[task]}_MAPPING_NAMES")  # type: ignore[no-any-return]


def row(task: str, kind: str) -> dict[str, Any]:
    """The data for one model type: what holds for all its tasks, and over it what holds for one of them."""
    merged: dict[str, Any] = {}
    for key in (kind, f"{kind}/{task}"):
        for part, value in ROWS.get(key, {}).items():
            merged[part] = merged.get(part, {}) | value if isinstance(value, dict) else value
    return merged


# --- configurations -----------------------------------------------------------------------------------------------


def configure(kind: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """The default configuration, with every size that `SIZES` knows made small; nested ones too."""
    default = kind()
    settings = {k: small for k, v in vars(default).items() if (small := _shrink(k, v, default)) is not v}
    heads = next((vars(default)[name] for name in HEAD_COUNTS if name in vars(default)), None)
    if "num_key_value_heads" in settings and heads == vars(default)["num_key_value_heads"]:
        settings["num_key_value_heads"] = HEADS  # a model without groups stays one
    for name, nested in kind.sub_configs.items():
        current = getattr(default, name, None)
        given = overrides.get(name, {})
        if isinstance(given, dict) and (current is not None or given):
            nested = type(current) if current is not None else CONFIG_MAPPING[given["model_type"]]
            settings[name] = configure(nested, {k: v for k, v in given.items() if k != "model_type"})
    return kind(**settings | {k: v for k, v in overrides.items() if k not in kind.sub_configs})


def _shrink(name: str, value: Any, config: PreTrainedConfig) -> Any:
    if isinstance(value, bool) or value is None or name.startswith("_"):
        return value
    if name.endswith(("_token_id", "_token_index")) or name in TOKEN_IDS:
        return [token_id(name)] if isinstance(value, list) else token_id(name)
    if isinstance(value, dict) and "mrope_section" in value:
        half = int(16 * value.get("partial_rotary_factor", 1)) // 2
        return value | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    small, depth = SIZES.get(name), _depth(config)
    if isinstance(value, (list, tuple)):
        if len(value) == layers(config):
            return _sample(value, depth) if small is None else [small] * depth
        if small is None:
            return value
        return [small * 2**k if name in GROWING else small for k in range(len(value))]
    if small is None or not isinstance(value, (int, float)):
        return value if small is None else small
    return depth if name in LAYER_COUNTS else small if name == "vocab_size" else min(small, value)


def layers(config: PreTrainedConfig) -> int:
    """How many layers the configuration has; -1 if it does not say so in one number."""
    return next((value for name in LAYER_COUNTS if isinstance(value := vars(config).get(name), int)), -1)


def _depth(config: PreTrainedConfig) -> int:
    """Two layers, or as many as it takes to have one of each kind."""
    lists = [v for v in vars(config).values() if isinstance(v, (list, tuple)) and len(v) == layers(config)]
    return max([LAYERS, *(len(set(v)) for v in lists if all(isinstance(kind, str) for kind in v))])


def _sample(values: Any, depth: int) -> Any:
    """A list with one item per layer, cut to `depth` items: one of each kind, in order of appearance, then the last."""
    distinct = [v for k, v in enumerate(values) if v not in values[:k]]
    return type(values)((distinct + [values[-1]] * depth)[:depth])


def token_id(name: str) -> int:
    """A special token's index below 10 or above 90, out of the way of the text."""
    for pattern, index in TOKEN_IDS.items():
        if re.search(pattern, name):
            return index
    return 91 + sum(map(ord, name)) % 9


# --- models -------------------------------------------------------------------------------------------------------


def model_class(task: str, kind: str) -> Any:
    """The class that transformers maps a model type to."""
    classes = _mapping(task)[kind]
    return getattr(transformers, classes if isinstance(classes, str) else classes[0])


def build(task: str, kind: str, config: PreTrainedConfig | None = None) -> nn.Module:
    """A float32 model in evaluation mode. Its vectors (biases, norm weights) are random too, so that they matter."""
    data = row(task, kind)
    if config is None:
        config = configure(CONFIG_MAPPING[kind], data.get("config", {}))
        for name, value in data.get("after", {}).items():
            setattr(config, name, value)
    kind_of_model = model_class(task, kind)
    if not isinstance(config, kind_of_model.config_class):  # a text model of a larger one
        config = next((c for c in vars(config).values() if isinstance(c, kind_of_model.config_class)), config)
    torch.manual_seed(0)
    model: nn.Module = kind_of_model._from_config(config, **data.get("build", {}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.float().eval()


# --- inputs -------------------------------------------------------------------------------------------------------


def inputs(task: str, kind: str, model: Any) -> dict[str, Any]:
    """Random inputs that the model takes: token indices, pixels, and what its row adds."""
    data, generator = row(task, kind), torch.Generator().manual_seed(2)
    taken = set(inspect.signature(model.forward).parameters)
    arguments: dict[str, Any] = {}
    if "input_ids" in taken and (task != "image-classification" or data.get("text")):
        ids = torch.randint(FIRST_FREE, LAST_FREE, (1, data.get("tokens", TOKENS)), generator=generator)
        if task in ("sequence-classification", "question-answering"):
            ids[0, -1] = TOKEN_IDS["eos"]
        arguments |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False) and task == "image-text-to-text"
    if task == "seq2seq-lm" or (encoder_decoder and "decoder_input_ids" in taken):
        ids = torch.randint(FIRST_FREE, LAST_FREE, (1, DECODER_TOKENS), generator=generator)
        arguments["decoder_input_ids"] = ids
    if "pixel_values" in taken and task in ("image-classification", "image-text-to-text"):
        arguments |= _images(model, generator)
    for name, spec in data.get("inputs", {}).items():
        arguments[name] = _made(spec, generator)
    arguments = {k: v for k, v in arguments.items() if v is not None and (k in taken or "kwargs" in taken)}
    if (task == "image-text-to-text" or data.get("text")) and "input_ids" in arguments:
        _place_images(model, arguments, data)
    if "mm_token_type_ids" in taken and "input_ids" in arguments:
        arguments["mm_token_type_ids"] = (arguments["input_ids"] == token_id("image_token_id")).long()
    return arguments


def _made(spec: Any, generator: torch.Generator) -> Any:
    """A tensor from its description: a shape for random numbers, {"ids": shape}, {"value": data}."""
    if isinstance(spec, tuple):
        return torch.randn(spec, generator=generator)
    if isinstance(spec, dict) and "ids" in spec:
        return torch.randint(*spec.get("range", (FIRST_FREE, LAST_FREE)), spec["ids"], generator=generator)
    return torch.tensor(spec["value"]) if isinstance(spec, dict) else spec


def _images(model: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """One image, or its 4 x 4 patches for models that take patches and their grid."""
    if "image_grid_thw" not in inspect.signature(model.forward).parameters:
        return {"pixel_values": torch.randn(_pixels(model.config), generator=generator)}
    vision = getattr(model.config, "vision_config", model.config)
    depth = getattr(vision, "temporal_patch_size", None) or 1
    width = _pixels(model.config)[1] * depth * vision.patch_size**2
    return {"pixel_values": torch.randn(16, width, generator=generator), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _pixels(config: Any) -> tuple[int, ...]:
    vision = next(
        (c for n in ("vision_config", "encoder", "backbone_config") if (c := getattr(config, n, None))), config
    )
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = next((c for n in ("num_channels", "in_channels", "in_chans") if (c := getattr(vision, n, None))), 3)
    return (1, channels, height, width)


def _place_images(model: Any, arguments: dict[str, Any], data: dict[str, Any]) -> None:
    """Put as many image tokens in front of the text as the model makes features."""
    count = data.get("image_tokens")
    if count is None:
        count = _count_features(model, arguments)
    images = torch.full((1, count), token_id("image_token_id"))
    arguments["input_ids"] = torch.cat([images, arguments["input_ids"]], dim=1)
    arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])


def _count_features(model: Any, arguments: dict[str, Any]) -> int:
    owners = [m for m in (getattr(model, "model", None), model) if hasattr(m, "get_image_features")]
    if not owners or "pixel_values" not in arguments:
        return 0
    owner: Any = owners[0]
    taken = inspect.signature(owner.get_image_features).parameters
    with torch.no_grad():
        found = owner.get_image_features(**{k: v for k, v in arguments.items() if k in taken})
    found = getattr(found, "pooler_output", found)
    tensors = [found] if isinstance(found, Tensor) else list(found)
    return sum(t.reshape(-1, t.shape[-1]).shape[0] for t in tensors)

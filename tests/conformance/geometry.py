"""Published configurations, whole and made small."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .published import PUBLISHED
from .recipe import model_class, token_id
from .sizes import LAYER_COUNTS, VOCAB

WIDTHS = frozenset(
    "hidden_size intermediate_size moe_intermediate_size head_dim qk_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "q_lora_rank kv_lora_rank query_pre_attn_scalar n_embd ffn_dim ffn_hidden_size word_embed_proj_dim d_model d_ff d_kv "
    "encoder_ffn_dim decoder_ffn_dim dim hidden_dim embedding_size pooler_hidden_size pooler_output_size".split()
)
DEPTHS = frozenset((*LAYER_COUNTS, "encoder_layers", "num_decoder_layers"))
VOCABULARIES = frozenset(("vocab_size", "decoder_vocab_size"))
WINDOWS = frozenset(("sliding_window", "local_attention"))
WINDOW = 4  # shorter than the text of the suite, so that it is felt


def published(name: str) -> PreTrainedConfig:
    """The configuration as published."""
    data = PUBLISHED[name]
    kind: type[PreTrainedConfig] = CONFIG_MAPPING[data["kind"]]
    return kind(**data["config"])


def scaled(name: str) -> PreTrainedConfig:
    """The published configuration with widths divided, layers cut, and a short vocabulary and window; all else as it is."""
    data, whole = PUBLISHED[name], published(name)
    width, layers = data["width"], data["layers"]
    changed: dict[str, Any] = {}
    for key, value in vars(whole).items():
        if key in WIDTHS and value is not None:
            changed[key], rest = divmod(value, width)
            if rest:
                raise ValueError(f"{name}: {key} = {value} is not a multiple of {width}")
        elif key in DEPTHS and value is not None:
            changed[key] = min(value, layers)
        elif key in VOCABULARIES:
            changed[key] = VOCAB
        elif key in WINDOWS and value is not None:
            changed[key] = WINDOW
        elif key in ("layer_types", "mlp_layer_types") and value is not None:
            changed[key] = value[:layers]
        elif key.endswith("_token_id") and isinstance(value, int) and value >= VOCAB:
            changed[key] = token_id(key)
    return type(whole)(**data["config"] | changed)


def depth(name: str) -> int:
    """How many layers the model has as published; of an encoder-decoder, its encoder."""
    values = vars(published(name))
    return next(values[key] for key in (*LAYER_COUNTS, "encoder_layers") if key in values)  # type: ignore[no-any-return]


def parameters(name: str) -> int:
    """How many parameters the model has as published, counted without memory for them."""
    data = PUBLISHED[name]
    with torch.device("meta"):
        model = model_class(data["task"], data["kind"])(published(name))
    return sum(p.numel() for p in model.parameters())

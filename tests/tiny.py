"""Tiny models with random weights, built from their configurations: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
GROUPED = SHAPE | {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

# name -> (class of the configuration, class of the model, settings)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64},
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", GROUPED),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED | {"head_dim": 8}),
    "bert": (
        "BertConfig",
        "BertForSequenceClassification",
        SHAPE | {"intermediate_size": 48, "max_position_embeddings": 64, "num_labels": 3},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
        | {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
    ),
}
NAMES = tuple(MODELS)
EAGER_ONLY = ("gemma2",)  # transformers has no fused attention for it: its logits are soft-capped
TOKENS = 7


def build(name: str, dtype: torch.dtype = torch.float32, *, attention: str | None = None, **settings: Any) -> nn.Module:
    """A model in evaluation mode. Its vectors (biases, norm weights) are random too, so that they matter."""
    config_name, model_name, defaults = MODELS[name]
    config = getattr(transformers, config_name)(**IDS | defaults | settings)
    attention = attention or ("eager" if name in EAGER_ONLY else "sdpa")
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, model_name)._from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else 0.15
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def inputs(name: str, *, batch: int = 1, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """Random token indices; for an encoder-decoder, a first decoder token too."""
    ids = torch.randint(3, 100, (batch, tokens), generator=torch.Generator().manual_seed(2))
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "t5":
        arguments["decoder_input_ids"] = torch.zeros(batch, 1, dtype=torch.long)
    return arguments


def embedded(name: str, model: nn.Module, **shape: int) -> dict[str, torch.Tensor]:
    """The same inputs as embeddings that take gradients (`inputs_embeds`)."""
    arguments = inputs(name, **shape)
    embeddings = model.get_input_embeddings()(arguments.pop("input_ids")).detach().requires_grad_()
    return arguments | {"inputs_embeds": embeddings}

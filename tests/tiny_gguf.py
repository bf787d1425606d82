"""A tiny random Llama with a byte-level tokenizer, written as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from torch import nn

from tiny_tokenizers import build, build_tokenizer


def write(path: Path, *, without: str = "") -> nn.Module:
    """Write the file; returns the model that it holds.

    Args:
        path: the file.
        without: leave out the tensors of this name.
    """
    tokenizer = build_tokenizer("bytes")
    model, _ = build("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    writer = gguf.GGUFWriter(path, "llama")
    _write_config(writer, model)
    _write_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if without and without in name:
            continue
        array = tensor.numpy()
        for part, count in heads.items():
            if part in name:  # GGUF keeps the two halves of a rotation side by side
                halves = array.reshape(count, 2, -1, array.shape[-1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _write_config(writer: gguf.GGUFWriter, model: nn.Module) -> None:
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = build_tokenizer("bytes")
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    kinds = [gguf.TokenType.CONTROL if name.startswith("<|") else gguf.TokenType.NORMAL for name in names]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

"""The exceptions from the generic recipe: model type, or model type/task -> data.

Parts of a row: `config` (overrides, nested as configurations are), `after` (attributes set on the finished
configuration), `inputs` (a tuple is a shape of random numbers, {"ids": shape} random indices, {"value": data} a tensor,
None leaves an input out), `tokens`, `image_tokens`, `build` (arguments of `_from_config`), `note` (shown in the table).
"""

from __future__ import annotations

from typing import Any

HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
BOXES = {"bbox": {"value": [[[k, k, k + 5, k + 8] for k in range(7)]]}}
ZERO_ATTENTION = "without its CUDA kernel the attention of this model returns zeros"

_TEXT: dict[str, dict[str, Any]] = {
    "bamba": {"config": {"attn_layer_indices": [1]}},
    "blt": {"config": {"encoder_hash_byte_group_vocab": 50}},
    "bros": {"inputs": {"bbox": (1, 7, 4)}},
    "canine": {"inputs": {"input_ids": None, "inputs_embeds": (1, 7, 64)}},
    "cohere_compass_text": {"config": {"layer_types": ["full_attention", "full_attention"]}},
    "dbrx": {"config": {"attn_config": {"rope_theta": 1e4}}},
    "deepseek_v2": {"config": {"num_experts_per_tok": 2}},
    "dots1": {"config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}},
    "encoder-decoder": {
        "config": {
            "encoder": {"model_type": "bert"},
            "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
        }
    },
    "esm": {"config": {"vocab_size": 128, "pad_token_id": 0, "mask_token_id": 4}},
    "gemma3n_text": {"config": {"num_kv_shared_layers": 0}},
    "granitemoehybrid": {"config": {"layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8}},
    "hunyuan_v1_dense": {"config": {"head_dim": 16}},
    "hunyuan_v1_moe": {"config": {"head_dim": 16}},
    "jamba": {"config": {"attn_layer_period": 2, "attn_layer_offset": 1}},
    "layoutlmv3": {"config": {"coordinate_size": 12, "shape_size": 8}, "inputs": BOXES},
    "layoutlm": {"inputs": BOXES},
    "lfm2_moe": {"config": {"layer_types": ["conv", "full_attention"]}},
    "lilt": {"config": {"hidden_size": 96}, "inputs": BOXES},
    "longformer/question-answering": {
        "inputs": {"input_ids": {"value": [[11, 12, 3, 3, 15, 16, 3]]}},
    },
    "lxmert": {
        "config": {"num_layers": None, "visual_feat_dim": 12, "l_layers": 1, "x_layers": 1, "r_layers": 1},
        "inputs": {"visual_feats": (1, 4, 12), "visual_pos": (1, 4, 4)},
    },
    "mamba2": {"config": {"num_heads": 8, "head_dim": 16, "n_groups": 2}},
    "ministral": {"config": {"head_dim": 16}},
    "mistral4": {"config": {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "head_dim": 32}},
    "mra": {"note": ZERO_ATTENTION},
    "nemotron": {"config": {"num_key_value_heads": 2}},
    "qwen4_exp_text": {
        "config": {
            "layer_types": ["linear_attention", "indexed_attention"],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        }
    },
    "recurrent_gemma": {"config": {"block_types": ["recurrent", "attention"]}},
    "reformer": {"config": {"axial_pos_shape": [4, 16], "axial_pos_embds_dim": [32, 32]}},
    "reformer/causal-lm": {"config": {"is_decoder": True}},
    # its state is written in place, which autograd forbids with or without rules
    "rwkv": {"inputs": {"use_cache": False}},
    "t5": {"config": {"decoder_start_token_id": 0}},
    "xlstm": {"config": {"qk_dim_factor": 1.0}},
    "xmod": {"config": {"languages": ["en_XX"], "default_language": "en_XX"}},
    "zamba": {
        "config": {
            "num_hidden_layers": 4,
            "layers_block_type": HYBRID,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
        }
    },
    "zamba2": {
        "config": {"num_hidden_layers": 4, "layers_block_type": HYBRID, "intermediate_size": 96, "hybrid_layer_ids": [1, 3]}
    },
}

_VISION: dict[str, dict[str, Any]] = {
    "bit": {"config": {"num_groups": 4}},
    "donut-swin": {"config": {"image_size": 32, "patch_size": 2}},
    "swin": {"config": {"image_size": 32, "patch_size": 2}},
    "siglip2": {"inputs": {"pixel_values": (1, 16, 192), "pixel_attention_mask": {"value": [[1] * 16]}, "spatial_shapes": {"value": [[4, 4]]}}},
    "imagegpt": {"inputs": {"input_ids": {"ids": (1, 7)}, "pixel_values": None}},
}

_MULTIMODAL: dict[str, dict[str, Any]] = {}

ROWS: dict[str, dict[str, Any]] = _TEXT | _VISION | _MULTIMODAL

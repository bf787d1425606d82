"""The exceptions from the generic recipe: model type, or model type/task -> data.

Parts of a row: `config` (overrides, nested as configurations are), `after` (attributes set on the finished
configuration), `inputs` (a tuple is a shape of random numbers, {"ids": shape} random indices, {"value": data} a tensor,
None leaves an input out), `tokens`, `image_tokens`, `build` (arguments of `_from_config`), `note` (shown in the table).
"""

from __future__ import annotations

from typing import Any

HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
BOXES = {"bbox": {"value": [[[k, k, k + 5, k + 8] for k in range(7)]]}}
FULL_ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
MROPE = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}}
WINDOW: dict[str, Any] = {"vision_config": {"window_size": 32}}
INDEXER = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
NAFLEX = {
    "pixel_values": (1, 16, 192),
    "pixel_attention_mask": {"value": [[1] * 16]},
    "spatial_shapes": {"value": [[4, 4]]},
}
PACKED = {"pixel_values": (1, 3, 8, 128), "target_sizes": {"value": [[4, 4]]}}
SIZED = {"image_sizes": {"value": [[32, 32]]}}
TILED = {"pixel_values": (1, 2, 3, 32, 32), **SIZED}
FRAMED = {"pixel_values": (1, 1, 3, 32, 32)}
PINPOINTS = {"image_grid_pinpoints": [[32, 32]]}
QFORMER = {"qformer_input_ids": {"ids": (1, 5)}, "qformer_attention_mask": {"value": [[1] * 5]}}
QUERIES = {"num_query_tokens": 4, "image_token_index": 120}
NOT_BUILDABLE = "transformers 5.23 cannot build it from its own default configuration either"
NO_IMAGE = "no relevance reaches an image: this tiny model is exercised in its text part only"
CODES = "the image enters as discrete codes (arg max), through which no relevance flows"
OWN_BACKWARD = (
    "runs a custom autograd function with a backward pass of its own, inside of which torch shows no operation"
)
ZERO_ATTENTION = "without its CUDA kernel the attention of this model returns zeros"

_TEXT: dict[str, dict[str, Any]] = {
    "bamba": {"config": {"attn_layer_indices": [1]}},
    "blt": {"config": {"encoder_hash_byte_group_vocab": 50}, "inputs": {"use_cache": False}},
    "bros": {"inputs": {"bbox": (1, 7, 4)}},
    "canine": {"inputs": {"input_ids": None, "inputs_embeds": (1, 7, 64)}},
    "cohere_compass_text": {"config": {"rope_parameters": FULL_ROPE}},
    "dbrx": {"config": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}}},
    "deepseek_v2": {"config": {"num_experts_per_tok": 2}},
    "dots3_note": {
        "config": {
            "text_config": {"per_layer_config": {}, "rope_parameters": None, "head_dim": 32},
            "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
            "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
        }
    },
    "dots3_note_text": {"config": {"per_layer_config": {}, "rope_parameters": None, "head_dim": 32}},
    "dots1": {"config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}},
    "encoder-decoder": {
        "config": {
            "encoder": {"model_type": "bert"},
            "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
        }
    },
    "esm": {"config": {"vocab_size": 128, "pad_token_id": 0, "mask_token_id": 4}},
    "gemma4_assistant": {"note": NOT_BUILDABLE},
    "gemma4_unified_assistant": {"note": NOT_BUILDABLE},
    "gemma3n_text": {"config": {"num_kv_shared_layers": 0}},
    "granitemoehybrid": {"config": {"layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8}},
    "hunyuan_v1_dense": {"config": {"head_dim": 16}},
    "hunyuan_v1_moe": {"config": {"head_dim": 16}},
    "jamba": {
        "config": {"attn_layer_period": 2, "attn_layer_offset": 1},
        "build": {"experts_implementation": "eager"},
    },
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
    "musicgen": {"inputs": {"input_ids": None, "attention_mask": None, "inputs_embeds": (1, 7, 64)}},
    "musicgen_melody": {"inputs": {"input_ids": None, "attention_mask": None, "inputs_embeds": (1, 7, 64)}},
    "nemo_speechlm": {"config": {"audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 64}}}}},
    "nemotron": {"config": {"num_key_value_heads": 2}},
    "perceiver": {"config": {"num_latents": 16, "d_latents": 64, "num_self_attends_per_block": 2}},
    "qwen4_exp": {"config": {"text_config": INDEXER}},
    "qwen4_exp_text": {"config": INDEXER},
    "recurrent_gemma": {"config": {"block_types": ["recurrent", "attention"]}},
    "reformer": {"note": OWN_BACKWARD, "config": {"axial_pos_shape": [4, 16], "axial_pos_embds_dim": [32, 32]}},
    "reformer/causal-lm": {"config": {"is_decoder": True}},
    # its state is written in place, which autograd forbids with or without rules
    "rwkv": {"inputs": {"use_cache": False}},
    "t5": {"config": {"decoder_start_token_id": 0}},
    "voxtral_realtime": {"inputs": {"input_features": (1, 128, 56), "decoder_input_ids": None, "attention_mask": None}},
    "xlstm": {"config": {"qk_dim_factor": 1.0}},
    "yoso": {"note": OWN_BACKWARD},
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
        "config": {
            "num_hidden_layers": 4,
            "layers_block_type": HYBRID,
            "hybrid_layer_ids": [1, 3],
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "mamba_headdim": 16,
        }
    },
}

_VISION: dict[str, dict[str, Any]] = {
    "bit": {"config": {"num_groups": 4}},
    "cvt": {"config": {"depth": [1, 2, 3], "num_heads": [2, 4, 8]}},
    "donut-swin": {"config": {"patch_size": 2}},
    "swin": {"config": {"patch_size": 2}},
    "efficientnet": {"config": {"hidden_dim": 2560}},
    "hgnet_v2": {"config": {"hidden_sizes": [128, 512, 1024, 2048]}},
    "imagegpt": {"inputs": {"input_ids": {"ids": (1, 7)}, "pixel_values": None}},
    "levit": {
        "config": {
            "hidden_sizes": [64, 64, 64],
            "num_attention_heads": [4, 4, 4],
            "key_dim": [16, 16, 16],
            "image_size": 64,
            "patch_size": 16,
        }
    },
    "mobilevitv2": {"config": {"image_size": 128}},
    "shieldgemma2/image-classification": {
        "config": {"yes_token_index": 11, "no_token_index": 12},
        "after": {"yes_token_index": 11, "no_token_index": 12},
        "text": True,
    },
    "siglip2": {"inputs": NAFLEX},
    "textnet": {"config": {"hidden_sizes": [64, 64, 128, 256, 512]}},
}

_MULTIMODAL: dict[str, dict[str, Any]] = {
    "aria": {"config": {"projector_patch_to_query_dict": {16: 4}}},
    "blip-2": {"config": QUERIES},
    "chameleon": {
        "note": CODES,
        "config": {
            "vocabulary_map": {"<image>": 120, "IMGIMGAZ": 110, "IMGIMGBZ": 111, "IMGIMGCZ": 112, "IMGIMGDZ": 113},
            "vq_config": {"num_embeddings": 4, "base_channels": 32, "resolution": 32, "latent_channels": 64},
        },
    },
    "cohere_compass": {"config": {"text_config": {"rope_parameters": FULL_ROPE}}},
    "deepseek_vl_hybrid": {
        "config": {"high_res_vision_config": {"global_attn_indexes": [0, 1]}},
        "inputs": {"high_res_pixel_values": (1, 3, 32, 32)},
    },
    "deepseek_ocr2": {
        "config": {
            "vision_config": {"sam_config": {"downsample_channels": [32, 64]}},
            "text_config": {
                "mlp_layer_types": ["dense", "sparse"],
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "moe_intermediate_size": 32,
            },
        }
    },
    "diffusion_gemma": {
        "note": NO_IMAGE,
        "config": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    },
    "emu3/image-text-to-text": {
        "note": CODES,
        "config": {
            "vocabulary_map": {f"<|visual token {k:06}|>": 110 + k for k in range(4)}
            | {"<image>": 120, "<|extra_200|>": 109},
            "vq_config": {"codebook_size": 4, "base_channels": 32, "hidden_size": 128},
        },
        "inputs": {"image_sizes": {"value": [[32, 32]]}},
    },
    "ernie4_5_vl_moe": {
        "config": {
            "text_config": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
                "moe_intermediate_size": [32, 32],
            }
        }
    },
    "evolla": {"note": NO_IMAGE},
    "exaone4_5": {"config": WINDOW},
    "florence2": {
        "config": {
            "vision_config": {"patch_size": [7, 3, 3, 3], "embed_dim": [16, 32, 64, 64], "num_heads": [2, 2, 4, 4]}
            | {"num_groups": [2, 2, 4, 4]}
        },
        "inputs": {"pixel_values": (1, 3, 64, 64)},
    },
    "fuyu/image-text-to-text": {"inputs": {"image_patches": (1, 16, 192), "pixel_values": None}, "image_tokens": 16},
    "gemma4/image-text-to-text": {
        "config": {"vision_config": {"model_type": "gemma4_vision", "pooling_kernel_size": 2}},
        "inputs": {
            "pixel_values": (1, 16, 192),
            "image_position_ids": {"value": [[[k % 4, k // 4] for k in range(16)]]},
        },
    },
    "gemma4_unified/image-text-to-text": {
        "config": {
            "vision_config": {
                "model_type": "gemma4_unified_vision",
                "pooling_kernel_size": 2,
                "mm_embed_dim": 64,
                "mm_posemb_size": 16,
            }
        },
        "inputs": {
            "pixel_values": (1, 16, 768),
            "image_position_ids": {"value": [[[k % 4, k // 4] for k in range(16)]]},
        },
    },
    "glm46v": {"config": MROPE},
    "glm4v": {"config": MROPE},
    "glm4v_moe": {
        "config": {
            "text_config": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
                | {"partial_rotary_factor": 0.5}
            }
        }
    },
    "glm_ocr": {"config": MROPE},
    "glmga": {"config": MROPE},
    "granite4_vision": {
        "note": NO_IMAGE,
        "config": {**PINPOINTS, "downsample_rate": "1/2", "spatial_target_layers": [], "deepstack_layer_map": []},
        "inputs": TILED,
        "image_tokens": 4,
    },
    "granite_docling": {"inputs": {**FRAMED, "pixel_attention_mask": {"value": [[True]]}}},
    "hunyuan_vl": {
        "config": {
            "text_config": {
                "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]},
            }
        }
    },
    "hyperclovax_vision_v2": {"config": WINDOW},
    "idefics": {"inputs": {**FRAMED, "image_attention_mask": {"value": [[[1]] * 7]}}},
    "idefics2": {"inputs": FRAMED},
    "idefics3": {"inputs": FRAMED},
    "inkling_mm_model": {"inputs": {"pixel_values": (4, 2, 8, 8, 3)}},
    "inkling2": {"inputs": {"pixel_values": (4, 16, 16, 3), "image_grid_thw": {"value": [[1, 2, 2]]}}},
    "instructblip": {"config": QUERIES, "inputs": QFORMER},
    "instructblipvideo": {
        "config": {"num_query_tokens": 4, "video_token_index": 120},
        "inputs": {"pixel_values": (1, 2, 3, 32, 32), **QFORMER},
        "image_tokens": 8,
    },
    "kimi_k25": {"config": {"projection_hidden_size": 64}, "inputs": {"pixel_values": (16, 3, 8, 8)}},
    "kosmos-2": {
        "config": {"latent_query_num": 4},
        "inputs": {"image_embeds_position_mask": {"value": [[1, 1, 1, 1, 0, 0, 0]]}},
        "image_tokens": 0,
    },
    "kosmos-2.5": {"note": NO_IMAGE},
    "lfm2_vl": {"inputs": NAFLEX},
    "lighton_ocr": {"inputs": SIZED},
    "llama4": {
        "config": {
            "vision_config": {"intermediate_size": 256, "projector_input_dim": 64, "projector_output_dim": 64},
            "text_config": {"intermediate_size_mlp": 96},
        },
        "image_tokens": 4,
    },
    "llava_next": {"config": PINPOINTS, "inputs": TILED},
    "llava_next_video": {"config": PINPOINTS, "inputs": TILED},
    "llava_onevision": {"config": PINPOINTS, "inputs": TILED},
    "minicpm_ocr": {"inputs": PACKED, "note": NO_IMAGE},
    "minicpmv4_6": {"inputs": PACKED, "note": NO_IMAGE},
    "minicpmv4_7": {"inputs": PACKED, "note": NO_IMAGE},
    "molmo2": {
        "config": {
            "adapter_config": {"vision_feature_layer": [1, 0]},
            "vision_config": {"num_position_embeddings": 16},
            "image_patch_id": 120,
        },
        "inputs": {
            "pixel_values": (1, 16, 192),
            "image_token_pooling": {"value": [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]},
            "image_grids": {"value": [[2, 2, 0, 0]]},
            "image_num_crops": {"value": [1]},
        },
    },
    "mistral3": {"inputs": SIZED},
    "mistral4/image-text-to-text": {"note": NO_IMAGE},
    "mistral_large4": {"inputs": SIZED},
    "mllama/image-text-to-text": {
        "config": {
            "vision_config": {
                "max_num_tiles": 1,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 128,
                "supported_aspect_ratios": [[1, 1]],
                "num_global_layers": 1,
            },
            "text_config": {"cross_attention_layers": [1]},
        },
        "inputs": {
            "pixel_values": (1, 1, 1, 3, 32, 32),
            "aspect_ratio_ids": {"value": [[1]]},
            "aspect_ratio_mask": {"value": [[[1]]]},
            "cross_attention_mask": {"value": [[[[1]]] * 7]},
        },
        "image_tokens": 0,
    },
    "muse_glimmer": {"config": {"out_hidden_size": 256}, "inputs": {"pixel_values": (16, 384)}},
    "muse_spark": {"config": {"out_hidden_size": 256}, "inputs": {"pixel_values": (16, 384)}},
    "nemotron_h_omni": {
        "config": {"vision_config": {"video_temporal_patch_size": 2}, "vit_hidden_size": 64, "image_token_id": 120},
        "inputs": {"pixel_values": (16, 192), "image_grid_hw": {"value": [[4, 4]]}},
    },
    "paddleocr_vl": {"config": MROPE, "inputs": {"pixel_values": (16, 3, 8, 8)}},
    "pi0": {
        "note": NO_IMAGE,
        "inputs": {
            "pixel_values": (1, 1, 3, 32, 32),
            "pixel_attention_mask": {"value": [[True]]},
            "state": (1, 32),
            "noise": (1, 50, 32),
            "timestep": {"value": [0.5]},
        },
    },
    "pix2struct": {
        "inputs": {
            # the row and the column of each patch, then its pixels
            "flattened_patches": {
                "value": [[[k % 3 + 1, k // 3 + 1, *(((k + j * j) % 7 - 3) / 3 for j in range(768))] for k in range(5)]]
            },
            "attention_mask": {"value": [[1] * 5]},
        }
    },
    "qwen2_5_omni_thinker": {
        "config": WINDOW | MROPE,
        "after": {"vision_start_token_id": 101, "audio_start_token_id": 103, "vision_end_token_id": 102},
    },
    "qwen2_5_vl": {"config": WINDOW | MROPE},
    "qwen2_vl": {"config": MROPE},
    "qwen3_omni_moe_thinker": {
        "after": {"vision_start_token_id": 101, "audio_start_token_id": 103, "vision_end_token_id": 102}
    },
    "smolvlm": {"inputs": FRAMED},
    "step3p7": {"config": {"text_config": {"sliding_window": 8}}},
    "t5gemma2": {"inputs": {"decoder_input_ids": {"ids": (1, 3)}}},
    "udop": {"inputs": BOXES},
    "unlimited_ocr": {"config": {"vision_config": {"sam_config": {"downsample_channels": [32, 64]}}}},
    "video_llama_3": {"inputs": {"image_merge_sizes": {"value": [2]}}},
    "vipllava": {"config": {"vision_feature_layers": [-2, -1]}},
    "vision-encoder-decoder": {
        "config": {
            "encoder": {"model_type": "vit"},
            "decoder": {"model_type": "gpt2", "add_cross_attention": True, "is_decoder": True},
        },
        "inputs": {"decoder_input_ids": {"ids": (1, 3)}, "input_ids": None, "attention_mask": None},
    },
}

ROWS: dict[str, dict[str, Any]] = _TEXT | _VISION | _MULTIMODAL

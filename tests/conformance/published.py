"""The published geometry of well-known checkpoints: the values of their config.json as data.

Key: the name on the hub. Parts of a row:

- `model`: what people call it; `task` and `kind`: the class, as in the other rows;
- `width`: the number that every width is divided by; `layers`: how many of the layers are kept, enough to have each kind;
- `parameters`: those of the whole model, where they are known from elsewhere: a check of the values below;
- `config`: the published values; what is not listed is the default of the configuration class, as it is for config.json.
"""

from __future__ import annotations

from typing import Any

from .published_encoders import ENCODERS, IMAGES, T5S, TRANSLATORS

TASK = "published"
"""Name of these rows where tasks are listed."""

YARN = {"rope_type": "yarn", "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMAS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {
        "model": "LLaMa 2-7b",
        "kind": "llama",
        "width": 16,
        "parameters": 6_738_415_616,
        "config": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    },
    "meta-llama/Llama-3.1-8B": {
        "model": "Llama 3.1-8B",
        "kind": "llama",
        "width": 16,
        "parameters": 8_030_261_248,
        "config": {
            "vocab_size": 128256,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "rope_scaling": {**LLAMA3, "factor": 8.0},
        },
    },
    "meta-llama/Llama-3.2-1B": {
        "model": "Llama 3.2-1B",
        "kind": "llama",
        "width": 8,
        "parameters": 1_235_814_400,
        "config": {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "rope_scaling": {**LLAMA3, "factor": 32.0},
            "tie_word_embeddings": True,
        },
    },
    "mistralai/Mistral-7B-v0.1": {
        "model": "Mistral-7B",
        "kind": "mistral",
        "width": 16,
        "parameters": 7_241_732_096,
        "config": {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "sliding_window": 4096,
        },
    },
    "mistralai/Mixtral-8x7B-v0.1": {
        "model": "Mixtral 8x7b",
        "kind": "mixtral",
        "width": 32,
        "parameters": 46_702_792_704,
        "config": {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
        },
    },
    "microsoft/phi-1_5": {
        "model": "Phi-1.5",
        "kind": "phi",
        "width": 8,
        "parameters": 1_418_270_720,
        "config": {"partial_rotary_factor": 0.5, "hidden_act": "gelu_new", "qk_layernorm": False},
    },
    "microsoft/Phi-3-mini-4k-instruct": {
        "model": "Phi-3-mini",
        "kind": "phi3",
        "width": 16,
        "parameters": 3_821_079_552,
        "config": {"vocab_size": 32064, "sliding_window": 2047, "rms_norm_eps": 1e-5},
    },
    "microsoft/phi-4": {
        "model": "Phi-4",
        "kind": "phi3",
        "width": 32,
        "parameters": 14_659_507_200,
        "config": {
            "vocab_size": 100352,
            "hidden_size": 5120,
            "intermediate_size": 17920,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 10,
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-5,
            "rope_theta": 250000.0,
            "sliding_window": None,
        },
    },
}

_QWENS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-0.5B": {
        "model": "Qwen 2",
        "kind": "qwen2",
        "width": 16,
        "parameters": 494_032_768,
        "config": {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        },
    },
    "Qwen/Qwen2.5-7B": {
        "model": "Qwen 2.5",
        "kind": "qwen2",
        "width": 16,
        "parameters": 7_615_616_512,
        "config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
        },
    },
    "Qwen/Qwen3-8B": {
        "model": "Qwen 3",
        "kind": "qwen3",
        "width": 16,
        "parameters": 8_190_735_360,
        "config": {
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rope_theta": 1e6,
        },
    },
    "Qwen/Qwen3-30B-A3B": {
        "model": "Qwen3-MoE",
        "kind": "qwen3_moe",
        "width": 16,
        "parameters": 30_532_122_624,
        "config": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
            "rope_theta": 1e6,
        },
    },
}

_GEMMAS: dict[str, dict[str, Any]] = {
    "google/gemma-2-2b": {
        "model": "Gemma 2-2b",
        "kind": "gemma2",
        "width": 16,
        "parameters": 2_614_341_888,
        "config": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
    },
    "google/gemma-2-9b": {
        "model": "Gemma 2-9b",
        "kind": "gemma2",
        "width": 16,
        "parameters": 9_241_705_984,
        "config": {
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
    },
    "google/gemma-3-1b-it": {
        "model": "Gemma 3-1b",
        "kind": "gemma3_text",
        "width": 16,
        "layers": 6,
        "parameters": 999_885_952,
        "config": {
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
    },
}

_EXPERTS: dict[str, dict[str, Any]] = {
    "deepseek-ai/DeepSeek-V2-Lite": {
        "model": "DeepSeek-V2-Lite",
        "kind": "deepseek_v2",
        "width": 16,
        "parameters": 15_706_484_224,
        "config": {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "max_position_embeddings": 163840,
            "rope_scaling": {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    },
    "deepseek-ai/DeepSeek-V3": {
        "model": "DeepSeek-V3",
        "kind": "deepseek_v3",
        "width": 32,
        "layers": 4,  # three dense ones, then experts
        "parameters": 671_026_404_352,
        "config": {
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "max_position_embeddings": 163840,
            "rope_scaling": {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    },
    "openai/gpt-oss-20b": {
        "model": "GPT-OSS-20b",
        "kind": "gpt_oss",
        "width": 16,
        "parameters": 20_914_757_184,
        "config": {
            "num_hidden_layers": 24,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "rope_theta": 150000.0,
            "rope_scaling": {**YARN, "factor": 32.0, "truncate": False},
        },
    },
}

_EARLIER: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": {
        "model": "GPT-2",
        "kind": "gpt2",
        "width": 16,
        "parameters": 124_439_808,
        "config": {"vocab_size": 50257, "n_positions": 1024},
    },
    "EleutherAI/pythia-6.9b": {
        "model": "Pythia-6.9b",
        "kind": "gpt_neox",
        "width": 16,
        "parameters": 6_857_302_016,
        "config": {
            "hidden_size": 4096,
            "intermediate_size": 16384,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "rotary_pct": 0.25,
        },
    },
    "EleutherAI/gpt-neox-20b": {
        "model": "GPT-NeoX-20b",
        "kind": "gpt_neox",
        "width": 12,
        "parameters": 20_554_567_680,
        "config": {"num_hidden_layers": 44, "hidden_act": "gelu_fast", "rotary_pct": 0.25},
    },
    "facebook/opt-6.7b": {
        "model": "OPT-6.7b",
        "kind": "opt",
        "width": 16,
        "parameters": 6_658_473_984,
        "config": {
            "hidden_size": 4096,
            "ffn_dim": 16384,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "word_embed_proj_dim": 4096,
        },
    },
    "facebook/opt-350m": {
        "model": "OPT-350m (norms behind, projected embeddings)",
        "kind": "opt",
        "width": 16,
        "parameters": 331_196_416,
        "config": {
            "hidden_size": 1024,
            "ffn_dim": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
        },
    },
    "tiiuae/falcon-7b": {
        "model": "Falcon-7b",
        "kind": "falcon",
        "width": 16,
        "parameters": 6_921_720_704,
        "config": {"multi_query": True, "parallel_attn": True, "bias": False, "alibi": False},
    },
}

_BY_TASK = {
    "causal-lm": _LLAMAS | _QWENS | _GEMMAS | _EXPERTS | _EARLIER,
    "masked-lm": ENCODERS,
    "seq2seq-lm": TRANSLATORS | T5S,
    "image-classification": IMAGES,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    name: {"task": task, "layers": 2} | data for task, rows in _BY_TASK.items() for name, data in rows.items()
}

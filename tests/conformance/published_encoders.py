"""Published geometry of encoders, encoder-decoders and vision transformers; `published` says what a row holds."""

from __future__ import annotations

from typing import Any

DEBERTA = {
    "vocab_size": 128100,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "relative_attention": True,
    "max_relative_positions": -1,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
T5_V1_0 = {"decoder_start_token_id": 0}
T5_V1_1 = {**T5_V1_0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

ENCODERS: dict[str, dict[str, Any]] = {
    "google-bert/bert-base-uncased": {
        "model": "BERT-base",
        "kind": "bert",
        "task": "masked-lm",
        "width": 16,
        "parameters": 109_514_298,
        "config": {},
    },
    "FacebookAI/roberta-base": {
        "model": "RoBERTa-base",
        "kind": "roberta",
        "task": "masked-lm",
        "width": 16,
        "parameters": 124_697_433,
        "config": {
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
            "pad_token_id": 1,
        },
    },
    "distilbert/distilbert-base-uncased": {
        "model": "DistilBERT-base",
        "kind": "distilbert",
        "task": "masked-lm",
        "width": 16,
        "parameters": 66_985_530,
        "config": {"activation": "gelu", "sinusoidal_pos_embds": False},
    },
    "microsoft/deberta-v2-xlarge-mnli": {
        "model": "DeBERTa-v2-xlarge",
        "kind": "deberta-v2",
        "task": "sequence-classification",
        "width": 16,
        "config": DEBERTA
        | {
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 24,
            "pooler_hidden_size": 1536,
            "conv_kernel_size": 3,
            "conv_act": "gelu",
            "num_labels": 3,
        },
    },
    "microsoft/deberta-v3-base": {
        "model": "DeBERTa-v3-base",
        "kind": "deberta-v2",
        "task": "sequence-classification",
        "width": 16,
        "parameters": 184_423_682,
        "config": DEBERTA
        | {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "pooler_hidden_size": 768,
        },
    },
    "answerdotai/ModernBERT-base": {
        "model": "ModernBERT-base",
        "kind": "modernbert",
        "task": "masked-lm",
        "width": 16,
        "layers": 4,  # the first one lacks its norm; every third one attends to everything
        "parameters": 149_655_232,
        "config": {
            "global_attn_every_n_layers": 3,
            "global_rope_theta": 160000.0,
            "local_rope_theta": 1e4,
            "local_attention": 128,
        },
    },
    "google/electra-base-discriminator": {
        "model": "ELECTRA-base",
        "kind": "electra",
        "task": "sequence-classification",
        "width": 16,
        "parameters": 109_483_778,
        "config": {
            "embedding_size": 768,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
        },
    },
}

TRANSLATORS: dict[str, dict[str, Any]] = {
    "facebook/bart-base": {
        "model": "BART-base",
        "kind": "bart",
        "width": 16,
        "parameters": 139_420_416,
        "config": {
            "vocab_size": 50265,
            "d_model": 768,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_attention_heads": 12,
            "decoder_attention_heads": 12,
            "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072,
        },
    },
    "facebook/bart-large": {
        "model": "BART-large",
        "kind": "bart",
        "width": 16,
        "parameters": 406_291_456,
        "config": {"vocab_size": 50265},
    },
    "facebook/mbart-large-50-many-to-many-mmt": {
        "model": "mBART-50",
        "kind": "mbart",
        "width": 16,
        "parameters": 610_879_488,
        "config": {
            "vocab_size": 250054,
            "activation_function": "relu",
            "scale_embedding": True,
            "decoder_start_token_id": 2,
        },
    },
    "Helsinki-NLP/opus-mt-en-de": {
        "model": "Marian en-de",
        "kind": "marian",
        "width": 16,
        "config": {
            "vocab_size": 58101,
            "decoder_vocab_size": 58101,
            "d_model": 512,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048,
            "activation_function": "swish",
            "max_position_embeddings": 512,
            "scale_embedding": True,
        },
    },
}

T5S: dict[str, dict[str, Any]] = {
    "google/flan-t5-xl": {
        "model": "Flan-T5-XL",
        "kind": "t5",
        "width": 16,
        "parameters": 2_783_959_040,  # tied, as transformers 5 does; 2,849,757,184 with a head of its own
        "config": {
            **T5_V1_1,
            "d_model": 2048,
            "d_ff": 5120,
            "num_layers": 24,
            "num_decoder_layers": 24,
            "num_heads": 32,
        },
    },
    "google-t5/t5-base": {
        "model": "T5-base",
        "kind": "t5",
        "width": 16,
        "parameters": 222_903_552,
        "config": {**T5_V1_0, "d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    },
    "google/mt5-small": {
        "model": "mT5-small",
        "kind": "mt5",
        "width": 16,
        "parameters": 172_119_424,  # tied; 300,176,768 with a head of its own
        "config": {**T5_V1_1, "vocab_size": 250112, "d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    },
    "google/byt5-small": {
        "model": "ByT5-small",
        "kind": "t5",
        "width": 16,
        "parameters": 299_072_512,  # tied; 299,637,760 with a head of its own
        "config": {
            **T5_V1_1,
            "vocab_size": 384,
            "d_model": 1472,
            "d_ff": 3584,
            "num_layers": 12,
            "num_decoder_layers": 4,
            "num_heads": 6,
        },
    },
    "google/umt5-small": {
        "model": "UMT5-small",
        "kind": "umt5",
        "width": 16,
        "parameters": 175_333_376,  # tied; 306,601,984 with a head of its own
        "config": {**T5_V1_1, "vocab_size": 256384, "d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    },
}

_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
IMAGES: dict[str, dict[str, Any]] = {
    "google/vit-base-patch16-224": {
        "model": "ViT-B-16",
        "kind": "vit",
        "width": 16,
        "parameters": 86_567_656,
        "config": {"num_labels": 1000},
    },
    "google/vit-large-patch16-224": {
        "model": "ViT-L-16",
        "kind": "vit",
        "width": 16,
        "parameters": 304_326_632,
        "config": {**_LARGE, "num_labels": 1000},
    },
    "google/vit-large-patch32-384": {
        "model": "ViT-L-32",
        "kind": "vit",
        "width": 16,
        "parameters": 306_632_680,
        "config": {**_LARGE, "num_labels": 1000, "patch_size": 32, "image_size": 384},
    },
}

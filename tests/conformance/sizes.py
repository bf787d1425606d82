"""Small values for the sizes that configurations name, consistent with each other."""

from __future__ import annotations

HIDDEN, HEADS, HEAD, INNER, LAYERS, VOCAB, POSITIONS, EXPERTS, PATCH = 64, 4, 16, 96, 2, 128, 64, 4, 8

_NAMES = [
    (
        HIDDEN,
        "hidden_size d_model n_embd dim embed_dim hidden_dim_model embedding_size emb_dim projection_dim "
        "out_hidden_size decoder_hidden_size text_hidden_size vision_output_dim encoder_hidden_size output_proj_dims "
        "projector_hidden_size word_embed_proj_dim pooler_hidden_size pooler_output_size attention_hidden_size "
        "d_embed embedding_dim backbone_hidden_size hidden_size_global lru_width kv_channels_total",
    ),
    (
        HEADS,
        "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads "
        "attention_heads linear_num_heads linear_num_value_heads index_n_heads swa_num_attention_heads "
        "conf_num_attention_heads resampler_heads resampler_n_heads num_attention_groups",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads kv_n_heads linear_num_key_heads swa_num_key_value_heads num_layers "
        "num_hidden_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth layers "
        "conf_num_hidden_layers num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k n_group "
        "num_expert_group vision_config_layers resampler_depth spatial_merge_size merge_size num_global_layers "
        "t2u_encoder_layers t2u_decoder_layers speech_encoder_layers",
    ),
    (
        1,
        "topk_group n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers depths "
        "moe_num_shared_experts num_nextn_predict_layers",
    ),
    (
        HEAD,
        "head_dim d_kv d_head v_head_dim qk_nope_head_dim qk_rope_head_dim q_lora_rank kv_lora_rank dim_head "
        "linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim swa_head_dim query_pre_attn_scalar "
        "hidden_sizes kv_channels attention_head_dim",
    ),
    (32, "qk_head_dim moe_intermediate_size image_size"),
    (
        INNER,
        "intermediate_size ffn_dim d_ff d_inner encoder_ffn_dim decoder_ffn_dim n_inner hidden_dim dff dim_ff "
        "mlp_dim ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size",
    ),
    (VOCAB, "vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input entity_vocab_size"),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length model_max_length "
        "max_source_positions max_target_positions max_2d_position_embeddings num_position_embeddings",
    ),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (PATCH, "patch_size sliding_window rotary_dim mamba_chunk_size chunk_size attention_window_size"),
    (4, "mm_tokens_per_image num_query_tokens window_size attention_window block_size"),
]
SIZES: dict[str, int] = {name: size for size, names in _NAMES for name in names.split()}

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth")
HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_head", "n_heads")
GROWING = ("hidden_sizes", "num_heads", "num_attention_heads", "embed_dim", "embed_dims", "dim_embed", "out_channels")
"""Lists with one item per stage, each twice the one before."""

TOKEN_IDS = {
    "pad": 0,
    "bos": 1,
    "decoder_start": 1,
    "eos": 2,
    "sep": 3,
    "mask": 4,
    "cls": 5,
    "unk": 6,
    "image_start|vision_start|boi": 101,
    "image_end|vision_end|eoi": 102,
    "^image_token|^img_token|^image_pad|^media": 120,
    "^video_token": 121,
    "^audio_token": 122,
}

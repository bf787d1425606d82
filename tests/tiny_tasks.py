"""Tiny random models of every task that reads a text, with a WordPiece tokenizer that has a mask token."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from tokenizers import processors

from attnlrp import Explainer
from tiny_tokenizers import CONTEXT, build_tokenizer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": CONTEXT}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "is_gated_act": True}
BART_IDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "decoder_start_token_id": 3}
NER = {"id2label": {0: "O", 1: "PER", 2: "LOC"}, "label2id": {"O": 0, "PER": 1, "LOC": 2}}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-mlm": ("BertConfig", "BertForMaskedLM", SHAPE),
    "bert-ner": ("BertConfig", "BertForTokenClassification", SHAPE | NER),
    "bert-qa": ("BertConfig", "BertForQuestionAnswering", SHAPE),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5 | {"decoder_start_token_id": 0, "pad_token_id": 0}),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART | BART_IDS),
    "bart-classifier": ("BartConfig", "BartForSequenceClassification", BART | BART_IDS),
    "marian": (
        "MarianConfig",
        "MarianMTModel",
        BART | BART_IDS | {"share_encoder_decoder_embeddings": False, "decoder_start_token_id": 0},
    ),
}


def build(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Explainer:
    """A random model that reads a WordPiece tokenizer with a mask token."""
    tokenizer = copy.deepcopy(build_tokenizer("wordpiece"))
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config_name, model_name, defaults = MODELS[name]
    size = {"vocab_size": len(tokenizer)} | ({"decoder_vocab_size": len(tokenizer)} if name == "marian" else {})
    config = getattr(transformers, config_name)(**size | defaults)
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    if name == "bart":
        model.generation_config.forced_bos_token_id = 2
    return Explainer(model.to(dtype).eval(), tokenizer, **settings)

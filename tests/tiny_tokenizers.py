"""Tiny tokenizers of the three common kinds, trained in memory, and tiny random models of matching vocabulary."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

KINDS = ("bytes", "wordpiece", "sentencepiece")
CORPUS = (
    "Paris is the capital of France. Berlin is the capital of Germany. The capital of Italy is Rome.",
    "The film was great, the play was bad; unbelievable unhappiness is not the end of the world.",
    "He said: don't go there! She said 'why not?' and they were walking and talking in the garden.",
    "Café naïve Zürich. Привет мир. السلام عليكم. 日本語です 中国 你好",
)
CONTEXT = 64
LABELS = ("negative", "neutral", "positive")
_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@functools.cache
def build_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer: byte-level BPE (GPT-2), WordPiece (BERT), or BPE on "▁" with byte fallback (Llama)."""
    return {"bytes": _byte_level, "wordpiece": _wordpiece, "sentencepiece": _sentencepiece}[kind]()


def _byte_level() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=380, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    return _wrap(raw, bos_token=special[0], eos_token=special[0], pad_token=special[1])


def _wordpiece() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=False)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    raw.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=260, special_tokens=special, show_progress=False)
    )
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return _wrap(raw, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def _sentencepiece() -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>"]
    spaced = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = spaced
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    latin = [line for line in CORPUS if line.isascii()]  # every other character falls back to its bytes
    trained.train_from_iterator(latin, trainers.BpeTrainer(vocab_size=140, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [tuple(merge) for merge in model["merges"]]
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = spaced
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _wrap(raw: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=CONTEXT, clean_up_tokenization_spaces=False, **special
    )


# name -> (kind of tokenizer, class of the configuration, class of the model, settings)
MODELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": (
        "sentencepiece",
        "LlamaConfig",
        "LlamaForCausalLM",
        _SHAPE | {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt2": (
        "bytes",
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "bert": (
        "wordpiece",
        "BertConfig",
        "BertForSequenceClassification",
        _SHAPE
        | {"max_position_embeddings": CONTEXT, "pad_token_id": 0, "id2label": dict(enumerate(LABELS))}
        | {"label2id": {label: index for index, label in enumerate(LABELS)}},
    ),
    "llama-classifier": (
        "bytes",
        "LlamaConfig",
        "LlamaForSequenceClassification",
        _SHAPE
        | {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "id2label": dict(enumerate(LABELS))}
        | {"label2id": {label: index for index, label in enumerate(LABELS)}, "bos_token_id": 0, "eos_token_id": 0}
        | {"pad_token_id": 1},
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """A random model in evaluation mode, spread enough for its logits to differ, and its tokenizer."""
    kind, config_name, model_name, defaults = MODELS[name]
    tokenizer = build_tokenizer(kind)
    config = getattr(transformers, config_name)(**defaults | {"vocab_size": len(tokenizer)} | settings)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, model_name)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval(), tokenizer

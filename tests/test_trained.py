"""Trained models whose answer has a known source, and the readers of the formats that trained models come in."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from attnlrp import ATTNLRP, CP_LRP, Explainer, Explanation, audit, propagate
from attnlrp.rules import Rules
from whisper import load, whisper_tiny

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import llama2c
import speech
import train_toy_models as toy

SAMPLES = 100
Trained = tuple[Any, toy.Samples]


# --- the token that was copied ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["t5-reverse", "phi-lookup"])
def trained(request: pytest.FixtureRequest) -> Iterator[Trained]:
    """A model that has learned its task in seconds, and texts that it has not seen."""
    family, task = request.param.split("-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "LENGTH", 4)
        patch.setattr(toy, "PAIRS", 3)
        model = toy.train(family, task, steps=1500, batch=32, width=32, rate=3e-3)
        yield model, toy.TASKS[task](SAMPLES, torch.Generator().manual_seed(1))


def copied_token_is_first(model: Any, samples: toy.Samples, rules: Rules) -> float:
    """How often the source of the first step has the most relevance, of the tokens that are neither <s> nor </s>."""
    with propagate(model, rules) as propagation:
        chosen = toy.logits(model, samples)[:, 0]
    embeddings = propagation.embeddings[0][1]
    (grad,) = torch.autograd.grad(chosen.max(-1).values.sum(), embeddings)
    first = not model.config.is_encoder_decoder  # <s> stands before the prompt, </s> behind it
    relevance = (embeddings * grad).sum(-1)[:, first : first + samples.prompt.shape[1]]
    return (relevance.argmax(-1) == samples.source[:, 0]).double().mean().item()


@pytest.mark.parametrize("rules", [ATTNLRP, CP_LRP], ids=["attnlrp", "cp-lrp"])
def test_the_copied_token_has_the_most_relevance(trained: Trained, rules: Rules) -> None:
    model, samples = trained
    assert toy.accuracy(model, samples) > 0.97
    assert samples.prompt.shape[1] >= 5  # chance is at most 0.2
    assert copied_token_is_first(model, samples, rules) > 0.8


def test_the_books_of_a_trained_model_close(trained: Trained) -> None:
    model, samples = trained
    one = toy.Samples(samples.prompt[:1], samples.answer[:1], samples.source[:1])
    try:
        ledger = audit(model.double(), toy.inputs(model, one))
    finally:
        model.float()
    assert ledger.closes, ledger.leaks()


def test_a_saved_model_is_explained_by_name(trained: Trained, tmp_path: Path) -> None:
    model, samples = trained
    encoder_decoder = model.config.is_encoder_decoder
    model.save_pretrained(tmp_path)
    toy.tokenizer("t5" if encoder_decoder else "phi").save_pretrained(tmp_path)
    text = " ".join(toy.WORDS[k] for k in samples.prompt[0])
    explanation = Explainer.from_pretrained(tmp_path)(text)
    assert isinstance(explanation, Explanation)
    answer = toy.WORDS[samples.answer[0, 0]]
    assert explanation.target.token.strip() == answer
    relevance = explanation.relevance[0].masked_fill(torch.tensor(explanation.special), -torch.inf)
    assert explanation.tokens[int(relevance.argmax())].strip() == answer


@pytest.mark.parametrize("task", toy.TASKS)
def test_the_source_holds_the_answer(task: str) -> None:
    samples = toy.TASKS[task](50, torch.Generator().manual_seed(0))
    assert torch.equal(samples.prompt.gather(1, samples.source), samples.answer)
    assert all((row == token).sum() == 1 for row, token in zip(samples.prompt, samples.answer[:, 0], strict=True))


# --- llama2.c -----------------------------------------------------------------------------------------------------


def exported(model: Any) -> bytes:
    """The bytes that llama2.c would write for a model: rotary pairs are neighbours in it."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    header = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads)
    sign = 1 if config.tie_word_embeddings else -1
    data = struct.pack(
        "<7i", *header, config.num_key_value_heads, sign * config.vocab_size, config.max_position_embeddings
    )

    def rotary(weight: Tensor) -> Tensor:
        halves = weight.view(-1, 2, size // 2, config.hidden_size)
        return torch.stack([halves[:, 0], halves[:, 1]], dim=2)

    layers = model.model.layers
    parts: list[Tensor] = [model.model.embed_tokens.weight]
    parts += [layer.input_layernorm.weight for layer in layers]
    parts += [rotary(layer.self_attn.q_proj.weight) for layer in layers]
    parts += [rotary(layer.self_attn.k_proj.weight) for layer in layers]
    parts += [layer.self_attn.v_proj.weight for layer in layers]
    parts += [layer.self_attn.o_proj.weight for layer in layers]
    parts += [layer.post_attention_layernorm.weight for layer in layers]
    parts += [layer.mlp.gate_proj.weight for layer in layers]
    parts += [layer.mlp.down_proj.weight for layer in layers]
    parts += [layer.mlp.up_proj.weight for layer in layers]
    parts += [model.model.norm.weight, torch.full((config.max_position_embeddings * size,), 7.0)]
    parts += [] if config.tie_word_embeddings else [model.lm_head.weight]
    return data + b"".join(p.detach().contiguous().numpy().astype("<f4").tobytes() for p in parts)


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_export_is_the_same_model(tied: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "vocab_size": 30, "max_position_embeddings": 24, "rms_norm_eps": 1e-5}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more, tie_word_embeddings=tied))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    (tmp_path / "model.bin").write_bytes(exported(model))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        found, expected = (m(input_ids=ids).logits for m in (llama2c.load(tmp_path / "model.bin"), model.eval()))
    torch.testing.assert_close(found, expected)


def test_llama2c_tokenizer_joins_the_best_pair_first(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA4>", " ", "a", "b", "c", "ab", "bc", " a"]
    scores = [0.0] * 9 + [-2.0, -1.0, -3.0]
    data = struct.pack("<i", 6)
    for piece, score in zip(pieces, scores, strict=True):
        data += struct.pack("<fi", score, len(piece)) + piece.encode()
    (tmp_path / "tok.bin").write_bytes(data)
    tokenizer = llama2c.Tokenizer(tmp_path / "tok.bin", len(pieces))
    assert [pieces[k] for k in tokenizer.encode("abc")] == ["<s>", " a", "bc"]
    assert tokenizer.decode(tokenizer.encode("abcä")) == "abcä"


# --- Whisper ------------------------------------------------------------------------------------------------------


def variable(name: str, kind: int, values: Any) -> bytes:
    raw = values.tobytes()
    encoded = name.encode() + b"\0"
    head = struct.pack("<H", len(encoded)) + encoded + struct.pack("<B", values.ndim)
    return head + struct.pack(f"<{values.ndim}I", *values.shape) + struct.pack("<BI", kind, len(raw)) + raw


def container(version: int = 6) -> bytes:
    """Floats in half precision, integers with a scale for each row, an alias."""
    variables = [
        variable("a/weight", 4, np.array([[0.5, -2.0]], dtype="<f2")),
        variable("b/weight", 1, np.array([[10, -20], [30, 40]], dtype="i1")),
        variable("b/weight_scale", 0, np.array([10.0, 2.0], dtype="<f4")),
    ]
    name = b"Spec\0"
    head = struct.pack("<IH", version, len(name)) + name + struct.pack("<II", 3, len(variables))
    alias = struct.pack("<IH", 1, 4) + b"c/w\0" + struct.pack("<H", 9) + b"a/weight\0"
    return head + b"".join(variables) + alias


def test_ctranslate2_files_are_read_with_scales_and_aliases() -> None:
    name, variables = whisper_tiny.read_ctranslate2(container())
    assert name == "Spec"
    assert set(variables) == {"a/weight", "b/weight", "c/w"}
    assert variables["c/w"].tolist() == [[0.5, -2.0]]
    assert variables["b/weight"].tolist() == [[1.0, -2.0], [15.0, 20.0]]


def test_another_version_of_the_format_is_refused() -> None:
    with pytest.raises(ValueError, match="got version 9 of the format, expected 4, 5 or 6"):
        whisper_tiny.read_ctranslate2(container(version=9))


@pytest.mark.packaged
def test_whisper_hears_and_its_books_close() -> None:
    model, tokenizer = load()
    model = whisper_tiny.shorten(model, 5)
    mel = whisper_tiny.features(whisper_tiny.tone(), seconds=5)
    heard = whisper_tiny.transcribe(model, mel)
    assert tokenizer.decode(heard[2:]).strip()  # it writes something down, and goes on after its start tokens
    ledger = audit(model, {"input_features": mel, "decoder_input_ids": torch.tensor([heard[:4]]), "use_cache": False})
    assert ledger.closes, ledger.leaks()
    assert set(ledger.inputs) == {"input_features", "embeddings"}
    assert all(abs(value) > 1e-3 for value in ledger.inputs.values())


@pytest.mark.packaged
def test_whisper_writes_down_what_is_said() -> None:
    model, tokenizer = load()
    if not speech.installed():
        pytest.skip(f"espeak-ng is not installed: {speech.INSTALL}")
    ids = whisper_tiny.transcribe(model, whisper_tiny.features(speech.speak("My dog likes to sleep in the garden.")))
    assert tokenizer.decode(ids).strip() == "My dog likes to sleep in the garden."

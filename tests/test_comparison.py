"""What a model says before and after an intervention."""

from __future__ import annotations

import pytest
import torch

import tiny_tasks
from attnlrp import Direction, Explainer, InputError, Neuron, Scale, compare, intervene
from tiny_tokenizers import build

TEXT = "Paris is the capital of"


def explainer(name: str = "llama") -> Explainer:
    return Explainer(*build(name, torch.float64))


def test_distributions_generations_and_divergence_by_hand() -> None:
    ours, changes = explainer(), {Neuron(1, n): 3.0 for n in range(6)}
    found = compare(ours, TEXT, changes, generate=4, top=5)
    ids = torch.tensor([ours.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        p = ours.model(input_ids=ids).logits[0, -1].softmax(-1)
        plain = ours.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        with intervene(ours.model, changes):
            q = ours.model(input_ids=ids).logits[0, -1].softmax(-1)
            changed = ours.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    decode = ours.tokenizer.decode
    assert (found.before, found.after) == (
        decode(plain, skip_special_tokens=True),
        decode(changed, skip_special_tokens=True),
    )
    assert found.kl == pytest.approx((p * (p / q).log()).sum().item())
    assert found.kl > 0
    rose, fell = (q - p).topk(5), (p - q).topk(5)
    assert [s.after - s.before for s in found.rose] == pytest.approx(rose.values.tolist())
    assert [s.before - s.after for s in found.fell] == pytest.approx(fell.values.tolist())
    assert found.rose[0].before == pytest.approx(p[rose.indices[0]].item())
    assert found.changes == {f"Neuron(layer=1, index={n})": "Set(value=3.0)" for n in range(6)}
    assert found.to_dict()["kl"] == found.kl


def test_nothing_changes_if_nothing_is_changed() -> None:
    found = compare(explainer(), TEXT, {Neuron(1, 3): Scale(1.0)}, generate=3)
    assert (found.kl, found.rose, found.fell) == (0.0, (), ())
    assert found.before == found.after
    assert found.prediction[0] == found.prediction[1]


def test_classifiers_compare_their_classes() -> None:
    found = compare(explainer("bert"), TEXT, {Direction("layer.1:after", torch.ones(32)): 3.0})
    assert {s.output for s in (*found.rose, *found.fell)} <= {"negative", "neutral", "positive"}
    assert len(found.rose) + len(found.fell) >= 2
    assert (found.before, found.after) == ("", "")
    assert found.changes == {"a direction of layer.1:after": "Set(value=3.0)"}


def test_an_encoder_decoder_and_a_masked_model() -> None:
    found = compare(tiny_tasks.build("t5"), "the film", {"encoder.block.0.layer.1.DenseReluDense:1": 30.0}, generate=3)
    assert found.kl > 0
    masked = compare(tiny_tasks.build("bert-mlm"), "the [MASK] was", {"layer.0.output:1": 30.0})
    assert masked.kl > 0


def test_what_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="outputs are compared for causal-lm"):
        compare(tiny_tasks.build("bert-ner"), TEXT, {"layer.0.output:1": 0.0})
    with pytest.raises(InputError, match="top: got 0"):
        compare(explainer(), TEXT, {Neuron(0, 0): 0.0}, top=0)
    with pytest.raises(InputError, match="generate: "):
        compare(explainer("bert"), TEXT, {Neuron(0, 0): 0.0}, generate=3)

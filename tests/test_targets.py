"""What is explained: the right token, the right number, and words that help where there is none."""

from __future__ import annotations

import math

import pytest
import torch

from attnlrp import OTHERS, Continuation, TargetError
from attnlrp.targets import Scalar, class_index, token_index
from tiny_tokenizers import KINDS, LABELS, build_tokenizer

LOGITS = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)


def index(target: object, kind: str = "bytes", **options: str) -> int:
    tokenizer = build_tokenizer(kind)
    return token_index(target, tokenizer, len(tokenizer), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "text", "token"),
    [
        ("bytes", " capital", "Ġcapital"),
        ("bytes", "is", "is"),
        ("bytes", " is", "Ġis"),
        ("bytes", "\n", "Ċ"),
        ("bytes", "<|endoftext|>", "<|endoftext|>"),
        ("sentencepiece", " capital", "▁capital"),
        ("sentencepiece", "capital", "▁capital"),
        ("sentencepiece", "</s>", "</s>"),
        ("wordpiece", "capital", "capital"),
        ("wordpiece", " capital", "capital"),
        ("wordpiece", "[UNK]", "[UNK]"),
    ],
)
def test_the_text_of_a_token_gives_its_index(kind: str, text: str, token: str) -> None:
    assert index(text, kind) == build_tokenizer(kind).convert_tokens_to_ids(token)
    assert build_tokenizer(kind).convert_ids_to_tokens(index(text, kind)) == token


def test_a_leading_space_makes_a_different_token() -> None:
    assert index(" is") != index("is")


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_taken_as_it_is(kind: str) -> None:
    size = len(build_tokenizer(kind))
    assert [index(k, kind) for k in (0, 5, size - 1)] == [0, 5, size - 1]


def test_the_size_is_that_of_the_logits() -> None:
    """Models pad their vocabulary beyond the tokenizer's."""
    assert token_index(450, build_tokenizer("bytes"), 500) == 450


@pytest.mark.parametrize("target", [-1, 380, 10**9])
def test_an_index_out_of_range_is_refused(target: int) -> None:
    with pytest.raises(TargetError, match=f"^target: index {target} is not in the vocabulary, expected 0 to 379$"):
        index(target)


def test_the_option_is_named() -> None:
    with pytest.raises(TargetError, match=r"^against: index 999 is not"):
        index(999, option="against")


@pytest.mark.parametrize("text", ["quixotic!", "日本国", ""])
def test_a_text_outside_the_vocabulary_is_refused(text: str) -> None:
    with pytest.raises(TargetError, match=r"^target: "):
        index(text, "wordpiece")


def test_an_unknown_token_is_not_taken_for_the_text() -> None:
    assert build_tokenizer("wordpiece").encode("Q", add_special_tokens=False) == [1]
    with pytest.raises(TargetError, match="'Q' is not in the vocabulary; give the text of a token, or its index"):
        index("Q", "wordpiece")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_several_tokens_are_shown_and_their_sum_offered(kind: str) -> None:
    text = " Germany Italy"
    with pytest.raises(TargetError) as caught:
        index(text, kind)
    message = str(caught.value)
    count = len(build_tokenizer(kind).encode(text, add_special_tokens=False))
    assert f"' Germany Italy' is {count} tokens" in message
    assert "expected one" in message
    assert "target=attnlrp.Continuation(' Germany Italy')" in message
    assert "--target-sum" in message


def test_the_tokens_of_a_message_are_readable() -> None:
    with pytest.raises(TargetError, match=r"\['x', '😀\[1/4\]', '😀\[2/4\]', '😀\[3/4\]', '😀\[4/4\]'\]"):
        index("x😀")


def test_a_space_that_no_token_has_is_not_dropped() -> None:
    """`Par` is a token and ` Par` is two: explaining the one for the other would be silent."""
    assert index("Par") >= 0
    with pytest.raises(TargetError, match="is 2 tokens"):
        index(" Par")


@pytest.mark.parametrize("target", [True, 1.5, None, ["a"]])
def test_what_is_neither_text_nor_index_is_refused(target: object) -> None:
    function = getattr(token_index, "__wrapped__", token_index)  # the tests check annotations too; users' calls do not
    with pytest.raises(TargetError, match="expected the text of a token or its index"):
        function(target, build_tokenizer("bytes"), 380)


@pytest.mark.parametrize(("target", "expected"), [("neutral", 1), ("Neutral", 1), (2, 2), (0, 0), ("2", 2)])
def test_a_class_by_name_or_index(target: str | int, expected: int) -> None:
    assert class_index(target, LABELS) == expected


def test_the_name_of_a_class_comes_before_its_index() -> None:
    assert class_index("2", ["zero", "2", "two"]) == 1


@pytest.mark.parametrize("target", ["happy", "3", "²", 3, -1, True, "", "neutra"])
def test_an_unknown_class_is_refused_and_the_classes_listed(target: str | int) -> None:
    with pytest.raises(TargetError) as caught:
        class_index(target, LABELS, option="against")
    assert str(caught.value) == (
        f"against: got {target!r}, expected one of the classes ['negative', 'neutral', 'positive'] or an index below 3"
    )


def test_a_logit() -> None:
    assert Scalar(0, 3).value(LOGITS) == 4.0


def test_a_contrast_with_one_output() -> None:
    assert Scalar(0, 3, against=1).value(LOGITS) == 6.0


def test_a_contrast_with_all_others_is_plus_one_and_minus_one_by_n() -> None:
    logits = LOGITS.clone().requires_grad_()
    value = Scalar(0, 2, against=OTHERS).value(logits)
    value.backward()
    assert value.item() == pytest.approx(0.5 - (1.0 - 2.0 + 4.0) / 3)
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([-1 / 3, -1 / 3, 1.0, -1 / 3])


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])
def test_a_probability_at_a_temperature(temperature: float) -> None:
    powers = [math.exp(x / temperature) for x in LOGITS.tolist()]
    value = Scalar(0, 3, output="probability", temperature=temperature).value(LOGITS)
    assert value.item() == pytest.approx(powers[3] / sum(powers), rel=1e-12)


def test_the_gradient_of_a_saturated_probability_comes_back_with_temperature() -> None:
    def slope(temperature: float) -> float:
        logits = torch.tensor([0.0, 60.0], requires_grad=True)
        Scalar(0, 1, output="probability", temperature=temperature).value(logits).backward()
        assert logits.grad is not None
        return logits.grad[1].item()

    assert slope(1.0) == 0
    assert slope(20.0) > 1e-3


def test_targets_are_frozen_and_compare_by_value() -> None:
    assert Continuation(" a b") == Continuation(" a b")
    assert {Scalar(0, 1), Scalar(0, 1)} == {Scalar(0, 1)}
    with pytest.raises(AttributeError):
        Continuation("a").text = "b"  # type: ignore[misc]

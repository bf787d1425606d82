"""Any tokenizer, any script: pieces decode to the text, and words never cut a character."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from attnlrp.tokens import name_of, pieces, words
from tiny_tokenizers import KINDS, build_tokenizer

PART = re.compile(r"(?P<text>.+)\[(?P<index>\d+)/(?P<count>\d+)\]", re.DOTALL)
TEXTS = {
    "english": "Paris is the capital of France.",
    "spaces": "  two  spaces at  the end  ",
    "apostrophe": "don't go there, she's 'walking'!",
    "chinese": "你好，世界。中国很大",
    "japanese": "日本語です。カタカナとひらがな",
    "mixed": "the 語 of 日本 is nice",
    "emoji": "good 😀👍🏽 end",
    "joined": "a family 👨‍👩‍👧‍👦, a flag 🏳️‍🌈",
    "flags": "🇩🇪🇫🇷 and 🇯🇵",
    "arabic": "السلام عليكم، كيف الحال؟",
    "persian": "می\u200cخواهم",
    "hindi": "नमस्ते दुनिया",
    "marks": "e\u0301a\u0308o\u0302 cafe\u0301 z\u0323\u0307",
    "lines": "one\ntwo\n\n\tthree\r\nfour\n",
    "symbols": "x = a[0] + b[1/2]; # <b> & </b> [red]y[/red]",
    "beyond": "𝔘𝔫𝔦 𐍈 🀄",
}
ONE_CHARACTER = ("👨\u200d👩\u200d👧\u200d👦", "👍🏽", "🏳️\u200d🌈", "e\u0301", "z\u0323\u0307", "म\u200dस्")


def joined(texts: tuple[str, ...]) -> str:
    """The text that the pieces show, each character once."""
    shown = []
    for text in texts:
        part = PART.fullmatch(text)
        shown.append(text if part is None else part["text"] if part["index"] == "1" else "")
    return "".join(shown)


def split(kind: str, text: str) -> tuple[Any, list[int], tuple[str, ...]]:
    tokenizer = build_tokenizer(kind)
    ids = tokenizer(text).input_ids
    return tokenizer, ids, pieces(tokenizer, ids)


def grouped(kind: str, text: str) -> list[str]:
    tokenizer, ids, texts = split(kind, text)
    index = words(texts, [i in tokenizer.all_special_ids for i in ids])
    return [joined(tuple(t for t, k in zip(texts, index, strict=True) if k == word)) for word in range(index[-1] + 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEXTS)
def test_pieces_join_to_the_decoded_text(kind: str, name: str) -> None:
    tokenizer, ids, texts = split(kind, TEXTS[name])
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert len(texts) == len(ids)
    # WordPiece writes no space beside a special token within a text; the pieces show one word each
    assert (
        joined(texts).replace(" ", "") == decoded.replace(" ", "") if kind == "wordpiece" else joined(texts) == decoded
    )
    assert "\ufffd" not in "".join(texts)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("name", TEXTS)
def test_pieces_show_the_text_itself(kind: str, name: str) -> None:
    """These two tokenizers lose nothing: what is shown is the prompt, after the special tokens and their space."""
    shown = joined(split(kind, TEXTS[name])[2])
    assert shown.removeprefix("<s> ") == TEXTS[name]


def test_bytes_of_one_character_are_numbered() -> None:
    assert split("bytes", "x😀")[2] == ("x", "😀[1/4]", "😀[2/4]", "😀[3/4]", "😀[4/4]")
    assert split("sentencepiece", "語")[2] == ("<s>", " ", "語[1/3]", "語[2/3]", "語[3/3]")


def test_a_run_of_byte_tokens_longer_than_the_context_is_read_character_by_character() -> None:
    """Byte fallback gives up a whole run of bytes if it starts in the middle of a character."""
    texts = split("sentencepiece", "日本語の文字列")[2]
    assert [t for t in texts if t.endswith("[1/3]")] == [f"{c}[1/3]" for c in "日本語の文字列"]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_half_a_character_does_not_spoil_what_follows(kind: str) -> None:
    tokenizer = build_tokenizer(kind)
    half = tokenizer.encode("😀", add_special_tokens=False)[-2:-1]
    rest = tokenizer.encode("日 the", add_special_tokens=False)
    texts = pieces(tokenizer, [*half, *rest])
    assert texts[0] == "\ufffd"
    assert joined(texts[1:]).lstrip() == "日 the"


def test_a_text_that_ends_in_the_middle_of_a_character_ends_with_the_replacement_character() -> None:
    tokenizer = build_tokenizer("bytes")
    ids = tokenizer.encode("a😀")[:-1]
    assert pieces(tokenizer, ids) == ("a", *["\ufffd"] * (len(ids) - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_inside_the_text_keep_their_names(kind: str) -> None:
    tokenizer = build_tokenizer(kind)
    name = {"bytes": "<|endoftext|>", "wordpiece": "[SEP]", "sentencepiece": "</s>"}[kind]
    _, ids, texts = split(kind, f"the film {name} the end")
    at = texts.index(name)
    assert ids[at] == tokenizer.convert_tokens_to_ids(name)
    assert joined(texts[:at]).endswith("film") or joined(texts[:at]).endswith("film ")
    special = [i in tokenizer.all_special_ids for i in ids]
    word = words(texts, special)
    assert word.count(word[at]) == 1, "a special token is a word of its own"


def test_a_special_token_in_the_middle_of_a_character_stands_alone() -> None:
    tokenizer = build_tokenizer("bytes")
    a, b, c, d = tokenizer.encode("😀")
    assert pieces(tokenizer, [a, b, 0, c, d]) == ("\ufffd", "\ufffd", "<|endoftext|>", "\ufffd", "\ufffd")


def test_an_index_beyond_the_tokenizer_has_a_name() -> None:
    """Models pad their vocabulary, so that they can generate indices that the tokenizer lacks."""
    tokenizer = build_tokenizer("bytes")
    assert pieces(tokenizer, [tokenizer.encode("x")[0], 5000]) == ("x", "<5000>")


def test_a_space_that_the_tokenizer_strips_is_an_empty_piece() -> None:
    tokenizer = build_tokenizer("sentencepiece")
    ids = tokenizer.encode("日 is", add_special_tokens=False)
    assert pieces(tokenizer, ids) == ("", "日[1/3]", "日[2/3]", "日[3/3]", " is")


def test_a_name_keeps_its_space_and_a_whole_text_reads_as_one() -> None:
    for kind in ("bytes", "sentencepiece"):
        tokenizer = build_tokenizer(kind)
        ids = tokenizer.encode("the capital of", add_special_tokens=False)
        assert name_of(tokenizer, ids[-2:]) == " capital of"
        assert tokenizer.decode(ids[-2:]) == (" capital of" if kind == "bytes" else "capital of")


def test_no_token_has_no_piece() -> None:
    assert pieces(build_tokenizer("bytes"), []) == ()
    assert words([], []) == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEXTS)
def test_words_keep_order_and_lose_no_character(kind: str, name: str) -> None:
    tokenizer, ids, texts = split(kind, TEXTS[name])
    index = words(texts, [i in tokenizer.all_special_ids for i in ids])
    assert len(index) == len(ids)
    assert index[0] == 0
    assert all(b - a in (0, 1) for a, b in itertools.pairwise(index))
    assert "".join(grouped(kind, TEXTS[name])) == joined(texts)
    for k, text in enumerate(texts[1:], start=1):
        part = PART.fullmatch(text)
        if part and part["index"] != "1" and PART.fullmatch(texts[k - 1]):
            assert index[k] == index[k - 1], f"{text!r} was cut from {texts[k - 1]!r}"


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("character", ONE_CHARACTER)
def test_a_character_of_several_code_points_is_one_word(kind: str, character: str) -> None:
    found = grouped(kind, f"the {character} end")
    assert any(character in word for word in found), found
    assert [w.strip() for w in found if "end" in w] == ["end"]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_flags_are_not_cut(kind: str) -> None:
    assert any("🇩🇪" in word for word in grouped(kind, "a 🇩🇪🇫🇷 b"))


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize(
    "text", ["unbelievable unhappiness", "don't walking_around", "नमस्ते दुनिया", "می\u200cخواهم", "cafe\u0301s"]
)
def test_pieces_of_a_word_share_its_index(kind: str, text: str) -> None:
    found = [word.strip() for word in grouped(kind, text)]
    assert [word for word in found if word and word != "<s>"] == text.split()


def test_continuations_of_wordpiece_join_their_word() -> None:
    tokenizer, ids, texts = split("wordpiece", "the unhappiest film")
    raw = tokenizer.convert_ids_to_tokens(ids)
    assert any(name.startswith("##") for name in raw), "the test needs a word of several pieces"
    assert not any("##" in text for text in texts)
    assert [w.strip() for w in grouped("wordpiece", "the unhappiest film")] == [
        "[CLS]",
        "the",
        "unhappiest",
        "film",
        "[SEP]",
    ]
    index = words(texts, [name.startswith("[") for name in raw])
    for k, name in enumerate(raw):
        if name.startswith("##"):
            assert index[k] == index[k - 1]


def test_letters_and_punctuation_are_different_words() -> None:
    assert "".join(f"{word}|" for word in grouped("bytes", 'the end."so!"')) == 'the| end|."|so|!"|'
    assert words(["a", "[", "b", "]", "c"], [False] * 5) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("text", ["你好世界", "สวัสดี", "日本語です"])
def test_scripts_without_spaces_have_a_word_for_each_character(text: str) -> None:
    found = grouped("sentencepiece", text)[2:]
    assert "".join(found) == text
    assert len(found) > 1
    if text == "你好世界":
        assert found == list(text)


def test_a_script_without_spaces_ends_a_word_of_another() -> None:
    assert words(["the", "語", "of", "日"], [False] * 4) == (0, 1, 2, 3)


def test_white_space_separates_words() -> None:
    assert words(["one", "\n", "two", " three", "\t"], [False] * 5) == (0, 1, 2, 3, 4)

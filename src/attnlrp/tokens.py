"""Token indices as readable text: pieces that decode exactly, and the words they belong to."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

__all__ = ["name_of", "pieces", "words"]

_LONGEST_CHARACTER = 8  # byte pieces of one character; more than that is not text
_INCOMPLETE = "\ufffd"
_PART = re.compile(r"\[(?P<index>\d+)/\d+\]$")
_JOINER = "\u200d"
_SKIN = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
_FLAG = frozenset(map(chr, range(0x1F1E6, 0x1F200)))
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)  # Thai, Lao, Burmese, Khmer, Chinese, Japanese: written without spaces between words


def pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Text of each token; "é[1/2]" and "é[2/2]" for two tokens that hold the bytes of one character.

    Args:
        tokenizer: any tokenizer of `transformers`.
        ids: token indices of one text.

    Returns:
        One string for each token; joined (each character once) they are the decoded text.
    """
    special = set(tokenizer.all_special_ids)
    texts: list[str] = []
    before: list[int] = []  # the last whole piece
    start = 0
    while start < len(ids):
        name = tokenizer.convert_ids_to_tokens(ids[start])
        if name is None:  # models pad their vocabulary beyond that of the tokenizer
            texts.append(f"<{ids[start]}>")
            start += 1
            continue
        end, text = (start + 1, str(name)) if ids[start] in special else _character(tokenizer, ids, start, before)
        count = end - start
        texts += [text] if count == 1 else [f"{text}[{k}/{count}]" for k in range(1, count + 1)]
        before = before if _INCOMPLETE in text else list(ids[start:end])
        start = end
    return tuple(texts)


def _character(tokenizer: Any, ids: Sequence[int], start: int, before: list[int]) -> tuple[int, str]:
    """The smallest run of tokens from `start` that decodes to whole characters: its end, and its text."""
    for end in range(start + 1, min(start + _LONGEST_CHARACTER, len(ids)) + 1):
        text = _decode_after(tokenizer, before, ids[start:end])
        if _INCOMPLETE not in text:
            return end, text
    return start + 1, _decode_after(tokenizer, before, ids[start : start + 1])


def _decode_after(tokenizer: Any, before: list[int], ids: Sequence[int]) -> str:
    """Text of a piece; decoded after a whole piece, as some tokenizers strip the leading space of a text.

    Byte tokens must not follow half a character: tokenizers with byte fallback give up a whole run of bytes together.
    """
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    head = tokenizer.decode(before, **options) if before else ""
    return str(tokenizer.decode([*before, *ids], **options))[len(head) :]


def name_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of tokens inside of a text: with their leading space, which some tokenizers strip at a start."""
    return _decode_after(tokenizer, tokenizer.encode("a", add_special_tokens=False), ids)


def words(texts: Sequence[str], special: Sequence[bool], segments: Sequence[str] = ()) -> tuple[int, ...]:
    """Index of the word that each piece belongs to.

    A word starts at white space, at a special token, at a change between letters and punctuation, at every character
    of a script that is written without spaces, and at another segment; never inside of a character. The patches of an
    image are one word.
    """
    index = -1
    result = []
    segments = segments or [""] * len(texts)
    for k, text in enumerate(texts):
        apart = k == 0 or segments[k] != segments[k - 1]
        if apart or (segments[k] != "image" and _starts_word(texts[k - 1], text, special[k - 1] or special[k])):
            index += 1
        result.append(index)
    return tuple(result)


def _starts_word(before: str, text: str, special: bool) -> bool:
    part, ended = _PART.search(text), _PART.search(before)
    if part and part["index"] != "1":
        return False
    if special or not text or not before:
        return True
    first, last = text[0], (before[: ended.start()] if ended else before)[-1:]
    if _joins(last, first):
        return False
    if first.isspace() or last.isspace() or _UNSPACED.match(first) or _UNSPACED.match(last):
        return True
    return _is_word(first) != _is_word(last)


def _joins(last: str, first: str) -> bool:
    """Whether two characters are shown as one: an accent, a joined emoji or its skin colour, the letters of a flag."""
    attached = unicodedata.category(first).startswith("M") or first in _SKIN or _JOINER in (last, first)
    return (attached and not last.isspace()) or (last in _FLAG and first in _FLAG)


def _is_word(character: str) -> bool:
    return character.isalnum() or character in "_'’\u200c" or unicodedata.category(character).startswith("M")

"""Token indices as readable text: pieces that decode exactly, and the words they belong to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["pieces", "words"]

_CONTEXT = 4  # decoded before a piece, so that a tokenizer that strips leading spaces does not strip this piece's
_LONGEST_CHARACTER = 8  # byte pieces of one character; more than that is not text
_INCOMPLETE = "\ufffd"
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
    start = 0
    while start < len(ids):
        if ids[start] in special:
            texts.append(str(tokenizer.convert_ids_to_tokens(ids[start])))
            start += 1
            continue
        end, text = _character(tokenizer, ids, start, special)
        count = end - start
        texts += [text] if count == 1 else [f"{text}[{k}/{count}]" for k in range(1, count + 1)]
        start = end
    return tuple(texts)


def _character(tokenizer: Any, ids: Sequence[int], start: int, special: set[int]) -> tuple[int, str]:
    """The smallest run of tokens from `start` that decodes to whole characters: its end, and its text."""
    for end in range(start + 1, min(start + _LONGEST_CHARACTER, len(ids)) + 1):
        if end - start > 1 and ids[end - 1] in special:
            break
        text = _decode_between(tokenizer, ids, start, end)
        if text and not text.endswith(_INCOMPLETE):
            return end, text
    return start + 1, str(tokenizer.convert_ids_to_tokens(ids[start]))


def _decode_between(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> str:
    context = ids[max(0, start - _CONTEXT) : start]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(list(context), **options) if context else ""
    return str(tokenizer.decode([*context, *ids[start:end]], **options))[len(before) :]


def words(texts: Sequence[str], special: Sequence[bool]) -> tuple[int, ...]:
    """Index of the word that each piece belongs to.

    A word starts at white space, at a special token, at a change between letters and punctuation, and at every
    character of a script that is written without spaces.
    """
    index = -1
    result = []
    for k, text in enumerate(texts):
        if k == 0 or _starts_word(texts[k - 1], text, special[k - 1] or special[k]):
            index += 1
        result.append(index)
    return tuple(result)


def _starts_word(before: str, text: str, special: bool) -> bool:
    if re.search(r"\[([2-9]|\d\d)/\d+\]$", text):
        return False
    if special or not text or text[0].isspace() or before[-1:].isspace():
        return True
    if _UNSPACED.match(text) or _UNSPACED.match(before[-1:]):
        return True
    return _is_word(text[0]) != _is_word(before[-1:])


def _is_word(character: str) -> bool:
    return character.isalnum() or character in "_'’\u0300-\u036f" or character == "]"

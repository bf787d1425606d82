"""What is explained: one scalar of the model's output for each row of relevance."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor

from attnlrp.errors import TargetError
from attnlrp.tokens import pieces

__all__ = ["OTHERS", "Continuation", "Head", "Neuron", "Output", "Scalar", "Target", "class_index", "token_index"]

OTHERS: Final = "<others>"
"""`against=OTHERS`: compare with the mean of all other outputs (+1 on the target, -1/N on each of N others)."""


_LISTED = 20  # classes, above which an error names those with a similar name


@dataclass(frozen=True)
class Continuation:
    """A text of several tokens after the prompt; explained is the sum of the logits of its tokens, each after the last.

    Args:
        text: what follows the prompt, with its leading space.
    """

    text: str


@dataclass(frozen=True)
class Neuron:
    """A neuron of an MLP: an input of its last linear layer.

    Args:
        layer: number of the layer, or its address, such as "layers.16.mlp" or "layers.3.mlp.experts.5".
        index: which of its neurons.
    """

    layer: int | str
    index: int


@dataclass(frozen=True)
class Head:
    """A head of an attention.

    Args:
        layer: number of the layer, or its address, such as "layers.16.self_attn".
        index: which of its heads.
    """

    layer: int | str
    index: int


Target: TypeAlias = "str | int | Continuation | Neuron | None"
Output: TypeAlias = Literal["logit", "probability"]


@dataclass(frozen=True)
class Scalar:
    """One output at one position, or its contrast with another.

    Args:
        position: row of the logits: index of the token whose prediction is explained; None if there is one output.
        id: explained output.
        against: output to subtract; `OTHERS` for the mean of all others; None for none.
        output: "logit", or "probability" after a softmax.
        temperature: of that softmax; above 1 it is not saturated and has a gradient (appendix A.2.4).
    """

    position: int | None
    id: int
    against: int | str | None = None
    output: Output = "logit"
    temperature: float = 1.0

    def value(self, logits: Tensor) -> Tensor:
        """The scalar, from the logits of its position (vocab,)."""
        if self.output == "probability":
            return torch.softmax(logits / self.temperature, dim=-1)[self.id]
        chosen = logits[self.id]
        if self.against is None:
            return chosen
        if self.against == OTHERS:
            return chosen - (logits.sum() - chosen) / (logits.shape[-1] - 1)
        return chosen - logits[int(self.against)]


def token_index(target: str | int, tokenizer: Any, size: int, *, option: str = "target") -> int:
    """Index of a single token of the vocabulary.

    Args:
        target: an index, or the text of a token, with its leading space if it has one.
        tokenizer: any tokenizer of `transformers`.
        size: number of logits.
        option: what to call it in an error.

    Raises:
        TargetError: not in the vocabulary, or more than one token.
    """
    if isinstance(target, bool) or not isinstance(target, (int, str)):
        raise TargetError(f"{option}: got {target!r}, expected the text of a token or its index")
    if isinstance(target, int):
        if not 0 <= target < size:
            raise TargetError(f"{option}: index {target} is not in the vocabulary, expected 0 to {size - 1}")
        return target
    ids = tokenizer.encode(target, add_special_tokens=False)
    if len(ids) != 1:
        ids = _whole_token(target, tokenizer) or ids
    if not ids or (ids == [tokenizer.unk_token_id] and target != tokenizer.unk_token):
        raise TargetError(f"{option}: {target!r} is not in the vocabulary; give the text of a token, or its index")
    if len(ids) > 1:
        parts = list(pieces(tokenizer, ids))
        raise TargetError(
            f"{option}: {target!r} is {len(ids)} tokens, {parts}, expected one. Explain the sum over its tokens with "
            f"target=attnlrp.Continuation({target!r}) (command line: --target-sum), or choose one of them"
        )
    return int(ids[0])


def _whole_token(text: str, tokenizer: Any) -> list[int]:
    """A token that holds the text as it stands, for tokenizers that add a space of their own before a text."""
    vocabulary = tokenizer.get_vocab()
    for form in (text, text.replace(" ", "▁"), text.replace(" ", "Ġ")):
        if form in vocabulary:
            return [vocabulary[form]]
    return []


def class_index(target: str | int, labels: Sequence[str], *, option: str = "target") -> int:
    """Index of a class, from its index or its name; of a name such as "goldfish, Carassius auratus", a part will do.

    Raises:
        TargetError: no such class, or several.
    """
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(labels):
        return target
    if isinstance(target, str) and target in labels:
        return labels.index(target)
    if isinstance(target, str) and target.isdecimal() and int(target) < len(labels):
        return int(target)
    wanted = str(target).strip().casefold()
    found = [i for i, label in enumerate(labels) if wanted in [part.strip() for part in label.casefold().split(",")]]
    if len(found) == 1 and isinstance(target, str):
        return found[0]
    if found:
        several = ", ".join(f"#{i} {labels[i]!r}" for i in found)
        raise TargetError(f"{option}: {target!r} is the name of several classes, {several}; give an index")
    near = difflib.get_close_matches(wanted, labels, n=5) if len(labels) > _LISTED else []
    known = f"{near or labels[:_LISTED]} and others" if len(labels) > _LISTED else list(labels)
    raise TargetError(f"{option}: got {target!r}, expected one of the classes {known} or an index below {len(labels)}")

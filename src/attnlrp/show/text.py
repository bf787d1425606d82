"""What all renderers say in the same words: tokens, numbers, targets, the sum."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from attnlrp.explanation import ExplainedTarget, Explanation
from attnlrp.show import colours

__all__ = [
    "TopToken",
    "absorbers",
    "balance",
    "column",
    "facts",
    "heading",
    "inline",
    "isolate",
    "label",
    "quantity",
    "runners_up",
    "signed",
    "top",
]

_DIGITS = 4
_WIDTH = 32
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, surrogate, line and paragraph separators
_ABSORBERS = "biases, softmax and constants absorb"
_PICTURES = {"\n": "↵", "\t": "⇥"}
_EDGES = re.compile(r"^ +| +$")
# Joiners between two characters beyond ASCII shape an emoji or a Persian word; elsewhere they are hidden text.
_JOINER = re.compile(r"(?<=[^\x00-\x7f])[\u200c\u200d](?=[^\x00-\x7f])")


class TopToken(NamedTuple):
    """One row of the table of the most relevant tokens.

    Args:
        position: index into `Explanation.tokens`.
        token: its label.
        relevance: formatted, in the unit of the target.
        share: of the sum of absolute relevance, formatted in percent.
        size: relevance as a fraction of the largest magnitude, in [-1, 1].
    """

    position: int
    token: str
    relevance: str
    share: str
    size: float


def inline(token: str) -> str:
    """A token inside running text: spaces stay, a newline shows and breaks the line, nothing is invisible."""
    return "↵\n".join(_visible(part) for part in token.split("\n"))


def label(token: str, *, width: int = _WIDTH) -> str:
    """A token on its own, on one line: spaces at the edges show as ␣, an empty token as ∅.

    Args:
        token: any text.
        width: characters after which the label is cut.
    """
    shown = _visible(_EDGES.sub(lambda spaces: "␣" * len(spaces[0]), token)) or "∅"
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def isolate(shown: str) -> str:
    """Keep right-to-left text from reordering its neighbours in plain text."""
    mixed = any(unicodedata.bidirectional(character) in ("R", "AL", "AN") for character in shown)
    return f"\u2068{shown}\u2069" if mixed else shown


def signed(value: float, unit: str = "") -> str:
    """A number with its sign and four significant digits, and its unit: "+1.234 logit"."""
    number = f"{value:+#.{_DIGITS}g}".rstrip(".") if value else "0"
    return f"{number} {unit}".rstrip()


def column(values: Sequence[float]) -> list[str]:
    """Signed numbers with the same count of decimals: four significant digits for the largest."""
    largest = colours.limit(values)
    exponent = math.floor(math.log10(largest)) if largest else 0
    if not -4 <= exponent <= 6:
        return [f"{value:+.{_DIGITS - 1}e}" for value in values]
    return [f"{value:+.{max(0, _DIGITS - 1 - exponent)}f}" for value in values]


def heading(explanation: Explanation) -> str:
    """Where the numbers come from: model, rules, number of tokens, version."""
    model, rules = label(explanation.model, width=80), label(explanation.rules)
    return f"{model} · rules {rules} · {len(explanation.tokens)} tokens · attnlrp {explanation.version}"


def quantity(target: ExplainedTarget) -> str:
    """The explained scalar with its unit: "logit +14.52"."""
    return f"{target.unit}{' difference' if target.against is not None else ''} {signed(target.logit)}"


def facts(explanation: Explanation, target: ExplainedTarget) -> list[str]:
    """What is known of a target besides its name: value, rank, contrast, position."""
    read = [] if target.position is None else [(target.position, explanation.tokens[target.position])]
    at = [f"read at token {position} {isolate(label(token))}" for position, token in read]
    rank = [] if target.rank is None else [f"rank {target.rank}"]
    against = [] if target.against is None else [f"against {isolate(label(target.against))}"]
    return [quantity(target), *against, *rank, *at]


def runners_up(target: ExplainedTarget) -> list[tuple[str, str]]:
    """(label, logit) of the candidates other than the target, best first."""
    return [(label(c.token), signed(c.logit)) for c in target.candidates if c.id != target.id]


def top(explanation: Explanation, target: int, count: int) -> list[TopToken]:
    """The most relevant tokens of one target, largest magnitude first."""
    row = explanation.relevance[target].tolist()
    total = sum(abs(value) for value in row if math.isfinite(value))
    found = explanation.top(count, target=target)
    sizes = colours.normalise(row)
    shares = [f"{abs(v) / total:.1%}" if total and math.isfinite(v) else "–" for _, _, v in found]
    numbers = column([value for _, _, value in found])
    return [
        TopToken(i, label(token), number, share, sizes[i])
        for (i, token, _), number, share in zip(found, numbers, shares, strict=True)
    ]


def balance(explanation: Explanation, target: int) -> str:
    """How much of the target reached the input, and where the rest went."""
    reached, total = signed(explanation.sum[target]), quantity(explanation.targets[target])
    return f"Relevance sums to {reached} of {total}; {absorbers(explanation.rules)} the rest."


def absorbers(rules: str) -> str:
    """What keeps the relevance that does not reach the input."""
    return "the plain gradient keeps no account of" if rules == "gradient" else _ABSORBERS


def _visible(token: str) -> str:
    kept = {match.start() for match in _JOINER.finditer(token)}
    return "".join(c if i in kept else _picture(c) for i, c in enumerate(token))


def _picture(character: str) -> str:
    """A visible form of one character; most are visible already."""
    if unicodedata.category(character) not in _INVISIBLE:
        return character
    return _PICTURES.get(character, f"⟨U+{ord(character):04X}⟩")

"""`compare`: what a model says before and after an intervention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from attnlrp.errors import InputError
from attnlrp.explainer import Conversation, Explainer
from attnlrp.intervention import Change, Direction, Set, intervene
from attnlrp.units import Unit

__all__ = ["Comparison", "Shift", "compare"]

_TASKS = {"causal-lm": 20, "seq2seq-lm": 20, "masked-lm": 0, "sequence-classification": 0}
"""The tasks that have one output distribution, and how many tokens they generate if nothing is said."""


@dataclass(frozen=True)
class Shift:
    """One output whose probability has changed.

    Args:
        output: text of the token, or name of the class.
        before, after: probability.
    """

    output: str
    before: float
    after: float


@dataclass(frozen=True)
class Comparison:
    """What an intervention does to one text.

    Args:
        text: the prompt.
        changes: unit -> what was done with it, in words.
        before, after: what was generated; empty where nothing was.
        prediction: the most likely output before, and after.
        rose, fell: outputs whose probability has changed the most, largest change first.
        kl: Kullback-Leibler divergence of the distribution after from the one before, in nats.
    """

    text: str
    changes: dict[str, str]
    before: str
    after: str
    prediction: tuple[str, str]
    rose: tuple[Shift, ...]
    fell: tuple[Shift, ...]
    kl: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to JSON."""
        return asdict(self)


def compare(
    explainer: Explainer,
    text: str | Conversation,
    changes: Mapping[Unit | Direction, Change],
    *,
    positions: Sequence[int] | None = None,
    generate: int | None = None,
    top: int = 10,
    chat: bool = False,
) -> Comparison:
    """The output distribution and the generated text before and after an intervention.

    Args:
        explainer: the model.
        text: what it reads.
        changes: unit -> what to do with it, as for `intervene`.
        positions: tokens at which units are changed; None for all, also those that are generated.
        generate: tokens to generate greedily; None for 20 where the model can.
        top: outputs that are listed of those that rose, and of those that fell.
        chat: put the text into the model's chat template.

    Raises:
        InputError: a unit, change or option that the model does not have.

    Example:
        >>> compare(explainer, "The ice bear lives in the", {"layers.16.mlp:394": 0.0}).after
    """
    if explainer.task not in _TASKS:
        raise InputError(
            f"{explainer.name} is a model for {explainer.task}; outputs are compared for {', '.join(_TASKS)}"
        )
    if top < 1:
        raise InputError(f"top: got {top}, expected at least 1")
    count = _TASKS[explainer.task] if generate is None else generate
    before = explainer.predict(text, generate=count, chat=chat)
    with intervene(explainer.model, changes, positions=positions):
        after = explainer.predict(text, generate=count, chat=chat)
    p, q = before.logits.double().log_softmax(-1), after.logits.double().log_softmax(-1)
    difference = q.exp() - p.exp()

    def shifts(order: Tensor) -> tuple[Shift, ...]:
        chosen = [i for i in order[:top].tolist() if difference[i] * difference[order[0]] > 0]
        return tuple(Shift(before.name(i), p[i].exp().item(), q[i].exp().item()) for i in chosen)

    return Comparison(
        text=str(text),
        changes={_name(unit): _said(change) for unit, change in changes.items()},
        before=before.generated,
        after=after.generated,
        prediction=(before.name(int(p.argmax())), before.name(int(q.argmax()))),
        rose=shifts(difference.argsort(descending=True)) if difference.any() else (),
        fell=shifts(difference.argsort()) if difference.any() else (),
        kl=max(0.0, (p.exp() * (p - q)).sum().item()),
    )


def _said(change: Change) -> str:
    return str(Set(float(change)) if isinstance(change, (int, float)) else change)


def _name(unit: Unit | Direction) -> str:
    return f"a direction of {unit.place}" if isinstance(unit, Direction) else str(unit)

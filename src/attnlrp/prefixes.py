"""Causal models: what follows a token has no part in its prediction, so a text is read only as far as its targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch

from attnlrp.changes import open_changes
from attnlrp.compiled import is_compiled
from attnlrp.explanation import Explanation
from attnlrp.targets import Neuron
from attnlrp.tasks import Request, Slot

__all__ = ["Prefixes", "groups"]

PASS = 20
"""What a group of targets costs beyond what it costs for each token it reads, in tokens (benchmarks/cost.py)."""

_PROBE = 16  # tokens
Explain: TypeAlias = Callable[[list[Request]], list[Explanation]]


class Prefixes:
    """Decides how much of a text a model is given, and which targets share a forward pass.

    Args:
        model: the model.
        task: what it is for.
    """

    def __init__(self, model: Any, task: str) -> None:
        config = model.config.get_text_config()
        rotary = str([getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")])
        # positions, or where a recurrence is cut into parts, that follow from the length of the text
        of_length = "longrope" in rotary or "dynamic" in rotary or hasattr(config, "chunk_size")
        self.model, self._can = model, task == "causal-lm" and not of_length
        self._is_causal: bool | None = None

    def explained(self, requests: list[Request], explain: Explain) -> list[Explanation]:
        """Explain a batch; of a single text read no more than is needed, by groups of targets where that is cheaper.

        Args:
            requests: texts and what to explain of each.
            explain: makes the explanations of a batch.
        """
        if len(requests) > 1 or not self._can_cut(requests[0]):
            return explain(requests)
        (request,), probe = requests, _probe(requests[0])
        found = groups(map(_end, request.rows))
        parts = [_part(request, group) for group in found]
        if sum(map(_cost, [*parts, probe, _part(probe, [0])])) >= _cost(request):
            return explain(requests)
        if self._is_causal is None:
            whole, cut = explain([probe])[0], explain([_part(probe, [0])])[0]
            self._is_causal = _is_same(whole, cut, _end(probe.rows[0]))
        if not self._is_causal:
            return explain(requests)
        return [_joined([explain([part])[0] for part in parts], found)]

    def _can_cut(self, request: Request) -> bool:
        """Changes to a model may concern later tokens; a neuron may be sought in the whole text."""
        neurons = any(isinstance(slot.target, Neuron) for row in request.rows for slot in row)
        compiled = is_compiled(self.model)  # for a length
        return self._can and not (compiled or request.extra or neurons or open_changes())


def groups(ends: Iterable[int]) -> list[list[int]]:
    """Targets by how much of the text they need, split so that all passes together read the fewest tokens.

    A group costs one forward pass and for each target a backward pass, all over what its last target needs.

    Args:
        ends: for each target, how many tokens it needs.

    Returns:
        Indices of targets, those that need the least first.
    """
    needed = list(ends)
    order = sorted(range(len(needed)), key=needed.__getitem__)
    cost, start = [0], [0]  # of the first n targets split best: tokens, and where their last group starts
    for n in range(1, len(order) + 1):
        end = needed[order[n - 1]]
        costs = [cost[k] + (n - k + 1) * end + PASS for k in range(n)]
        cost.append(min(costs))
        start.append(costs.index(cost[-1]))
    found, n = [], len(order)
    while n:
        found.append(order[start[n] : n])
        n = start[n]
    return found[::-1]


def _end(row: Sequence[Slot]) -> int:
    """How many tokens a row needs."""
    return max(slot.position or 0 for slot in row) + 1


def _cost(request: Request) -> int:
    """In tokens that are passed through the model."""
    return len(request.ids[: request.read]) * (len(request.rows) + 1) + PASS


def _part(request: Request, group: Sequence[int]) -> Request:
    """Some of the rows, with as much of the text as they need."""
    rows = [request.rows[k] for k in group]
    return dataclasses.replace(request, rows=rows, read=max(map(_end, rows)))


def _probe(request: Request) -> Request:
    """The prediction in the middle of the first tokens."""
    ids = request.ids[:_PROBE]
    return Request(ids, [[Slot(len(ids) // 2, None)]], ("prompt",) * len(ids))


def _is_same(whole: Explanation, cut: Explanation, end: int) -> bool:
    """Whether what comes later gets no relevance at all, and what comes before gets the same without it."""
    a, b = whole.relevance, cut.relevance
    near = torch.finfo(a.dtype).eps ** 0.5 * a.abs().max().item()
    return not a[:, end:].any() and torch.allclose(a, b, rtol=0.0, atol=near)


def _joined(parts: Sequence[Explanation], found: Sequence[Sequence[int]]) -> Explanation:
    """Explanations of groups of rows as one of all rows, in their order."""
    order = [k for group in found for k in group]
    at = sorted(range(len(order)), key=order.__getitem__)
    targets = [target for part in parts for target in part.targets]
    relevance = torch.cat([part.relevance for part in parts])[at]
    return dataclasses.replace(parts[0], relevance=relevance, targets=tuple(targets[k] for k in at))

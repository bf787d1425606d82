"""Gradients of many scalars of one forward pass: several backward passes at once, and few through the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnlrp.compiled import is_compiled

__all__ = ["AT_ONCE", "OutputLayer", "gradients", "watch_head"]

AT_ONCE = 512
"""Rows (token x target) that backward passes handle at once: matrix products get no faster beyond, only larger."""

Places = Sequence[set[tuple[int, int]]]
"""For each scalar, the rows (text, index) of the logits that it depends on."""


def gradients(
    scalars: Sequence[Tensor],
    leaves: Sequence[Tensor],
    *,
    at_once: int,
    head: OutputLayer | None = None,
    places: Places = (),
) -> Iterator[tuple[Tensor, ...]]:
    """The gradient of each scalar by each leaf; the graph is used up when the last one has been yielded.

    Backward passes run as one batched pass for `at_once` scalars. Where an operation of the model cannot be batched,
    they run one by one. The numbers are the same.

    Args:
        scalars: what to differentiate, all from one forward pass.
        leaves: by what; a leaf that a scalar does not depend on has the gradient 0.
        at_once: how many scalars share a batched pass; 1 for one pass each.
        head: the output layer, as it was seen in the forward pass.
        places: rows of the logits that each scalar depends on; with `head`, scalars of different rows share a pass
            through it, which would else cost each scalar the whole vocabulary at all rows.
    """
    outputs, one_hot = torch.stack(list(scalars)), torch.eye(len(scalars), device=scalars[0].device)
    seed: Callable[[int], Tensor] = one_hot.__getitem__
    rounds = _rounds(places) if head is not None and all(places) else []
    if head is not None and 0 < len(rounds) < len(scalars) and head.is_between(scalars, leaves):
        outputs, seed = head.seeds(scalars, places, rounds)
    done, count = 0, len(scalars)
    while done < count:
        n = min(at_once, count - done)
        seeds = torch.stack([seed(k) for k in range(done, done + n)]).to(outputs.dtype)
        # the first batch shows whether there is a way; if not, the graph is needed again
        keep = done + n < count or (done == 0 and n > 1)
        try:
            found = _backward(outputs, leaves, seeds, keep=keep)
        except Exception:  # of whatever cannot be batched; another failure comes again
            if done or n == 1:
                raise
            at_once = 1
            continue
        yield from zip(*found, strict=True)
        done += n


def _backward(outputs: Tensor, leaves: Sequence[Tensor], seeds: Tensor, *, keep: bool) -> list[Tensor]:
    """Gradients (scalar, ...) by each leaf."""
    several = len(seeds) > 1
    options: Any = {"retain_graph": keep, "allow_unused": True, "is_grads_batched": several}
    found = torch.autograd.grad(outputs, leaves, seeds if several else seeds[0], **options)
    shapes = [(len(seeds), *leaf.shape) for leaf in leaves]
    return [x.new_zeros(s) if g is None else g.reshape(s) for g, x, s in zip(found, leaves, shapes, strict=True)]


# --- the head -----------------------------------------------------------------------------------------------------


class OutputLayer:
    """The input of an output layer in one forward pass; each row of the logits is computed of one row of it."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def is_between(self, scalars: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
        """Whether it ran once, and all that the scalars know of the leaves went through its input (text, row, hidden).

        Other ways around it would be missed by a backward pass that starts at its input.
        """
        if len(self.inputs) != 1 or self.inputs[0].dim() != 3 or self.inputs[0].grad_fn is None:
            return False
        own = (self.inputs[0].grad_fn, self.inputs[0].output_nr)
        ends = {id(leaf) for leaf in leaves}
        pending, seen = [(s.grad_fn, 0) for s in scalars], set()
        while pending:
            node, _ = edge = pending.pop()
            if node is None or edge == own or edge in seen:
                continue
            seen.add(edge)
            if id(getattr(node, "variable", None)) in ends:
                return False
            pending.extend(node.next_functions)
        return True

    def seeds(
        self, scalars: Sequence[Tensor], places: Places, rounds: Sequence[list[int]]
    ) -> tuple[Tensor, Callable[[int], Tensor]]:
        """The head's input, and as a function of a scalar's index the scalar's gradient by it (text, row, hidden)."""
        inner = self.inputs[0]
        of: dict[int, Tensor] = {}
        for members in rounds:
            total = torch.stack([scalars[k] for k in members]).sum()
            (gradient,) = torch.autograd.grad(total, inner, retain_graph=True)
            of |= dict.fromkeys(members, gradient)

        def seed(k: int) -> Tensor:
            own = torch.zeros_like(inner)
            for text, row in places[k]:
                own[text, row] = of[k][text, row]
            return own

        return inner, seed


@contextmanager
def watch_head(model: Any) -> Iterator[OutputLayer]:
    """Keep the input of the model's output layer, `get_output_embeddings()`, inside the block."""
    head = OutputLayer()
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None or is_compiled(model):  # a graph cannot hand it out
        yield head
        return
    hook = layer.register_forward_pre_hook(lambda _, inputs: head.inputs.extend(inputs[:1]))
    try:
        yield head
    finally:
        hook.remove()


def _rounds(places: Places) -> list[list[int]]:
    """Scalars that share no row, together."""
    rounds: list[tuple[set[tuple[int, int]], list[int]]] = []
    for k, own in enumerate(places):
        for taken, members in rounds:
            if not taken & own:
                taken |= own
                members.append(k)
                break
        else:
            rounds.append((set(own), [k]))
    return [members for _, members in rounds]

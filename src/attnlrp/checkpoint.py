"""Checkpointed regions of a model: their recomputation runs under the rules of the block that ran them first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["follow_checkpoint"]


def follow_checkpoint(propagation: Any) -> None:
    """Inside a checkpointed region, make its recomputation run under the same rules.

    The recomputation happens in the backward pass: outside of the block, and on a GPU in another thread. torch offers
    `context_fn` for it, but only to the caller of `checkpoint`, which is the model; so the region's frame is reached
    through its saved-tensor hooks.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or not getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook"):
        return
    cells = dict(zip(hooks[0].__code__.co_freevars, hooks[0].__closure__ or (), strict=True))
    frame = cells["frame"].cell_contents
    if not hasattr(frame.recompute_fn, "propagation"):
        frame.recompute_fn = _Recomputation(frame.recompute_fn, propagation)


class _Recomputation:
    def __init__(self, function: Callable[..., Any], propagation: Any) -> None:
        self.function, self.propagation = function, propagation

    def __call__(self, *args: Any) -> None:
        outer = self.propagation
        with type(outer)(outer.model, outer.rules, on_unknown=outer.on_unknown):
            self.function(*args)

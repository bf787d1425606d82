"""The changes that are open in this thread: rules see what they leave, and a recomputation makes them again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch.overrides import TorchFunctionMode

__all__ = ["again", "changing", "open_changes"]

_here = threading.local()  # .open: list of modes


def open_changes() -> list[TorchFunctionMode]:
    """Modes that change what is computed, outermost first."""
    return list(getattr(_here, "open", []))


@contextmanager
def changing(modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    """Open modes that change what is computed."""
    before = open_changes()
    _here.open = [*before, *modes]
    try:
        with again(modes):
            yield
    finally:
        _here.open = before


@contextmanager
def again(modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    """Put modes that are open in front of all others; each must act once only."""
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield

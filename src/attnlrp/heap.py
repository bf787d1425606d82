"""What the system's allocator holds on to after it was freed, given back."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["LARGE", "SLACK", "SLACK_OF_LAYERS", "give_back"]

SLACK = 2**30
"""Bytes that the process may grow by until freed memory is given back: seldom enough to cost no time."""

SLACK_OF_LAYERS = 2**28
"""The same where layers are computed again, to save memory for time."""

LARGE = 2**20
"""Bytes of a tensor, below which what is freed is not worth a look."""

_STATM = Path("/proc/self/statm")  # of Linux
_floor = 0  # bytes after memory was last given back, or fewer


def give_back(slack: int = SLACK) -> None:
    """Give freed memory back to the system, if the process has grown by more than `slack` since the last time.

    The allocator of glibc seldom uses a freed block of aligned memory again, and torch aligns its tensors: a long pass
    over layers, each of which frees what it took, would grow layer by layer. Elsewhere than with glibc this does
    nothing, nor for the memory of a GPU.

    Args:
        slack: bytes.
    """
    global _floor
    trim = _trim()
    if trim is None:
        return
    now = _anonymous()
    if now > _floor + slack:
        trim(0)
        _floor = _anonymous()
    else:
        _floor = min(_floor, now)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """`malloc_trim` of glibc; None where there is none, or where the system does not say what a process takes."""
    if not _STATM.exists():
        return None
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


def _anonymous() -> int:
    """Bytes that are resident and not a mapped file, such as weights."""
    fields = _STATM.read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")

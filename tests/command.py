"""What a run of the command line gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Result", "Run"]


@dataclass(frozen=True)
class Result:
    """Exit status, standard output and standard error, without colours."""

    status: int
    out: str
    err: str


Run = Callable[..., Result]

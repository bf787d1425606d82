"""The one family of exceptions: every message says what, got, expected, and how to fix it."""

from __future__ import annotations

__all__ = [
    "AttnLRPError",
    "InputError",
    "ModelError",
    "NumericalError",
    "OutOfMemoryError",
    "TargetError",
    "UnknownOperationError",
]


class AttnLRPError(Exception):
    """Anything that this library refuses to do, and why."""


class InputError(AttnLRPError, ValueError):
    """A text, an image, a file or an option that cannot be explained as given."""


class TargetError(InputError):
    """A target that the model does not have."""


class ModelError(AttnLRPError, ValueError):
    """A model that cannot be loaded or has nothing to explain."""


class NumericalError(AttnLRPError, ArithmeticError):
    """NaN or infinite values where relevance must be finite."""


class OutOfMemoryError(AttnLRPError, MemoryError):
    """The explanation does not fit into memory; the message names what to turn on."""


class UnknownOperationError(AttnLRPError, NotImplementedError):
    """An operation that is neither neutral nor in the table of rules."""

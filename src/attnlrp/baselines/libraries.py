"""captum, loaded on first use: the extra `evaluation` brings it."""

from __future__ import annotations

import importlib
from typing import Any

from attnlrp.errors import InputError

__all__ = ["INSTALL", "captum_module"]

INSTALL = 'pip install "attnlrp[evaluation]"'


def captum_module(name: str) -> Any:
    """A module of captum.

    Raises:
        InputError: captum, or scikit-learn which fits its surrogates, is not installed.
    """
    try:
        importlib.import_module("sklearn")
        return importlib.import_module(f"captum.{name}")
    except ImportError as error:
        raise InputError(
            f"this baseline needs captum, {error.name or 'a part of it'} is not installed: {INSTALL}"
        ) from error

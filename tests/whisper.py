"""Whisper tiny.en, if its package is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import whisper_tiny

__all__ = ["load", "whisper_tiny"]


def load() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer; skips the test without the package."""
    folder = whisper_tiny.folder()
    if folder is None:
        pytest.skip(f"Whisper tiny.en is not installed: {whisper_tiny.INSTALL}")
    return whisper_tiny.load(folder), whisper_tiny.load_tokenizer(folder)

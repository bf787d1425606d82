"""What an explanation runs in: gradients are on, and a lack of memory says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from attnlrp.errors import OutOfMemoryError

__all__ = ["explaining"]


@contextmanager
def explaining() -> Iterator[None]:
    """Gradients are on, whatever the caller has turned off.

    Raises:
        OutOfMemoryError: the explanation does not fit into memory; says what to change.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason: Exception = error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        reason = error
    else:
        return
    said = str(reason).splitlines() or [type(reason).__name__]
    raise OutOfMemoryError(
        "out of memory: explain fewer inputs at a time, use memory='checkpoint' (--memory checkpoint), bfloat16 "
        "(--dtype bfloat16), a shorter text, or a device with more memory (--device); the system said: " + said[0]
    ) from reason

"""Every method behind one interface: (model, inputs, target) -> relevance; those of the library and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlrp.columns import arrange, widen
from attnlrp.engine import propagate
from attnlrp.errors import InputError
from attnlrp.rules import PRESETS, Rules

__all__ = ["Propagated", "find_methods"]


@dataclass(frozen=True)
class Propagated:
    """Relevance propagation with a table of rules: one forward pass, one backward pass.

    Args:
        rules: the table.
    """

    rules: Rules

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Callable[[Any], Tensor]) -> Tensor:
        """Relevance of the tokens (token,), or of the pixels (height, width)."""
        pixels = inputs.get("pixel_values")
        if pixels is not None:
            pixels = pixels.detach().clone().requires_grad_()
        with torch.enable_grad(), propagate(model, self.rules) as propagation:
            scores = target(model(**{**inputs, **({} if pixels is None else {"pixel_values": pixels})}))
        if pixels is not None:
            (gradient,) = torch.autograd.grad(scores.sum(), pixels)
            return (widen(pixels.detach()) * widen(gradient))[0].sum(dim=0).cpu()
        decoder = getattr(model.config, "is_encoder_decoder", False)
        read = arrange(propagation.embeddings, inputs["input_ids"], encoder_decoder=decoder, name=type(model).__name__)[
            0
        ]
        return read.relevance(torch.autograd.grad(scores.sum(), read.leaves))[0].cpu()


def find_methods(names: list[str] | None = None) -> dict[str, Any]:
    """Methods by name: the baselines, and relevance propagation with each preset.

    Raises:
        InputError: no such method.
    """
    from attnlrp.baselines import BASELINES

    known = {**BASELINES, **{name: Propagated(rules) for name, rules in PRESETS.items() if name != "gradient"}}
    missing = [name for name in names or [] if name not in known]
    if missing:
        raise InputError(f"methods: got {', '.join(missing)}, expected some of {', '.join(known)}")
    return {name: known[name] for name in names or known}

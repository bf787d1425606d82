"""Attention computed step by step, in models of transformers that use fused kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from attnlrp.errors import ModelError

__all__ = ["eager_attention"]

_CAPTURING = "_output_capturing_hooks_installed"
"""With what transformers marks models in which it has put hooks, for good, that collect weights and hidden states."""


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Attention computed step by step, the form that shows its weights, while the block is open.

    Raises:
        ModelError: the model is not one of transformers, or cannot switch.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise ModelError(
            f"{type(model).__name__} has no attention that could be shown: expected a model of transformers"
        )
    configs = {id(config): config for config in _configs(model)}.values()
    before = [(config, config._attn_implementation) for config in configs]
    hooks = [(module, set(module._forward_hooks), _CAPTURING in vars(module)) for module in model.modules()]
    try:
        if any(implementation != "eager" for _, implementation in before):
            model.set_attn_implementation("eager")
        if model.config._attn_implementation != "eager":
            raise ModelError(f"{type(model).__name__} cannot switch to eager attention, which shows its weights")
        yield
    finally:
        for config, implementation in before:
            # the public setter would set nested configurations too, which may have had another one
            config._attn_implementation_internal = implementation
        for module, known, capturing in hooks:
            for key in set(module._forward_hooks) - known:
                del module._forward_hooks[key]
            if not capturing:
                vars(module).pop(_CAPTURING, None)


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configurations of a model and of its parts, with those that are nested in them."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    pending = [config for config in found if hasattr(config, "sub_configs")]
    while pending:
        config = pending.pop()
        yield config
        pending += [nested for name in config.sub_configs if (nested := getattr(config, name, None)) is not None]

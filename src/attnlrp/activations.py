"""Activation modules written out in Python, shown to a propagation as one element-wise operation."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack, handle_torch_function, has_torch_function_unary

from attnlrp.forwards import StandIn

__all__ = ["activation_forward", "activation_name", "claim", "is_written_out", "own_forward", "release"]

_CLOSED_FORMS = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "MishActivation": "mish",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
}
_NAMES = re.compile(r"(gelu|gelutanh|silu|swish|mish|relu|elu)(activation)?$", re.IGNORECASE)


def activation_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the forward of an activation module while a block is open: shows the call as one operation."""
    x, *rest = args or (kwargs.pop(next(iter(kwargs))),)
    if torch.compiler.is_compiling():  # where the question below is answered without looking at modes
        modes = [m for m in _get_current_function_mode_stack() if hasattr(m, "rules")]
        if modes:
            with torch._C.DisableTorchFunction():
                return modes[-1].__torch_function__(activation_forward, (), (self, x, *rest), kwargs)
    if has_torch_function_unary(x):
        return handle_torch_function(activation_forward, (x,), self, x, *rest, **kwargs)
    return _ACTIVATIONS.own_forward(self, x, *rest, **kwargs)


_ACTIVATIONS = StandIn(activation_forward, "_attnlrp_forward")
claim, release, own_forward = _ACTIVATIONS.claim, _ACTIVATIONS.release, _ACTIVATIONS.own_forward


def activation_name(module: nn.Module) -> str:
    """The row of the table for an activation module."""
    return _CLOSED_FORMS.get(type(module).__name__, "activation")


def is_written_out(module: nn.Module) -> bool:
    """Whether a module is an activation function, by its name; those of torch are single operations already."""
    kind = type(module)
    return not kind.__module__.startswith("torch.") and bool(_NAMES.search(kind.__name__)) and not module._modules

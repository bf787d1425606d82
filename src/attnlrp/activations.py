"""Activation modules written out in Python, shown to a propagation as one element-wise operation."""

from __future__ import annotations

import re
import threading
import weakref
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack, handle_torch_function, has_torch_function_unary

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
_claims: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_claims_lock = threading.Lock()


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
    return own_forward(self, x, *rest, **kwargs)


def activation_name(module: nn.Module) -> str:
    """The row of the table for an activation module."""
    return _CLOSED_FORMS.get(type(module).__name__, "activation")


def own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module computes when no block is open."""
    replaced = module.__dict__.get("_attnlrp_forward")
    return type(module).forward(module, *args, **kwargs) if replaced is None else replaced(*args, **kwargs)


def is_written_out(module: nn.Module) -> bool:
    """Whether a module is an activation function, by its name; those of torch are single operations already."""
    kind = type(module)
    return not kind.__module__.startswith("torch.") and bool(_NAMES.search(kind.__name__)) and not module._modules


def claim(activations: list[nn.Module]) -> None:
    """Let activation modules show themselves, until released as often as claimed."""
    with _claims_lock:
        for module in activations:
            _claims[module] = _claims.get(module, 0) + 1
            if _claims[module] == 1:
                replaced = module.__dict__.get("forward")
                if replaced is not None and getattr(replaced, "__func__", None) is not activation_forward:
                    module.__dict__["_attnlrp_forward"] = replaced
                # a bound method: equal in every block, so that a compiled model is not compiled again
                module.__dict__["forward"] = MethodType(activation_forward, module)


def release(activations: list[nn.Module]) -> None:
    """Undo one claim; the last restores the modules."""
    with _claims_lock:
        for module in activations:
            _claims[module] -= 1
            if _claims[module] == 0:
                del _claims[module], module.__dict__["forward"]
                if "_attnlrp_forward" in module.__dict__:
                    module.__dict__["forward"] = module.__dict__.pop("_attnlrp_forward")

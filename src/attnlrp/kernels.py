"""Kernels that torch shows in their own ways: attention, custom autograd functions, operators of libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverloadPacket
from torch.autograd.function import BackwardCFunction

from attnlrp.backward import live, scale_gradient
from attnlrp.rules import Rule, Rules, gradient

__all__ = [
    "FLEX_ATTENTION",
    "FUNCTIONS",
    "caps_inside_kernel",
    "factors_at_inputs",
    "kernel_rule",
    "scale_inputs",
    "share_attention",
    "spelled",
]

FLEX_ATTENTION: Any = torch.ops.higher_order.flex_attention
"""Flex attention, as it is shown while a graph is traced; masks and changes of the scores are inside the kernel."""

_ATTENTION = (".flash_attn_interface.FlashAttnFunc", ".flash_attn_interface.FlashAttnVarlenFunc")
"""Ends of the names of custom autograd functions, called with queries, keys, values; whatever package ships them."""

Shares = Callable[[bool, bool, bool, bool], tuple[float, float, float, float]]


def share_attention(
    shares: Shares, op: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """op(query, key, value, ...) with the gradients at its inputs multiplied by `rules.attention_shares`."""
    q, k, v, _ = shares(live(query), live(key), live(value), False)
    return op(scale_gradient(query, q), scale_gradient(key, k), scale_gradient(value, v), *args, **kwargs)


def kernel_rule(name: str, shares: Shares | None) -> Rule | None:
    """The rule of a custom autograd function, by its qualified name, if it is known."""
    if shares is not None and name.endswith(_ATTENTION):
        return partial(share_attention, shares)
    return FUNCTIONS.get(name)


def caps_inside_kernel(model: nn.Module) -> bool:
    """Whether a model of transformers hands a kernel a soft-capping, which no mode sees."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    return capped and getattr(text, "_attn_implementation", None) not in (None, "eager", "sdpa")


FUNCTIONS: dict[str, Rule] = {
    # linear in what is not a weight: the weights are dequantised in the forward and in the backward pass
    "bitsandbytes.autograd._functions.MatMul4Bit": gradient,
    "bitsandbytes.autograd._functions.MatMul8bitLt": gradient,
    # sqrt(x) with a bounded derivative: f(x)/x is twice the derivative, bounded alike
    "transformers.models.recurrent_gemma.modeling_recurrent_gemma.SqrtBoundDerivative": lambda op, x: op(
        scale_gradient(x, 2.0)
    ),
}
"""Rules of custom autograd functions, for tables that have no row of their own for them."""


def factors_at_inputs(rule: Rule, node: Any) -> tuple[float, ...]:
    """What a rule multiplies the gradient of each tensor input of a call with; () if it does more than that."""
    inputs = [torch.ones((), device="cpu", requires_grad=edge is not None) for edge, _ in node.next_functions]
    results = []

    def op(*args: Any, **_: Any) -> Tensor:
        results.append(torch.stack(args).sum())
        return results[-1]

    try:
        result = rule(op, *inputs)
    except TypeError:  # it takes arguments that are not tensors
        return ()
    if len(results) != 1 or result is not results[0] or isinstance(result.grad_fn, BackwardCFunction):
        return ()
    if not result.requires_grad:
        return (0.0,) * len(inputs)
    result.backward()
    return tuple((0.0 if x.grad is None else x.grad.item()) if x.requires_grad else 1.0 for x in inputs)


def scale_inputs(factors: tuple[float, ...], grads: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
    """A hook of a node: the gradients that it hands to its inputs, times factors."""
    return tuple(g if g is None else g * factor for g, factor in zip(grads, factors, strict=True))


def spelled(rules: Rules) -> Rules:
    """The table, with a row for every spelling of an operator of `torch.ops` or of `torch.library.custom_op`."""
    rows: dict[Any, Rule] = {}
    for key, rule in rules.items():
        overload = getattr(key, "_opoverload", key)
        packet = getattr(overload, "overloadpacket", overload)
        if isinstance(packet, OpOverloadPacket) and (packet is overload or len(packet.overloads()) == 1):
            rows |= dict.fromkeys([packet, *(getattr(packet, name) for name in packet.overloads())], rule)
    return {**rows, **rules} if rows else rules

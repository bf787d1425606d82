"""Attention kernels that show themselves in another way than `scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnlrp.backward import live, scale_gradient

__all__ = ["FLEX_ATTENTION", "caps_inside_kernel", "kernel_rule", "share_attention"]

FLEX_ATTENTION: Any = torch.ops.higher_order.flex_attention
"""Flex attention, as it is shown while a graph is traced; masks and changes of the scores are inside the kernel."""

_FUNCTIONS = (".flash_attn_interface.FlashAttnFunc", ".flash_attn_interface.FlashAttnVarlenFunc")
"""Ends of the names of custom autograd functions, called with queries, keys, values; whatever package ships them."""

Shares = Callable[[bool, bool, bool, bool], tuple[float, float, float, float]]


def share_attention(
    shares: Shares, op: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """op(query, key, value, ...) with the gradients at its inputs multiplied by `rules.attention_shares`."""
    q, k, v, _ = shares(live(query), live(key), live(value), False)
    return op(scale_gradient(query, q), scale_gradient(key, k), scale_gradient(value, v), *args, **kwargs)


def kernel_rule(name: str, shares: Shares | None) -> Callable[..., Any] | None:
    """The rule of a custom autograd function, by its qualified name, if it is a known attention kernel."""
    return partial(share_attention, shares) if shares is not None and name.endswith(_FUNCTIONS) else None


def caps_inside_kernel(model: nn.Module) -> bool:
    """Whether a model of transformers hands a kernel a soft-capping, which no mode sees."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    return capped and getattr(text, "_attn_implementation", None) not in (None, "eager", "sdpa")

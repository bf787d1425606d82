"""Attention kernels that are custom autograd functions, by a stand-in of the same name: the real ones need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from attnlrp import ATTNLRP, CP_LRP, UnknownOperationError, propagate
from attnlrp.rules import SOFTMAX_OMIT, Rules


class Kernel(torch.autograd.Function):
    """softmax(q k^T) v with a backward pass of its own; tensors are (batch, token, head, channel)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.causal = causal
        return attend(q, k, v, causal)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            output = attend(*inputs, ctx.causal)
        return *torch.autograd.grad(output, inputs, grad), None, None


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2)


class Model(nn.Module):
    def __init__(self, kernel: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v = (nn.Linear(8, 8, dtype=torch.float64) for _ in range(3))
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 2, 4)
        q, k, v = (layer(x).view(shape) for layer in (self.q, self.k, self.v))
        return x + self.kernel(q, k, v).reshape(x.shape)


def gradient(kernel: Any, rules: Rules) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    model = Model(kernel)
    with propagate(model, rules):
        y = model(x)[0, -1, 0]
    return torch.autograd.grad(y, x)[0]


def flash(package: str, name: str = "FlashAttnFunc") -> Any:
    function: Any = type(name, (Kernel,), {"__module__": f"{package}.flash_attn_interface"})
    return lambda q, k, v: function.apply(q, k, v, torch.tensor([5]), True)


@pytest.mark.parametrize("package", ["flash_attn", "kernels_of_a_hub_0123.flash_attn"])
@pytest.mark.parametrize("rules", [ATTNLRP, CP_LRP, {}], ids=["attnlrp", "cp-lrp", "gradient"])
def test_flash_attention_has_the_shares_of_fused_attention(package: str, rules: Rules) -> None:
    expected = gradient(lambda q, k, v: attend(q, k, v, True), rules)
    assert_close(gradient(flash(package), rules), expected)


def test_rules_inside_a_kernel_are_refused() -> None:
    with pytest.raises(UnknownOperationError, match="FlashAttnFunc"):
        gradient(flash("flash_attn"), SOFTMAX_OMIT)


def test_a_kernel_of_another_name_is_refused() -> None:
    with pytest.raises(UnknownOperationError, match="PackedFunc"):
        gradient(flash("flash_attn", "PackedFunc"), ATTNLRP)

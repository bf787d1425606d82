"""Adapters of peft: relevance is that of the model that they are merged into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tiny
from attnlrp import audit, propagate
from attnlrp.checkpoint import checkpointed

peft = pytest.importorskip("peft", reason="needs peft")
# peft asks transformers in the way of its version 4
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "dense"], "gpt2": ["c_attn"]}
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def adapted(name: str, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with adapters whose weights are random, so that they matter."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": TARGETS[name]}
    fans = {"fan_in_fan_out": True} if name == "gpt2" else {}
    model = peft.get_peft_model(tiny.build(name, dtype), peft.LoraConfig(**options | fans | KINDS[kind]))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path and "magnitude" not in path:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def relevance(model: nn.Module, name: str) -> Tensor:
    with propagate(model) as propagation:
        output = model(**tiny.inputs(name)).logits
        scalar = output.reshape(-1, output.shape[-1])[-1, 1]
    ((_, embeddings),) = propagation.embeddings
    (grad,) = torch.autograd.grad(scalar, embeddings)
    return (embeddings * grad).sum(-1).detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_adapters_have_the_relevance_of_the_merged_model(name: str, kind: str) -> None:
    model = adapted(name, kind)
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    found = relevance(model, name)
    with checkpointed(model):
        assert torch.equal(relevance(model, name), found)
    assert {path for path, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    with model.disable_adapter():
        without = relevance(model, name)
    expected = relevance(model.merge_and_unload(), name)
    assert_close(found, expected, rtol=1e-4, atol=1e-6 * max(1.0, expected.abs().max().item()))
    assert not torch.allclose(without, expected, rtol=1e-2)


def test_the_ledger_of_adapters() -> None:
    assert audit(adapted("llama", "rslora", torch.float64), tiny.inputs("llama")).closes

"""Quantised weights: relevance is that of a model whose weights are the dequantised ones."""

from __future__ import annotations

import copy
import importlib
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tiny
from attnlrp import UnknownOperationError, propagate
from attnlrp.checkpoint import checkpointed
from attnlrp.kernels import FUNCTIONS
from attnlrp.rules import gradient


def loaded(name: str) -> Any:
    """A package, whose warnings and log messages about kernels that are missing here are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            return pytest.importorskip(name, reason=f"needs {name}", exc_type=ImportError)
        finally:
            logging.disable(logging.NOTSET)


def relevance(model: nn.Module, name: str, target: int = 1) -> Tensor:
    with propagate(model) as propagation:
        output = model(**tiny.inputs(name)).logits
        scalar = output.reshape(-1, output.shape[-1])[-1, target]
    ((_, embeddings),) = propagation.embeddings
    (grad,) = torch.autograd.grad(scalar, embeddings)
    found: Tensor = (embeddings * grad).detach()
    assert found.abs().max() > 1e-5
    return found


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


# --- torchao: the weight is a subclass of a tensor ------------------------------------------------------------------

AO = {
    "int8": ("Int8WeightOnlyConfig", ()),
    "int4": ("IntxWeightOnlyConfig", (torch.int4,)),
    "float8": ("Float8WeightOnlyConfig", ()),
}


def quantised(name: str, config: str, *args: Any) -> nn.Module:
    quantization = loaded("torchao.quantization")
    model = tiny.build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(model, getattr(quantization, config)(*args))
    return model


@pytest.mark.parametrize("kind", AO)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_weights_quantised_by_torchao(name: str, kind: str) -> None:
    config, args = AO[kind]
    model = quantised(name, config, *args)
    plain = tiny.build(name)
    changed = 0.0
    for path, layer in layers(plain).items():
        weight = layers(model)[path].weight
        assert type(weight) is not nn.Parameter
        dequantised = weight.dequantize().float()
        changed = max(changed, (dequantised - layer.weight).abs().max().item())
        layer.weight = nn.Parameter(dequantised)
    assert changed > 1e-4
    expected = relevance(plain, name)
    assert_close(relevance(model, name), expected, rtol=0, atol=1e-6 * max(1.0, expected.abs().max().item()))


def test_quantised_weights_and_layers_that_are_computed_again() -> None:
    model = quantised("llama", "Int8WeightOnlyConfig")
    expected = relevance(model, "llama")
    with checkpointed(model):
        assert torch.equal(relevance(model, "llama"), expected)


def test_quantised_activations_are_refused_with_the_fix() -> None:
    model = quantised("llama", "Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(UnknownOperationError, match="quantise the weights only") as error:
        relevance(model, "llama")
    assert "linear with a Int8Tensor, whose output has no gradient" in str(error.value)


# --- bitsandbytes: a custom autograd function ------------------------------------------------------------------------


def replaced(model: nn.Module, bits: int) -> nn.Module:
    """The same model with the linear layers of bitsandbytes."""
    bnb = loaded("bitsandbytes")
    for path, layer in layers(model).items():
        shape = (layer.in_features, layer.out_features, layer.bias is not None)
        if bits == 4:
            twin = bnb.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
            twin.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        else:
            twin = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            twin.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        if layer.bias is not None:
            twin.bias = nn.Parameter(layer.bias.data)
        model.set_submodule(path, twin.to("cpu"))
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
def test_weights_of_4_bits_by_bitsandbytes(name: str) -> None:
    bnb = loaded("bitsandbytes")
    plain = tiny.build(name)
    model = replaced(copy.deepcopy(plain), 4)
    for path, layer in layers(plain).items():
        weight = layers(model)[path].weight
        layer.weight = nn.Parameter(bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float())
    assert not torch.allclose(relevance(plain, name), relevance(tiny.build(name), name), rtol=1e-3)
    expected = relevance(plain, name)
    assert_close(relevance(model, name), expected, rtol=0, atol=1e-6 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
def test_weights_of_8_bits_by_bitsandbytes(name: str) -> None:
    """The forward pass rounds what it multiplies with, too, so that values differ by that."""
    model = replaced(tiny.build(name), 8)
    found, expected = relevance(model, name), relevance(tiny.build(name), name)
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("name", ["MatMul4Bit", "MatMul8bitLt"])
def test_the_known_functions_of_bitsandbytes_exist(name: str) -> None:
    loaded("bitsandbytes")
    assert hasattr(importlib.import_module("bitsandbytes.autograd._functions"), name)
    assert FUNCTIONS[f"bitsandbytes.autograd._functions.{name}"] is gradient

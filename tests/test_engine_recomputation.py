"""Checkpointing, compilation: the rules follow the computation wherever it is run again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import tiny
from attnlrp import ATTNLRP, CP_LRP, UnknownOperationError, audit, propagate
from attnlrp.rules import SOFTMAX_OMIT, Rules


class Block(nn.Module):
    """Attention and a gated MLP, with every kind of rule in it."""

    def __init__(self, checkpointed: bool | None, **options: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.up = (nn.Linear(8, 8, dtype=torch.float64) for _ in range(4))
        self.norm = nn.LayerNorm(8, dtype=torch.float64)
        self.checkpointed, self.options = checkpointed, options

    def body(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        x = x + F.silu(self.up(x)) * self.q(x)
        return x + (x @ x.mT).softmax(-1) @ x

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, **self.options) if self.checkpointed else self.body(x)


def blocks(checkpointed: bool, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(checkpointed, **options) for _ in range(3)))


def gradients(model: nn.Module, rules: Rules, x: Tensor, *, inside: bool) -> list[Tensor]:
    """Gradients of one output, taken twice with the graph kept, inside or after the block."""
    x = x.clone().requires_grad_()
    found: list[Tensor] = []
    with propagate(model, rules):
        y = model(x).sum()
        if inside:
            found += [torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2)]
    return found or [torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2)]


@pytest.mark.parametrize(
    "options", [{}, {"preserve_rng_state": False}, {"early_stop": False}, {"determinism_check": "none"}]
)
@pytest.mark.parametrize("rules", [ATTNLRP, CP_LRP, SOFTMAX_OMIT, {}])
@pytest.mark.parametrize("inside", [True, False])
def test_a_checkpointed_module_has_the_same_relevance(inside: bool, rules: Rules, options: dict[str, Any]) -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = gradients(blocks(False), rules, x, inside=True)
    found = gradients(blocks(True, use_reentrant=False, **options), rules, x, inside=inside)
    assert all(torch.equal(g, expected[0]) for g in (*expected, *found))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 4), nn.PReLU(), nn.GELU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))]
)
def test_a_checkpoint_around_a_few_layers(layer: nn.Module, inside: bool) -> None:
    found = []
    for checkpointed in (False, True):
        x = torch.ones(2, 4, requires_grad=True)
        with propagate(layer):
            y = (checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)).sum()
            if inside:
                y.backward()
        if not inside:
            y.backward()
        found.append(x.grad)
    assert torch.equal(*found)
    assert all(p.grad is None for p in layer.parameters())


def test_a_checkpoint_inside_a_checkpoint() -> None:
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    plain, nested = blocks(False), blocks(True, use_reentrant=False)
    with propagate(plain):
        expected = torch.autograd.grad(plain(x).sum(), x)[0]
    with propagate(nested):
        y = checkpoint(nested, x, use_reentrant=False).sum()
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)


def test_the_innermost_rules_hold_in_the_recomputation() -> None:
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    model = blocks(True, use_reentrant=False)
    with propagate(model, CP_LRP):
        expected = torch.autograd.grad(model(x).sum(), x)[0]
    with propagate(model, ATTNLRP):
        with propagate(model, CP_LRP):
            y = model(x).sum()
        assert torch.equal(torch.autograd.grad(y, x, retain_graph=True)[0], expected)
        with propagate(model, {}):
            assert torch.equal(torch.autograd.grad(y, x, retain_graph=True)[0], expected)
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)


def test_a_plain_backward_stays_plain_when_it_is_called_inside_a_block() -> None:
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    model = blocks(True, use_reentrant=False)
    expected = torch.autograd.grad(blocks(False)(x).sum(), x)[0]
    y = model(x).sum()
    with propagate(model):
        assert torch.equal(torch.autograd.grad(y, x)[0], expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3", "mixtral", "bert"])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing_of_transformers_has_the_same_relevance(name: str, inside: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model = tiny.build(name, hidden_act="gelu_new") if name == "bert" else tiny.build(name)
        model.config.use_cache = False
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        with propagate(model) as propagation:
            output = model(**tiny.inputs(name)).logits
            y = output.reshape(-1, output.shape[-1])[-1].max()
            if inside:
                y.backward()
        if not inside:
            y.backward()
        ((_, embeddings),) = propagation.embeddings
        found.append(embeddings.detach() * embeddings.grad)
    assert torch.equal(*found)
    assert found[0].abs().max() > 1e-3


def test_several_targets_at_once_through_checkpoints() -> None:
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    model = blocks(True, use_reentrant=False)
    with propagate(model):
        y = model(x)[0, -1]
    basis = torch.eye(8, dtype=torch.float64)
    loop = [torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in basis]
    assert_close(torch.autograd.grad(y, x, basis, is_grads_batched=True)[0], torch.stack(loop))


def test_the_ledger_sees_through_checkpoints() -> None:
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    plain, recomputed = (
        audit(blocks(c, **({"use_reentrant": False} if c else {})), {"input": x}, target=lambda y: y.sum())
        for c in (False, True)
    )
    assert recomputed.closes
    assert recomputed.inputs == pytest.approx(plain.inputs, rel=1e-12)
    assert recomputed.absorbed == pytest.approx(plain.absorbed, rel=1e-9, abs=1e-12)


def test_reentrant_checkpointing_is_refused_with_the_fix() -> None:
    model = blocks(True, use_reentrant=True)
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(UnknownOperationError, match="use_reentrant=False") as error, propagate(model):
        model(x).sum().backward()
    assert "CheckpointFunction" in str(error.value)


# --- compilation ------------------------------------------------------------------------------------------------

COMPILED = """
import contextlib
import torch
import tiny
from attnlrp import UnknownOperationError, propagate

torch.set_num_threads(1)

def relevance(model, run, name, explained):
    arguments = tiny.embedded(name, model)
    x = arguments["inputs_embeds"]
    with propagate(model) if explained else contextlib.nullcontext():
        output = run(**arguments).logits
        output.reshape(-1, output.shape[-1])[-1].max().backward()
    return x.detach() * x.grad

for name, order in {"llama": [True], "gpt2": [False, True]}.items():
    model = tiny.build(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for explained in order:
        found = [relevance(model, run, name, explained) for run in (model, compiled)]
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)

try:
    relevance(model, torch.compile(model, backend="eager"), "gpt2", True)
except UnknownOperationError as error:
    assert "use another backend" in str(error)
else:
    raise AssertionError("the rules were applied twice")
"""


def test_a_compiled_model_has_no_graph_break_and_the_same_relevance() -> None:
    """In a process of its own: the type checks of these tests would break the graph."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]

"""`torch.compile`: no graph break, the same relevance, no compilation for a second block.

Most tests run in a process of their own: the type checks of these tests would break the graph.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from attnlrp import UnknownOperationError, propagate

START = """
import torch
import tiny
from torch import nn
from torch.nn import functional as F
from attnlrp import InputError, propagate

torch.set_num_threads(1)

def graphs():
    return torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
"""

MODELS = """
def relevance(model, name, given):
    arguments = tiny.inputs(name)
    if given == "inputs_embeds":
        arguments = tiny.embedded(name, model)
    with propagate(model) as propagation:
        output = model(**arguments).logits
        target = output.reshape(-1, output.shape[-1])[-1].max()
    explained = [e for _, e in propagation.embeddings] or [arguments["inputs_embeds"]]
    gradients = torch.autograd.grad(target, explained)
    return output.detach(), torch.cat([(x * g).flatten() for x, g in zip(explained, gradients, strict=True)]).detach()

for given, names in {"input_ids": %r, "inputs_embeds": %r}.items():
    for name in names:
        torch._dynamo.reset()
        model = tiny.build(name)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        attributes = {n: sorted(vars(m)) for n, m in model.named_modules()}
        (logits, expected), (same, found) = relevance(model, name, given), relevance(compiled, name, given)
        before = graphs()
        again = relevance(compiled, name, given)[1]
        assert graphs() == before > 0, "compiled again"
        scale = expected.abs().max().item()
        assert scale > 1e-3
        for values, reference in ((found, expected), (again, expected), (same, logits)):
            torch.testing.assert_close(values, reference, rtol=0, atol=1e-6 * max(scale, 1))
        assert {n: sorted(vars(m)) for n, m in model.named_modules()} == attributes
        assert not compiled._forward_pre_hooks
"""

OPERATIONS = """
def into_a_view(x):
    y = x.abs()
    part = y[:, :2]
    part.rsqrt_()
    return y * 1

def statistic(x):
    v = x.pow(2).mean(-1, keepdim=True)
    v += 1e-6
    v.rsqrt_()
    return x * v

def router(x):
    weights = x.softmax(-1).topk(3).values
    weights /= weights.sum(-1, keepdim=True)
    return weights * x[:, :3]

CASES = {
    "clamp": lambda x: x.clamp(-0.5, 0.5) * x,
    "clamp without 0": lambda x: x.clamp(min=0.1) * x,
    "clamp by a tensor": lambda x: x.clamp(min=torch.tensor([-1.0, 0.2, 0.1, -0.2])),
    "x ** n": lambda x: x**3 + (x * x + 1) ** -0.5 * x,
    "x **= n": lambda x: (x * 1).__ipow__(2),
    "n ** x": lambda x: 2**x,
    "c / x": lambda x: x * (1 / (x.abs() + 1)),
    "c - x": lambda x: 1 - x,
    "normalize": lambda x: F.normalize(x, dim=-1),
    "norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "in place": statistic,
    "into a view": into_a_view,
    "router": router,
    "hardswish": F.hardswish,
    "hardsigmoid": nn.Hardsigmoid(),
    "F.tanh": F.tanh,
    "tanh_": lambda x: torch.tanh_(x * 1),
    "hardtanh": F.hardtanh,
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "glu": F.glu,
    "norms": lambda x: F.layer_norm(x, (4,)) + F.rms_norm(x, (4,)) + F.group_norm(x, 2),
}

class Case(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)

values = torch.randn(3, 4)
for name, function in CASES.items():
    torch._dynamo.reset()
    model = Case(function)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for run in (model, compiled, compiled):
        x = values.clone().requires_grad_()
        before = graphs()
        with propagate(model):
            y = run(x)
        (y * torch.arange(1.0, 1 + y.numel()).view(y.shape)).sum().backward()
        found.append(x.grad)
    assert graphs() == before, f"{name}: compiled again"
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-5, atol=1e-6, msg=name)
"""

RESTORED = """
from torch._dynamo.variables.torch import get_overridable_functions
before = set(get_overridable_functions())
with propagate(nn.Linear(2, 2)), propagate(nn.Linear(2, 2)):
    assert F.hardswish in get_overridable_functions() and F.hardswish not in before
assert get_overridable_functions() == before
"""

WRONG_BLOCK = """
model = tiny.build("llama")
compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
try:
    with propagate(model):
        compiled(**tiny.inputs("llama"))
except Exception as error:
    assert "propagate(compiled), or pass inputs_embeds" in str(error), error
else:
    raise AssertionError("the embeddings would have no gradient")

# without fullgraph the block that is opened with the model itself works: the graph breaks at the embeddings
torch._dynamo.reset()
breaking = torch.compile(model, backend="aot_eager")
found = []
for run in (model, breaking):
    with propagate(model) as propagation:
        target = run(**tiny.inputs("llama")).logits[0, -1].max()
    ((_, embeddings),) = propagation.embeddings
    found.append(torch.autograd.grad(target, embeddings)[0])
torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
"""

INDUCTOR = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        h = self.norm(x)
        x = x + F.scaled_dot_product_attention(h, h, h)
        return x + self.down(F.silu(self.up(x)) * 2)

model = Block()
compiled = torch.compile(model, fullgraph=True)
found = []
values = torch.randn(1, 5, 8)
for run in (model, compiled):
    x = values.clone().requires_grad_()
    with propagate(model):
        run(x)[0, -1, 0].backward()
    found.append(x.grad)
torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
"""


def run(code: str) -> None:
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", START + code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("ids", [["llama", "gemma3"], ["gemma2", "bert"], ["t5"], ["mixtral"]])
def test_a_compiled_model_that_looks_its_tokens_up(ids: list[str]) -> None:
    run(MODELS % (ids, []))


def test_a_compiled_model_that_is_given_embeddings() -> None:
    run(MODELS % ([], ["llama", "bert"]))


def test_operations_in_a_graph_have_the_same_rules() -> None:
    run(OPERATIONS)


def test_what_the_compiler_shows_is_restored() -> None:
    run(RESTORED)


def test_a_block_around_the_model_itself_names_the_fix() -> None:
    run(WRONG_BLOCK)


@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("cc") is None, reason="inductor needs a C compiler")
def test_the_default_backend() -> None:
    run(INDUCTOR)


# --- flex attention ---------------------------------------------------------------------------------------------

FLEX = """
import torch.nn.attention.flex_attention as flex
import transformers.integrations.flex_attention as integration
from attnlrp import ATTNLRP, CP_LRP

# its backward pass for a CPU is there but refused; transformers compiles it for a GPU
flex._validate_device = lambda *_: None
integration.compile_friendly_flex_attention = lambda *args, training, **options: compiled(*args, **options)

for rules in (ATTNLRP, CP_LRP):
    torch._dynamo.reset()
    compiled = torch.compile(flex.flex_attention, backend="aot_eager", fullgraph=True)
    found = []
    for attention in ("eager", "flex_attention"):
        model = tiny.build("llama", attention=attention)
        with propagate(model, rules) as propagation:
            target = model(**tiny.inputs("llama"), use_cache=False).logits[0, -1, 1]
        ((_, embeddings),) = propagation.embeddings
        found.append(torch.autograd.grad(target, embeddings)[0])
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
"""


def test_compiled_flex_attention_has_the_relevance_of_written_out_attention() -> None:
    run(FLEX)


def test_soft_capping_inside_flex_attention_is_refused_with_the_fix() -> None:
    model = tiny.build("gemma2", attention="flex_attention")
    with pytest.raises(
        UnknownOperationError, match=r"soft-capping.* inside fused attention.*attn_implementation='eager'"
    ):
        with propagate(model):
            pass
    with propagate(model, on_unknown="gradient"):
        pass

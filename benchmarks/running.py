"""What a way of running a model costs, and how far its relevance is from that of float32 with everything kept.

    python benchmarks/running.py [--model NAME] [--tokens 512] [--rounds 3] [--out benchmarks/results/running.json]

Every way explains the same target. Difference: the largest of any token, relative to the largest relevance. Memory: the
most bytes that tensors occupy at once, beyond the model. Time: median of rounds in which the ways take turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlrp import propagate
from attnlrp.checkpoint import checkpointed
from shared import attn_lrp, inputs, load, machine, packaged_smollm2, peak_mebibytes

PRECISION_TOKENS = 128  # float16 is slow on a CPU

Way = Callable[[Any, Tensor], Tensor]


def checkpoint(model: Any, ids: Tensor) -> Tensor:
    with checkpointed(model):
        return attn_lrp(model, ids)


def relevance(model: Any, ids: Tensor, target: int) -> Tensor:
    with propagate(model) as propagation:
        logit = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[0, -1, target]
    ((_, embeddings),) = propagation.embeddings
    (grad,) = torch.autograd.grad(logit, embeddings)
    return (embeddings.double() * grad.double()).sum(-1).flatten().detach()


def distance(found: Tensor, expected: Tensor) -> dict[str, float]:
    return {
        "cosine": F.cosine_similarity(found, expected, dim=0).item(),
        "difference": ((found - expected).abs().max() / expected.abs().max()).item(),
    }


def memory(model: Any, ids: Tensor, rounds: int) -> dict[str, Any]:
    ways: dict[str, Way] = {"full": attn_lrp, "checkpoint": checkpoint}
    expected = attn_lrp(model, ids).flatten()
    rows: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():
        rows[name] = distance(way(model, ids).flatten(), expected)
        rows[name]["peak_mebibytes"] = peak_mebibytes(model, ids, way)
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way(model, ids)
            times[name].append(time.perf_counter() - start)
    for name in ways:
        rows[name]["seconds"] = statistics.median(times[name])
    return rows


def precision(model: Any, ids: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        target = int(model(input_ids=ids, logits_to_keep=1).logits[0, -1].argmax())
    expected = relevance(model, ids, target)
    rows = {}
    for dtype in (torch.bfloat16, torch.float16):
        rows[str(dtype).removeprefix("torch.")] = distance(
            relevance(copy.deepcopy(model).to(dtype), ids, target), expected
        )
    model.set_attn_implementation("eager")
    rows["float32, attention written out"] = distance(relevance(model, ids, target), expected)
    model.set_attn_implementation("sdpa")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name = options.model or packaged_smollm2()
    model, tokenizer = load(name)
    ids = inputs(tokenizer, options.tokens)
    results = {
        "model": Path(name).stem,
        "tokens": options.tokens,
        "machine": machine(),
        "memory": memory(model, ids, options.rounds),
        "precision": precision(model, ids[:, :PRECISION_TOKENS]),
    }
    text = json.dumps(results, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

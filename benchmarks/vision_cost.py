"""Time, memory and ledger of one explanation by vision transformers of full size, random weights, one image.

    python benchmarks/vision_cost.py [--rounds 9] [--out benchmarks/results/vision_cost.json]

Methods take turns, one warm-up round is dropped; reported are medians, and the median of the ratio to gradient x input
within each round. Memory: the most bytes that tensors occupy at once beyond the model. The ledger accounts for every
unit of relevance under the paper's composite.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

import attnlrp
from attnlrp.evaluation.cost import Method, peak_memory
from attnlrp.methods import find_methods
from shared import machine

BASE: dict[str, int] = {}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
GEOMETRIES = {"ViT-B-16": BASE, "ViT-L-16": LARGE, "ViT-L-32": LARGE | {"patch_size": 32}}
METHODS = ["gradient-x-input", "attnlrp", "vit", "vit-cp", "vit-dinov2"]


def seconds(model: Any, inputs: Mapping[str, Any], methods: Mapping[str, Method], rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 1):
        for name, method in methods.items():
            gc.collect()
            start = time.perf_counter()
            method(model, inputs, best)
            if turn:
                times[name].append(time.perf_counter() - start)
    rows = {}
    for name, values in times.items():
        ratios = [v / y for v, y in zip(values, times["gradient-x-input"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows[name] = {"seconds": statistics.median(values), "ratio": statistics.median(ratios)}
        rows[name]["ratio_quartiles"] = [low, high]
    return rows


def best(output: Any) -> torch.Tensor:
    return output.logits.max(dim=-1).values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/vision_cost.json"))
    given = parser.parse_args()
    found: dict[str, Any] = {}
    methods = find_methods(METHODS)
    for name, geometry in GEOMETRIES.items():
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**geometry, num_labels=1000)).eval().requires_grad_(False)
        inputs = {"pixel_values": torch.randn(1, 3, 224, 224)}
        rows = seconds(model, inputs, methods, given.rounds)
        for method, row in rows.items():
            row["peak_mebibytes"] = peak_memory(methods[method], model, inputs, best) / 2**20
        leaf = {"pixel_values": inputs["pixel_values"].clone().requires_grad_()}
        ledger = attnlrp.audit(model, leaf, target=lambda output: best(output)[0], rules=attnlrp.VIT)
        count = sum(p.numel() for p in model.parameters())
        found[name] = {"parameters": count, "methods": rows, "ledger": {"closes": ledger.closes, "error": ledger.error}}
        closes = "closes" if ledger.closes else "leaks"
        print(f"{name}: {count / 1e6:.0f} M parameters; the ledger {closes}, error {ledger.error:.1e}")
        for method, row in rows.items():
            low, high = row["ratio_quartiles"]
            print(
                f"  {method:18s} {row['seconds']:.3f} s  {row['ratio']:.2f} [{low:.2f}, {high:.2f}]"
                f"  {row['peak_mebibytes']:.0f} MiB",
                flush=True,
            )
    given.out.write_text(json.dumps({"models": found, "machine": machine()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

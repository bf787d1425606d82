"""A data set in batches of like length against a loop over its texts, and many targets against single ones.

    OMP_NUM_THREADS=1 python benchmarks/throughput.py [--rounds 3] [--out benchmarks/results/throughput.json]

SmolLM2-135M. Time is the CPU time of the process; the two ways take turns, and reported are the medians of all rounds
and the ratios within rounds. Texts: 64 of 4 to 24 tokens. Targets: positions in a text of 32 or 128 tokens; "whole"
explains them together, too, but reads the whole text for each.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from attnlrp import explain_dataset
from attnlrp.explainer import Explainer
from shared import TEXT, machine, packaged_smollm2


def compare(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """CPU seconds of each way, and the ratio of the last to each other."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if turn:
                times[name].append(time.process_time() - start)
    *others, last = ways
    found: dict[str, Any] = {"CPU seconds": {name: statistics.median(values) for name, values in times.items()}}
    for name in others:
        ratios = [b / a for a, b in zip(times[name], times[last], strict=True)]
        found[f"{last} / {name}"] = {"median": statistics.median(ratios), "ratios": ratios}
    return found


def data_set(explainer: Explainer, rounds: int) -> dict[str, Any]:
    shuffled, ids = random.Random(0), explainer.tokenizer(TEXT).input_ids
    texts = [explainer.tokenizer.decode(ids[: shuffled.randint(4, 24)]) for _ in range(64)]

    def batched() -> None:
        with tempfile.TemporaryDirectory() as folder:
            explain_dataset(explainer, texts, Path(folder) / "out.jsonl")

    found = compare({"loop": lambda: [explainer(text) for text in texts], "batches": batched}, rounds)
    tokens = sum(len(explainer.tokenizer(text).input_ids) for text in texts)
    return found | {"tokens per CPU second": {k: tokens / v for k, v in found["CPU seconds"].items()}}


def targets(explainer: Explainer, tokens: int, positions: list[int], rounds: int) -> dict[str, Any]:
    text = explainer.tokenizer.decode(explainer.tokenizer(TEXT * 20).input_ids[:tokens])

    def single() -> torch.Tensor:
        return torch.cat([explainer(text, position=p).relevance for p in positions])

    def together() -> torch.Tensor:
        return explainer(text, position=positions).relevance

    def whole() -> torch.Tensor:
        with patch.object(explainer._prefixes, "_can", False):
            return together()

    found = compare({"single": single, "whole": whole, "together": together}, rounds)
    cosine = torch.nn.functional.cosine_similarity(whole(), together(), dim=-1)
    return found | {"lowest cosine": cosine.min().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/throughput.json"))
    options = parser.parse_args()
    explainer = Explainer.from_pretrained(packaged_smollm2())
    results: dict[str, Any] = {"machine": machine(), "data set": data_set(explainer, options.rounds)}
    cases = {"last 16 of 32": (32, range(16, 32)), "last 16 of 128": (128, range(112, 128))}
    cases |= {"16 spread over 128": (128, range(7, 128, 8)), "all of 128": (128, range(128))}
    results["targets"] = {
        name: targets(explainer, tokens, list(positions), options.rounds) for name, (tokens, positions) in cases.items()
    }
    text = json.dumps(results, indent=1)
    print(text)
    options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

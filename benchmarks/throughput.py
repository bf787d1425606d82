"""A data set in batches of like length against a loop over its texts, and many targets against single ones.

    OMP_NUM_THREADS=1 python benchmarks/throughput.py [--rounds 3] [--out benchmarks/results/throughput.json]

SmolLM2-135M. Time is the CPU time of the process; the two ways take turns, and reported are the medians of all rounds
and the ratios within rounds. Texts: 64 of 4 to 24 tokens. Targets: 16 positions at the end of a text of 32 and of
128 tokens.
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

import torch

from attnlrp import explain_dataset
from attnlrp.explainer import Explainer
from shared import TEXT, machine, packaged_smollm2

TARGETS = 16


def compare(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    first, second = ways
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if turn:
                times[name].append(time.process_time() - start)
    ratios = [b / a for a, b in zip(times[first], times[second], strict=True)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"CPU seconds": medians, f"{second} / {first}": statistics.median(ratios), "ratios": ratios}


def data_set(explainer: Explainer, rounds: int) -> dict[str, Any]:
    shuffled, ids = random.Random(0), explainer.tokenizer(TEXT).input_ids
    texts = [explainer.tokenizer.decode(ids[: shuffled.randint(4, 24)]) for _ in range(64)]

    def batched() -> None:
        with tempfile.TemporaryDirectory() as folder:
            explain_dataset(explainer, texts, Path(folder) / "out.jsonl")

    found = compare({"loop": lambda: [explainer(text) for text in texts], "batches": batched}, rounds)
    tokens = sum(len(explainer.tokenizer(text).input_ids) for text in texts)
    return found | {"tokens per CPU second": {k: tokens / v for k, v in found["CPU seconds"].items()}}


def targets(explainer: Explainer, tokens: int, rounds: int) -> dict[str, Any]:
    text = explainer.tokenizer.decode(explainer.tokenizer(TEXT * 20).input_ids[:tokens])
    positions = list(range(tokens - TARGETS, tokens))

    def single() -> torch.Tensor:
        return torch.cat([explainer(text, position=p).relevance for p in positions])

    cosine = torch.nn.functional.cosine_similarity(single(), explainer(text, position=positions).relevance, dim=-1)
    found = compare({"single": single, "together": lambda: explainer(text, position=positions)}, rounds)
    return found | {"lowest cosine": cosine.min().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/throughput.json"))
    options = parser.parse_args()
    explainer = Explainer.from_pretrained(packaged_smollm2())
    results: dict[str, Any] = {"machine": machine(), "data set": data_set(explainer, options.rounds)}
    results["targets"] = {f"{n} tokens": targets(explainer, n, options.rounds) for n in (32, 128)}
    text = json.dumps(results, indent=1)
    print(text)
    options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

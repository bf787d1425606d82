"""Peak memory against its estimate before the run, and a long context, each in a process of its own.

    OMP_NUM_THREADS=2 python benchmarks/memory.py [--tokens 512 8192] [--out benchmarks/results/memory.json]

SmolLM2-135M, fused attention, one text, the predicted token. Measured: by how much the largest resident memory of the
process exceeds what is resident before the run, after a short text has been explained; the same without giving freed
memory back (`attnlrp.heap`), and of input x gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from attnlrp import ATTNLRP, heap
from attnlrp.explainer import Explainer
from attnlrp.memory import Plan, estimate
from shared import input_x_gradient, inputs, machine, packaged_smollm2

GRADIENT = "input x gradient"
KEEP = "KEEP_FREED_MEMORY"  # in the environment of a process that measures


def largest() -> float:
    """Largest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def resident() -> float:
    """What is resident now, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure(tokens: int, way: str) -> dict[str, Any]:
    if KEEP in os.environ:
        heap.__dict__["_trim"] = lambda: None  # as on a system that cannot
    choice: Any = way if way in ("full", "checkpoint") else "full"
    explainer = Explainer.from_pretrained(packaged_smollm2(), memory=choice)
    ids = inputs(explainer.tokenizer, tokens)
    found = estimate(explainer.model, ATTNLRP, {"input_ids": ids})
    estimated = found.peak(Plan(way == "checkpoint", 1), texts=1, tokens=tokens) / 2**20

    def run(ids: torch.Tensor) -> None:
        if way == GRADIENT:
            input_x_gradient(explainer.model.requires_grad_(False), ids)
        else:
            explainer(explainer.tokenizer.decode(ids[0]))

    run(ids[:, :64])  # reads the weights
    before, start = resident(), time.process_time()
    run(ids)
    return {
        "tokens": tokens,
        "way": way,
        "estimated MiB": None if way == GRADIENT else estimated,
        "measured MiB": largest() - before,
        "whole process MiB": largest(),
        "CPU seconds": time.process_time() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(int(options.one[0]), options.one[1])))
        return
    rows = []
    for tokens in options.tokens:
        for way in (GRADIENT, "full", "checkpoint") if tokens <= 2048 else ("checkpoint",):
            for own in [{}] if way == GRADIENT else [{}, {KEEP: "1"}]:
                command = [sys.executable, __file__, "--one", str(tokens), way]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | own)
                rows.append(json.loads(done.stdout.splitlines()[-1]) | {"gives back": not own})
                print(rows[-1], flush=True)
            options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

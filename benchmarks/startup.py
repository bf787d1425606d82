"""What `attnlrp explain` takes from shell to heat map, when the packaged model has been converted before.

    python benchmarks/startup.py [--rounds 3] [--out benchmarks/results/startup.json]

CPU time of the process (user and system) and wall clock, each the median of the rounds, and all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from shared import machine

COMMAND = [sys.executable, "-c", "from attnlrp.cli import main; main()", "explain", "Paris is the capital of France."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/startup.json"))
    options = parser.parse_args()
    cpu, wall = [], []
    for turn in range(options.rounds + 1):
        before, start = os.times(), time.perf_counter()
        subprocess.run(COMMAND, check=True, capture_output=True)
        after = os.times()
        if turn:
            wall.append(time.perf_counter() - start)
            cpu.append(sum(after[2:4]) - sum(before[2:4]))
    medians = {"CPU seconds": statistics.median(cpu), "seconds": statistics.median(wall)}
    results = {"machine": machine(), "load": os.getloadavg()[0], **medians, "all": {"CPU": cpu, "wall": wall}}
    print(json.dumps(results, indent=1))
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

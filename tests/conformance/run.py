"""`python -m tests.conformance.run`: every architecture of transformers, and docs/architectures.md from the results."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
import warnings
from collections import deque
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import transformers.conversion_mapping  # imported once here, not in each child
import transformers.models.llama.modeling_llama

from . import recipe, table
from .checks import Result, check

TIMEOUT = 90.0  # seconds per row
MEMORY = 10 * 2**30  # bytes of address space per row
RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def one(task: str, kind: str) -> Result:
    """One row, in this process."""
    result, start, stage = Result(task, kind), time.monotonic(), "not built"
    try:
        model = recipe.build(task, kind)
        stage = "no input"
        inputs = recipe.inputs(task, kind, model)
        with torch.no_grad():
            model(**inputs)
        stage = "error"
        check(result, model, inputs)
    except Exception as error:  # whatever a model raises is its row's result
        result.outcome = "unknown operation" if type(error).__name__ == "UnknownOperationError" else stage
        result.reason = f"{type(error).__name__}: {str(error).strip()}"[:400].replace("\n", " ")
    result.seconds = round(time.monotonic() - start, 1)
    return result


def _child(task: str, kind: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    pipe.send(one(task, kind))
    pipe.close()


class _Worker:
    """A forked process for one row: a crash, a hang or memory that is not returned concerns that row alone."""

    def __init__(self, task: str, kind: str, timeout: float) -> None:
        context = multiprocessing.get_context("fork")
        self.row, self.pipe, pipe = (task, kind), *context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(task, kind, pipe), daemon=True)
        self.deadline = time.monotonic() + timeout
        self.timeout = timeout
        self.process.start()
        pipe.close()

    def result(self) -> Result | None:
        """The result, if there is one by now."""
        late = time.monotonic() > self.deadline
        if not (late or self.pipe.poll()):
            return None
        try:
            found = self.pipe.recv() if self.pipe.poll() else None
        except EOFError:
            found = None
        if late:
            self.process.kill()
        self.process.join()
        self.pipe.close()
        if found is not None:
            return found  # type: ignore[no-any-return]
        if late:
            return Result(*self.row, "timeout", f"more than {self.timeout:.0f} s")
        return Result(*self.row, "crash", f"exit code {self.process.exitcode}")


def run(rows: list[tuple[str, str]], jobs: int, timeout: float = TIMEOUT) -> list[Result]:
    """The results of the rows, each in a process of its own."""
    waiting, working, results = deque(rows), [], []
    while waiting or working:
        while waiting and len(working) < jobs:
            working.append(_Worker(*waiting.popleft(), timeout))
        wait([w.pipe for w in working], timeout=1)
        for worker in list(working):
            if (result := worker.result()) is not None:
                working.remove(worker)
                results.append(result)
                merge([result])
                print(
                    f"{result.task:24} {result.kind:26} {result.seconds:5.1f} {result.outcome:12} {result.reason}",
                    flush=True,
                )
    return results


def merge(results: list[Result]) -> dict[str, Any]:
    """Join new results with those on file, in the order of the mappings."""
    known = {(r["task"], r["kind"]): r for r in json.loads(RESULTS.read_text())["rows"]} if RESULTS.exists() else {}
    known |= {(r.task, r.kind): asdict(r) for r in results}
    rows = [known[pair] for pair in recipe.pairs() if pair in known]
    data = {"transformers": transformers.__version__, "torch": torch.__version__, "rows": rows}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="model types, tasks, or model type/task")
    parser.add_argument("--failed", action="store_true", help="only rows that have not passed yet")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    rows = recipe.pairs()
    if options.only:
        rows = [(t, k) for t, k in rows if {t, k, f"{k}/{t}"} & set(options.only)]
    if options.failed and RESULTS.exists():
        passed = {(r["task"], r["kind"]) for r in json.loads(RESULTS.read_text())["rows"] if r["outcome"] == "pass"}
        rows = [r for r in rows if r not in passed]
    run(rows, options.jobs)
    PAGE.write_text(table.page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()

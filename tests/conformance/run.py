"""`python -m tests.conformance.run`: every architecture of transformers, and docs/architectures.md from the results."""

from __future__ import annotations

import argparse
import hashlib
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

from . import geometry, recipe, table
from .checks import Result, check
from .published import PUBLISHED, TASK

TIMEOUT = 90.0  # seconds per row
MEMORY = 10 * 2**30  # bytes of address space per row
RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
SOURCE = Path(__file__).parents[2] / "src" / "attnlrp"
DECIDES = ("rules", "backward", "operations", "engine", "layers", "kernels", "activations", "ledger")
"""The modules that a result depends on."""


def rows() -> list[tuple[str, str]]:
    """Every row: published geometries by the names of their checkpoints, and every model type of every task."""
    return [(TASK, name) for name in PUBLISHED] + recipe.pairs()


def one(task: str, kind: str) -> Result:
    """One row, in this process."""
    result, start, stage = Result(task, kind), time.monotonic(), "not built"
    try:
        config = None
        if task == TASK:  # the name of a checkpoint stands for its task, model type and configuration
            task, kind, config = PUBLISHED[kind]["task"], PUBLISHED[kind]["kind"], geometry.scaled(kind)
        model = recipe.build(task, kind, config)
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


def state() -> str:
    """What a result depends on besides its row: a digest of the modules that decide it, and the versions it runs with."""
    digest = hashlib.sha256(f"{transformers.__version__} {torch.__version__}".encode())
    for name in DECIDES:
        digest.update((SOURCE / f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


def run(wanted: list[tuple[str, str]], jobs: int, timeout: float = TIMEOUT) -> list[Result]:
    """The results of the rows, each in a process of its own."""
    waiting, working, results, source = deque(wanted), [], [], state()
    while waiting or working:
        while waiting and len(working) < jobs:
            working.append(_Worker(*waiting.popleft(), timeout))
        wait([w.pipe for w in working], timeout=1)
        for worker in list(working):
            if (result := worker.result()) is not None:
                working.remove(worker)
                result.state = source
                results.append(result)
                merge([result])
                print(
                    f"{result.task:24} {result.kind:40} {result.seconds:5.1f} {result.outcome:12} {result.reason}",
                    flush=True,
                )
    return results


def merge(results: list[Result]) -> dict[str, Any]:
    """Join new results with those on file, in the order of the mappings."""
    known = {(r["task"], r["kind"]): r for r in json.loads(RESULTS.read_text())["rows"]} if RESULTS.exists() else {}
    known |= {(r.task, r.kind): asdict(r) for r in results}
    kept = [known[pair] for pair in rows() if pair in known]
    data = {"transformers": transformers.__version__, "torch": torch.__version__, "rows": kept}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        nargs="*",
        help="model types, tasks, or model type/task; checkpoints by name, all of them as 'published'",
    )
    parser.add_argument("--failed", action="store_true", help="only rows that have not passed yet")
    parser.add_argument("--resume", action="store_true", help="only rows that the library as it is has not run yet")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    wanted = rows()
    if options.only:
        wanted = [(t, k) for t, k in wanted if {t, k, f"{k}/{t}"} & set(options.only)]
    on_file = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    if options.failed:
        wanted = _without(wanted, [r for r in on_file if r["outcome"] == "pass"])
    if options.resume:
        wanted = _without(wanted, [r for r in on_file if r.get("state") == state()])
    run(wanted, options.jobs)
    PAGE.write_text(table.page(json.loads(RESULTS.read_text()), state()))


def _without(wanted: list[tuple[str, str]], done: list[dict[str, Any]]) -> list[tuple[str, str]]:
    settled = {(r["task"], r["kind"]) for r in done}
    return [pair for pair in wanted if pair not in settled]


if __name__ == "__main__":
    main()

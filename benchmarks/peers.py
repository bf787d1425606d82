"""Other implementations of LRP for transformers, side by side with this one.

    pip install --no-deps --target /tmp/peers lxt==2.1 autolrp==0.2.0
    OMP_NUM_THREADS=1 PYTHONPATH=/tmp/peers python benchmarks/peers.py [--out benchmarks/results/peers.json]

SmolLM2-135M; the logit of the predicted token, the only logits that are computed. LXT changes classes of the process it
runs in, so each method has a process of its own, and they take turns. Time is the CPU time of a process; ratios are
taken within rounds to input x gradient, one round of warm-up is dropped, reported are medians. Relevance is compared
with that of attnlrp. LXT is the package of PyPI; this version of transformers needs help to run with it: what LXT
imports and does not use here is put in place (torchvision, a function that is gone), and its table of attention
functions is made of the class that transformers expects.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from shared import attn_lrp, input_x_gradient, inputs, load, machine, packaged_smollm2

Method = Callable[[Any, Tensor], Tensor]


def lxt() -> Method:
    import transformers.pytorch_utils
    from transformers.models.llama import modeling_llama

    transformers.pytorch_utils.find_pruneable_heads_and_indices = None
    for name in ("torchvision", "torchvision.models", "torchvision.models.vision_transformer"):
        sys.modules[name] = MagicMock()
    from lxt.efficient import monkey_patch

    table = type(modeling_llama.ALL_ATTENTION_FUNCTIONS)
    monkey_patch(modeling_llama)
    patched, modeling_llama.ALL_ATTENTION_FUNCTIONS = modeling_llama.ALL_ATTENTION_FUNCTIONS, table()
    for name, function in patched.items():
        modeling_llama.ALL_ATTENTION_FUNCTIONS[name] = function
    return input_x_gradient


def autolrp() -> Method:
    import autolrp

    config = autolrp.LRPConfig(rule={**autolrp.BASE, **autolrp.ATTNLRP})

    def relevance(model: Any, ids: Tensor) -> Tensor:
        embeddings = autolrp.tensor(model.get_input_embeddings()(ids).detach())
        logits = model(inputs_embeds=embeddings, logits_to_keep=1, use_cache=False).logits
        logits[0, -1].max().lrp(config=config)
        return embeddings.relevance.sum(-1)

    return relevance


METHODS: dict[str, Callable[[], Method]] = {
    "input x gradient": lambda: input_x_gradient,
    "attnlrp": lambda: attn_lrp,
    "lxt": lxt,
    "autolrp": autolrp,
}


def work(name: str) -> None:
    """Answer each number of tokens on standard input with seconds and relevance."""
    model, tokenizer = load(packaged_smollm2())
    method = METHODS[name]()
    for line in sys.stdin:
        ids = inputs(tokenizer, int(line))
        start = time.process_time()
        relevance = method(model, ids)
        seconds = time.process_time() - start
        print(json.dumps({"seconds": seconds, "relevance": relevance[0].tolist()}), flush=True)


def ask(worker: subprocess.Popen[str], tokens: int) -> dict[str, Any]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(f"{tokens}\n")
    worker.stdin.flush()
    while not (line := worker.stdout.readline()).startswith('{"seconds"'):
        if not line:
            raise SystemExit(f"{worker.args} failed")
    answer: dict[str, Any] = json.loads(line)
    return answer


def compare(workers: dict[str, subprocess.Popen[str]], tokens: int, rounds: int) -> dict[str, Any]:
    turns = [{name: ask(worker, tokens) for name, worker in workers.items()} for _ in range(rounds + 1)]
    own = torch.tensor(turns[0]["attnlrp"]["relevance"])
    found = {}
    for name in workers:
        seconds = [turn[name]["seconds"] for turn in turns[1:]]
        ratios = [turn[name]["seconds"] / turn["input x gradient"]["seconds"] for turn in turns[1:]]
        relevance = torch.tensor(turns[0][name]["relevance"])
        found[name] = row = {
            "CPU seconds": statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "ratios": [min(ratios), max(ratios)],
            "cosine with attnlrp": torch.nn.functional.cosine_similarity(own, relevance, dim=0).item(),
        }
        print(f"{tokens:>5}  {name:<17} {row['ratio']:.2f}  {row['cosine with attnlrp']:.6f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    parser.add_argument("--worker", choices=list(METHODS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {name: subprocess.Popen([sys.executable, __file__, "--worker", name], **pipes) for name in METHODS}
    try:
        tokens = {str(n): compare(workers, n, options.rounds) for n in options.tokens}
    finally:
        for worker in workers.values():
            worker.kill()
    about = machine() | {name: version(name) for name in ("lxt", "autolrp")}
    options.out.write_text(json.dumps({"machine": about, "tokens": tokens}, indent=1) + "\n")


if __name__ == "__main__":
    main()

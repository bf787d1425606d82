"""Knowledge neurons: found by relevance, switched off, and replaced by others.

    python benchmarks/knowledge.py [--models smollm2 gemma] [--dev 16] [--test 100] [--journals FOLDER] [--out FOLDER]

A model is asked for facts (benchmarks/knowledge_prompts.jsonl); those that it answers are split by a hash. For each,
all MLP neurons are ranked by several methods, and the first 1, 2, 4, ... are set to 0: how many must go until the
prediction changes? What each method ranks by (signed or absolute, the logit or its difference to the mean logit) is
chosen on the dev prompts; the results are those of the test prompts. A run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import attnlrp
import knowledge_report as report
from attnlrp import models
from attnlrp.evaluation.journal import Journal
from knowledge_neurons import (
    BEHIND,
    EVERYWHERE,
    LAST,
    POSITIONS,
    Fact,
    Neurons,
    Scores,
    ranking,
    read_facts,
    scores,
    spearman,
)
from knowledge_steering import steer
from shared import machine, packaged_smollm2

HERE = Path(__file__).parent
GRID = tuple(2**k for k in range(15))
SINGLE, OTHERS = 32, 6  # random neurons that are switched off one by one; other prompts on which a set is tried
Row = dict[str, Any]
Choices = dict[tuple[str, str], str]


@dataclass(frozen=True)
class Bench:
    """A model, the facts that it answers, and the file of results."""

    neurons: Neurons
    dev: list[Fact]
    test: list[Fact]
    journal: Journal


# --- one prompt ---------------------------------------------------------------------------------------------------


def masks(order: Tensor, grid: Sequence[int]) -> Tensor:
    """Which neurons are gone (step, neuron), when the first n of an order go for each n of a grid."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return place[None] < torch.tensor(grid)[:, None]


def until_change(grid: Sequence[int], kept: Sequence[bool]) -> int:
    """The first n of a grid of doublings at which the prediction is another; twice the last n if it never is."""
    return next((n for n, k in zip(grid, kept, strict=True) if not k), 2 * grid[-1])


def read(logits: Tensor, target: int) -> Row:
    """What becomes of the answer in each row of logits (row, vocab)."""
    own = logits[:, target]
    return {
        "logit": own.tolist(),
        "probability": logits.softmax(dim=-1)[:, target].tolist(),
        "rank": ((logits > own[:, None]).sum(dim=1) + 1).tolist(),
        "kept": (logits.argmax(dim=1) == target).tolist(),
    }


def flip(neurons: Neurons, fact: Fact, order: Tensor, positions: str) -> Row:
    found = read(neurons.logits(neurons.ids(fact.prompt), masks(order, GRID), positions), neurons.first(fact.answer))
    return found | {"until change": until_change(GRID, found["kept"])}


def one_by_one(neurons: Neurons, fact: Fact, own: dict[str, Tensor], positions: str) -> Row:
    """Each of some neurons switched off alone: the 8 first of each method, and random ones.

    Returns:
        method -> correlation of ranks between its score and the loss of the logit.
    """
    few = torch.cat([ranking(s)[: SINGLE if method == "random" else 8] for method, s in own.items()]).unique()
    gone = torch.nn.functional.one_hot(few, neurons.count).bool()
    ids, target = neurons.ids(fact.prompt), neurons.first(fact.answer)
    before = neurons.logits(ids, gone[:1] & False, positions)[0, target]
    loss = before - neurons.logits(ids, gone, positions)[:, target]
    return {
        "neurons": len(few),
        "correlation": {method: spearman(score[few], loss) for method, score in own.items() if method != "random"},
        "largest loss": loss.max().item(),
    }


def elsewhere(neurons: Neurons, others: Sequence[Fact], gone: Tensor, positions: str) -> list[float]:
    """Share of other prompts whose answer stays when the neurons of each row (row, neuron) go."""
    kept = []
    for fact in others:
        logits = neurons.logits(neurons.ids(fact.prompt), gone, positions)
        kept.append((logits.argmax(dim=1) == neurons.first(fact.answer)).double())
    return torch.stack(kept).mean(dim=0).tolist()


# --- all prompts --------------------------------------------------------------------------------------------------


def answered(neurons: Neurons, facts: Sequence[Fact]) -> Iterator[Fact]:
    nothing = torch.zeros(1, neurons.count, dtype=torch.bool)
    for fact in facts:
        if int(neurons.logits(neurons.ids(fact.prompt), nothing, EVERYWHERE).argmax()) == neurons.first(fact.answer):
            yield fact


def choose(bench: Bench) -> Choices:
    """(method, positions) -> the variant that needs the fewest neurons on the dev prompts, mean of log2."""
    for k, fact in enumerate(bench.dev):
        missing = [p for p in POSITIONS if (fact.prompt, f"dev, {p}") not in bench.journal]
        found = scores(bench.neurons, fact) if missing else {}
        for positions in missing:
            counts = {
                "|".join(key): flip(bench.neurons, fact, ranking(score), positions)["until change"]
                for key, score in found.items()
                if key[2] == positions
            }
            bench.journal.add({"sample": fact.prompt, "method": f"dev, {positions}", "counts": counts})
        print(f"dev {k + 1} of {len(bench.dev)}: {fact.prompt}", flush=True)
    prompts = {fact.prompt for fact in bench.dev}
    return report.best_variants([r["counts"] for r in bench.journal if "counts" in r and r["sample"] in prompts])


def measure(bench: Bench, facts: Sequence[Fact], chosen: Choices, kind: str, places: Sequence[str]) -> list[Row]:
    """Each fact with the neurons of each method gone at each of the places; the rows of the journal."""
    for k, fact in enumerate(facts):
        if (fact.prompt, kind) not in bench.journal:
            others = [f for f in (*facts[k + 1 :], *facts[:k]) if f.relation != fact.relation][:OTHERS]
            keys = [(method, variant, p) for (method, p), variant in chosen.items() if p in places]
            row = measured(bench.neurons, fact, scores(bench.neurons, fact, keys), places, others)
            bench.journal.add({"sample": fact.prompt, "method": kind} | row)
        print(f"{kind} {k + 1} of {len(facts)}: {fact.prompt}", flush=True)
    prompts = {fact.prompt for fact in facts}
    return [row for row in bench.journal if row["method"] == kind and row["sample"] in prompts]


def measured(neurons: Neurons, fact: Fact, found: Scores, places: Sequence[str], others: Sequence[Fact]) -> Row:
    """One fact; of the first place also what becomes of other facts, and what each neuron does alone."""
    row: Row = {"answer": fact.answer, "relation": fact.relation}
    row["before"] = read(
        neurons.logits(neurons.ids(fact.prompt), torch.zeros(1, neurons.count, dtype=torch.bool), LAST),
        neurons.first(fact.answer),
    )
    for place in places:
        row[place] = {m: flip(neurons, fact, ranking(s), place) for (m, _, p), s in found.items() if p == place}
    own = {method: score for (method, _, place), score in found.items() if place == places[0]}
    gone = torch.cat([masks(ranking(s), [row[places[0]][m]["until change"]]) for m, s in own.items()])
    row["other answers kept"] = dict(zip(own, elsewhere(neurons, others, gone, places[0]), strict=True))
    return row | {"one by one": one_by_one(neurons, fact, own, places[0])}


def checks(bench: Bench, chosen: Choices) -> Row:
    """The batched switch against `attnlrp.intervene`, and counts in bfloat16 against those in float32.

    Returns:
        the largest difference of a logit on 2 prompts, and for 10 prompts the neurons until change in both precisions.
    """
    whole = Neurons(bench.neurons.model, bench.neurons.tokenizer, bench.neurons.model.dtype)
    variant, worst, counts = chosen[report.OURS, LAST], 0.0, []
    for k, fact in enumerate(bench.test[:10]):
        order = ranking(scores(whole, fact, [(report.OURS, variant, LAST)])[report.OURS, variant, LAST])
        worst = max(worst, distance(whole, fact, order)) if k < 2 else worst
        counts.append([flip(neurons, fact, order, LAST)["until change"] for neurons in (bench.neurons, whole)])
    return {"difference to intervene": worst, "until change, bfloat16 and float32": counts}


def distance(neurons: Neurons, fact: Fact, order: Tensor, count: int = 8) -> float:
    """The largest difference of a logit between the first neurons off here and by `attnlrp.intervene`."""
    ids, worst = neurons.ids(fact.prompt), 0.0
    changes: dict[Any, Any] = {neurons.address(int(n)): 0.0 for n in order[:count]}
    for place, positions in ((EVERYWHERE, None), (LAST, [ids.shape[1] - 1])):
        with torch.no_grad(), attnlrp.intervene(neurons.model, changes, positions=positions):
            expected = neurons.model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[0, -1]
        found = neurons.logits(ids, masks(order, [1, count]), place)[1]
        worst = max(worst, (found - expected).abs().max().item())
    return worst


def run(name: str, options: argparse.Namespace) -> Row:
    source = packaged_smollm2() if name == "smollm2" else None if name == "gemma" else name
    model, tokenizer, shown = models.load(source)
    shown = Path(shown).name.removesuffix(".gguf")
    neurons = Neurons(model.requires_grad_(False), tokenizer)
    facts = read_facts(HERE / "knowledge_prompts.jsonl")
    known = list(answered(neurons, facts))
    dev, test = ([f for f in known if f.split == split] for split in ("dev", "test"))
    journal = Journal(options.journals / f"{name}.jsonl", {"model": shown, "grid": list(GRID), "dev": options.dev})
    bench = Bench(neurons, dev[: options.dev], test[: options.test], journal)
    chosen = choose(bench)
    rows = measure(bench, bench.test, chosen, "test", (BEHIND, LAST))
    broken = measure(bench, bench.dev, chosen, "dev", (EVERYWHERE,))
    if ("steering", "steering") not in journal:
        journal.add({"sample": "steering", "method": "steering", **steer(neurons, bench.test)})
    return {
        "model": shown,
        "prompts": {"candidates": len(facts), "answered": len(known), "dev": len(bench.dev), "test": len(rows)},
        "neurons": neurons.count,
        "checks": checks(bench, chosen),
        "variants": {f"{method}, {positions}": variant for (method, positions), variant in chosen.items()},
        "test": report.summary(rows, (BEHIND, LAST), GRID),
        "every token, dev": report.summary(broken, (EVERYWHERE,), GRID),
        "steering": next(row for row in journal if row["method"] == "steering"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma"], help="smollm2, gemma, a name or a folder")
    parser.add_argument("--dev", type=int, default=16, help="prompts for choices")
    parser.add_argument("--test", type=int, default=100, help="prompts for results")
    parser.add_argument("--journals", type=Path, default=Path("build/knowledge"), help="folder of unfinished results")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "knowledge")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = [run(name, options) for name in options.models]
    options.out.mkdir(parents=True, exist_ok=True)
    results = report.rounded({"machine": machine(), "models": found})
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "table.md").write_text(report.table(results["models"]))
    report.figure(results["models"], options.out / "curves.png")


if __name__ == "__main__":
    main()

"""Reference samples of every neuron of a language model: what they cost, and what they say of some neurons.

    python benchmarks/neurons.py TEXTS.jsonl [--model NAME] [--samples 200] [--out benchmarks/results/neurons]

TEXTS.jsonl has a text on each line, such as `wikipedia.jsonl` of benchmarks/local_data.py. Written are

- cost.json: seconds per text against gradient x input with the same target (the prediction at every token), taking
  turns; peak memory of one pass; how large the kept state and its folder are after a part of the texts and after all;
- labels.jsonl, labels.md: what is found of neurons drawn at random, and of those that a search names for some words;
- samples/ (not committed): the samples, from which the same command goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import attnlrp
from attnlrp.evaluation.data import read
from attnlrp.labels import Label, LogitLens, label, search
from shared import machine, packaged_smollm2, peak_mebibytes

WORDS = ("cold", "war", "football", "German", "music", "money")
DRAWN = 12
TIMED = 20
LENGTH = 128


def gradient_x_input(model: Any, ids: torch.Tensor, *, every: bool) -> torch.Tensor:
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    kept = {} if every else {"logits_to_keep": 1}
    logits = model(inputs_embeds=embeddings, use_cache=False, **kept).logits
    (grad,) = torch.autograd.grad(logits.max(dim=-1).values.sum(), embeddings)
    return (embeddings.detach() * grad).sum(-1)


def methods(explainer: attnlrp.Explainer) -> dict[str, Callable[[str], Any]]:
    def ids(text: str) -> torch.Tensor:
        return torch.tensor([explainer.tokenizer(text).input_ids[:LENGTH]])

    def collected(text: str, **options: Any) -> Any:
        return attnlrp.reference_samples(explainer, [text], length=LENGTH, **options)

    return {
        "gradient x input": lambda text: gradient_x_input(explainer.model, ids(text), every=True),
        "gradient x input, last token": lambda text: gradient_x_input(explainer.model, ids(text), every=False),
        "samples by activation": lambda text: collected(text, by="activation"),
        "samples by activation and relevance": lambda text: collected(text),
    }


def seconds(explainer: attnlrp.Explainer, texts: list[str]) -> dict[str, Any]:
    """Medians over texts, each of which every method reads in turn; those of samples without their start."""
    found = methods(explainer)
    found["samples by activation"](texts[0])
    times: dict[str, list[float]] = {name: [] for name in found}
    starts: list[float] = []
    for text in texts:
        gc.collect()
        start = time.perf_counter()
        attnlrp.reference_samples(explainer, [])  # finds the units and makes room for their samples
        starts.append(time.perf_counter() - start)
        for name, method in found.items():
            start = time.perf_counter()
            method(text)
            times[name].append(time.perf_counter() - start - (starts[-1] if name.startswith("samples") else 0))
    yardstick = times["gradient x input"]
    rows = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles([v / y for v, y in zip(values, yardstick, strict=True)], n=4)
        rows[name] = {"seconds": statistics.median(values), "ratio": middle, "ratio_quartiles": [low, high]}
    return {"texts": len(texts), "start": statistics.median(starts), "methods": rows}


def size(samples: attnlrp.ReferenceSamples, folder: Path) -> dict[str, float]:
    rankings = [r for layers in samples.rankings.values() for r in layers.values()]
    numbers = sum(t.nbytes for r in rankings for t in (r.values, r.samples, r.positions))
    return {
        "texts": samples.count,
        "texts kept": len(samples.passages),
        "rankings, MiB": numbers / 2**20,
        "folder, MiB": sum(path.stat().st_size for path in folder.iterdir()) / 2**20,
    }


def described(samples: attnlrp.ReferenceSamples, found: Label, why: str) -> dict[str, Any]:
    tokens = {kind: [t.token for t in getattr(found, kind)] for kind in ("promotes", "suppresses")}
    relevant = samples.words(found.unit, "relevance")
    return {"why": why, "unit": found.unit, "words": found.words, "after": found.after, "relevant": relevant, **tokens}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| neuron | why | words at its peaks | words behind | promotes | suppresses |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        words = [
            ", ".join(f"{w} {share:.0%}" for w, share in row[kind][:5]).replace("|", "\\|")
            for kind in ("words", "after", "relevant")
        ]
        tokens = [" ".join(f"`{t}`" for t in row[kind][:6]).replace("|", "\\|") for kind in ("promotes", "suppresses")]
        lines.append(f"| {row['unit']} | {row['why']} | {' | '.join(words)} | {' | '.join(tokens)} |")
    return "\n".join(lines).replace("\n`", "`") + "\n"


def labels(explainer: attnlrp.Explainer, samples: attnlrp.ReferenceSamples) -> tuple[list[dict[str, Any]], float]:
    lens, draw = LogitLens(explainer), random.Random(0)
    drawn = [(site, draw.randrange(site.units)) for site in draw.sample(samples.sites, DRAWN)]
    drawn.sort(key=lambda one: samples.sites.index(one[0]))
    rows = [described(samples, label(samples, f"{site.name}:{k}", lens=lens), "drawn") for site, k in drawn]
    took = []
    for word in WORDS:
        start = time.perf_counter()
        found = search(samples, word, lens=lens, count=2)
        took.append(time.perf_counter() - start)
        for match in found:
            why = f"{word}: {match.score:.2f} (at {match.at:.0%}, before {match.after:.0%}, {match.promotes:+.1f} sd)"
            rows.append(described(samples, label(samples, match.unit, lens=lens), why))
    return rows, statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--model", default=None)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/neurons"))
    options = parser.parse_args()
    name = options.model or packaged_smollm2()
    explainer = attnlrp.Explainer.from_pretrained(name)
    explainer.model.requires_grad_(False)  # plain autograd must not pay for gradients of the weights
    records = read(options.texts)[: options.samples]
    texts = [record["text"] for record in records]
    options.out.mkdir(parents=True, exist_ok=True)
    cost: dict[str, Any] = {"model": Path(name).stem, "dtype": "float32", "length": LENGTH, "machine": machine()}
    sizes = []
    for part, count in (("part", len(records) // 4), ("all", len(records))):
        folder = options.out / "samples" / part
        samples = attnlrp.reference_samples(explainer, records[:count], length=LENGTH, folder=folder)
        sizes.append(size(samples, folder))
        print(sizes[-1], flush=True)
    cost |= {"units": samples.units, "top": samples.settings.top, "by": samples.settings.by, "sizes": sizes}
    cost["one text"] = seconds(explainer, texts[:TIMED])
    longest = max(texts[:TIMED], key=len)
    cost["peak of one pass, MiB"] = {
        name: peak_mebibytes(explainer.model, torch.tensor([[0]]), lambda model, ids, run=method: run(longest))
        for name, method in methods(explainer).items()
    }
    rows, cost["seconds of a search"] = labels(explainer, samples)
    (options.out / "cost.json").write_text(json.dumps(cost, indent=1) + "\n")
    print(json.dumps(cost["one text"], indent=1), cost["peak of one pass, MiB"])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (options.out / "labels.jsonl").write_text(lines, encoding="utf-8")
    (options.out / "labels.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()

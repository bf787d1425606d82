"""Rules that might be more faithful than the paper's: chosen on some texts of two models, tested on other texts.

    python benchmarks/beyond.py FOLDER [--out benchmarks/results/beyond.json] [--journals FOLDER]

FOLDER holds the data of benchmarks/local_data.py. Every candidate is measured on TUNE paragraphs with SmolLM2 (area
between LeRF and MoRF, zeroed embeddings, next word), the best KEPT of them on FEW paragraphs with Gemma 3. The CHOSEN
with the largest area, in units of AttnLRP's, mean over the two models, are then tested: on the other paragraphs with
both models, and on film reviews with a BERT classifier, a model and data that took no part in the choice. Paired
differences to AttnLRP and CP-LRP with bootstrap intervals, Bonferroni-corrected for the number of tests.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlrp import evaluation, models
from attnlrp.backward import live, scale_gradient
from attnlrp.methods import Propagated
from attnlrp.rules import ATTNLRP, CP_LRP, Rules, constant
from shared import machine, packaged_smollm2

LENGTH, STEPS, TUNE, KEPT, FEW, CHOSEN, REVIEWS = 48, 12, 100, 9, 40, 3, 200
Target = Callable[[Any], Tensor]


def attention(inner: float, value: float) -> Rules:
    """Fused attention whose queries and keys take `inner` times the gradient, its values `value` times."""

    def rule(op: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        return op(scale_gradient(q, inner), scale_gradient(k, inner), scale_gradient(v, value), *args, **kwargs)

    return {F.scaled_dot_product_attention: rule}


def gate(share: float) -> Rules:
    """Of a product of two live tensors, the first (the activated gate) takes this share."""

    def rule(op: Any, a: Any, b: Any, **kwargs: Any) -> Any:
        return op(scale_gradient(a, share), scale_gradient(b, 1 - share)) if live(a) and live(b) else op(a, b, **kwargs)

    return {"mul": rule}


class Mean:
    """Mean of two explanations, each in units of the logit."""

    def __init__(self, *tables: Rules) -> None:
        self.methods = [Propagated(table) for table in tables]

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Target) -> Tensor:
        return sum(method(model, inputs, target) for method in self.methods) / len(self.methods)  # type: ignore


class First:
    """The first token, an attention sink, is ranked above all others; or below them."""

    def __init__(self, rules: Rules, sign: int = 1) -> None:
        self.method, self.sign = Propagated(rules), sign

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Target) -> Tensor:
        relevance = self.method(model, inputs, target).clone()
        relevance[0] = self.sign * (relevance.abs().max() + 1)
        return relevance


class Against:
    """The logit less the mean of all logits (a contrastive target)."""

    def __init__(self, rules: Rules) -> None:
        self.method = Propagated(rules)

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Target) -> Tensor:
        return self.method(model, inputs, lambda out: target(out) - out.logits[:, -1].float().mean(-1))


class Positive:
    """Only positive relevance of each number of an embedding is counted."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Target) -> Tensor:
        from attnlrp.engine import propagate

        with torch.enable_grad(), propagate(model, self.rules) as propagation:
            scores = target(model(**inputs))
        _, embeddings = propagation.embeddings[0]
        (gradient,) = torch.autograd.grad(scores.sum(), embeddings)
        return (embeddings * gradient).detach().float().clamp(min=0).sum(-1)[0]


PAPER = {"attnlrp": Propagated(ATTNLRP), "cp-lrp": Propagated(CP_LRP)}
CANDIDATES: dict[str, Any] = {
    "queries and keys 1/4, values 1": Propagated(ATTNLRP | attention(1 / 4, 1)),
    "queries and keys 1/8, values 1": Propagated(ATTNLRP | attention(1 / 8, 1)),
    "queries and keys 1/8, values 3/4": Propagated(ATTNLRP | attention(1 / 8, 3 / 4)),
    "queries and keys 1/16, values 3/4": Propagated(ATTNLRP | attention(1 / 16, 3 / 4)),
    "mean of AttnLRP and CP-LRP": Mean(ATTNLRP, CP_LRP),
    "gate share 0": Propagated(ATTNLRP | gate(0)),
    "gate share 1/4": Propagated(ATTNLRP | gate(1 / 4)),
    "gate share 3/4": Propagated(ATTNLRP | gate(3 / 4)),
    "gate share 1": Propagated(ATTNLRP | gate(1)),
    "CP-LRP, gate share 0": Propagated(CP_LRP | gate(0)),
    "CP-LRP, gate share 1": Propagated(CP_LRP | gate(1)),
    "softmax constant, normalisation by gradient": Propagated({"softmax": constant, "mul": ATTNLRP["mul"]}),
    "first token first": First(ATTNLRP),
    "CP-LRP, first token first": First(CP_LRP),
    "first token last": First(ATTNLRP, -1),
    "against the mean logit": Against(ATTNLRP),
    "CP-LRP, against the mean logit": Against(CP_LRP),
    "positive parts": Positive(ATTNLRP),
    "CP-LRP, positive parts": Positive(CP_LRP),
}


MODELS = {"SmolLM2-135M": packaged_smollm2(), "Gemma-3-270M": None}


def measure(model: Any, samples: list[Any], methods: Mapping[str, Any], journal: Path) -> evaluation.Report:
    perturbation = evaluation.Perturbation(model, batch_size=32)

    def told(done: int, total: int, last: str) -> None:
        if done % 100 == 0:
            print(f"{journal.stem}: {done} of {total}", flush=True)

    return evaluation.faithfulness(samples, methods, perturbation, steps=STEPS, journal=journal, progress=told)


def summary(report: evaluation.Report, confidence: float) -> dict[str, Any]:
    found = {}
    for name in report.methods:
        row: dict[str, Any] = {m: report.mean(name, m).to_dict() for m in ("area", "comprehensiveness", "sufficiency")}
        for other in PAPER:
            if other != name:
                a, b = (report.values(method, "area") for method in (name, other))
                difference = evaluation.compare([a[n] for n in b], list(b.values()), confidence=confidence)
                row[f"less {other}"] = difference.to_dict()
        found[name] = row
    rows = dict(sorted(found.items(), key=lambda item: -item[1]["area"]["mean"]))
    return {"samples": len(report.values("attnlrp", "area")), "confidence": confidence, "methods": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/beyond.json"))
    parser.add_argument("--journals", type=Path, default=Path("beyond"))
    given = parser.parse_args()
    records = evaluation.read(given.folder / "wikipedia.jsonl")
    shuffled = evaluation.draw(records, len(records), seed=1)
    tune, test = shuffled[:TUNE], shuffled[TUNE:]
    loaded = {name: models.load(path, dtype="bfloat16")[:2] for name, path in MODELS.items()}

    def words(name: str, records: list[Any]) -> list[Any]:
        model, tokenizer = loaded[name]
        model.requires_grad_(False)
        return [evaluation.next_token(model, tokenizer, r, name=r["name"], length=LENGTH) for r in records]

    tuned = {}
    methods = PAPER | CANDIDATES
    for name, texts in {"SmolLM2-135M": tune, "Gemma-3-270M": tune[:FEW]}.items():
        tuned[name] = summary(
            measure(loaded[name][0], words(name, texts), methods, given.journals / f"tune-{name}.jsonl"), 0.95
        )
        best = [method for method in tuned[name]["methods"] if method not in PAPER][:KEPT]
        methods = PAPER | {method: CANDIDATES[method] for method in best}
    gains = {method: sum(_gain(part["methods"], method) for part in tuned.values()) / len(tuned) for method in methods}
    chosen = sorted(gains.keys() - PAPER.keys(), key=lambda method: -gains[method])[:CHOSEN]
    methods = PAPER | {name: CANDIDATES[name] for name in chosen}
    confidence = 1 - 0.05 / (3 * CHOSEN)
    samples = {f"{name}, other texts": (loaded[name][0], words(name, test)) for name in MODELS}
    model, tokenizer, _ = models.load(str(given.folder / "imdb-minilm"), dtype="float32")
    reviews = evaluation.draw(evaluation.read(given.folder / "imdb_test.jsonl"), REVIEWS, seed=1)
    model.requires_grad_(False)
    classified = [evaluation.classified(model, tokenizer, r, name=r["name"], length=LENGTH) for r in reviews]
    samples["MiniLM on IMDB"] = model, classified
    found = {"length": LENGTH, "steps": STEPS, "dtype": "bfloat16, MiniLM float32", "chosen": chosen, "gains": gains}
    parts = {f"tuned on {name}": part for name, part in tuned.items()}
    for name, (model, texts) in samples.items():
        report = measure(model, texts, methods, given.journals / f"test-{name.replace(' ', '-')}.jsonl")
        parts[f"tested on {name}"] = summary(report, confidence)
    given.out.write_text(json.dumps(found | parts | {"machine": machine()}, indent=1) + "\n", encoding="utf-8")
    for where, part in parts.items():
        print(f"\n{where}")
        for name, row in part["methods"].items():
            less = row.get("less attnlrp")
            interval = f"{less['mean']:+.2f} [{less['low']:+.2f}, {less['high']:+.2f}]" if less else ""
            print(f"{name:44s} {row['area']['mean']:6.2f} ±{row['area']['standard_error']:.2f}  {interval}")


def _gain(methods: dict[str, Any], method: str) -> float:
    return methods[method]["area"]["mean"] / methods["attnlrp"]["area"]["mean"]


if __name__ == "__main__":
    main()

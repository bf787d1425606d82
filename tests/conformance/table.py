"""The results as a page: docs/architectures.md."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .recipe import row

HEAD = """# Architectures

Written by `python -m tests.conformance.run`, with transformers {transformers} and torch {torch}: do not edit.

Every model type that transformers maps to the tasks below is built tiny, with random weights, from its configuration, and must
show five things: the forward pass is the same under the rules (1e-6 relative, float32); no operation is without a rule; under
`ATTNLRP` every operation of the ledger balances, to 1e-9 in float64, or to 1e-4 where the model's own code or kernels insist on
float32; under `CP_LRP` relevance of the inputs and what is absorbed add up to the explained logit to 1e-3; and `propagate` in float32, with fused
kernels, gives the inputs the relevance that the ledger has entered.

The columns after the dtype are parts of the explained logit, and sum to 1: what reaches the inputs (token embeddings, pixels,
audio), and what biases, softmax, constants (position tables, added `1`s, masks) and the stabiliser of gates absorb. The weights
are random, so the numbers show that something absorbs, not how much it does in a trained model.

{summary}
"""
INPUTS_FIRST = ("bias", "softmax", "constant", "stabiliser")


def page(data: dict[str, Any]) -> str:
    """The whole page."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for result in data["rows"]:
        tasks.setdefault(result["task"], []).append(result)
    parts = [HEAD.format(summary=_summary(tasks), **data)]
    return "\n".join(parts + [_section(task, results) for task, results in tasks.items()])


def _summary(tasks: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| task | model types | pass | of these in float64 | not |", "|---|---|---|---|---|"]
    everything = [r for results in tasks.values() for r in results]
    for task, results in [*tasks.items(), ("**all**", everything)]:
        passed = [r for r in results if r["outcome"] == "pass"]
        failed = Counter(r["outcome"] for r in results if r["outcome"] != "pass")
        reasons = ", ".join(f"{n} {outcome}" for outcome, n in failed.most_common())
        double = sum(r["dtype"] == "float64" for r in passed)
        lines.append(f"| {task} | {len(results)} | {len(passed)} | {double} | {reasons} |")
    return "\n".join(lines)


def _section(task: str, results: list[dict[str, Any]]) -> str:
    lines = [f"## {task}", "", "| model type | result | dtype | inputs | absorbed | why |", "|---|---|---|---|---|---|"]
    for r in results:
        absorbed = ", ".join(f"{k} {v:.3f}" for k, v in r["shares"].items() if k in INPUTS_FIRST and abs(v) >= 0.0005)
        inputs = ", ".join(f"{k} {v:.3f}" for k, v in r["shares"].items() if k not in INPUTS_FIRST)
        reason = r["reason"].split(": add a row to the table")[0].replace("|", "\\|")
        why = "; ".join(filter(None, (row(task, r["kind"]).get("note", ""), reason)))
        lines.append(f"| {r['kind']} | {r['outcome']} | {r['dtype']} | {inputs} | {absorbed} | {why} |")
    return "\n".join([*lines, ""])

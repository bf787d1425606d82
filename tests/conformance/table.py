"""The results as a page: docs/architectures.md."""

from __future__ import annotations

from collections import Counter
from typing import Any

from . import geometry
from .published import PUBLISHED, TASK
from .recipe import row
from .sizes import VOCAB

HEAD = """# Architectures

Written by `python -m tests.conformance.run`, with transformers {transformers} and torch {torch}: do not edit.

Every model type that transformers maps to the tasks below is built tiny, with random weights, from its configuration, and must
show five things: the forward pass is the same under the rules (1e-6 relative, float32); no operation is without a rule; under
`ATTNLRP` every operation of the ledger balances, to 1e-9 in float64, or to 1e-4 where the model's own code or kernels insist on
float32, and so under `VIT` for image classifiers; under `CP_LRP` relevance of the inputs and what is absorbed add up to the explained logit to 1e-3; and `propagate` in float32, with fused
kernels, gives the inputs the relevance that the ledger has entered.

The columns after the dtype are parts of the explained logit, and sum to 1: what reaches the inputs (token embeddings, pixels,
audio), and what biases, softmax, constants (position tables, added `1`s, masks) and the stabiliser of gates absorb. The weights
are random, so the numbers show that something absorbs, not how much it does in a trained model. Where the explained logit of
a random model is close to 0, the parts are large and cancel.

{origin}

{summary}
"""
GEOMETRIES = """## Published geometries

The same five checks, on the values of the config.json of well-known checkpoints: number and ratio of heads, kinds of norm,
activation, position and rope, experts and their routing, pattern of windows, soft caps, tied weights, context. Widths are
divided by the number in the table, the layers cut to as many as it takes to have each kind, vocabulary to {vocabulary} and
windows to {window}, shorter than the text. The weights are random: the checkpoints themselves were not loaded. The values
were written down without access to the hub; a test compares the number of parameters that they give with the known one, where there is
one. [checkpoints.md](checkpoints.md) has a recipe for each.

| model | checkpoint | parameters | widths | layers | result | dtype | inputs | absorbed | why |
|---|---|---|---|---|---|---|---|---|---|
"""
NAMES = {TASK: "published geometries"}
ABSORBERS = ("bias", "softmax", "constant", "stabiliser")


def page(data: dict[str, Any], state: str) -> str:
    """The whole page, for the library in this state."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for result in data["rows"]:
        tasks.setdefault(result["task"], []).append(result)
    parts = [HEAD.format(summary=_summary(tasks), origin=_origin(data["rows"], state), **data)]
    if TASK in tasks:
        parts.append(_geometries(tasks.pop(TASK)))
    return "\n".join(parts + [_section(task, results) for task, results in tasks.items()])


def _origin(results: list[dict[str, Any]], state: str) -> str:
    """Whether the page shows one run, or rows from earlier states of the library too."""
    older = sum(r.get("state") != state for r in results)
    if not older:
        return f"All {len(results)} rows were run with the library in one state (digest of its source: {state})."
    return (
        f"Of {len(results)} rows, {older} were run with an earlier state of the library than the others (digest of the "
        f"source: {state}); `--resume` runs these again."
    )


def _summary(tasks: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| task | rows | pass | of these in float64 | not |", "|---|---|---|---|---|"]
    everything = [r for results in tasks.values() for r in results]
    for task, results in [*tasks.items(), ("**all**", everything)]:
        passed = [r for r in results if r["outcome"] == "pass"]
        failed = Counter(r["outcome"] for r in results if r["outcome"] != "pass")
        reasons = ", ".join(f"{n} {outcome}" for outcome, n in failed.most_common())
        double = sum(r["dtype"] == "float64" for r in passed)
        lines.append(f"| {NAMES.get(task, task)} | {len(results)} | {len(passed)} | {double} | {reasons} |")
    return "\n".join(lines)


def _geometries(results: list[dict[str, Any]]) -> str:
    lines = []
    for r in results:
        data = PUBLISHED[r["kind"]]
        size = f"{geometry.parameters(r['kind']):,}"
        depth = f"{data['layers']} of {geometry.depth(r['kind'])}"
        lines.append(
            f"| {data['model']} | {r['kind']} | {size} | / {data['width']} | {depth} | {_columns(r, data.get('note', ''))} |"
        )
    return GEOMETRIES.format(vocabulary=VOCAB, window=geometry.WINDOW) + "\n".join([*lines, ""])


def _section(task: str, results: list[dict[str, Any]]) -> str:
    lines = [f"## {task}", "", "| model type | result | dtype | inputs | absorbed | why |", "|---|---|---|---|---|---|"]
    lines += [f"| {r['kind']} | {_columns(r, row(task, r['kind']).get('note', ''))} |" for r in results]
    return "\n".join([*lines, ""])


def _columns(r: dict[str, Any], note: str) -> str:
    """Result, dtype, inputs, absorbed, why."""
    absorbed = ", ".join(f"{k} {v:.3f}" for k, v in r["shares"].items() if k in ABSORBERS and abs(v) >= 0.0005)
    inputs = ", ".join(f"{k} {v:.3f}" for k, v in r["shares"].items() if k not in ABSORBERS)
    reason = r["reason"].split(": add a row to the table")[0].replace("|", "\\|")
    why = "; ".join(filter(None, (note, reason)))
    return " | ".join((r["outcome"], r["dtype"], inputs, absorbed, why))

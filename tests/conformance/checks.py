"""What one row must show: unchanged forward, closed books under ATTNLRP (VIT too), conservation under CP_LRP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import attnlrp
from attnlrp.errors import UnknownOperationError
from attnlrp.ledger import Ledger

FORWARD, FORWARD_DOUBLE, CONSERVED, AGREEMENT = 1e-6, 1e-12, 1e-3, 1e-3


@dataclass
class Result:
    """The outcome of one row, as data.

    Args:
        outcome: "pass", or the first thing that failed.
        reason: why it failed; for a pass in float32, why not in float64.
        dtype: precision of the books.
        shares: relevance of the inputs and of each absorber, in parts of the target.
        seconds: how long it took.
        state: digest of the library that it was run with.
    """

    task: str
    kind: str
    outcome: str = "pass"
    reason: str = ""
    dtype: str = ""
    shares: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    state: str = ""


def logits(output: Any) -> Tensor:
    """What the model predicts: class, token or start logits."""
    for name in ("logits", "start_logits", "prediction_logits"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    return output[0]  # type: ignore[no-any-return]


def target(output: Any) -> Tensor:
    """The largest logit of the last position of the first row."""
    found = logits(output)
    return found[0].reshape(-1, found.shape[-1])[-1].max()


def check(result: Result, model: nn.Module, inputs: dict[str, Any]) -> None:
    """Fill in the outcome."""
    difference = forward_difference(model, inputs)
    if FORWARD < difference < 100 * FORWARD:  # kernels with and without gradients round differently: is it that?
        difference = forward_difference(model.double(), as_dtype(inputs, torch.float64)) * FORWARD / FORWARD_DOUBLE
    if not difference <= FORWARD:
        result.outcome, result.reason = "forward differs", f"by {difference:.1e} of the largest logit"
        return
    ledger = books(result, model, inputs)
    if result.outcome != "pass":
        return
    result.shares = shares(ledger)
    conserved = audit(model, inputs, attnlrp.CP_LRP, ledger.dtype)
    if not conserved.error <= CONSERVED:
        result.outcome, result.reason = "CP-LRP not conserved", f"error {conserved.error:.1e}"
        return
    if result.task == "image-classification":
        vision = audit(model, inputs, attnlrp.VIT, ledger.dtype)
        if not vision.closes:
            result.outcome, result.reason = "leak under VIT", describe(vision)
            return
    # in float32 on both sides, so that what is compared is the way of computing it and not its precision
    ledger = ledger if ledger.dtype == torch.float32 else audit(model, inputs, attnlrp.ATTNLRP, torch.float32)
    difference = abs(explained(model, inputs) - sum(ledger.inputs.values())) / ledger.scale
    if not difference <= AGREEMENT:
        result.outcome = "not as audited"
        result.reason = f"relevance of the inputs differs by {difference:.1e} of the largest relevance"


def forward_difference(model: nn.Module, inputs: dict[str, Any]) -> float:
    """Largest change of a logit under the rules, relative to the largest logit."""
    torch.manual_seed(3)
    before = logits(model(**inputs)).detach()  # parameters take gradients, so that attention runs the same kernel
    torch.manual_seed(3)
    with attnlrp.propagate(model):
        after = logits(model(**inputs)).detach()
    if not before.isfinite().all():
        raise FloatingPointError("the model's own logits are not finite")
    return ((after - before).abs().max() / before.abs().max()).item()


def explained(model: nn.Module, inputs: dict[str, Any]) -> float:
    """Relevance of the inputs as a user gets it: in float32, with fused kernels, without the ledger."""
    torch.manual_seed(3)
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if _is_explained(k, v)}
    with attnlrp.propagate(model) as propagation:
        output = target(model(**inputs | leaves))
    tensors = [*leaves.values(), *(embeddings for _, embeddings in propagation.embeddings)]
    grads = torch.autograd.grad(output, tensors, allow_unused=True)
    return sum((x * g).double().sum().item() for x, g in zip(tensors, grads, strict=True) if g is not None)


def _is_explained(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name


def books(result: Result, model: nn.Module, inputs: dict[str, Any]) -> Ledger:
    """The ledger in float64; in float32 where the model's own code insists on that."""
    result.dtype = "float64"
    try:
        ledger = audit(model, inputs, attnlrp.ATTNLRP, torch.float64)
        result.reason = describe(ledger)
    except UnknownOperationError:
        raise
    except RuntimeError as error:
        result.reason = str(error).strip().split("\n")[0]
        ledger = None
    if ledger is None or not ledger.closes:
        result.dtype = "float32"
        in_float32 = audit(model, inputs, attnlrp.ATTNLRP, torch.float32)
        if not in_float32.closes:
            result.outcome = "leak"
            if ledger is None:
                result.reason = describe(in_float32)
        ledger = in_float32
    return ledger


def audit(model: nn.Module, inputs: dict[str, Any], rules: Any, dtype: torch.dtype) -> Ledger:
    torch.manual_seed(3)
    return attnlrp.audit(model.to(dtype), as_dtype(inputs, dtype), target=target, rules=rules)


def as_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def describe(ledger: Ledger) -> str:
    """Where the books do not balance."""
    if ledger.closes:
        return ""
    found = [f"{e.operation} in {e.module} ({e.leak / ledger.scale:.1e})" for e in ledger.leaks()[:3]]
    return f"error {ledger.error:.1e}; " + ("leaks: " + ", ".join(found) if found else "no operation leaks")


def shares(ledger: Ledger) -> dict[str, float]:
    """Relevance of the inputs and of the absorbers, in parts of the target."""
    parts = ledger.inputs | {k: v for k, v in ledger.absorbed.items() if v}
    return {name: round(value / ledger.target, 4) for name, value in parts.items()}

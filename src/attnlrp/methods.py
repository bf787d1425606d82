"""Every method behind one interface: (model, inputs, target) -> relevance; those of the library and the baselines."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlrp.columns import arrange, widen
from attnlrp.engine import propagate
from attnlrp.errors import InputError
from attnlrp.evaluation.cost import Method
from attnlrp.rules import PRESETS, Rules, composite

__all__ = ["DEFAULT", "Gammas", "Propagated", "find_methods", "parameters", "vary"]

DEFAULT = (
    "random",
    "gradient",
    "gradient-x-input",
    "integrated-gradients",
    "smoothgrad",
    "kernel-shap",
    "lime",
    "feature-ablation",
    "leave-one-out",
    "attention",
    "attention-rollout",
    "gradient-x-attention-rollout",
    "grad-cam",
    "atman",
    "cp-lrp",
    "attnlrp",
)
"""Compared when nothing is asked for: every baseline, and the two presets that are meant to be used."""


@dataclass(frozen=True)
class Propagated:
    """Relevance propagation with a table of rules: one forward pass, one backward pass.

    Args:
        rules: the table.
    """

    rules: Rules

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Callable[[Any], Tensor]) -> Tensor:
        """Relevance of the tokens (token,), or of the pixels (height, width)."""
        pixels = inputs.get("pixel_values")
        if pixels is not None:
            pixels = pixels.detach().clone().requires_grad_()
        with torch.enable_grad(), propagate(model, self.rules) as propagation:
            scores = target(model(**{**inputs, **({} if pixels is None else {"pixel_values": pixels})}))
        if pixels is not None:
            (gradient,) = torch.autograd.grad(scores.sum(), pixels)
            return (widen(pixels.detach()) * widen(gradient))[0].sum(dim=0).cpu()
        decoder = getattr(model.config, "is_encoder_decoder", False)
        read = arrange(propagation.embeddings, inputs["input_ids"], encoder_decoder=decoder, name=type(model).__name__)[
            0
        ]
        return read.relevance(torch.autograd.grad(scores.sum(), read.leaves))[0].cpu()


@dataclass(frozen=True)
class Gammas:
    """Relevance propagation with gamma rules: arguments of `attnlrp.rules.composite`.

    Args:
        conv: gamma of convolutions, such as the patch embedding.
        mlp: gamma of the linear layers of MLPs.
        qkv: gamma of the projections to queries, keys and values.
        out: gamma of the projection after attention.
        head: gamma of the classifier.
        attention: way through softmax, one of `attnlrp.rules.SOFTMAX`.
    """

    conv: float = 0.0
    mlp: float = 0.0
    qkv: float = 0.0
    out: float = 0.0
    head: float = 0.0
    attention: str = "attnlrp"

    @property
    def rules(self) -> Rules:
        """The table."""
        return composite(**dataclasses.asdict(self))

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Callable[[Any], Tensor]) -> Tensor:
        """Relevance of the pixels (height, width)."""
        return Propagated(self.rules)(model, inputs, target)

    def __str__(self) -> str:
        values = [f"{f.name} {getattr(self, f.name):g}" for f in _fields(self) if f.name != "attention"]
        return ", ".join([*values, f"softmax {self.attention}"])


def find_methods(names: Sequence[str | Mapping[str, Any]] | None = None) -> dict[str, Method]:
    """Methods by name: the baselines, relevance propagation with each preset or gammas, those of other packages.

    Args:
        names: of each method its name; "package.module:NAME" for a method or a table of rules of another package; or a
            mapping with `name`, its own parameters, and `method` if that has another name. None for `DEFAULT`.

    Raises:
        InputError: no such method, or not such a parameter.
    """
    found: dict[str, Method] = {}
    for entry in DEFAULT if names is None else names:
        given = {"name": entry} if isinstance(entry, str) else dict(entry)
        name = given.pop("name", given.get("method"))
        base = given.pop("method", name)
        if not isinstance(name, str) or not isinstance(base, str):
            raise InputError(f"methods: got {entry!r}, expected a name, or a mapping with name and parameters")
        if name in found:
            raise InputError(f"methods: got {name!r} twice, expected each name once")
        found[name] = vary(_find(base), name, given) if given else _find(base)
    return found


def vary(method: Method, name: str, parameters: Mapping[str, Any]) -> Method:
    """The method with other parameters.

    Raises:
        InputError: not such a parameter; names those that it has.
    """
    known = [f.name for f in _fields(method)]
    unknown = [key for key in parameters if key not in known]
    if unknown:
        raise InputError(
            f"method {name}: got the parameter {unknown[0]!r}, expected some of {', '.join(known) or 'none: it has no'}"
        )
    return dataclasses.replace(method, **parameters) if known else method  # type: ignore[type-var]


def parameters(method: Method) -> dict[str, Any]:
    """What makes a method what it is, as plain data: its parameters, of a table of rules its rows."""
    if isinstance(method, Propagated):
        named = next((name for name, rules in PRESETS.items() if rules is method.rules), None)
        rows = {str(key): _described(rule) for key, rule in method.rules.items()}
        return {"rules": named or dict(sorted(rows.items()))}
    return {f.name: _described(getattr(method, f.name)) for f in _fields(method)}


def _find(name: str) -> Method:
    from attnlrp.baselines import BASELINES

    if ":" in name:
        return _imported(name)
    if name in BASELINES:
        return BASELINES[name]
    if name in PRESETS:
        return Propagated(PRESETS[name])
    if name == "gamma":
        return Gammas()
    known = ", ".join(dict.fromkeys([*BASELINES, *PRESETS, "gamma"]))
    raise InputError(f"methods: got {name!r}, expected some of {known}, or package.module:NAME")


def _imported(name: str) -> Method:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"methods: cannot import {name!r} ({error}); expected package.module:NAME") from error
    if isinstance(found, Mapping):
        return Propagated(found)
    method = found() if isinstance(found, type) else found
    if not callable(method):
        raise InputError(f"methods: {name!r} is {found!r}, expected a method or a table of rules")
    return method  # type: ignore[no-any-return]


def _fields(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else ()


def _described(value: Any) -> Any:
    """Plain data without addresses, the same in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if _fields(value):
        inside = ", ".join(f"{f.name}={_described(getattr(value, f.name))}" for f in _fields(value))
        return f"{type(value).__name__}({inside})"
    return getattr(value, "__qualname__", None) or type(value).__qualname__

"""Explain the decisions of transformers: attention-aware layer-wise relevance propagation (AttnLRP).

Everything public is listed in `__all__` and loads on first use; importing the package imports torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnlrp import evaluation as evaluate
    from attnlrp.collecting import activation_maps, reference_samples
    from attnlrp.comparison import Comparison, compare
    from attnlrp.dataset import explain_dataset, read_dataset
    from attnlrp.engine import Propagation, propagate
    from attnlrp.errors import (
        AttnLRPError,
        InputError,
        ModelError,
        NumericalError,
        OutOfMemoryError,
        TargetError,
        UnknownOperationError,
    )
    from attnlrp.explainer import Explainer
    from attnlrp.explanation import Explanation
    from attnlrp.features import SparseAutoencoder
    from attnlrp.gamma import search_gamma
    from attnlrp.image_explainer import ImageExplainer
    from attnlrp.image_explanation import ImageExplanation
    from attnlrp.intervention import Add, Clamp, Direction, Scale, Set, intervene
    from attnlrp.ledger import Ledger, audit
    from attnlrp.ranking import ReferenceSample
    from attnlrp.reference import ReferenceSamples
    from attnlrp.rules import ATTNLRP, CP_LRP, GRADIENT, MAMBA_LRP, VIT, VIT_CP, VIT_DINOV2
    from attnlrp.targets import OTHERS, Continuation, Head, Neuron
    from attnlrp.weights import weight_relevance

__version__ = "0.1.0"

_HOMES = {
    "ATTNLRP": "rules",
    "Add": "intervention",
    "AttnLRPError": "errors",
    "CP_LRP": "rules",
    "Clamp": "intervention",
    "Comparison": "comparison",
    "Continuation": "targets",
    "Direction": "intervention",
    "Explainer": "explainer",
    "Explanation": "explanation",
    "GRADIENT": "rules",
    "Head": "targets",
    "ImageExplainer": "image_explainer",
    "ImageExplanation": "image_explanation",
    "InputError": "errors",
    "Ledger": "ledger",
    "MAMBA_LRP": "rules",
    "ModelError": "errors",
    "Neuron": "targets",
    "NumericalError": "errors",
    "OTHERS": "targets",
    "OutOfMemoryError": "errors",
    "Propagation": "engine",
    "ReferenceSample": "ranking",
    "ReferenceSamples": "reference",
    "Scale": "intervention",
    "Set": "intervention",
    "SparseAutoencoder": "features",
    "TargetError": "errors",
    "UnknownOperationError": "errors",
    "VIT": "rules",
    "VIT_CP": "rules",
    "VIT_DINOV2": "rules",
    "activation_maps": "collecting",
    "audit": "ledger",
    "compare": "comparison",
    "explain_dataset": "dataset",
    "intervene": "intervention",
    "propagate": "engine",
    "read_dataset": "dataset",
    "reference_samples": "collecting",
    "search_gamma": "gamma",
    "weight_relevance": "weights",
}

__all__ = [
    "ATTNLRP",
    "CP_LRP",
    "GRADIENT",
    "MAMBA_LRP",
    "OTHERS",
    "VIT",
    "VIT_CP",
    "VIT_DINOV2",
    "Add",
    "AttnLRPError",
    "Clamp",
    "Comparison",
    "Continuation",
    "Direction",
    "Explainer",
    "Explanation",
    "Head",
    "ImageExplainer",
    "ImageExplanation",
    "InputError",
    "Ledger",
    "ModelError",
    "Neuron",
    "NumericalError",
    "OutOfMemoryError",
    "Propagation",
    "ReferenceSample",
    "ReferenceSamples",
    "Scale",
    "Set",
    "SparseAutoencoder",
    "TargetError",
    "UnknownOperationError",
    "__version__",
    "activation_maps",
    "audit",
    "compare",
    "evaluate",
    "explain_dataset",
    "intervene",
    "propagate",
    "read_dataset",
    "reference_samples",
    "search_gamma",
    "weight_relevance",
]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        return importlib.import_module("attnlrp.evaluation")
    if name not in _HOMES:
        raise AttributeError(f"module 'attnlrp' has no attribute {name!r}")
    return getattr(importlib.import_module(f"attnlrp.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

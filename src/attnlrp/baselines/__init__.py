"""Other people's explanations behind one interface: method(model, inputs, target) -> relevance.

Each is a frozen dataclass whose fields are the parameters of the publication; `dataclasses.replace` tunes them. They
know nothing of the rules of this library. captum's implementation is used where it has the method.
"""

from __future__ import annotations

from attnlrp.baselines.atman import AtMan
from attnlrp.baselines.attention import Attention, AttentionRollout, GradCam, GradientXAttentionRollout
from attnlrp.baselines.chance import Random
from attnlrp.baselines.gradient import Gradient, GradientXInput, IntegratedGradients, SmoothGrad
from attnlrp.baselines.perturbation import LeaveOneOut
from attnlrp.baselines.sample import Method, Score
from attnlrp.baselines.shapley import KernelShap, Lime

__all__ = [
    "BASELINES",
    "AtMan",
    "Attention",
    "AttentionRollout",
    "GradCam",
    "Gradient",
    "GradientXAttentionRollout",
    "GradientXInput",
    "IntegratedGradients",
    "KernelShap",
    "LeaveOneOut",
    "Lime",
    "Method",
    "Random",
    "Score",
    "SmoothGrad",
]

BASELINES: dict[str, Method] = {
    "random": Random(),
    "gradient": Gradient(),
    "gradient-x-input": GradientXInput(),
    "integrated-gradients": IntegratedGradients(),
    "smoothgrad": SmoothGrad(),
    "kernel-shap": KernelShap(),
    "lime": Lime(),
    "feature-ablation": LeaveOneOut(),
    "leave-one-out": LeaveOneOut(replacement="delete"),
    "attention": Attention(),
    "attention-rollout": AttentionRollout(),
    "gradient-x-attention-rollout": GradientXAttentionRollout(),
    "grad-cam": GradCam(),
    "atman": AtMan(),
}
"""The methods by name, with the parameters of their publications."""

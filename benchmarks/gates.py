"""Gates and state spaces: what each way to treat a gate gives as the text grows, in float32 and in float64.

    python benchmarks/gates.py [--out benchmarks/results/gates.json]

Tiny random models, so nothing is loaded. A gate is an element-wise function with f(0) != 0 (sigmoid, softplus, exp).
For each model, length and table: the largest |relevance of a token| and the sum over the tokens, in parts of the
explained logit, in float64; and the largest difference of a token between float32 and float64, in parts of the largest
relevance. The ledger of a text of 64 tokens adds what is absorbed; it has no entry for "f(0) absorbs".
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import attnlrp
from attnlrp.backward import Identity
from attnlrp.rules import ATTNLRP, MAMBA_LRP, Rules, constant, stabilised_identity

GATES = tuple(name for name, rule in ATTNLRP.items() if isinstance(rule, stabilised_identity))
SHAPE = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "use_cache": False}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}

# name -> (class of the configuration, settings, arguments of the model)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mamba": ("MambaConfig", {"state_size": 4}, {}),
    "mamba2": ("Mamba2Config", {"state_size": 4, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 64}, {}),
    "jamba": (
        "JambaConfig",
        HEADS | {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}
        | {"use_mamba_kernels": False},
        {"experts_implementation": "eager"},
    ),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 64, "context_length": 8192}, {}),
    "xlstm": ("xLSTMConfig", {"num_heads": 2, "qk_dim_factor": 1.0}, {}),
    "qwen3_next": (
        "Qwen3NextConfig",
        HEADS | EXPERTS | DELTA | {"head_dim": 16, "shared_expert_intermediate_size": 16}
        | {"layer_types": ["linear_attention", "full_attention"]},
        {"experts_implementation": "eager"},
    ),
}  # fmt: skip


def offset(op: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """f(0) absorbs as a bias, and f(x) - f(0) has the identity rule; its ratio is taken at 1e-3 where |x| is less."""

    def ratio(t: Tensor) -> Tensor:
        t = torch.where(t.abs() < 1e-3, torch.where(t < 0, -1e-3, 1e-3).to(t), t)
        change: Tensor = (op(t, *args, **kwargs) - op(torch.zeros_like(t), *args, **kwargs)) / t
        return change

    return Identity.on(x, lambda t: op(t, *args, **kwargs), ratio)


def gates(rule: Any, names: tuple[str, ...] = GATES) -> Rules:
    return {**ATTNLRP, **dict.fromkeys(names, rule)}


TABLES: dict[str, Rules] = {
    "epsilon sqrt(machine epsilon)": gates(stabilised_identity(None)),
    "epsilon 1e-3": gates(stabilised_identity(1e-3)),
    "epsilon 1e-2 (attnlrp)": ATTNLRP,
    "epsilon 1e-1": gates(stabilised_identity(1e-1)),
    "f(0) absorbs": gates(offset, tuple(n for n in GATES if n not in ("log", "log2"))),
    "gates constant": gates(constant),
    "mamba-lrp": MAMBA_LRP,
}
ALWAYS = ("epsilon sqrt(machine epsilon)", "epsilon 1e-2 (attnlrp)", "mamba-lrp")


def build(name: str) -> nn.Module:
    kind, settings, arguments = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SHAPE | settings)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, **arguments)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def relevance(model: nn.Module, ids: Tensor, rules: Rules, target: int | None = None) -> tuple[Tensor, float, int]:
    """Relevance of each token in float64, the explained logit, and its index."""
    with attnlrp.propagate(model, rules) as propagation:
        logits = model(input_ids=ids, use_cache=False).logits[0, -1]
    index = int(logits.argmax()) if target is None else target
    embeddings = propagation.embeddings[0][1]
    (grad,) = torch.autograd.grad(logits[index], embeddings)
    return (embeddings.detach().double() * grad.double()).sum(-1)[0], logits[index].item(), index


def measure(model: nn.Module, tokens: int, rules: Rules) -> dict[str, Any]:
    ids = torch.randint(3, 100, (1, tokens), generator=torch.Generator().manual_seed(2))
    precise, logit, index = relevance(model.double(), ids, rules)
    coarse, _, _ = relevance(model.float(), ids, rules, index)
    largest = precise.abs().max().item()
    row = {
        "largest": largest / abs(logit),
        "sum": precise.sum().item() / logit,
        "float32 against float64": (coarse - precise).abs().max().item() / largest,
        "finite": bool(coarse.isfinite().all() and precise.isfinite().all()),
    }
    if tokens == 64 and rules is not TABLES["f(0) absorbs"]:
        ledger = attnlrp.audit(model.double(), {"input_ids": ids, "use_cache": False}, rules=rules)
        row |= {"closes": ledger.closes, "absorbed": {k: v / ledger.target for k, v in ledger.absorbed.items()}}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gates.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = []
    for tokens in arguments.tokens:
        for name in arguments.models:
            for table in ALWAYS if tokens > 1024 else TABLES:
                row = {"model": name, "tokens": tokens, "rules": table, **measure(build(name), tokens, TABLES[table])}
                rows.append(row)
                print(json.dumps(row), flush=True)
        about = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
        arguments.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

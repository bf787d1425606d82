"""Neurons of MLPs, numbered through all layers: their scores by several methods, and the model without some of them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnlrp
from attnlrp.latent import Latent
from attnlrp.rules import ATTNLRP, CP_LRP, GRADIENT
from attnlrp.units import Rows, Taps, example_inputs, find_sites

EVERYWHERE, BEHIND, LAST = "every token", "every token but the first", "last token"
POSITIONS = (BEHIND, LAST, EVERYWHERE)
FIRST = {EVERYWHERE: 0, BEHIND: 1, LAST: -1}
RULES = {"AttnLRP": ATTNLRP, "CP-LRP": CP_LRP, "gradient x activation": GRADIENT}
TARGETS = {"logit": None, "contrast": attnlrp.OTHERS}
BATCH = 32


@dataclass(frozen=True)
class Fact:
    """A prompt, the word that follows, and what kind of fact it is."""

    prompt: str
    answer: str
    relation: str

    @property
    def digest(self) -> int:
        return int.from_bytes(hashlib.sha256(self.prompt.encode()).digest()[:6], "big")

    @property
    def split(self) -> str:
        """A quarter of all prompts is for choices, the others for results."""
        return "dev" if self.digest % 4 == 0 else "test"


def read_facts(path: Path) -> list[Fact]:
    """Facts in the order of their digests, which mixes the relations."""
    facts = [Fact(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(facts, key=lambda fact: fact.digest)


class Neurons:
    """All MLP neurons of a decoder, in the order of computation.

    Args:
        model: the one that is explained.
        tokenizer: its tokenizer.
        dtype: in which it runs without some of its neurons; its head in its own.
    """

    def __init__(self, model: Any, tokenizer: Any, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.fast = model if dtype == model.dtype else copy.deepcopy(model).to(dtype)
        self.sites = [site for site in find_sites(model, example_inputs(model)) if site.kind == "neurons"]
        *self.starts, self.count = accumulate((site.units for site in self.sites), initial=0)

    def address(self, neuron: int) -> str:
        """Such as "layers.17.mlp:3948"."""
        k = max(k for k, start in enumerate(self.starts) if start <= neuron)
        return f"{self.sites[k].name}:{neuron - self.starts[k]}"

    def ids(self, text: str) -> Tensor:
        """(1, token)."""
        return torch.tensor([self.tokenizer(text).input_ids])

    def first(self, word: str) -> int:
        """The first token of a word behind a space."""
        return int(self.tokenizer(f" {word}", add_special_tokens=False).input_ids[0])

    def dense(self, latent: Latent, name: str) -> Tensor:
        """Relevance or activation of all neurons (neuron, token)."""
        layers = {layer.name: layer for layer in latent.of("neurons")}
        parts = []
        for site in self.sites:
            values = getattr(layers[site.name], name)[0]
            parts.append(torch.zeros_like(values).index_copy_(0, layers[site.name].indices[0], values))
        return torch.cat(parts)

    @contextmanager
    def off(self, gone: Tensor, positions: str) -> Iterator[None]:
        """Neurons set to 0, others in each row of the batch: gone (row, neuron)."""
        taps = {
            site: partial(_zeroed, gone[:, start : start + site.units], positions)
            for site, start in zip(self.sites, self.starts, strict=True)
        }
        with Taps(self.fast, taps):
            yield

    def logits(self, ids: Tensor, gone: Tensor, positions: str) -> Tensor:
        """Of the next token (row, vocab), of one text (1, token) without the neurons of each row (row, neuron)."""
        found, run = [], self.fast.get_decoder()
        with torch.no_grad():
            before = run(input_ids=ids[:, :-1], use_cache=True) if positions == LAST else None
            for part in gone.split(BATCH):
                given: dict[str, Any] = {"input_ids": ids.expand(len(part), -1), "use_cache": False}
                if before is not None:  # what comes before the last token is the same without the neurons
                    cache = copy.deepcopy(before.past_key_values)
                    cache.batch_repeat_interleave(len(part))
                    given = {"input_ids": ids[:, -1:].expand(len(part), -1), "past_key_values": cache}
                with self.off(part, positions):
                    found.append(run(**given).last_hidden_state[:, -1])
            logits: Tensor = self.model.get_output_embeddings()(torch.cat(found).to(self.model.dtype))
        return logits


def _zeroed(gone: Tensor, positions: str, x: Tensor, rows: Rows | None) -> Tensor:
    first = FIRST[positions]
    return torch.cat([x[:, :first], x[:, first:].masked_fill(gone[:, None], 0)], dim=1)


# --- scores -------------------------------------------------------------------------------------------------------

Scores = dict[tuple[str, str, str], Tensor]
"""(method, variant, positions) -> score of each neuron (neuron,), the first to go has the largest."""


def scores(neurons: Neurons, fact: Fact, chosen: Sequence[tuple[str, str, str]] | None = None) -> Scores:
    """Scores of all methods for the first token of the answer, or of the chosen ones only."""
    target = neurons.first(fact.answer)
    found: Scores = {}
    activation = torch.empty(0)
    for method, rules in RULES.items():
        explainer = attnlrp.Explainer(neurons.model, neurons.tokenizer, rules=rules)
        for variant, against in TARGETS.items():
            if chosen is not None and not any(m == method and variant in v for m, v, _ in chosen):
                continue
            latent = explainer(fact.prompt, target=target, against=against, latent="neurons", latent_top=None).latent
            assert latent is not None
            relevance, activation = (neurons.dense(latent, name) for name in ("relevance", "activation"))
            found |= _reduced(method, variant, {p: relevance[:, k:].sum(dim=1) for p, k in FIRST.items()})
    found |= _reduced("activation", "", {p: _largest(activation[:, k:]) for p, k in FIRST.items()})
    for variant, lens in lenses(neurons, neurons.ids(fact.prompt), target, activation[:, -1]).items():
        found |= _reduced("logit lens", variant, dict.fromkeys(POSITIONS, lens))
    chance = torch.rand(neurons.count, generator=torch.Generator().manual_seed(fact.digest))
    found |= {("random", "", positions): chance for positions in POSITIONS}
    return found if chosen is None else {key: found[key] for key in chosen}


def _largest(x: Tensor) -> Tensor:
    return x.gather(1, x.abs().argmax(dim=1, keepdim=True))[:, 0]


def _reduced(method: str, variant: str, values_at: dict[str, Tensor]) -> Scores:
    found: Scores = {}
    for positions, values in values_at.items():
        found[method, f"signed {variant}".strip(), positions] = values
        found[method, f"absolute {variant}".strip(), positions] = values.abs()
    return found


def outputs(neurons: Neurons, ids: Tensor) -> Iterator[Tensor]:
    """What one unit of each neuron adds to the input of the head at the last token: (hidden, neuron) of each layer.

    Past all later layers; norms behind the neurons are the factors by which they multiply here.
    """
    modules, parameters = dict(neurons.model.named_modules()), dict(neurons.model.named_parameters())
    blocks = [modules[site.weight.rpartition(".mlp.")[0]] for site in neurons.sites]
    after = [getattr(block, "post_feedforward_layernorm", None) for block in blocks]
    last = neurons.model.get_decoder().norm
    factors: dict[Any, Tensor] = {}
    hooks = [
        norm.register_forward_hook(lambda norm, x, y: factors.update({norm: (y / x[0])[0, -1]}))
        for norm in (last, *filter(None, after))
    ]
    with torch.no_grad():
        neurons.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    for site, norm in zip(neurons.sites, after, strict=True):
        yield parameters[site.weight] * (factors[last] * factors.get(norm, 1.0))[:, None]


def lenses(neurons: Neurons, ids: Tensor, target: int, activation: Tensor) -> dict[str, Tensor]:
    """What each neuron adds by itself to the logit, or to its difference to the mean logit (neuron,)."""
    head = neurons.model.get_output_embeddings().weight
    directions = {"logit": head[target], "contrast": head[target] - head.mean(dim=0)}
    layers = list(outputs(neurons, ids))
    return {
        name: activation * torch.cat([direction @ layer for layer in layers]) for name, direction in directions.items()
    }


def ranking(score: Tensor, *, descending: bool = True) -> Tensor:
    """Neurons, the largest score first; of equal ones the first in the model."""
    return score.argsort(descending=descending, stable=True)


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of ranks; equal values share their mean rank."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return torch.corrcoef(ranks)[0, 1].nan_to_num().item()


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return ranks.double()[inverse]

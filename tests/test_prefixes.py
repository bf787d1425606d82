"""Targets of a causal model, each explained on as much of the text as it needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers

import tiny
from attnlrp import Explainer, Neuron, intervene
from attnlrp.prefixes import PASS, groups
from nearness import close
from tiny_tokenizers import build

TEXT = "Paris is the capital of France. Berlin is the capital of Germany. Rome is the capital of Italy."
LONG = TEXT + " " + TEXT
STRETCHED = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
CONFIGS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "mamba": (
        transformers.MambaConfig,
        transformers.MambaForCausalLM,
        {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    ),
    "bloom": (transformers.BloomConfig, transformers.BloomForCausalLM, {"n_head": 4, "hidden_size": 32, "n_layer": 2}),
    "decoder": (transformers.BertConfig, transformers.BertLMHeadModel, tiny.SHAPE | {"is_decoder": True}),
    "encoder": (transformers.BertConfig, transformers.BertLMHeadModel, tiny.SHAPE),
    "chunks": (transformers.xLSTMConfig, transformers.xLSTMForCausalLM, tiny.SHAPE | {"num_heads": 4}),
    "stretched": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        tiny.GROUPED | {"rope_parameters": STRETCHED},
    ),
}


def explainer(name: str) -> Explainer:
    _, tokenizer = build("llama")
    own = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "n_positions": 512}
    if name in tiny.MODELS:
        return Explainer(tiny.build(name, **own), tokenizer, name="tiny")
    config, model, settings = CONFIGS[name]
    torch.manual_seed(0)
    made = model(config(**tiny.IDS | settings | own)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return Explainer(made, tokenizer, name="tiny")


@contextmanager
def lengths(model: Any) -> Iterator[list[int]]:
    """How many tokens each pass reads."""
    read: list[int] = []

    def look(_: Any, args: Any, kwargs: Any) -> None:
        read.append(kwargs["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    yield read
    hook.remove()


def tokens_passed(split: list[list[int]], ends: list[int]) -> int:
    return sum((len(group) + 1) * max(ends[k] for k in group) + PASS for group in split)


def cheapest(ends: list[int]) -> int:
    """By trying every split of the sorted targets."""
    order = sorted(range(len(ends)), key=ends.__getitem__)
    found = []
    for count in range(len(order)):
        for cuts in itertools.combinations(range(1, len(order)), count):
            edges = [0, *cuts, len(order)]
            found.append(tokens_passed([order[a:b] for a, b in itertools.pairwise(edges)], ends))
    return min(found)


@pytest.mark.parametrize("seed", range(6))
def test_the_split_is_the_cheapest_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(1, (40, 400)[seed % 2], (9,), generator=generator).tolist()
    split = groups(ends)
    assert sorted(k for group in split for k in group) == list(range(9))
    assert tokens_passed(split, ends) == cheapest(ends)


def test_targets_near_the_end_share_a_pass() -> None:
    assert groups(range(112, 128)) == [list(range(16))]
    assert len(groups(range(1, 129))) > 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3", "mixtral", "mamba", "bloom", "decoder"])
def test_relevance_is_that_of_the_whole_text(name: str) -> None:
    ours = explainer(name)
    count = len(ours(TEXT).tokens)
    positions = [2, count - 1, 0, 2, 9, *range(count)]
    with lengths(ours.model) as read:
        found = ours(TEXT, position=positions)
    assert len(read) > 3
    assert max(read) == count
    ours._prefixes._can = False
    whole = ours(TEXT, position=positions)
    assert found.relevance.shape == (len(positions), count)
    assert close(found.relevance, whole.relevance)
    assert (found.tokens, found.segments, found.words) == (whole.tokens, whole.segments, whole.words)
    for a, b in zip(found.targets, whole.targets, strict=True):
        assert (a.id, a.position, a.rank) == (b.id, b.position, b.rank)


def test_what_follows_an_early_target_is_not_read() -> None:
    ours = explainer("llama")
    with lengths(ours.model) as read:
        explanation = ours(LONG, position=3)
        ours(LONG, position=3)
    assert read[2:] == [4, 4]  # after a look at whether the model is causal
    assert explanation.relevance.shape[-1] == len(explanation.tokens) > 50
    assert not explanation.relevance[:, 4:].any()


@pytest.mark.parametrize("name", ["encoder", "chunks", "stretched"])
def test_a_model_whose_text_cannot_be_cut_reads_it_all(name: str) -> None:
    ours = explainer(name)
    with lengths(ours.model) as read:
        explanation = ours(LONG, position=3)
    assert read[-1] == len(explanation.tokens)
    assert explanation.relevance[:, 4:].any() == (name == "encoder")


def test_what_concerns_later_tokens_reads_it_all() -> None:
    ours = explainer("llama")
    with lengths(ours.model) as read:
        plain = ours(LONG, position=3)
        assert read[-1] == 4
        whole = len(plain.tokens)
        recorded = ours(LONG, position=3, latent="neurons")
        assert read[-1] == whole
        ours(LONG, target=Neuron(1, 5), position=3)
        assert read[-1] == whole
        with intervene(ours.model, {"layers.1.mlp:5": 0.0}, positions=[whole - 1]):
            changed = ours(LONG, position=3)
        assert read[-1] == whole
    assert close(recorded.relevance, plain.relevance)
    assert close(changed.relevance, plain.relevance)  # what comes later plays no part


def test_short_texts_are_not_worth_it() -> None:
    ours = explainer("llama")
    with lengths(ours.model) as read:
        explanation = ours("Paris is the capital", position=1)
    assert read == [len(explanation.tokens)]

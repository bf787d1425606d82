"""The ice bear: the neurons behind "Arctic" are found on other prompts, switched off, and others raised instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnlrp
from knowledge_neurons import Fact, Neurons, outputs, ranking

TESTED, ANSWER = "The ice bear lives in the", "Arctic"
FOUND_ON: dict[str, tuple[str, ...]] = {
    "Arctic": (
        "The polar bear lives in the",
        "Polar bears live in the",
        "The natural home of the polar bear is the",
        "Ice bears are found in the",
        "The white bear lives in the",
        "The reindeer lives in the",
    ),
    "desert": (
        "The camel lives in the",
        "The scorpion lives in the",
        "Camels live in the",
        "The cactus grows in the",
        "The rattlesnake lives in the",
        "The Bedouin lives in the",
    ),
    "ocean": (
        "The shark lives in the",
        "The whale lives in the",
        "The octopus lives in the",
        "The dolphin lives in the",
        "Whales live in the",
        "The jellyfish lives in the",
    ),
    "jungle": (
        "The tiger lives in the",
        "The monkey lives in the",
        "The orangutan lives in the",
        "The parrot lives in the",
        "Monkeys live in the",
        "The jaguar lives in the",
    ),
}
ALL, END = "every token but the first", "last token of the prompt"
OFF = tuple(2**k for k in range(10))
RAISED, FACTORS = (1, 2, 4, 8, 16), (1.0, 2.0, 4.0, 8.0)
WITHIN = 10  # rank of the word for a prompt to count
WORDS, UNRELATED, SEEDS = 12, 40, 3
Row = dict[str, Any]
Changes = dict[Any, Any]


def next_token(neurons: Neurons, text: str) -> Tensor:
    """Logits (vocab,)."""
    with torch.no_grad():
        logits: Tensor = neurons.model(input_ids=neurons.ids(text), logits_to_keep=1, use_cache=False).logits
    return logits[0, -1]


def told(neurons: Neurons, word: str = ANSWER) -> Row:
    """What the model says to the tested prompt, and what has become of a word."""
    logits, target = next_token(neurons, TESTED), neurons.first(word)
    return {
        "says": neurons.tokenizer.decode([int(logits.argmax())]),
        "probability": logits.softmax(-1)[target].item(),
        "rank": int((logits > logits[target]).sum()) + 1,
    }


def goes_on(neurons: Neurons) -> str:
    """What is generated behind the tested prompt."""
    ids = neurons.ids(TESTED)
    made = neurons.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=WORDS, do_sample=False)
    text: str = neurons.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text


# --- search -------------------------------------------------------------------------------------------------------


def usable(neurons: Neurons) -> dict[str, list[str]]:
    """The prompts of each word whose next token it may be."""
    found: dict[str, list[str]] = {}
    for word, prompts in FOUND_ON.items():
        target = neurons.first(word)
        logits = {prompt: next_token(neurons, prompt) for prompt in prompts}
        found[word] = [p for p, x in logits.items() if int((x > x[target]).sum()) < WITHIN]
    return found


def search(neurons: Neurons, prompts: Mapping[str, Sequence[str]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Word -> mean over its prompts of the relevance (neuron,) for it, and of the activation at the last token."""
    explainer = attnlrp.Explainer(neurons.model, neurons.tokenizer)
    found = {}
    for word, own in prompts.items():
        target = neurons.first(word)
        latents = [explainer(p, target=target, latent="neurons", latent_top=None).latent for p in own]
        relevance = torch.stack([neurons.dense(x, "relevance")[:, 1:].sum(dim=1) for x in latents if x is not None])
        activation = torch.stack([neurons.dense(x, "activation")[:, -1] for x in latents if x is not None])
        found[word] = relevance.mean(dim=0), activation.mean(dim=0)
    return found


def specific(found: Mapping[str, tuple[Tensor, Tensor]], word: str) -> Tensor:
    """Relevance for a word less the mean relevance that the same neurons have for the other words (neuron,)."""
    others = torch.stack([relevance for other, (relevance, _) in found.items() if other != word])
    return found[word][0] - others.mean(dim=0)


# --- what changes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Other:
    """Another prompt, and the logits of its next token (vocab,)."""

    prompt: str
    before: Tensor


def positions(neurons: Neurons, text: str, place: str) -> list[int]:
    """Tokens at which neurons are changed."""
    last = neurons.ids(text).shape[1] - 1
    return [last] if place == END else list(range(1, last + 1 + WORDS))


def unrelated(neurons: Neurons, others: Sequence[Other], changes: Changes, place: str) -> Row:
    """Share of other prompts that keep their answer, and mean divergence KL(before | after) in nats."""
    after = []
    for other in others:
        with attnlrp.intervene(neurons.model, changes, positions=positions(neurons, other.prompt, place)):
            after.append(next_token(neurons, other.prompt))
    p, q = (torch.stack(x).double().log_softmax(-1) for x in ([other.before for other in others], after))
    return {
        "prompts": len(others),
        "answers kept": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        "divergence": (p.exp() * (p - q)).sum(-1).mean().item(),
    }


def changed(neurons: Neurons, changes: Changes, place: str, word: str = ANSWER) -> Row:
    with attnlrp.intervene(neurons.model, changes, positions=positions(neurons, TESTED, place)):
        return told(neurons, word)


def effects(neurons: Neurons, changes: Changes, place: str, others: Sequence[Other]) -> Row:
    """How the tested prompt goes on, and what else is changed."""
    with attnlrp.intervene(neurons.model, changes, positions=positions(neurons, TESTED, place)):
        text = goes_on(neurons)
    return {"goes on": text, "unrelated": unrelated(neurons, others, changes, place)}


def off(neurons: Neurons, order: Tensor, count: int) -> Changes:
    return {neurons.address(int(n)): 0.0 for n in order[:count]}


def switched_off(neurons: Neurons, order: Tensor, others: Sequence[Other]) -> Row:
    """The first 1, 2, 4, ... neurons of an order at 0; the first count that changes the prediction in full."""
    steps = [{"neurons": n} | changed(neurons, off(neurons, order, n), ALL) for n in OFF]
    enough = next((step["neurons"] for step in steps if step["rank"] > 1), None)
    found: Row = {"steps": steps, "enough": enough}
    return found if enough is None else found | effects(neurons, off(neurons, order, enough), ALL, others)


@dataclass(frozen=True)
class Word:
    """Another word, its neurons in order, and their mean activation at the last token of its prompts (neuron,)."""

    word: str
    order: Tensor
    activation: Tensor

    def raised(self, neurons: Neurons, gone: Changes, count: int, factor: float) -> Changes:
        """The first neurons at a multiple of their activation, on top of those that are gone."""
        own = {neurons.address(int(n)): factor * self.activation[n].item() for n in self.order[:count]}
        return {**gone, **own}


def replaced(neurons: Neurons, word: Word, gone: Changes, others: Sequence[Other]) -> Row:
    """Neurons of another word raised while those of "Arctic" are off; of each place the smallest change that works."""
    row: Row = {}
    for place in (ALL, END):
        rows: list[Row] = [
            {"neurons": count, "factor": factor}
            | changed(neurons, word.raised(neurons, gone, count, factor), place, word.word)
            for count in RAISED
            for factor in FACTORS
        ]
        good = [r for r in rows if r["rank"] == 1]
        row[place] = {"tried": len(rows), "succeeded": len(good), "best": None}
        if good:
            best = min(good, key=lambda r: (r["neurons"], r["factor"]))
            changes = word.raised(neurons, gone, best["neurons"], best["factor"])
            row[place]["best"] = best | effects(neurons, changes, place, others)
    return row


def steer(neurons: Neurons, facts: Sequence[Fact]) -> Row:
    """All of it for one model."""
    texts = [fact.prompt for fact in facts if fact.relation != "place of an animal"][:UNRELATED]
    others = [Other(text, next_token(neurons, text)) for text in texts]
    prompts = usable(neurons)
    found = search(neurons, {word: own for word, own in prompts.items() if own})
    scores = {word: specific(found, word) for word in found}
    relevance, activation = found[ANSWER]
    orders = {
        "relevance": ranking(relevance),
        "relevance for Arctic alone": ranking(scores[ANSWER]),
        "activation": ranking(activation.abs()),
    }
    row: Row = {"prompt": TESTED, "before": told(neurons) | {"goes on": goes_on(neurons)}, "found on": prompts}
    row["off"] = {name: switched_off(neurons, order, others) for name, order in orders.items()}
    seeds = [torch.randperm(neurons.count, generator=torch.Generator().manual_seed(seed)) for seed in range(SEEDS)]
    row["random"] = [switched_off(neurons, order, others)["enough"] for order in seeds]
    enough = row["off"]["relevance for Arctic alone"]["enough"] or OFF[-1]
    gone = off(neurons, orders["relevance for Arctic alone"], enough)
    row["neurons"] = {w: shown(neurons, prompts[w][0], score, found[w][1]) for w, score in scores.items()}
    words = [Word(word, ranking(scores[word]), found[word][1]) for word in found if word != ANSWER]
    return row | {"replaced": {word.word: replaced(neurons, word, gone, others) for word in words}}


def shown(neurons: Neurons, prompt: str, score: Tensor, activation: Tensor, count: int = 8) -> list[Row]:
    """The first neurons of a word, and the tokens that each makes more likely, active as on its prompts."""
    layers, head = list(outputs(neurons, neurons.ids(prompt))), neurons.model.get_output_embeddings().weight
    rows = []
    for n in ranking(score)[:count].tolist():
        unit = neurons.address(n)
        k = next(k for k, site in enumerate(neurons.sites) if site.name == unit.rpartition(":")[0])
        promoted = (head @ layers[k][:, n - neurons.starts[k]] * activation[n].sign()).topk(5).indices
        tokens = [neurons.tokenizer.decode([int(t)]) for t in promoted]
        rows.append({"unit": unit, "score": score[n].item(), "activation": activation[n].item(), "promotes": tokens})
    return rows

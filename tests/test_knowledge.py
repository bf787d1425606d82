"""The knowledge-neuron experiment of benchmarks/: what is ranked, what is switched off, and what is counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import attnlrp
import tiny_tokenizers

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import knowledge
import knowledge_report
from knowledge_neurons import BEHIND, EVERYWHERE, LAST, POSITIONS, Fact, Neurons, ranking, read_facts, scores, spearman

FACT = Fact("Berlin is the capital of", "Germany", "capital of")


@pytest.fixture(scope="module")
def neurons() -> Neurons:
    model, tokenizer = tiny_tokenizers.build("llama")
    return Neurons(model.requires_grad_(False), tokenizer, torch.float32)


def test_facts_are_split_by_their_prompts_alone() -> None:
    facts = read_facts(knowledge.HERE / "knowledge_prompts.jsonl")
    assert len({fact.prompt for fact in facts}) == len(facts) >= 300
    assert 0.2 < sum(fact.split == "dev" for fact in facts) / len(facts) < 0.3
    assert Fact(FACT.prompt, "France", "other").split == FACT.split


def test_masks_take_the_first_of_an_order() -> None:
    order = torch.tensor([2, 0, 3, 1])
    expected = [[False] * 4, [False, False, True, False], [True, False, True, True], [True] * 4]
    assert knowledge.masks(order, [0, 1, 3, 9]).tolist() == expected


def test_the_count_until_the_prediction_changes() -> None:
    assert knowledge.until_change([1, 2, 4], [True, False, True]) == 2
    assert knowledge.until_change([1, 2, 4], [True, True, True]) == 8


def test_ranks_and_their_correlation() -> None:
    assert ranking(torch.tensor([1.0, 3.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]
    a = torch.tensor([1.0, 2.0, 2.0, 5.0])
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, torch.ones(4)) == 0


def test_the_variant_that_needs_the_fewest_neurons() -> None:
    rows = [{"m|signed|last": 1, "m|absolute|last": 4}, {"m|signed|last": 16, "m|absolute|last": 2}]
    assert knowledge_report.best_variants(rows) == {("m", "last"): "absolute"}


@pytest.mark.parametrize("place", POSITIONS)
def test_switching_off_in_a_batch_is_intervening_row_by_row(neurons: Neurons, place: str) -> None:
    ids = neurons.ids(FACT.prompt)
    gone = torch.rand(3, neurons.count, generator=torch.Generator().manual_seed(0)) < torch.tensor(
        [[0.1], [0.3], [1.0]]
    )
    last = ids.shape[1] - 1
    where = {EVERYWHERE: None, BEHIND: list(range(1, last + 1)), LAST: [last]}[place]
    found = neurons.logits(ids, gone, place)
    for row, own in zip(found, gone, strict=True):
        changes = {neurons.address(int(n)): 0.0 for n in own.nonzero()}
        with torch.no_grad(), attnlrp.intervene(neurons.model, changes, positions=where):
            expected = neurons.model(input_ids=ids).logits[0, -1]
        torch.testing.assert_close(row, expected)


def test_every_method_scores_every_neuron(neurons: Neurons) -> None:
    found = scores(neurons, FACT)
    assert {place for _, _, place in found} == set(POSITIONS)
    assert all(score.shape == (neurons.count,) for score in found.values())
    explanation = attnlrp.Explainer(neurons.model, neurons.tokenizer)(
        FACT.prompt, target=neurons.first(FACT.answer), latent="neurons", latent_top=None
    )
    best = explanation.latent.top("neurons", 1)[0]
    assert neurons.address(int(found["AttnLRP", "absolute logit", EVERYWHERE].argmax())) == best.unit


def test_the_logit_lens_of_the_last_layer_is_its_relevance(neurons: Neurons) -> None:
    found = scores(neurons, FACT)
    lens, relevance = (found[method, "signed logit", LAST] for method in ("logit lens", "AttnLRP"))
    last = neurons.starts[-1]
    torch.testing.assert_close(lens[last:], relevance[last:])
    assert not torch.allclose(lens[:last], relevance[:last])


def test_one_fact_is_measured(neurons: Neurons) -> None:
    chosen = {key: s for key, s in scores(neurons, FACT).items() if key[1] in ("", "signed", "signed logit")}
    places = (BEHIND, LAST)
    row = {"sample": FACT.prompt} | knowledge.measured(neurons, FACT, chosen, places, [FACT])
    summary = knowledge_report.summary([row], places, knowledge.GRID)
    assert set(summary[LAST]) == {"AttnLRP", "CP-LRP", "gradient x activation", "activation", "logit lens", "random"}
    for cell in summary[LAST].values():
        assert len(cell["curve"]["mean"]) == len(knowledge.GRID)
        assert cell["until change"]["log2"]["low"] <= cell["until change"]["log2"]["mean"]
    for cell in row[BEHIND].values():  # all neurons are gone at the end of each order
        assert cell["logit"][-1] == pytest.approx(row[BEHIND]["random"]["logit"][-1], abs=1e-5)

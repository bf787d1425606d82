"""Metrics on models whose answer is known in closed form, and against an independent computation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnlrp import InputError
from attnlrp import evaluation as ev
from attnlrp.evaluation.cost import peak_memory
from attnlrp.evaluation.flipping import order
from tiny_tokenizers import build


class Bag(nn.Module):
    """Its logits are sums over tokens: output 0 is sum_t w_t, with w the first feature of the embedding of a token."""

    def __init__(self, contributions: list[float], *, reads: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(len(contributions), 2)
        with torch.no_grad():
            self.table.weight.copy_(torch.tensor([[c, 0.0] for c in contributions]))
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.device = torch.device("cpu")
        self.reads = reads
        self.batches: list[int] = []

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Any:
        x = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        self.batches.append(len(x))
        x = x if self.reads is None else x[:, self.reads : self.reads + 1]
        return SimpleNamespace(logits=x.sum(dim=1))


def sample(count: int, *, special: tuple[int, ...] = (), answer: tuple[int, ...] = (), name: str = "a") -> ev.Sample:
    marks = torch.tensor([k in special for k in range(count)])
    inside = torch.tensor([k in answer for k in range(count)])
    ids = torch.arange(count)[None]
    return ev.Sample(name, {"input_ids": ids}, ev.Output(0, last=False), marks, answer=inside)


# --- curves -------------------------------------------------------------------------------------------------------


def test_the_perfect_order_of_a_linear_model() -> None:
    contributions = [3.0, -1.0, 2.0, 0.5]
    model = Bag(contributions)
    found = ev.curves(ev.Perturbation(model), sample(4), torch.tensor(contributions))
    assert found.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.morf[:, 0].tolist() == [4.5, 1.5, -0.5, -1, 0]
    assert found.lerf[:, 0].tolist() == [4.5, 5.5, 5, 3, 0]
    metrics = found.metrics()
    morf, lerf = (4.5 / 2 + 1.5 - 0.5 - 1) / 4, (4.5 / 2 + 5.5 + 5 + 3) / 4
    assert metrics["deletion"] == pytest.approx(morf)
    assert metrics["insertion"] == pytest.approx(lerf)
    assert metrics["area"] == pytest.approx(lerf - morf)
    assert metrics["comprehensiveness"] == pytest.approx((3 + 5 + 5.5 + 4.5) / 4)
    assert metrics["sufficiency"] == pytest.approx((-1 - 0.5 + 1.5 + 4.5) / 4)
    probability = torch.tensor([[4.5, 0.0]]).softmax(-1)[0, 0].item()
    assert found.morf[0, 1].item() == pytest.approx(probability)


def test_no_order_of_a_linear_model_beats_its_contributions() -> None:
    contributions = torch.tensor([3.0, -1.0, 2.0, 0.5, -0.25, 1.0])
    perturbation = ev.Perturbation(Bag(contributions.tolist()))
    best = ev.curves(perturbation, sample(6), contributions).metrics()["area"]
    worst = ev.curves(perturbation, sample(6), -contributions).metrics()["area"]
    assert worst == pytest.approx(-best)
    for seed in range(20):
        other = torch.randn(6, generator=torch.Generator().manual_seed(seed))
        assert ev.curves(perturbation, sample(6), other).metrics()["area"] <= best + 1e-6


def test_a_model_that_reads_one_token_only() -> None:
    perturbation = ev.Perturbation(Bag([1.0] * 5, reads=3))
    right = ev.curves(perturbation, sample(5), torch.tensor([0.0, 0, 0, 1, 0]))
    assert right.morf[:, 0].tolist() == [1, 0, 0, 0, 0, 0]
    assert right.lerf[:, 0].tolist() == [1, 1, 1, 1, 1, 0]
    assert right.metrics()["area"] == pytest.approx(0.8)
    wrong = ev.curves(perturbation, sample(5), torch.tensor([1.0, 1, 1, 0, 1]))
    assert wrong.metrics()["area"] == pytest.approx(-0.8)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_fewer_steps_are_points_of_the_full_curves(steps: int) -> None:
    contributions = torch.randn(7, generator=torch.Generator().manual_seed(1))
    perturbation = ev.Perturbation(Bag(contributions.tolist()), batch_size=3)
    every = ev.curves(perturbation, sample(7), contributions)
    some = ev.curves(perturbation, sample(7), contributions, steps=steps)
    at = (some.fractions * 7).round().long()
    assert len(at) == steps + 1
    assert torch.equal(some.morf, every.morf[at])
    assert torch.equal(some.lerf, every.lerf[at])


def test_every_perturbed_input_is_run_once_in_batches() -> None:
    model = Bag([1.0] * 6)
    ev.curves(ev.Perturbation(model, batch_size=4), sample(6), torch.arange(6.0))
    assert model.batches == [4, 4, 4]  # both ends, and five points of each curve


@pytest.mark.parametrize("steps", [None, 4])
def test_curves_of_a_language_model_against_one_forward_pass_for_each_point(steps: int | None) -> None:
    model, tokenizer = build("llama")
    found = ev.next_token(model, tokenizer, {"text": "Paris is the capital of France"}, name="a")
    ids = found.inputs["input_ids"]
    relevance = torch.randn(ids.shape[1], generator=torch.Generator().manual_seed(0))
    measured = ev.curves(ev.Perturbation(model, batch_size=5), found, relevance, steps=steps)
    with torch.no_grad():
        predicted = int(model(input_ids=ids).logits[0, -1].argmax())
        assert found.output.index == predicted
        for sign, curve in ((-1, measured.morf), (1, measured.lerf)):
            ranked = sorted(range(ids.shape[1]), key=lambda k: sign * relevance[k])
            for fraction, point in zip(measured.fractions.tolist(), curve, strict=True):
                embeddings = model.get_input_embeddings()(ids).clone()
                embeddings[0, ranked[: round(fraction * ids.shape[1])]] = 0
                logits = model(inputs_embeds=embeddings).logits[0, -1]
                assert point[0].item() == pytest.approx(logits[predicted].item(), abs=1e-5)
                assert point[1].item() == pytest.approx(logits.softmax(-1)[predicted].item(), abs=1e-5)


def test_a_shared_prefix_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the prefix, and with every input run as a whole: the same scores from fewer tokens."""
    for name in ("llama", "gpt2"):
        model, tokenizer = build(name)
        found = ev.next_token(model, tokenizer, {"text": "Paris is the capital of France. Berlin is"}, name="a")
        length = found.inputs["input_ids"].shape[1]
        kept = ~torch.eye(length, dtype=torch.bool)  # each token gone once
        tokens: list[int] = []
        handle = model.register_forward_pre_hook(
            lambda m, args, kwargs, t=tokens: t.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
        )
        perturbation = ev.Perturbation(model, batch_size=4)
        shared = perturbation.scores(found, kept)
        less = sum(tokens)
        tokens.clear()
        monkeypatch.setattr(ev.Perturbation, "_caches", lambda self, sample: False)
        assert torch.allclose(shared, perturbation.scores(found, kept), atol=1e-5)
        assert sum(tokens) == length * length
        assert less < 0.8 * length * length
        monkeypatch.undo()
        handle.remove()


@pytest.mark.parametrize("baseline", ["mean", "unknown", "mask"])
def test_what_takes_the_place_of_an_embedding(baseline: Any) -> None:
    model = Bag([3.0, -1.0, 2.0, 0.5])
    tokenizer = SimpleNamespace(unk_token_id=1, mask_token_id=2)
    found = ev.curves(ev.Perturbation(model, tokenizer, baseline), sample(4), torch.tensor([3.0, -1, 2, 0.5]))
    other = {"mean": 4.5 / 4, "unknown": -1.0, "mask": 2.0}[baseline]
    assert found.morf[:, 0].tolist() == pytest.approx([4.5, 1.5 + other, -0.5 + 2 * other, -1 + 3 * other, 4 * other])


def test_a_baseline_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"^baseline: this tokenizer has no mask token; use zero or mean$"):
        ev.curves(ev.Perturbation(Bag([1.0]), None, "mask"), sample(1), torch.ones(1))
    with pytest.raises(InputError, match=r"^baseline: got 'blur', expected one of zero, mean, unknown, mask$"):
        ev.curves(ev.Perturbation(Bag([1.0]), None, "blur"), sample(1), torch.ones(1))


# --- order --------------------------------------------------------------------------------------------------------


def test_what_happens_to_special_tokens() -> None:
    relevance = torch.tensor([5.0, 1.0, 3.0, 9.0])
    marked = sample(4, special=(0, 3))
    assert order(relevance, marked).tolist() == [3, 0, 2, 1]
    assert order(relevance, marked, special="keep").tolist() == [2, 1]
    assert order(relevance * torch.tensor([-1, 1, 1, -1]), marked, special="first").tolist() == [0, 3, 2, 1]
    kept = ev.curves(ev.Perturbation(Bag([1.0, 2.0, 4.0, 8.0])), marked, relevance, special="keep")
    assert kept.morf[:, 0].tolist() == [15, 11, 9]


def test_equal_relevance_is_ordered_by_the_seed_alone() -> None:
    ties = torch.zeros(50)
    assert torch.equal(order(ties, sample(50), seed=1), order(ties, sample(50), seed=1))
    assert not torch.equal(order(ties, sample(50), seed=1), order(ties, sample(50), seed=2))
    assert not torch.equal(order(ties, sample(50, name="a")), order(ties, sample(50, name="b")))
    assert sorted(order(ties, sample(50)).tolist()) == list(range(50))


def test_relevance_that_cannot_be_ordered() -> None:
    with pytest.raises(InputError, match=r"^relevance: got shape \(3,\), expected \(4,\)$"):
        order(torch.zeros(3), sample(4))
    with pytest.raises(InputError, match=r"^relevance of sample a holds NaN"):
        order(torch.tensor([1.0, math.nan]), sample(2))
    with pytest.raises(InputError, match=r"has no token that may be taken away"):
        ev.curves(ev.Perturbation(Bag([1.0])), sample(1, special=(0,)), torch.ones(1), special="keep")


# --- question answering -------------------------------------------------------------------------------------------


def test_pointing_at_the_answer() -> None:
    marked = sample(6, special=(0,), answer=(2, 3))
    found = ev.pointing(marked, torch.tensor([99.0, 0.5, 2.0, 1.0, 1.5, -3.0]))
    assert found == {"top1": 1.0, "iou": pytest.approx(1 / 3), "mass": pytest.approx(3 / 5)}
    assert ev.pointing(marked, torch.tensor([0.0, 0.5, 2, 3, 1, 0]))["iou"] == 1
    missed = ev.pointing(marked, torch.tensor([0.0, 5, -1, -1, 5, 5]))
    assert missed == {"top1": 0.0, "iou": 0.0, "mass": 0.0}
    assert ev.pointing(marked, -torch.ones(6))["mass"] == 0
    with pytest.raises(InputError, match="has no token of an answer"):
        ev.pointing(sample(6), torch.ones(6))


def test_answers_of_characters_are_tokens_of_the_context() -> None:
    model, tokenizer = build("llama", max_position_embeddings=256)
    context = "Berlin is the capital of Germany. The capital of Italy is Rome."
    record = {"context": context, "question": "what is the capital of Italy", "answers": ["Rome", "capital of Italy"]}
    found = ev.question(model, tokenizer, record, name="q")
    assert found.answer is not None
    ids = found.inputs["input_ids"][0]
    spans = "".join(tokenizer.decode(t) for t, inside in zip(ids, found.answer, strict=True) if inside)
    assert "".join(spans.split()).rstrip(".") == "capitalofItalyRome"  # the occurrence in the question does not count
    assert found.correct is False
    assert found.details["answers"] == ["Rome", "capital of Italy"]


@pytest.mark.parametrize(
    ("said", "right"),
    [("Rome", True), (" the Rome.", True), ("rome, in Italy", True), ("in Rome", False), ("", False), ("Romeo", False)],
)
def test_answers_are_compared_as_squad_does(said: str, right: bool) -> None:
    from attnlrp.evaluation.samples import answers_match

    assert answers_match(said, ["Rome", ""]) is right


# --- statistics ---------------------------------------------------------------------------------------------------


def test_mean_and_standard_error() -> None:
    found = ev.mean([1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.count) == (2.5, 4)
    assert found.standard_error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert ev.mean([2.0]).standard_error is None
    with pytest.raises(InputError, match="got no values"):
        ev.mean([])


def test_the_confidence_of_a_paired_difference() -> None:
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    shift = 0.5 * torch.randn(400, generator=torch.Generator().manual_seed(1)).double() + 0.1
    found = ev.compare((10 * noise + shift).tolist(), (10 * noise).tolist())
    assert found.mean == pytest.approx(shift.mean().item())
    half = 1.96 * shift.std().item() / 20  # pairing removes the noise that both share
    assert found.low == pytest.approx(found.mean - half, abs=half / 5)
    assert found.high == pytest.approx(found.mean + half, abs=half / 5)
    assert found == ev.compare((10 * noise + shift).tolist(), (10 * noise).tolist())
    assert ev.compare([1.0, 2.0], [1.0, 2.0]).decided is False
    assert ev.compare([2.0, 3.0], [1.0, 2.0]).decided is True
    with pytest.raises(InputError, match="got 2 and 1 values"):
        ev.compare([1.0, 2.0], [1.0])


# --- runs ---------------------------------------------------------------------------------------------------------


def contribution(model: Any, inputs: Any, target: Any) -> Tensor:
    x = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(target(model(inputs_embeds=x)).sum(), x)
    return (x * gradient).sum(-1)[0].detach()


def backwards(model: Any, inputs: Any, target: Any) -> Tensor:
    with torch.no_grad():
        target(model(input_ids=inputs["input_ids"].expand(3, -1)))
    return -contribution(model, inputs, target)


METHODS = {"contribution": contribution, "backwards": backwards}


def samples(count: int = 3) -> list[ev.Sample]:
    return [sample(5, name=f"s{k}") for k in range(count)]


def test_a_run_reports_means_differences_and_costs(tmp_path: Path) -> None:
    perturbation = ev.Perturbation(Bag([3.0, -1.0, 2.0, 0.5, 1.0]))
    seen: list[tuple[int, int, str]] = []
    report = ev.faithfulness(samples(), METHODS, perturbation, progress=lambda *args: seen.append(args))
    assert report.methods == ["contribution", "backwards"]
    area = report.mean("contribution", "area")
    assert area.count == 3
    assert area.standard_error == pytest.approx(0)
    assert report.mean("backwards", "area").mean == pytest.approx(-area.mean)
    assert report.compare("contribution", "backwards", "area").mean == pytest.approx(2 * area.mean)
    assert {k: v for k, v in report.cost("contribution").items() if k != "seconds"} == {"forwards": 1, "backwards": 1}
    assert {k: v for k, v in report.cost("backwards").items() if k != "seconds"} == {"forwards": 4, "backwards": 1}
    assert seen[-1] == (6, 6, "backwards on s2")
    data = report.to_dict()
    assert data["settings"]["special"] == "rank"
    assert data["methods"]["contribution"]["metrics"]["area"]["mean"] == pytest.approx(area.mean)
    assert len(data["samples"]) == 6
    json.dumps(data)


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "results" / "run.jsonl"
    perturbation = ev.Perturbation(Bag([3.0, -1.0, 2.0, 0.5, 1.0]))
    calls: list[str] = []

    def counted(model: Any, inputs: Any, target: Any) -> Tensor:
        calls.append("x")
        if len(calls) == 3:
            raise KeyboardInterrupt
        return contribution(model, inputs, target)

    with pytest.raises(KeyboardInterrupt):
        ev.faithfulness(samples(), {"m": counted}, perturbation, journal=path)
    assert len(path.read_text().splitlines()) == 3  # settings, and two results
    with path.open("a") as file:
        file.write('{"sample": "s2", "met')  # cut off by the kill
    again = ev.faithfulness(samples(), {"m": counted}, perturbation, journal=path)
    assert len(calls) == 4
    whole = ev.faithfulness(samples(), {"m": contribution}, perturbation)
    assert again.values("m", "area") == whole.values("m", "area")
    assert all(json.loads(line) for line in path.read_text().splitlines())
    with pytest.raises(InputError, match=r"holds results with steps None \(now 2\); give another file"):
        ev.faithfulness(samples(), {"m": counted}, perturbation, steps=2, journal=path)


def test_a_file_that_holds_no_results_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("my notes\n")
    with pytest.raises(InputError, match="not a file of results"):
        ev.faithfulness(samples(), METHODS, ev.Perturbation(Bag([1.0] * 5)), journal=path)
    assert path.read_text() == "my notes\n"


def test_question_answering_over_all_samples_and_the_correct_ones() -> None:
    import dataclasses

    model = Bag([3.0, -1.0, 2.0, 0.5, 1.0])
    first = dataclasses.replace(sample(5, answer=(0,), name="right"), correct=True)
    other = dataclasses.replace(sample(5, answer=(1,), name="wrong"), correct=False)
    without = sample(5, name="no answer in the context")
    report = ev.question_answering([first, other, without], {"m": contribution}, model)
    assert report.values("m", "top1") == {"right": 1, "wrong": 0}
    assert report.mean("m", "top1").mean == 0.5
    assert report.mean("m", "top1", correct_only=True).mean == 1


def test_runs_that_make_no_sense() -> None:
    perturbation = ev.Perturbation(Bag([1.0] * 5))
    with pytest.raises(InputError, match="got 0 samples and 2 methods"):
        ev.faithfulness([], METHODS, perturbation)
    with pytest.raises(InputError, match="two have the same name"):
        ev.faithfulness([sample(5), sample(5)], METHODS, perturbation)


def test_peak_memory_grows_with_what_a_method_keeps() -> None:
    model = Bag([1.0] * 5)
    inputs = sample(5).inputs

    def keeps(count: int) -> int:
        return peak_memory(lambda *_: torch.zeros(count), model, inputs, ev.Output(0, last=False))

    assert keeps(1_000_000) - keeps(10) == pytest.approx(4_000_000, rel=0.01)


# --- data ---------------------------------------------------------------------------------------------------------


def test_reading_lines_and_squad(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text(
        '{"text": "one", "label": 1}\n\n{"id": "x", "question": "q", "context": "c d", "answers": {"text": ["c", "c"]}}\n'
    )
    assert ev.read(lines) == [
        {"name": "1", "text": "one", "label": 1},
        {"name": "x", "question": "q", "context": "c d", "answers": ["c"]},
    ]
    squad = tmp_path / "squad.json"
    asked = [{"id": "1", "question": "q", "answers": [{"text": "c", "answer_start": 0}]}]
    asked.append({"id": "2", "question": "q", "answers": []})
    squad.write_text(json.dumps({"data": [{"paragraphs": [{"context": "c d", "qas": asked}]}]}))
    assert [r["name"] for r in ev.read(squad)] == ["1"]


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.jsonl", "", r"holds no record"),
        ("a.jsonl", "{}\n", r"a.jsonl:1: has the fields \[\], expected text, or question, context and answers"),
        ("a.jsonl", '{"text": "a"}\n{oops\n', r"a.jsonl:2: not JSON"),
        ("a.jsonl", "[]\n", r"a.jsonl:1: got '\[\]', expected an object"),
        ("a.json", "{}", r"not in SQuAD format \(KeyError\('data'\)\)"),
    ],
)
def test_data_that_cannot_be_read(tmp_path: Path, name: str, text: str, match: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=match):
        ev.read(tmp_path / name)


def test_choices_are_kept_apart() -> None:
    records = [{"name": str(k)} for k in range(20)]
    test, tuning = ev.draw(records, 12, seed=3), ev.draw(records, 8, seed=3, skip=12)
    assert {r["name"] for r in test + tuning} == {str(k) for k in range(20)}
    assert ev.draw(records, 12, seed=3) == test != ev.draw(records, 12, seed=4)
    with pytest.raises(InputError, match=r"got 20 records, expected at least 21"):
        ev.draw(records, 1, skip=20)

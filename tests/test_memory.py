"""Memory estimated before a run, and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from attnlrp import ATTNLRP, Explainer, InputError, OutOfMemoryError, memory, propagate
from attnlrp.checkpoint import checkpointed
from attnlrp.evaluation.cost import peak_memory
from attnlrp.memory import Estimate, Plan, Planner, estimate
from nearness import same
from tiny_tokenizers import build

TEXT = "Paris is the capital of France. Berlin is the capital of"
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 344, "max_position_embeddings": 600}


def measured(model: Any, tokens: int, *, saving: bool) -> int:
    ids = torch.randint(3, 100, (1, tokens))

    def explain(model: Any, inputs: Any, target: Any) -> torch.Tensor:
        with propagate(model) as propagation:
            if saving:
                with checkpointed(model):
                    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            else:
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        ((_, embeddings),) = propagation.embeddings
        (grad,) = torch.autograd.grad(logits.max(), embeddings)
        return grad[0].sum(-1)

    return peak_memory(explain, model, {}, lambda output: output)


@pytest.mark.filterwarnings("ignore")  # of the profiler
@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi"])
def test_estimates_are_near_what_is_measured(name: str, saving: bool) -> None:
    model = tiny.build(name, num_hidden_layers=8, **WIDE).requires_grad_(False)
    found = estimate(model, ATTNLRP, {"input_ids": torch.arange(3, 20)[None]})
    for tokens in (100, 400):
        tensors = found.peak(Plan(saving, 1), texts=1, tokens=tokens) / (1 if saving else 1 + found.held)
        assert 0.8 < tensors / measured(model, tokens, saving=saving) < 2


def test_written_out_attention_keeps_squares() -> None:
    model = tiny.build("llama", attention="eager", **WIDE)
    inputs = {"input_ids": torch.arange(3, 20)[None]}
    assert estimate(model, ATTNLRP, inputs).full[2] > 0
    assert abs(estimate(tiny.build("llama", **WIDE), ATTNLRP, inputs).full[2]) < 1e-6


def test_checkpointing_keeps_less() -> None:
    found = estimate(tiny.build("llama", num_hidden_layers=8), ATTNLRP, {"input_ids": torch.arange(3, 20)[None]})
    assert found.checkpoint is not None
    assert found.checkpoint[1] < found.full[1] / 4
    assert found.layers == 8


def planner(limit: int) -> Planner:
    made = Planner(tiny.build("llama"), "auto", limit)
    made._estimate = Estimate((0.0, 800.0, 0.0), (0.0, 80.0, 0.0), 8)  # bytes a token: a layer keeps 100
    return made


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (10 * (800 + 1.5 * 5 * 100), Plan(False, 4)),
        (10 * (800 + 1.5 * 2 * 100), Plan(False, 1)),
        (10 * (80 + 100 + 1.5 * 5 * 100), Plan(True, 4)),
        (10 * (80 + 100 + 1.5 * 2 * 100), Plan(True, 1)),
    ],
)
def test_auto_takes_the_fastest_way_that_fits(limit: float, expected: Plan) -> None:
    assert planner(int(limit)).plan(ATTNLRP, {"input_ids": torch.zeros(1, 10, dtype=torch.long)}, 4) == expected


def test_what_cannot_fit_is_refused_and_what_would_is_named() -> None:
    inputs = {"input_ids": torch.zeros(2, 1000, dtype=torch.long)}
    with pytest.raises(OutOfMemoryError) as raised:
        planner(480 * 1100).plan(ATTNLRP, inputs, 1)
    for part in ("2 texts of 1000 tokens", "even if layers are computed again", "at most 550 tokens", "one text at a"):
        assert part in str(raised.value)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_auto_gives_the_same_relevance(name: str) -> None:
    model, tokenizer = build(name)
    plain, auto = Explainer(model, tokenizer), Explainer(model, tokenizer, memory="auto")
    assert same(auto(TEXT), plain(TEXT))
    with pytest.raises(OutOfMemoryError, match="what would fit"):
        Explainer(model, tokenizer, memory="auto", memory_limit=1)(TEXT)


def test_options_are_checked() -> None:
    model, tokenizer = build("llama")
    with pytest.raises(InputError, match="memory_limit: got -1"):
        Explainer(model, tokenizer, memory="auto", memory_limit=-1)
    with pytest.raises(InputError, match="and memory='auto'"):
        Explainer(model, tokenizer, memory_limit=5)


def test_a_system_that_does_not_say_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.available_bytes(torch.device("cpu")) > 0
    monkeypatch.setattr(memory, "_lines", lambda path: [])
    with pytest.raises(InputError, match="give memory_limit in bytes"):
        memory.available_bytes(torch.device("cpu"))

"""The published geometries: that they are what was published, that little is lost in making them small, and that they conform."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from conformance import geometry, recipe
from conformance.published import PUBLISHED, TASK
from conformance.run import one

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns of while it builds its own models

SCALED = geometry.WIDTHS | geometry.DEPTHS | geometry.VOCABULARIES | geometry.WINDOWS | {"layer_types"}
WINDOWED = [name for name in PUBLISHED if geometry.WINDOWS & {k for k, v in vars(geometry.scaled(name)).items() if v}]
SIBLINGS = """
meta-llama/Llama-3.2-1B microsoft/phi-4 Qwen/Qwen2.5-7B google/gemma-2-9b EleutherAI/gpt-neox-20b facebook/bart-base
google/byt5-small google/vit-large-patch16-224 google/vit-large-patch32-384
""".split()
"""Left to `python -m tests.conformance.run`: the same kind of model as another row, in another size."""


def on_meta(name: str, config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = recipe.model_class(PUBLISHED[name]["task"], PUBLISHED[name]["kind"])(config)
    return model


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in SIBLINGS])
def test_a_published_geometry_conforms(name: str) -> None:
    result = one(TASK, name)
    assert (result.outcome, result.dtype) == ("pass", "float64"), result.reason


@pytest.mark.parametrize("name", [name for name, data in PUBLISHED.items() if "parameters" in data])
def test_the_whole_model_has_as_many_parameters_as_published(name: str) -> None:
    assert geometry.parameters(name) == PUBLISHED[name]["parameters"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_small_geometry_has_each_kind_of_layer_and_differs_in_sizes_only(name: str) -> None:
    whole, small = geometry.published(name), geometry.scaled(name)
    kinds = [
        {re.sub(r"\d+", "*", key): p.dim() for key, p in on_meta(name, config).named_parameters()}
        for config in (whole, small)
    ]
    assert kinds[0] == kinds[1]
    assert set(getattr(whole, "layer_types", None) or ()) == set(getattr(small, "layer_types", None) or ())
    for key, value in vars(whole).items():
        if key in geometry.WIDTHS and value is not None:
            assert value == PUBLISHED[name]["width"] * getattr(small, key), key
        elif key not in SCALED and not key.endswith("_token_id"):
            assert value == getattr(small, key), key


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_is_shorter_than_the_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def logits() -> torch.Tensor:
        task, kind = PUBLISHED[name]["task"], PUBLISHED[name]["kind"]
        model = recipe.build(task, kind, geometry.scaled(name))
        with torch.no_grad():
            found: torch.Tensor = model(**recipe.inputs(task, kind, model)).logits
        return found

    felt = logits()
    monkeypatch.setattr(geometry, "WINDOW", 64)
    assert not torch.allclose(felt, logits())


def test_a_width_that_does_not_divide_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PUBLISHED["openai-community/gpt2"], "width", 7)
    with pytest.raises(ValueError, match="n_embd = 768 is not a multiple of 7"):
        geometry.scaled("openai-community/gpt2")

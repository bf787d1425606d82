"""The search for gammas: it takes what is best, keeps what it tried, stops when told, goes on from its journal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import attnlrp
from attnlrp import InputError, evaluate, gamma, search_gamma
from attnlrp.gamma import Gammas, Search
from attnlrp.rules import VIT, VIT_CP, gradient


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3, initializer_range=0.4)
    return transformers.ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def samples(model: Any) -> list[evaluate.Sample]:
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    drawn = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (16, 16, 3), generator=drawn, dtype=torch.uint8).numpy() for _ in range(3)]
    records = [{"image": Image.fromarray(p)} for p in pictures]
    return [evaluate.image_classified(model, processor, r, name=str(k)) for k, r in enumerate(records)]


def search(model: Any, samples: list[evaluate.Sample], **options: Any) -> Search:
    perturbation = evaluate.PixelPerturbation(model, patch=4)
    return search_gamma(samples, perturbation, coarse=2, steps=4, **options)


def test_the_best_of_what_was_tried(model: Any, samples: list[evaluate.Sample]) -> None:
    told: list[int] = []
    found = search(model, samples, progress=lambda done, total, last: told.append(done))
    final = [t for t in found.tried if t["images"] == 3]
    assert found.complete
    assert found.images == 3
    assert found.area.mean == max(t["mean"] for t in final)
    assert found.best == Gammas(**max(final, key=lambda t: t["mean"])["gammas"])
    assert told == list(range(1, len(found.tried) + 1))
    assert found.tried[0]["gammas"] == {**found.tried[0]["gammas"], "conv": 0.25, "mlp": 0.05}  # the paper's first
    # the best area is what the best table gives when it is measured alone
    perturbation = evaluate.PixelPerturbation(model, patch=4)
    method = {"best": attnlrp.methods.Propagated(found.rules)}
    assert evaluate.faithfulness(samples, method, perturbation, steps=4).mean("best", "area") == found.area


def test_budget(model: Any, samples: list[evaluate.Sample]) -> None:
    stopped = search(model, samples, seconds=0.0)
    assert not stopped.complete
    assert len(stopped.tried) == 1
    assert stopped.best in [Gammas(**t["gammas"]) for t in stopped.tried]


def test_a_search_goes_on_and_is_saved(
    model: Any, samples: list[evaluate.Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search(model, samples, journal=tmp_path / "journal.jsonl")

    def fail(*args: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(gamma.Gammas, "__call__", fail)
    again = search(model, samples, journal=tmp_path / "journal.jsonl")
    assert (again.best, again.area, again.tried) == (first.best, first.area, first.tried)
    first.save(tmp_path / "found.json")
    assert Search.load(tmp_path / "found.json") == first


def test_gammas_are_tables() -> None:
    assert Gammas(conv=0.25, mlp=0.05).rules == VIT
    assert Gammas(conv=0.25, mlp=0.05, attention="cp").rules == VIT_CP
    assert Gammas().rules["conv"] is gradient
    assert str(Gammas(mlp=0.05)) == "conv 0, mlp 0.05, qkv 0, out 0, head 0, softmax attnlrp"


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"attnlrp": "gamma", "best": {"conv": 1}})])
def test_a_file_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match="expected a file of search_gamma"):
        Search.load(tmp_path / "x.json")
    with pytest.raises(InputError, match="cannot read"):
        Search.load(tmp_path / "missing.json")


def test_no_images(model: Any) -> None:
    with pytest.raises(InputError, match="no images"):
        search(model, [])

"""The recipes of docs/checkpoints.md, run on tiny stand-ins for the checkpoints that they name; and its tables."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from typer.testing import CliRunner

import attnlrp
from attnlrp.cli import app
from conformance import geometry, recipe
from conformance.published import PUBLISHED
from tiny_tokenizers import build_tokenizer

PAGE = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
HUB = re.compile(r"(?<![\w./-])[\w.-]+/[\w.-]+(?=[\"` ]|$)", re.MULTILINE)
PYTHON = re.compile(r"(?P<why><!-- no-test: .{10,}? -->\n)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
RUN = [m["code"] for m in PYTHON.finditer(PAGE) if not m["why"]]
COMMANDS = re.findall(r"^attnlrp .*$", PAGE, re.MULTILINE)
FINE_TUNED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english": (
        "sequence-classification",
        "distilbert",
        {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}},
    ),
    "dslim/bert-base-NER": (
        "token-classification",
        "bert",
        {"id2label": {0: "O", 1: "LOC"}, "label2id": {"O": 0, "LOC": 1}},
    ),
    "deepset/roberta-base-squad2": ("question-answering", "roberta", {}),
}


def save(name: str, folder: Path) -> None:
    """A random model of the class that the checkpoint has, with a tokenizer that fits."""
    if name in PUBLISHED:
        task, kind, config = PUBLISHED[name]["task"], PUBLISHED[name]["kind"], geometry.scaled(name)
    else:
        task, kind, settings = FINE_TUNED[name]
        config = recipe.configure(CONFIG_MAPPING[kind], {"max_position_embeddings": 512, **settings})
    if task == "image-classification":
        ViTImageProcessorPil(size={"height": config.image_size, "width": config.image_size}).save_pretrained(folder)
    else:
        tokenizer = _tokenizer(special="[MASK]" if kind in ("bert", "distilbert") else "<mask>")
        tokenizer.save_pretrained(folder)
        config.vocab_size = len(tokenizer)
        if kind == "marian":
            config.decoder_vocab_size = len(tokenizer)
    recipe.build(task, kind, config).save_pretrained(folder)


def _tokenizer(special: str) -> Any:
    tokenizer = copy.deepcopy(build_tokenizer("wordpiece"))
    tokenizer.add_special_tokens({"mask_token": special, "additional_special_tokens": ["en_XX", "de_DE"]})
    tokenizer.model_max_length = 512
    return tokenizer


def offline(text: str, folder: Path) -> str:
    """The text with folders of stand-ins in the place of names on the hub."""
    for name in sorted(set(HUB.findall(text)) & {*PUBLISHED, *FINE_TUNED}):
        place = folder / name.replace("/", "--")
        save(name, place)
        text = text.replace(f"{name}", str(place))
    return text


@pytest.mark.parametrize("code", RUN, ids=[f"recipe {k}" for k in range(len(RUN))])
def test_a_recipe_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    noise = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save("cat.jpg")
    run: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(offline(code, tmp_path), "docs/checkpoints.md", "exec"), run)
    if "patches" in run:
        assert run["patches"].shape == (14, 14)
        torch.testing.assert_close(run["patches"].sum(), run["relevance"].sum())
        assert run["relevance"].abs().max() > 0
    explained = [run[n] for n in ("first", "matrix", "explanation", "entities", "answer") if n in run]
    assert explained or "patches" in run
    assert all(e.relevance.abs().amax(-1).gt(0).all() for e in explained)


@pytest.mark.parametrize("command", COMMANDS, ids=[f"command {k}" for k in range(len(COMMANDS))])
def test_a_command_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, shlex.split(offline(command, tmp_path))[1:])
    assert done.exit_code == 0, done.output + repr(done.exception)


@pytest.mark.parametrize("name", [name for name, data in PUBLISHED.items() if data["task"] != "image-classification"])
def test_the_recipe_of_its_family_fits_every_checkpoint(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    explainer = attnlrp.Explainer.from_pretrained(tmp_path)
    assert explainer.task == PUBLISHED[name]["task"]
    explanation = explainer(f"Paris is the {explainer.tokenizer.mask_token} of France.")
    assert explanation.relevance.abs().max() > 0


def test_a_recipe_of_every_family_is_run_and_what_is_not_says_why() -> None:
    tasks = {PUBLISHED[name]["task"] for code in RUN for name in HUB.findall(code) if name in PUBLISHED}
    assert tasks == {data["task"] for data in PUBLISHED.values()} - {"sequence-classification"}
    assert len(RUN) == len(re.findall(r"^```python$", PAGE, re.MULTILINE)) - 1
    assert any("deberta" in command for command in COMMANDS)


def test_the_tables_have_every_checkpoint_and_its_size() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
    found = {cells[1]: (cells[0], *cells[3:]) for cells in rows if cells[1] in PUBLISHED}
    sizes = {name: geometry.parameters(name) / 1e9 for name in PUBLISHED}
    assert found == {
        name: (PUBLISHED[name]["model"], f"{n:.2f} B", f"{4 * n:.1f} GB", f"{2 * n:.1f} GB")
        for name, n in sizes.items()
    }


def test_what_is_loaded_dequantised_can_be() -> None:
    assert transformers.Mxfp4Config(dequantize=True).dequantize
    assert transformers.FineGrainedFP8Config(dequantize=True).dequantize

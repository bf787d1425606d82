"""The inside of a model as it is drawn: every number agrees with the tensors, nothing of a token is run, pages are small."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from attnlrp import InputError
from attnlrp.explanation import Explanation
from attnlrp.latent import Latent, LatentLayer
from attnlrp.show import html, image, page_units, terminal, units
from test_show import HOSTILE, UNUSUAL, Parsed, build

KEPT = 5


def layer(name: str, kind: str, tokens: int, kept: int = 1, of: int = 1, **options: Any) -> LatentLayer:
    """Numbers at random, as `Recorder` orders them."""
    targets = options.pop("targets", 1)
    relevance = torch.randn(targets, kept, tokens)
    order = relevance.sum(dim=-1).abs().argsort(dim=1, descending=True)
    relevance = relevance.gather(1, order[..., None].expand_as(relevance))
    indices = torch.stack([torch.randperm(of)[:kept] for _ in range(targets)])
    return LatentLayer(name, kind, of, relevance.sum(dim=1), indices, relevance, relevance.cos(), **options)


def made(
    depth: int, tokens: int, *, heads: int = 4, attention: bool = True, targets: int = 1, kept: int = KEPT
) -> Latent:
    layers = []
    for k in range(depth):
        layers.append(layer(f"layers.{k}:before", "residual", tokens, targets=targets))
        if attention:
            maps = torch.randn(targets, heads, tokens, tokens).tril()
            each = layer(f"layers.{k}.attn.weights", "attention", tokens, heads, heads, targets=targets)
            relevance = maps.sum(dim=-1).gather(1, each.indices[..., None].expand_as(each.relevance))
            layers.append(dataclasses.replace(each, attention=maps, relevance=relevance))
        layers.append(layer(f"layers.{k}.attn", "heads", tokens, heads, heads, targets=targets))
        layers.append(layer(f"layers.{k}:between", "residual", tokens, targets=targets))
        layers.append(layer(f"layers.{k}.mlp", "neurons", tokens, kept, 100, targets=targets))
        layers.append(layer(f"layers.{k}:after", "residual", tokens, targets=targets))
    return Latent(tuple(layers))


def explained(tokens: list[str], latent: Latent, rows: int = 1) -> Explanation:
    values = torch.linspace(-1, 2, rows * len(tokens)).reshape(rows, -1).tolist()
    return dataclasses.replace(build(tokens, values), latent=latent)


@pytest.fixture
def small() -> Explanation:
    torch.manual_seed(0)
    return explained(["<bos>", "Paris", " is", " in"], made(3, 4))


def printed(explanation: Explanation, width: int = 100, **options: Any) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(terminal.render(explanation, **options))
    return file.getvalue()


def data_of(page: str) -> list[dict[str, Any]]:
    return [json.loads(words) for attributes, words in Parsed(page).all("script") if "data-inside" in attributes]


def decoded(entry: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of a page and the step of each, by the format's description and not by our own reader."""
    whole = np.frombuffer(zlib.decompress(base64.b64decode(entry["data"])), "<i2")
    scale = torch.tensor(entry["scale"], dtype=torch.float64)[:, None]
    rows = torch.tensor(whole.astype(float)).reshape(len(scale), -1)
    return (rows * scale).reshape(entry["shape"]), scale.expand_as(rows).reshape(entry["shape"])


def assert_agrees(entry: dict[str, Any], values: torch.Tensor) -> None:
    found, step = decoded(entry)
    assert found.shape == values.shape
    assert ((found - values.double()).abs() <= 0.5001 * step).all()


def assert_page_agrees(page: str, latent: Latent) -> None:
    """Every number of a page is that of the tensors, up to half a step."""
    for k, data in enumerate(data_of(page)):
        stream = [x for x in latent if x.kind == "residual"]
        assert data["maps"][0]["names"] == [x.name for x in stream]
        assert_agrees(data["maps"][0]["values"], torch.stack([x.total[k] for x in stream]))
        for i, block in data["layers"].items():
            own = latent.layers[int(i)]
            if own.attention is not None:
                assert_agrees(block["maps"], own.attention[k][own.indices[k].argsort()])
            else:
                assert_agrees(block["values"], own.relevance[k])
                assert [row[0] for row in block["rows"]] == [f"{own.name}:{j}" for j in own.indices[k].tolist()]


# --- pages


@pytest.mark.parametrize("targets", [1, 3])
def test_every_number_of_a_page_is_that_of_the_tensors(targets: int) -> None:
    latent = made(3, 6, targets=targets)
    page = html.page(explained([f" w{i}" for i in range(6)], latent, targets))
    assert len(data_of(page)) == targets
    assert [len(data["layers"]) for data in data_of(page)] == [9] * targets
    assert "leaves out" not in page
    assert_page_agrees(page, latent)


def test_a_page_of_thirty_layers_stays_small() -> None:
    torch.manual_seed(0)
    latent = made(30, 512, heads=32, attention=False, kept=32)
    explanation = explained([f" token{i}" for i in range(512)], latent)
    begun = time.perf_counter()
    page = html.page(explanation)
    assert time.perf_counter() - begun < 30
    assert len(page.encode()) < 5_000_000
    assert len(data_of(page)[0]["layers"]) == 60
    assert "leaves out" not in page
    assert_page_agrees(page, latent)


@pytest.mark.parametrize(("tokens", "targets"), [(128, 1), (64, 8)])
def test_a_page_says_what_does_not_fit(tokens: int, targets: int) -> None:
    torch.manual_seed(0)
    latent = made(12, tokens, heads=32, targets=targets)
    page = html.page(explained([f" token{i}" for i in range(tokens)], latent, targets))
    assert 4_000_000 < len(page.encode()) < 5_000_000
    blocks = [data["layers"] for data in data_of(page)]
    kept = sum(latent.layers[int(i)].kind == "attention" for own in blocks for i in own)
    assert 0 < kept < 12 * targets
    (said,) = set(re.findall(r"leaves out maps of attention of (\d+) of (\d+) layers", page))
    assert said == (str(12 * targets - kept), str(12 * targets))
    assert page.count('data-draw="heads"') == kept
    assert_page_agrees(page, latent)
    if targets == 1:
        strength = {i: x.relevance[0, 0].sum().abs() for i, x in enumerate(latent) if x.kind == "attention"}
        strongest = sorted(strength, key=lambda i: -strength[i])[:kept]
        assert {int(i) for i in blocks[0] if latent.layers[int(i)].kind == "attention"} == set(strongest)


def test_units_that_do_not_fit_are_text_without_a_button(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_units, "LIMIT", 0)
    latent = made(2, 3)
    page = html.page(explained(["a", "b", "c"], latent))
    assert not Parsed(page).all("button")
    assert "neurons of 2 of 2 layers" in page
    assert f"layers.0.mlp:{latent.layers[4].indices[0, 0]}" in page


def test_without_script_the_strongest_units_and_all_layers_can_be_read(small: Explanation) -> None:
    page = html.page(small, {small.latent.top("neurons", 1)[0].unit: "<b>cold</b>"})
    bare = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    for kind in ("neurons", "heads"):
        for unit in small.latent.top(kind, 4):
            assert unit.unit in bare
            assert f"{unit.relevance:+.3f}" in bare
    for name in ("layers.0:before", ">layers.0<", ">layers.2<"):
        assert name in bare
    assert "&lt;b&gt;cold&lt;/b&gt;" in bare
    assert "<b>" not in page


def test_a_page_with_layers_runs_nothing_of_a_token() -> None:
    latent = made(2, len(HOSTILE))
    named = dataclasses.replace(latent.layers[0], name="</script><img src=x>")
    page = html.page(explained(HOSTILE, Latent((named, *latent.layers[1:]))), {"layers.0.mlp:1": "</script>"})
    document = Parsed(page)
    assert len(document.all("script")) == 3
    assert not document.all("img")
    for attributes, words in document.all("script"):
        if attributes.get("type") == "application/json":
            assert not set("<>&'\u2028") & set(words)
            json.loads(words)
    names = {name for _, attributes, _ in document.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert not names & {"src", "href", "srcset", "action", "style"}
    assert not re.search(r"https?:|url\(|@import|fetch\(|import\(|innerHTML", page)


def test_a_page_without_layers_is_as_it_was(small: Explanation) -> None:
    page = html.page(dataclasses.replace(small, latent=None))
    assert "details" not in page
    assert "DecompressionStream" not in page


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to parse the script with")
def test_the_script_parses(small: Explanation, tmp_path: Path) -> None:
    (tmp_path / "script.js").write_text(Parsed(html.page(small)).all("script")[-1][1], encoding="utf-8")
    subprocess.run(["node", "--check", str(tmp_path / "script.js")], check=True, capture_output=True)


def test_attention_to_an_encoder_reads_its_tokens() -> None:
    maps = torch.randn(1, 2, 3, 4)
    sums = maps.sum(dim=-1)
    both = {"units": 2, "total": sums.sum(1), "indices": torch.tensor([[0, 1]]), "relevance": sums, "activation": sums}
    crossed = LatentLayer(
        name="decoder.layers.0.encoder_attn.weights", kind="attention", attention=maps, offset=4, **both
    )
    padded = LatentLayer(name="layers.0.self_attn.weights", kind="attention", attention=maps, offset=0, **both)
    page = html.page(explained([f"t{i}" for i in range(7)], Latent((crossed, padded))))
    blocks = data_of(page)[0]["layers"]
    assert (blocks["0"]["start"], blocks["0"]["keys"], blocks["0"]["maps"]["shape"]) == (4, 0, [2, 3, 4])
    assert (blocks["1"]["start"], blocks["1"]["keys"], blocks["1"]["maps"]["shape"]) == (0, 0, [2, 3, 3])


def test_packed_numbers() -> None:
    values = torch.tensor([[0.0, 0.0], [1e-30, -2e-30], [3e20, 1.0], [float("nan"), 1.0]])
    entry = page_units.packed(values)
    assert_agrees(entry, values.nan_to_num(0.0))


# --- terminal


def test_terminal_ranks_units_and_maps_layers(small: Explanation) -> None:
    best = small.latent.top("neurons", 2)
    out = printed(small, labels={best[0].unit: "ice [red]"})
    assert f"{best[0].unit} {best[0].relevance:+.3f}" in re.sub(" +", " ", out)
    assert f"{best[0].relevance / 14.52:+.1%}" in out
    assert "ice [red]" in out
    lines = out[out.index("Residual stream") :].splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["layers.2", "layers.1", "layers.0", "layers.0:before"]
    assert lines[5].split() == ["<bos>", "Paris", "is", "in"]
    assert "label" not in printed(small)


def test_terminal_joins_tokens_and_skips_layers_that_do_not_fit() -> None:
    latent = made(60, 300, attention=False)
    out = printed(explained([f" w{i}" for i in range(300)], latent), width=80)
    lines = out[out.index("Residual stream") :].splitlines()
    assert "5 to a column" in lines[0]
    names = [line.split()[0] for line in lines[1:25]]
    assert (names[0], names[-1]) == ("layers.59", "layers.0:before")
    assert max(map(len, lines)) <= 80


def test_terminal_of_several_targets_names_their_strongest_units() -> None:
    explanation = explained(["a", "b"], made(2, 2, targets=2), 2)
    out = printed(explanation, width=200)
    for k in range(2):
        assert explanation.latent.top("neurons", 1, target=k)[0].unit in out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminal_cuts_no_number_and_no_address(small: Explanation, width: int) -> None:
    best = small.latent.top("neurons", 3)
    out = printed(small, width=width, labels={best[0].unit: "ice, the polar bear"})
    table = out[out.index("Neurons") : out.index("Heads")]
    assert "…" not in table
    assert {"ice,", "the", "polar", "bear"} < set(table.split())
    for unit in best:
        assert f"{unit.relevance:+.3f}" in table
        assert (f"{unit.activation:+.4f}"[:6] in table) == (width > 60)
        assert width < 80 or unit.unit in table
    assert ("━" in table) == (width == 120)
    assert max(map(len, table.splitlines())) <= width


# --- figures


def test_figure_grows_by_maps_and_bars(small: Explanation, tmp_path: Path) -> None:
    bare = image.figure(dataclasses.replace(small, latent=None))
    best = small.latent.top("neurons", 1)[0].unit
    drawing = image.figure(small, {best: "cold"})
    assert drawing.get_size_inches()[1] > bare.get_size_inches()[1] + 3
    words = [each.get_text() for each in drawing.texts]
    assert {"Residual stream", "Neurons", "Heads"} < set(words)
    stream, neurons = drawing.axes[2], drawing.axes[3]
    names = [tick.get_text() for tick in stream.get_yticklabels()]
    assert names == ["layers.2", "layers.1", "layers.0", "layers.0:before"]
    found = units.short(units.maps(small.latent, 0)[0])
    end = units.end_of(units.short(found).values)
    expected = (found.values / end).clamp(-1, 1).flip(0)
    assert torch.allclose(torch.tensor(np.asarray(stream.images[0].get_array())), expected)
    assert neurons.get_yticklabels()[0].get_text() == best
    assert any("cold" in each.get_text() for each in neurons.texts)
    for suffix in (".png", ".svg", ".pdf"):
        small.save(tmp_path / f"figure{suffix}", labels={best: "cold"})


def test_what_was_drawn_keeps_its_place(small: Explanation) -> None:
    bare, drawing = image.figure(dataclasses.replace(small, latent=None)), image.figure(small)
    for one, other in zip(bare.axes, drawing.axes[:2], strict=True):
        sizes = [axes.get_position().height * f.get_size_inches()[1] for axes, f in ((one, bare), (other, drawing))]
        tops = [(1 - axes.get_position().y1) * f.get_size_inches()[1] for axes, f in ((one, bare), (other, drawing))]
        assert sizes[0] == pytest.approx(sizes[1])
        assert tops[0] == pytest.approx(tops[1])


# --- all renderers


@pytest.mark.parametrize("values", ["zero", "broken", "positions", "features"])
def test_every_renderer_takes_every_latent(values: str, tmp_path: Path) -> None:
    latent = made(2, len(UNUSUAL))
    change: dict[str, Any] = {}
    if values in ("zero", "broken"):
        filling = 0.0 if values == "zero" else float("nan")
        layers = [
            dataclasses.replace(x, total=x.total * 0 + filling, relevance=x.relevance * 0 + filling) for x in latent
        ]
        latent = Latent(tuple(layers))
    elif values == "positions":
        change = {"offset": None}
    else:
        change = {"kind": "features"}
    latent = Latent(tuple(dataclasses.replace(x, **change) for x in latent)) if change else latent
    explanation = explained(UNUSUAL, latent)
    assert printed(explanation, width=150)
    data_of(html.page(explanation))
    explanation.save(tmp_path / "figure.png")
    explanation.merge_words().save(tmp_path / "words.html")


def test_error_and_bias_of_a_dictionary_have_their_names() -> None:
    values = torch.tensor([[3.0, 1.0], [0.5, 0.5], [0.25, 0.25]])
    features = layer("layers.0:after.features", "features", 2, 3, 6)
    features = dataclasses.replace(features, relevance=values[None], indices=torch.tensor([[4, 1, 5]]))
    explanation = explained(["a", "b"], Latent((features,)))
    names = [f"layers.0:after.features:{name}" for name in ("error", "1", "bias")]
    assert [unit.unit for unit in explanation.top("features", 3)] == names
    out, page = printed(explanation), html.page(explanation)
    for name in names:
        assert f"{name} " in out
        assert f">{name}<" in page


def test_kinds_that_were_not_recorded_are_left_out() -> None:
    latent = Latent((layer("layers.0.mlp", "neurons", 2, 2, 2),))
    explanation = explained(["a", "b"], latent)
    out = printed(explanation)
    assert "Neurons" in out
    assert "Residual" not in out
    assert "Layers <span>" not in html.page(explanation)
    with pytest.raises(InputError):
        latent.of("residual")


def test_ranks_hold_where_few_units_are_kept() -> None:
    latent = made(3, 4, kept=2)
    target = (0, build(["a"], [[1.0]]).targets[0])
    rows = units.ranked(latent, "neurons", target, ["a", "b", "c", "d"], count=10)
    assert [row.unit for row in rows] == [unit.unit for unit in latent.top("neurons", 2)]
    assert len(units.ranked(latent, "heads", target, ["a", "b", "c", "d"], count=10)) == 10

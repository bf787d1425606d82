"""Relevance inside models that read images: against hooks and gradients taken by hand, and against the ledger."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from attnlrp import VIT, Head, ImageExplainer, ImageExplanation, InputError, ModelError, Neuron, propagate
from attnlrp.latent import Latent, LatentLayer
from attnlrp.units import Site
from tiny_vision import NAMES, SIZE, TEXTS, build, photo

FAMILIES = ["ViT", "Dinov2", "Dinov2WithRegisters", "Swin", "CLIP", "Siglip"]
WHOLE: dict[str, Any] = {"latent": ("neurons", "heads", "residual"), "latent_top": None}


def texts(name: str) -> list[str] | None:
    return TEXTS if name in ("CLIP", "Siglip") else None


def inside(explanation: ImageExplanation) -> Latent:
    assert explanation.latent is not None
    return explanation.latent


def sites(ours: ImageExplainer, name: str = "ViT") -> dict[str, Site]:
    """Layers by their address."""
    ours(photo(), texts=texts(name), latent="neurons")
    assert ours._sites is not None
    return {site.name: site for site in ours._sites}


class Watched:
    """A model explained by hand: what the linear layers of units read is kept, with its gradients."""

    def __init__(self, ours: ImageExplainer, name: str, found: list[Site]) -> None:
        self.seen: dict[str, Tensor] = {}
        inputs = ours._inputs(photo(), texts(name))
        self.pixels = inputs["pixel_values"].requires_grad_()
        modules = {site.name: ours.model.get_submodule(site.weight.rpartition(".")[0]) for site in found}
        handles = [
            m.register_forward_pre_hook(lambda _, x, n=n: self.seen.update({n: x[0]})) for n, m in modules.items()
        ]
        with propagate(ours.model, VIT):
            output = ours.model(**inputs)
        for handle in handles:
            handle.remove()
        self.logits = output.logits_per_image[0] if texts(name) else output.logits[0]

    def relevance(self, scalar: Tensor, site: Site) -> Tensor:
        """(position, unit)."""
        x = self.seen[site.name]
        product = (x * torch.autograd.grad(scalar, x, retain_graph=True)[0]).detach()
        return product.reshape(-1, site.units, site.width // site.units).sum(-1)


def dense(layer: LatentLayer) -> Tensor:
    """(target, unit, position)."""
    size = (layer.indices.shape[0], layer.units, layer.total.shape[-1])
    return layer.relevance.new_zeros(size).scatter(1, layer.indices[..., None].expand(-1, -1, size[2]), layer.relevance)


# --- what is recorded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_and_heads_against_hooks(name: str) -> None:
    ours = build(name)
    found = [site for site in sites(ours, name).values() if not site.name.startswith("text")]
    explanation = ours(photo(), texts=texts(name), target=[1, 0], **WHOLE)
    by_hand, latent = Watched(ours, name, found), inside(explanation)
    assert {layer.name for layer in latent if layer.kind != "residual"} == {site.name for site in found}
    for row, target in enumerate(explanation.targets):
        for site in found:
            expected = by_hand.relevance(by_hand.logits[target.id], site)
            assert_close(dense(latent[site.name])[row], expected.T)
            assert_close(latent[site.name].total[row], expected.sum(-1))
            numbers = by_hand.seen[site.name].detach().reshape(-1, site.units, site.width // site.units)
            activation = numbers.squeeze(-1) if site.kind == "neurons" else numbers.norm(dim=-1)
            layer = latent[site.name]
            assert_close(layer.activation[row], activation.T[layer.indices[row]])
    assert not torch.equal(*[dense(latent[found[0].name])[k] for k in (0, 1)])


@pytest.mark.parametrize("name", FAMILIES)
def test_units_of_a_layer_add_up_to_what_the_ledger_books(name: str) -> None:
    ours, options = build(name), {"texts": texts(name)}
    latent, ledger = inside(ours(photo(), **options, **WHOLE)), ours.audit(photo(), **options)
    booked = {entry.module.split(" ")[0]: entry for entry in ledger.by_module()}
    checked = 0
    for address, site in sites(ours, name).items():
        if address.startswith("text"):
            continue
        entry = booked[site.weight.rpartition(".")[0]]
        assert latent[address].total.sum().item() == pytest.approx(entry.passed, rel=1e-6, abs=1e-9)
        assert entry.received - entry.absorbed.get("bias", 0.0) == pytest.approx(entry.passed, rel=1e-6, abs=1e-9)
        checked += 1
    assert checked >= 4


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Swin"])
def test_the_residual_stream_goes_on(name: str) -> None:
    latent = inside(build(name)(photo(), **WHOLE))
    stream = latent.of("residual")
    assert [layer.name.partition(":")[2] for layer in stream] == ["before", "between", "after"] * 2
    assert_close(stream[2].total.sum(), stream[3].total.sum())  # Swin merges patches between its two layers
    assert stream[0].total.abs().sum() > 0


def test_recording_changes_nothing() -> None:
    ours = build("ViT")
    plain, recorded = ours(photo(), top=2), ours(photo(), top=2, **WHOLE)
    assert torch.equal(plain.relevance, recorded.relevance)
    assert plain.latent is None
    assert dataclasses.replace(recorded, latent=None) == plain


def test_the_largest_are_kept() -> None:
    ours = build("ViT")
    whole, kept = (inside(ours(photo(), latent="neurons", latent_top=top)) for top in (None, 3))
    for a, b in zip(whole, kept, strict=True):
        assert b.relevance.shape[1] == 3
        assert torch.equal(b.indices, a.indices[:, :3])
        assert torch.equal(b.total, a.total)


@pytest.mark.parametrize("name", ["ViT", "CLIP"])
def test_attention_weights_get_half_of_what_the_heads_get(name: str) -> None:
    latent = inside(build(name)(photo(), texts=texts(name), latent=("attention", "heads")))
    assert len(latent.of("attention")) == 2  # those of CLIP's texts do not lead to the image
    for layer in latent.of("attention"):
        assert layer.attention is not None
        assert layer.attention.shape == (1, 4, 17, 17)
        heads = dense(latent[layer.name.removesuffix(".weights")])[0].sum(-1)
        assert_close(layer.attention[0].sum((-1, -2)), heads[layer.indices[0]] / 2, rtol=1e-5, atol=1e-6)


def test_targets_have_their_own_units() -> None:
    ours = build("ViT")
    explanation = ours(photo(), top=3, **WHOLE)
    for k, target in enumerate(explanation.targets):
        alone = inside(ours(photo(), target=target.id, **WHOLE))
        for a, b in zip(inside(explanation), alone, strict=True):
            assert_close(a.relevance[k], b.relevance[0])
            assert torch.equal(a.indices[k], b.indices[0])
        assert explanation.top("neurons", 2, target=k) == [*alone.top("neurons", 2)]


# --- through units --------------------------------------------------------------------------------------------------


def test_through_units_against_masked_gradients() -> None:
    ours = build("ViT")
    lower, upper = (sites(ours)[address] for address in ("layers.0.attention", "layers.1.mlp"))
    by_hand = Watched(ours, "ViT", [lower, upper])
    neurons, heads = torch.zeros(48, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    neurons[[5, 9]], heads[8:16] = 1, 1

    def step(of: Tensor, at: Tensor, weights: Tensor | None = None) -> Tensor:
        return torch.autograd.grad(of, at, weights, retain_graph=True)[0]

    top, bottom = by_hand.seen[upper.name], by_hand.seen[lower.name]
    masked = step(by_hand.logits[1], top) * neurons
    wanted = (by_hand.pixels * step(top, by_hand.pixels, masked)).sum(1).detach()
    units = ["layers.1.mlp:5", Neuron(1, 9)]
    assert_close(ours(photo(), target=1, through=units).relevance, wanted)
    both = step(top, bottom, masked) * heads
    wanted = (by_hand.pixels * step(bottom, by_hand.pixels, both)).sum(1).detach()
    found = ours(photo(), target=1, through=[*units, Head(0, 1)], latent="neurons")
    assert_close(found.relevance, wanted)
    assert found.relevance.abs().max() > 0
    assert found.latent is not None


def test_all_units_of_a_layer_together_are_the_sum_of_its_parts() -> None:
    ours = build("Swin")
    units = [f"layers.1.blocks.0.mlp:{k}" for k in range(128)]
    halves = ours(photo(), through=units[:64]).relevance + ours(photo(), through=units[64:]).relevance
    assert_close(ours(photo(), through=units).relevance, halves)


# --- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "front"), [("ViT", 1), ("DeiT", 2), ("Dinov2WithRegisters", 3), ("Siglip", 0)])
def test_positions_are_tokens_in_front_and_patches(name: str, front: int) -> None:
    explanation = build(name)(photo(), texts=texts(name), **WHOLE)
    for layer in inside(explanation):
        row = layer.total[0]
        assert explanation.in_front(len(row), layer.offset) == front
        assert_close(explanation.of_patches(row, layer.offset), row[front:].reshape(4, 4))


def test_patches_of_the_first_stream_are_those_of_the_pixels() -> None:
    ours = build("ViT")
    with torch.no_grad():  # else they take their part between the pixels and the stream
        ours.model.vit.embeddings.patch_embeddings.projection.bias.zero_()
        ours.model.vit.embeddings.position_embeddings.zero_()
    explanation = ours(photo(), latent="residual")
    first = inside(explanation)["layers.0:before"]
    assert_close(explanation.of_patches(first.total[0], first.offset), explanation.patches[0])


def test_where_positions_are_no_patches_nothing_is_said_of_patches() -> None:
    explanation = build("Swin")(photo(), **WHOLE)
    latent = inside(explanation)
    windows, merged = latent["layers.0.blocks.0.attention"], latent["layers.1.blocks.0.mlp"]
    assert windows.offset is None
    assert merged.offset == 0
    for layer in (windows, merged):
        assert explanation.in_front(layer.total.shape[-1], layer.offset) is None
        assert explanation.of_patches(layer.total[0], layer.offset) is None
    plain = latent["layers.0.blocks.0.mlp"]
    assert explanation.of_patches(plain.total[0], plain.offset) is not None


def test_a_stream_of_channels_has_a_sum_and_no_positions() -> None:
    explanation = build("ConvNext")(photo(), **WHOLE)
    stream = inside(explanation).of("residual")
    assert {layer.total.shape[-1] for layer in stream} == {1}
    assert_close(stream[1].total, stream[2].total)
    neurons = inside(explanation)["stages.0.layers.0.pwconv2"]
    assert explanation.of_patches(neurons.total[0], neurons.offset) is not None


# --- what is kept, and what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["json", "safetensors"])
@pytest.mark.parametrize("name", ["ViT", "Swin"])
def test_saved_and_loaded(name: str, ending: str, tmp_path: Path) -> None:
    kinds = ("neurons", "heads", "residual") if name == "Swin" else ("neurons", "heads", "residual", "attention")
    explanation = build(name)(photo(), top=2, latent=kinds, latent_top=5)
    loaded = ImageExplanation.load(explanation.save(tmp_path / f"e.{ending}"))
    assert loaded == explanation
    for a, b in zip(inside(explanation), inside(loaded), strict=True):
        for key, value in vars(a).items():
            other = getattr(b, key)
            assert (
                torch.equal(value, other) and value.dtype == other.dtype
                if isinstance(value, Tensor)
                else value == other
            )


def test_units_stay_when_relevance_is_smoothed() -> None:
    explanation = build("ViT")(photo(), latent="heads")
    assert explanation.smoothed(1.0).latent is explanation.latent


def test_a_convolutional_network_has_no_units() -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", **NAMES
    )
    model = transformers.ResNetForImageClassification(config).eval()
    ours = ImageExplainer(model, transformers.ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}))
    assert ours(photo()).relevance.abs().max() > 0
    with pytest.raises(ModelError, match="found neither neurons nor heads; expected layers whose linear layers read"):
        ours(photo(), latent="neurons")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"latent": "neuron"}, InputError, r"latent: got \['neuron'\], expected any of neurons, heads, residual"),
        ({"latent": "neurons", "latent_top": 0}, InputError, "latent_top: got 0"),
        ({"through": "layers.0.blocks.0.mlp:99"}, InputError, "layers.0.blocks.0.mlp has neurons 0 to 63"),
        ({"latent": "attention"}, ModelError, r'attention.weights are computed in windows.*ask for "heads" instead'),
    ],
)
def test_what_is_not_there_is_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build("Swin")(photo(), **options)


def test_units_that_read_no_pixels_are_refused() -> None:
    ours = build("CLIP")
    with pytest.raises(InputError, match=r"text_model.encoder.layers.0.mlp does not read the explained input"):
        ours(photo(), texts=TEXTS, through="text_model.encoder.layers.0.mlp:1")


def test_units_that_were_not_recorded() -> None:
    explanation = build("ViT")(photo())
    with pytest.raises(InputError, match=r"no neurons were recorded; explain with latent=\('neurons',\)"):
        explanation.top("neurons", 3)

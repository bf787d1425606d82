"""Features of sparse autoencoders: relevance, interventions, and the files that they come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from attnlrp import Explainer, Explanation, InputError, Scale, SparseAutoencoder, intervene, propagate
from tiny_tokenizers import build

TEXT = "Paris is the capital of"
FEATURES = 40


def autoencoder(place: str = "layers.0:after", **options: Any) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(*s, generator=generator) for s in [(FEATURES, 32), (FEATURES, 32), (FEATURES,), (32,)]]
    return SparseAutoencoder(place, *weights, **options)


def by_hand(explanation: Explanation, ours: Explainer, layer: int) -> tuple[Tensor, Tensor]:
    """What layer 1 is given (token, hidden), and the gradient there."""
    embeddings = ours.model.get_input_embeddings()(torch.tensor([explanation.token_ids])).detach().requires_grad_()
    seen: list[Tensor] = []
    handle = ours.model.model.layers[layer].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with propagate(ours.model):
        total = ours.model(inputs_embeds=embeddings).logits[0, -1, explanation.target.id]
    handle.remove()
    return seen[0][0].detach(), torch.autograd.grad(total, seen[0])[0][0]


@pytest.mark.parametrize("place", ["layers.0:after", "layers.1:before"])
def test_relevance_of_features_the_error_and_the_bias(place: str) -> None:
    ours, sae = Explainer(*build("llama", torch.float64)), autoencoder(place)
    explanation = ours(TEXT, latent=[sae, "residual"], latent_top=None)
    assert isinstance(explanation, Explanation)
    assert explanation.latent is not None
    layer = explanation.latent[f"{place}.features"]
    x, g = by_hand(explanation, ours, 1)
    assert sae.encoder_bias is not None
    assert sae.decoder_bias is not None
    found = torch.relu((x - sae.decoder_bias) @ sae.encoder.T.double() + sae.encoder_bias)
    error = x - found @ sae.decoder.double() - sae.decoder_bias
    wanted = [found[:, i] * (g @ sae.decoder[i].double()) for i in range(FEATURES)]
    wanted += [(error * g).sum(-1), (sae.decoder_bias * g).sum(-1)]
    assert layer.units == FEATURES + 2
    order = layer.indices[0].argsort()
    torch.testing.assert_close(layer.relevance[0][order], torch.stack(wanted))
    torch.testing.assert_close(layer.activation[0][order][:FEATURES], found.T)
    torch.testing.assert_close(layer.total, explanation.latent["layers.0:after"].total)
    names = {unit.unit for unit in explanation.latent.top("features", FEATURES + 2)}
    assert {f"{place}.features:error", f"{place}.features:bias", f"{place}.features:7"} <= names
    plain = ours(TEXT)
    assert torch.equal(plain.relevance, explanation.relevance)  # type: ignore[union-attr]


def test_a_feature_is_switched_off() -> None:
    model, tokenizer = build("llama")
    sae, ids = autoencoder(), torch.tensor([tokenizer(TEXT)["input_ids"]])
    seen: list[Tensor] = []  # before, of the pass that finds units, and after
    handle = model.model.layers[1].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with intervene(model, {sae.feature(7): 0.0}):
            model(input_ids=ids)
        with intervene(model, {sae.feature(7): Scale(1.0)}):
            assert torch.equal(model(input_ids=ids).logits, before)
    handle.remove()
    found = sae.encode(seen[0])[..., 7]
    assert found.any()
    torch.testing.assert_close(seen[2], seen[0] - found[..., None] * sae.decoder[7])


def test_kinds_of_activations() -> None:
    x = torch.randn(5, 32)
    plain = autoencoder(centred=False).encode(x)
    assert (plain > 0).any()
    assert torch.equal(plain, torch.relu(x @ autoencoder().encoder.T + autoencoder().encoder_bias))  # type: ignore[operator]
    top = autoencoder(centred=False, k=3).encode(x)
    assert ((top > 0).sum(-1) <= 3).all()
    assert torch.equal(top.sum(-1), plain.topk(3).values.sum(-1))
    jump = autoencoder(centred=False, threshold=torch.full((FEATURES,), 2.0)).encode(x)
    assert torch.equal(jump, plain * (plain > 2))


@pytest.mark.parametrize(
    "rename",
    [
        {"encoder": "W_enc", "decoder": "W_dec", "encoder_bias": "b_enc", "decoder_bias": "b_dec"},
        {"encoder": "encoder.weight", "decoder": "decoder.weight", "encoder_bias": "encoder.bias"},
        {"encoder": "encoder.weight", "decoder": "W_dec", "encoder_bias": "encoder.bias", "decoder_bias": "b_dec"},
    ],
    ids=["SAELens", "modules", "sparsify"],
)
def test_files_of_the_common_layouts(rename: dict[str, str], tmp_path: Path) -> None:
    sae = autoencoder()
    tensors = {name: getattr(sae, field).contiguous() for field, name in rename.items()}
    for name in ("W_enc", "decoder.weight"):
        if name in tensors:
            tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, tmp_path / "sae.safetensors")
    loaded = SparseAutoencoder.load(tmp_path / "sae.safetensors", "layers.0:after")
    for field in ("encoder", "decoder", "encoder_bias", "decoder_bias"):
        value = getattr(loaded, field)
        assert value is None if field not in rename else torch.equal(value, getattr(sae, field))


def test_what_is_no_autoencoder(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="expected matrices W_enc and W_dec"):
        SparseAutoencoder.load(tmp_path / "other.safetensors", "layers.0:after")
    with pytest.raises(InputError, match="expected a safetensors file"):
        SparseAutoencoder.load(tmp_path / "none.safetensors", "layers.0:after")
    with pytest.raises(InputError, match=r"encoder_bias: got shape \(3,\), expected \(40,\)"):
        SparseAutoencoder("layers.0:after", torch.ones(40, 32), torch.ones(40, 32), torch.ones(3))
    with pytest.raises(InputError, match="k: got 41"):
        autoencoder(k=41)
    with pytest.raises(InputError, match="feature 40: expected 0 to 39"):
        autoencoder().feature(40)
    ours = Explainer(*build("llama"))
    wide = SparseAutoencoder("layers.0:after", torch.ones(40, 31), torch.ones(40, 31))
    with pytest.raises(InputError, match="got 32 numbers for a token, expected 31"):
        ours(TEXT, latent=wide)
    with pytest.raises(InputError, match=r"place 'layers.5:after': expected one such as layers.0:before"):
        ours(TEXT, latent=autoencoder("layers.5:after"))

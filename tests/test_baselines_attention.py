"""Baselines from attention weights, and AtMan, against naive loops and hand-made masks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
from attnlrp.baselines import AtMan, Attention, AttentionRollout, GradCam, GradientXAttentionRollout

TEXTS = ("llama", "gpt2", "bert", "gemma3")
ONE_LAYER = {"llama": {"num_hidden_layers": 1}, "bert": {"num_hidden_layers": 1}}


def build_vit(attention: str = "sdpa", **settings: Any) -> nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.ViTConfig(**shape | {"image_size": 24, "patch_size": 8, "num_labels": 3} | settings)
    torch.manual_seed(0)
    model: nn.Module = transformers.ViTForImageClassification._from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pixels(height: int = 24, width: int = 24) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(3))}


def model_of(name: str, attention: str | None = None, **settings: Any) -> nn.Module:
    return (
        build_vit(attention or "sdpa", **settings)
        if name == "vit"
        else tiny.build(name, attention=attention, **settings)
    )


def inputs_of(name: str) -> dict[str, Tensor]:
    return pixels() if name == "vit" else tiny.inputs(name)


def score(output: Any) -> Tensor:
    """A class, or a next token at the last position."""
    logits: Tensor = output.logits
    return logits[:, 1] if logits.dim() == 2 else logits[:, -1, 5]


def row_of(name: str) -> int:
    """The explained position: the class token, or the last token."""
    return 0 if name in ("bert", "vit") else -1


def observed(name: str, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Attention weights of an eager model and their gradients, each (head, query, key)."""
    output = model_of(name, "eager")(**inputs, output_attentions=True)
    gradients = torch.autograd.grad(score(output).sum(), output.attentions)
    return [a[0].detach() for a in output.attentions], [g[0] for g in gradients]


def shown(name: str, row: Tensor) -> Tensor:
    """Of a text, the row; of an image, its 3 x 3 patches as 24 x 24 pixels."""
    if name != "vit":
        return row
    return F.interpolate(row[1:].reshape(1, 1, 3, 3), size=(24, 24), mode="bilinear")[0, 0]


def positive_mean(weights: Tensor, gradients: Tensor) -> Tensor:
    """Mean over heads of max(0, gradient * weight), number by number (query, key)."""
    heads, queries, keys = weights.shape
    result = torch.zeros(queries, keys)
    for h in range(heads):
        for q in range(queries):
            for k in range(keys):
                result[q, k] += max(0.0, weights[h, q, k].item() * gradients[h, q, k].item()) / heads
    return result


@pytest.mark.parametrize("name", [*TEXTS, "vit"])
def test_attention_is_the_mean_of_the_last_layer(name: str) -> None:
    weights, _ = observed(name, inputs_of(name))
    expected = sum(head[row_of(name)] for head in weights[-1]) / len(weights[-1])
    torch.testing.assert_close(Attention()(model_of(name), inputs_of(name), score), shown(name, expected))


@pytest.mark.parametrize("name", [*TEXTS, "vit"])
def test_rollout_against_sums_over_paths(name: str) -> None:
    """Two layers: what flows from p to k is the sum over the tokens j in between."""
    first, second = (weights.mean(dim=0) for weights in observed(name, inputs_of(name))[0])
    count = len(first)
    p = row_of(name) % count

    def mixed(weights: Tensor, query: int, key: int) -> float:
        return (weights[query, key].item() + (query == key)) / 2

    flow = [sum(mixed(second, p, j) * mixed(first, j, k) for j in range(count)) for k in range(count)]
    assert sum(flow) == pytest.approx(1.0, abs=1e-5)
    found = AttentionRollout()(model_of(name), inputs_of(name), score)
    torch.testing.assert_close(found, shown(name, torch.tensor(flow)))


@pytest.mark.parametrize("name", [*TEXTS, "vit"])
def test_gradient_x_attention_against_loops(name: str) -> None:
    weights, gradients = observed(name, inputs_of(name))
    relevance = torch.eye(weights[0].shape[-1])
    for a, g in zip(weights, gradients, strict=True):
        relevance = relevance + positive_mean(a, g) @ relevance
    found = GradientXAttentionRollout()(model_of(name), inputs_of(name), score)
    torch.testing.assert_close(found, shown(name, relevance[row_of(name)]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rectify", [True, False])
@pytest.mark.parametrize("name", [*TEXTS, "vit"])
def test_grad_cam_against_loops(name: str, rectify: bool) -> None:
    weights, gradients = observed(name, inputs_of(name))
    p, first = row_of(name), int(name == "vit")
    total = torch.zeros(weights[-1].shape[-1])
    for a, g in zip(weights[-1], gradients[-1], strict=True):
        total += g[p, first:].mean() * a[p] / len(weights[-1])
    expected = shown(name, total.clamp(min=0) if rectify else total)
    found = GradCam(rectify=rectify)(model_of(name), inputs_of(name), score)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_several_explained_positions_share_equally() -> None:
    def both(output: Any) -> Tensor:
        return output.logits[:, 2, 5] + output.logits[:, 4, 7]

    weights, _ = observed("llama", inputs_of("llama"))
    expected = weights[-1].mean(dim=0)[[2, 4]].mean(dim=0)
    torch.testing.assert_close(Attention()(model_of("llama"), inputs_of("llama"), both), expected)


def test_logits_of_the_last_position_only_change_nothing() -> None:
    inputs = inputs_of("llama")
    less = inputs | {"logits_to_keep": torch.tensor([tiny.TOKENS - 1]), "use_cache": False}
    for method in (GradientXAttentionRollout(), AtMan(batch_size=3)):
        whole, kept = (method(model_of("llama"), given, score) for given in (inputs, less))
        torch.testing.assert_close(whole, kept)


# --- encoder-decoders ---------------------------------------------------------------------------------------------


def t5_inputs(written: int = 3) -> dict[str, Tensor]:
    decoder = torch.randint(3, 100, (1, written), generator=torch.Generator().manual_seed(4))
    return tiny.inputs("t5") | {"decoder_input_ids": decoder}


def observed_t5(inputs: dict[str, Tensor]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    output = tiny.build("t5", attention="eager")(**inputs, output_attentions=True)
    names = ("encoder_attentions", "decoder_attentions", "cross_attentions")
    found = {}
    for name in names:
        gradients = torch.autograd.grad(score(output).sum(), output[name], retain_graph=True)
        found[name] = [(a[0].detach(), g[0]) for a, g in zip(output[name], gradients, strict=True)]
    return found


def normalised(relevance: Tensor) -> Tensor:
    rest = relevance - torch.eye(len(relevance))
    rows = [row / row.sum() if row.sum() > 0 else row for row in rest]
    return torch.stack(rows) + torch.eye(len(relevance))


@pytest.mark.parametrize("written", [1, 3])
def test_gradient_x_attention_of_an_encoder_decoder(written: int) -> None:
    inputs = t5_inputs(written)
    maps = observed_t5(inputs)
    text, own, across = torch.eye(tiny.TOKENS), torch.eye(written), torch.zeros(written, tiny.TOKENS)
    for a, g in maps["encoder_attentions"]:
        text = text + positive_mean(a, g) @ text
    for (a, g), (c, h) in zip(maps["decoder_attentions"], maps["cross_attentions"], strict=True):
        step = positive_mean(a, g)
        own, across = own + step @ own, across + step @ across
        across = across + normalised(own).T @ positive_mean(c, h) @ normalised(text)
    found = GradientXAttentionRollout()(tiny.build("t5"), inputs, score)
    torch.testing.assert_close(found, across[-1], rtol=1e-4, atol=1e-7)


def test_attention_methods_of_an_encoder_decoder() -> None:
    inputs = t5_inputs()
    maps = observed_t5(inputs)
    last, gradient = maps["cross_attentions"][-1]
    torch.testing.assert_close(Attention()(tiny.build("t5"), inputs, score), last.mean(dim=0)[-1])
    signed = (gradient[:, -1].mean(dim=-1, keepdim=True) * last[:, -1]).mean(dim=0)
    found = GradCam(rectify=False)(tiny.build("t5"), inputs, score)
    torch.testing.assert_close(found, signed, rtol=1e-4, atol=1e-7)
    flows = []
    for name, size in (("decoder_attentions", 3), ("encoder_attentions", tiny.TOKENS)):
        first, second = ((a.mean(dim=0) + torch.eye(size)) / 2 for a, _ in maps[name])
        flows.append(second @ first)
    expected = (flows[0].T @ last.mean(dim=0) @ flows[1])[-1]
    torch.testing.assert_close(AttentionRollout()(tiny.build("t5"), inputs, score), expected)


# --- AtMan --------------------------------------------------------------------------------------------------------


def causal(size: int) -> Tensor:
    return torch.full((1, 1, size, size), torch.finfo(torch.float32).min).triu(1)


def drops(model: nn.Module, inputs: dict[str, Tensor], masks: list[Tensor]) -> Tensor:
    """The score without a mask minus that with each mask added to the attention scores (mask,)."""
    given = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with torch.no_grad():
        whole = score(model(**given))
        return torch.cat([whole - score(model(**given, attention_mask=mask)) for mask in masks])


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_additive_atman_is_a_mask_at_one_key(name: str) -> None:
    model, inputs = tiny.build(name, attention="eager"), tiny.inputs(name)
    seen = causal(tiny.TOKENS) if name == "llama" else torch.zeros(1, 1, tiny.TOKENS, tiny.TOKENS)
    masks = []
    for t in range(tiny.TOKENS):
        mask = seen.clone()
        mask[..., t] += math.log(1 - 0.7)
        masks.append(mask)
    found = AtMan(factor=0.7, form="additive", batch_size=3)(tiny.build(name), inputs, score)
    torch.testing.assert_close(found, drops(model, inputs, masks), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_multiplicative_atman_scales_the_scores_of_one_key(name: str) -> None:
    """Of one layer the scores are known up to a constant for each query, which the lowest score takes away."""
    settings = ONE_LAYER[name]
    model, inputs = tiny.build(name, attention="eager", **settings), tiny.inputs(name)
    weights, size = model(**inputs, output_attentions=True).attentions[0].detach(), tiny.TOKENS
    masks = []
    for t in range(size):
        mask = (causal(size) if name == "llama" else torch.zeros(1, 1, size, size)).repeat(1, 4, 1, 1)
        for h in range(4):
            for q in range(t if name == "llama" else 0, size):
                visible = weights[0, h, q, : q + 1 if name == "llama" else size].log()
                mask[0, h, q, t] -= 0.6 * (visible[t] - visible.min())
        masks.append(mask)
    found = AtMan(factor=0.6, batch_size=4)(tiny.build(name, **settings), inputs, score)
    torch.testing.assert_close(found, drops(model, inputs, masks), rtol=1e-4, atol=1e-5)


def test_atman_suppresses_similar_tokens_by_their_similarity() -> None:
    model, inputs = tiny.build("llama", attention="eager"), tiny.inputs("llama")
    inputs["input_ids"][0, 4] = inputs["input_ids"][0, 1]
    unit = F.normalize(model.get_input_embeddings()(inputs["input_ids"])[0].detach(), dim=-1)
    masks = []
    for t in range(tiny.TOKENS):
        mask = causal(tiny.TOKENS)
        for k in range(tiny.TOKENS):
            cosine = (unit[t] @ unit[k]).item()
            if k == t or cosine >= 0.2:
                mask[..., k] += math.log(1 - 0.7 * min(cosine, 1.0))
        masks.append(mask)
    method = AtMan(factor=0.7, form="additive", similarity=0.2)
    found = method(tiny.build("llama"), inputs, score)
    torch.testing.assert_close(found, drops(model, inputs, masks), rtol=1e-4, atol=1e-5)
    assert found[1] == pytest.approx(found[4].item(), abs=1e-5), "the same token twice is suppressed as one"
    alone = AtMan(factor=0.7, form="additive")(tiny.build("llama"), inputs, score)
    assert not torch.allclose(alone, found)


@pytest.mark.parametrize("written", [2, tiny.TOKENS])
def test_atman_of_an_encoder_decoder_leaves_the_decoder_alone(written: int) -> None:
    """Also where both sides have the same number of tokens. A mask of keys holds for the encoder and cross attention."""
    inputs = t5_inputs(written)
    masks = []
    for t in range(tiny.TOKENS):
        mask = torch.zeros(1, 1, 1, tiny.TOKENS)
        mask[..., t] = math.log(1 - 0.7)
        masks.append(mask)
    found = AtMan(factor=0.7, form="additive")(tiny.build("t5"), inputs, score)
    expected = drops(tiny.build("t5", attention="eager"), inputs, masks)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_atman_of_an_image_suppresses_patches() -> None:
    """One layer, of which the class token alone counts: the rest follows from its attention weights."""
    model = build_vit("eager", num_hidden_layers=1)
    weights = model(**pixels(), output_attentions=True).attentions[0][0].detach()
    modules = {name.split(".")[-1]: module for name, module in model.named_modules()}
    values: list[Tensor] = []
    handle = modules["v_proj"].register_forward_hook(lambda module, args, out: values.append(out.detach()))
    model(**pixels())
    handle.remove()
    changed: list[float] = []
    whole = score(model(**pixels())).item()
    mixed = values[0][0].reshape(10, 4, 8).transpose(0, 1)  # (head, key, feature)
    for t in range(1, 10):
        scaled = weights[:, 0].clone()
        scaled[:, t] *= 1 - 0.7
        row = ((scaled / scaled.sum(dim=-1, keepdim=True))[:, None] @ mixed).reshape(32)

        def replace_row(module: nn.Module, args: Any, row: Tensor = row) -> Any:
            context = args[0].clone()
            context[0, 0] = row
            return (context,)

        handle = modules["o_proj"].register_forward_pre_hook(replace_row)
        changed.append(whole - score(model(**pixels())).item())
        handle.remove()
    found = AtMan(factor=0.7, form="additive", batch_size=4)(build_vit(num_hidden_layers=1), pixels(), score)
    expected = F.interpolate(torch.tensor(changed).reshape(1, 1, 3, 3), size=(24, 24), mode="bilinear")[0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_patches_keep_their_place_in_an_image_that_is_not_square() -> None:
    """Two rows of four patches: the first patch of the map is the top left one."""
    model = build_vit(image_size=(16, 32))
    inputs = pixels(16, 32)
    found = Attention()(model, inputs, score)
    row = build_vit("eager", image_size=(16, 32))(**inputs, output_attentions=True).attentions[-1][0].mean(dim=0)[0, 1:]
    assert found.shape == (16, 32)
    corners = found[[0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, row.detach()[[0, 3, 4, 7]])

"""Vision transformers as torchvision and timm write them have the relevance of that of `transformers`.

Neither library is installed here; the stand-ins have their modules, names and operations, and the weights of one
`ViTForImageClassification`, so that all three are the same function.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import ViTConfig, ViTForImageClassification

import attnlrp
from attnlrp.rules import ATTNLRP, CP_LRP, VIT, VIT_DINOV2, Layer, Rules, composite

WIDTH, HEADS, LAYERS, PATCH, SIZE, CLASSES, INNER = 16, 2, 2, 8, 16, 3, 24


class _Embedding(nn.Module):
    def embed(self, conv: nn.Module, x: Tensor) -> Tensor:
        x = conv(x).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions


class Torchvision(_Embedding):
    """`torchvision.models.VisionTransformer`: nn.MultiheadAttention, MLPs as sequences, biases in one tensor."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, eps=1e-12), nn.LayerNorm(WIDTH, eps=1e-12)
            self.self_attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            self.dropout = nn.Dropout(0.0)
            parts = nn.Linear(WIDTH, INNER), nn.GELU(), nn.Dropout(0.0), nn.Linear(INNER, WIDTH), nn.Dropout(0.0)
            self.mlp = nn.Sequential(*parts)

        def forward(self, x: Tensor) -> Tensor:
            y = self.ln_1(x)
            y, _ = self.self_attention(y, y, y, need_weights=False)
            x = self.dropout(y) + x
            return x + self.mlp(self.ln_2(x))

    def __init__(self) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2 + 1, WIDTH))
        self.encoder = nn.Module()
        self.encoder.layers = nn.Sequential(*(self.Block() for _ in range(LAYERS)))
        self.encoder.ln = nn.LayerNorm(WIDTH, eps=1e-12)
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder.ln(self.encoder.layers(self.embed(self.conv_proj, x)))
        return self.heads(x[:, 0])

    def take(self, k: int, layer: Any) -> None:
        block, core = self.encoder.layers[k], self.encoder.layers[k].self_attention
        for mine, theirs in _pairs(layer, block.ln_1, block.ln_2, block.mlp[0], block.mlp[3], core.out_proj):
            mine.load_state_dict(theirs.state_dict())
        core.in_proj_weight.data, core.in_proj_bias.data = _joined(layer)

    def ends(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.conv_proj, self.encoder.ln, self.heads[0]


class Timm(_Embedding):
    """`timm.models.VisionTransformer`: one projection for queries, keys and values, fused attention."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.q_norm = self.k_norm = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            batch, count, _ = x.shape
            q, k, v = self.qkv(x).reshape(batch, count, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
            x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p=0.0)
            return self.proj(x.transpose(1, 2).reshape(batch, count, WIDTH))

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-12), nn.LayerNorm(WIDTH, eps=1e-12)
            self.attn, self.mlp, self.drop_path = Timm.Attention(), Timm.Mlp(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.drop_path(self.attn(self.norm1(x)))
            return x + self.drop_path(self.mlp(self.norm2(x)))

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2 + 1, WIDTH))
        self.blocks = nn.Sequential(*(self.Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH, eps=1e-12), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(self.patch_embed.proj, x)))[:, 0])

    def take(self, k: int, layer: Any) -> None:
        block = self.blocks[k]
        for mine, theirs in _pairs(layer, block.norm1, block.norm2, block.mlp.fc1, block.mlp.fc2, block.attn.proj):
            mine.load_state_dict(theirs.state_dict())
        block.attn.qkv.weight.data, block.attn.qkv.bias.data = _joined(layer)

    def ends(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.patch_embed.proj, self.norm, self.head


def _pairs(layer: Any, *mine: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    theirs = layer.layernorm_before, layer.layernorm_after, layer.mlp.fc1, layer.mlp.fc2, layer.attention.o_proj
    return list(zip(mine, theirs, strict=True))


def _joined(layer: Any) -> tuple[Tensor, Tensor]:
    parts = layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj
    return torch.cat([p.weight.data for p in parts]), torch.cat([p.bias.data for p in parts])


@pytest.fixture(scope="module")
def reference() -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        image_size=SIZE,
        patch_size=PATCH,
        num_labels=CLASSES,
    )
    model = ViTForImageClassification(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def stand_in(kind: type[Torchvision] | type[Timm], reference: Any) -> Torchvision | Timm:
    model = kind().double().eval()
    vit = reference.vit
    model.class_token.data, model.positions.data = (
        vit.embeddings.cls_token.data,
        vit.embeddings.position_embeddings.data,
    )
    theirs = vit.embeddings.patch_embeddings.projection, vit.layernorm, reference.classifier
    for mine, their in zip(model.ends(), theirs, strict=True):
        mine.load_state_dict(their.state_dict())
    for k, layer in enumerate(vit.layers):
        model.take(k, layer)
    return model


def relevance(model: nn.Module, rules: Rules, **options: Any) -> tuple[Tensor, Tensor]:
    pixels = torch.randn(1, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pixels.requires_grad_()
    with attnlrp.propagate(model, rules):
        output = model(pixels)
        logits = getattr(output, "logits", output)[0]
    (gradient,) = torch.autograd.grad(logits.max(), pixels)
    return logits.detach(), (pixels * gradient).detach()


EVERY = composite(conv=0.25, mlp=0.1, qkv=0.5, out=0.3, head=0.2, attention="z+")


@pytest.mark.parametrize(
    "rules", [ATTNLRP, CP_LRP, VIT, VIT_DINOV2, EVERY], ids=["attnlrp", "cp", "vit", "tuned", "all"]
)
@pytest.mark.parametrize("kind", [Torchvision, Timm])
def test_the_same_function_has_the_same_relevance(reference: Any, kind: Any, rules: Rules) -> None:
    theirs, expected = relevance(reference, rules)
    logits, found = relevance(stand_in(kind, reference), rules)
    assert_close(logits, theirs)
    assert_close(found, expected)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("kind", [Torchvision, Timm])
def test_the_ledger_closes(reference: Any, kind: Any) -> None:
    pixels = torch.randn(1, 3, SIZE, SIZE, dtype=torch.float64).requires_grad_()
    ledger = attnlrp.audit(stand_in(kind, reference), {"x": pixels}, target=lambda out: out[0].max(), rules=VIT)
    assert ledger.closes, ledger.leaks()


def test_each_role_is_found_in_each_library(reference: Any) -> None:
    for model in (reference, stand_in(Torchvision, reference), stand_in(Timm, reference)):
        plain = relevance(model, composite())[1]
        for role in ("conv", "mlp", "qkv", "out", "head"):
            assert not torch.allclose(relevance(model, composite(**{role: 1.0}))[1], plain), role
    assert Layer("*.in_proj*", optional=True) in EVERY


def test_dinov3_which_has_no_classifier() -> None:
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
    }
    config = transformers.DINOv3ViTConfig(**sizes, image_size=SIZE, patch_size=PATCH, num_register_tokens=2)
    torch.manual_seed(0)
    model = transformers.DINOv3ViTModel(config).double().eval()
    pixels = torch.randn(1, 3, SIZE, SIZE, dtype=torch.float64).requires_grad_()
    for rules in (VIT, VIT_DINOV2):
        ledger = attnlrp.audit(
            model, {"pixel_values": pixels}, target=lambda out: out.pooler_output[0].square().sum(), rules=rules
        )
        assert ledger.closes, ledger.leaks()
        assert ledger.inputs["pixel_values"] != 0

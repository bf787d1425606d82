"""Padding, precision, attention kernels, weights that are elsewhere: the same relevance."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tiny
from attnlrp import ATTNLRP, CP_LRP, UnknownOperationError, propagate
from attnlrp.checkpoint import checkpointed
from attnlrp.rules import Rules


def relevance(
    model: nn.Module,
    inputs: dict[str, Tensor],
    *,
    target: int = 1,
    at: int = -1,
    row: int = 0,
    rules: Rules = ATTNLRP,
    saving: bool = False,
) -> Tensor:
    """Per token, over encoder and decoder, of one logit."""
    with propagate(model, rules) as propagation, checkpointed(model) if saving else nullcontext():
        logits = model(**inputs).logits
        scalar = logits[row, at, target] if logits.dim() == 3 else logits[row, target]
    explained = [e for _, e in propagation.embeddings]
    gradients = torch.autograd.grad(scalar, explained)
    rows = [(e.double() * g.double()).sum(-1) for e, g in zip(explained, gradients, strict=True)]
    return torch.cat(rows, dim=1).detach()


# --- padding ----------------------------------------------------------------------------------------------------

CAUSAL = [name for name in tiny.NAMES if name not in ("bert", "t5")]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "side"), [*product(CAUSAL, ("left", "right")), ("bert", "right")])
def test_a_padded_batch_has_the_relevance_of_each_text_alone(name: str, side: str, attention: str) -> None:
    model = tiny.build(name, attention="eager" if name in tiny.EAGER_ONLY else attention)
    texts = [tiny.inputs(name, tokens=n)["input_ids"] for n in (4, 7)]
    ids, mask = torch.full((2, 7), 2), torch.zeros(2, 7, dtype=torch.long)
    spans = [slice(7 - t.shape[1], 7) if side == "left" else slice(0, t.shape[1]) for t in texts]
    for k, (text, span) in enumerate(zip(texts, spans, strict=True)):
        ids[k, span], mask[k, span] = text[0], 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    for k, (text, span) in enumerate(zip(texts, spans, strict=True)):
        expected = relevance(model, {"input_ids": text})
        found = relevance(model, inputs, row=k, at=span.stop - 1)
        assert expected.abs().max() > 1e-5
        assert_close(found[k : k + 1, span], expected, rtol=1e-4, atol=1e-6)
        found[k, span] = 0
        assert not found.any(), "padding and the other text get nothing"


# --- precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_half_precision_agrees_with_float32(name: str, dtype: torch.dtype) -> None:
    inputs = tiny.inputs(name)
    expected = relevance(tiny.build(name), inputs)
    found = relevance(tiny.build(name, dtype), inputs)
    cosine = torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert cosine > (0.999 if dtype == torch.bfloat16 else 0.9999)


# --- attention kernels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [ATTNLRP, CP_LRP], ids=["attnlrp", "cp-lrp"])
@pytest.mark.parametrize("name", [name for name in tiny.NAMES if name not in tiny.EAGER_ONLY])
def test_the_fused_kernel_has_the_relevance_of_written_out_attention(name: str, rules: Rules) -> None:
    inputs = tiny.inputs(name)
    fused, written = (relevance(tiny.build(name, attention=a), inputs, rules=rules) for a in ("sdpa", "eager"))
    assert_close(fused, written, rtol=1e-4, atol=1e-5)


# --- weights that are elsewhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "t5", "mixtral"])
def test_weights_that_are_loaded_for_each_layer(name: str, where: str, saving: bool, tmp_path: Path) -> None:
    accelerate: Any = pytest.importorskip("accelerate", reason="needs accelerate")
    inputs = tiny.inputs(name)
    expected = relevance(tiny.build(name), inputs)
    model, here = tiny.build(name), torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(model, here, offload_buffers=True)
    else:
        accelerate.disk_offload(model, str(tmp_path), here)
    found = relevance(model, inputs, saving=saving)
    assert torch.equal(found, expected)
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.filterwarnings("ignore::UserWarning:accelerate")
def test_a_device_map_with_a_disk_in_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate")
    plain = tiny.build(name)
    plain.save_pretrained(tmp_path / "model")
    kind: Any = type(plain)
    limits: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": "40KB"}}
    model = kind.from_pretrained(tmp_path / "model", **limits, offload_folder=tmp_path / "weights")
    assert "disk" in model.hf_device_map.values()
    assert_close(relevance(model, tiny.inputs(name)), relevance(plain, tiny.inputs(name)), rtol=1e-5, atol=1e-6)


def test_data_parallel_is_refused_with_the_fix_if_it_starts_threads() -> None:
    model = nn.Sequential(nn.DataParallel(nn.Linear(2, 2)))
    x = torch.ones(1, 2, requires_grad=True)
    with propagate(model):
        model(x)
    model[0].device_ids = [0, 1]
    with pytest.raises(UnknownOperationError, match=r"DataParallel.*use a process for each device"), propagate(model):
        pass

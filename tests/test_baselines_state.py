"""What all baselines share: any model, a model left as it was, batches, and errors that say what to do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
import tiny_tasks
from attnlrp.baselines import (
    BASELINES,
    AtMan,
    Attention,
    GradCam,
    Gradient,
    GradientXInput,
    IntegratedGradients,
    KernelShap,
    LeaveOneOut,
    Lime,
    Method,
    SmoothGrad,
)
from attnlrp.errors import InputError, ModelError
from bag import bag, first_class
from test_baselines_attention import build_vit, pixels, score, t5_inputs

SMALL: dict[str, Any] = {"samples": 20, "steps": 4, "patch": 8}


def small(method: Method) -> Method:
    """The method with few samples."""
    return replace(method, **{k: v for k, v in SMALL.items() if hasattr(method, k)})  # type: ignore[type-var]


METHODS = {name: small(method) for name, method in BASELINES.items()} | {
    "unk": LeaveOneOut(replacement="unk", token=9),
    "atman-additive": AtMan(form="additive", similarity=0.5),
}
MODELS = ("llama", "gpt2", "bert", "t5", "vit", "bart", "marian", "bart-classifier")
REMOVING = ("leave-one-out", "unk")  # not from an image, nor from a text whose end is the class token
PAIRS = [(k, n) for k in MODELS for n in METHODS if not (k in ("vit", "bart-classifier") and n in REMOVING)]


def case(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name == "vit":
        return build_vit(), pixels()
    if name in ("bart", "marian", "bart-classifier"):
        model: nn.Module = tiny_tasks.build(name, torch.float32).model
        ids = torch.tensor([[2, 9, 14, 11, 3]])
        decoder = {} if name == "bart-classifier" else {"decoder_input_ids": torch.tensor([[3, 12]])}
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | decoder
    return tiny.build(name), t5_inputs() if name == "t5" else tiny.inputs(name)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a baseline could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return {
        "training": [m.training for m in model.modules()],
        "hooks": [len(getattr(m, h)) for m in model.modules() for h in hooks],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad for p in model.parameters()],
        "attention": [c._attn_implementation_internal for c in configs.values()],
        "values": [v.double().sum().item() for v in model.state_dict().values()],
        "random": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
    }


def unsettle(model: nn.Module) -> None:
    """Training mode in parts, a frozen parameter, a gradient: a state that a plain restoration would lose."""
    model.train()
    modules, parameters = list(model.modules()), list(model.parameters())
    modules[-1].training = False
    parameters[0].requires_grad_(False)
    parameters[-1].grad = torch.ones_like(parameters[-1])


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_every_method_explains_every_model_and_leaves_it_as_it_was(kind: str, name: str) -> None:
    model, inputs = case(kind)
    before_inputs = {k: v.clone() for k, v in inputs.items()}
    expected = METHODS[name](model, inputs, score)
    unsettle(model)
    before = state(model)
    with torch.no_grad():
        relevance = METHODS[name](model, inputs, score)
    torch.testing.assert_close(relevance, expected, rtol=1e-4, atol=1e-6)
    assert state(model) == before
    assert all(torch.equal(inputs[k], v) for k, v in before_inputs.items())
    assert relevance.shape == ((24, 24) if kind == "vit" else (inputs["input_ids"].shape[1],))
    assert relevance.dtype == torch.float32
    assert not relevance.requires_grad
    assert relevance.isfinite().all()


@pytest.mark.parametrize("name", [n for n in METHODS if n != "random"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_an_exception_leaves_the_model_as_it_was(kind: str, name: str) -> None:
    def broken(output: Any) -> Tensor:
        raise ValueError("no score")

    model, inputs = case(kind)
    unsettle(model)
    before = state(model)
    with pytest.raises(ValueError, match="no score"):
        METHODS[name](model, inputs, broken)
    assert state(model) == before


def test_attention_is_eager_only_while_it_is_needed() -> None:
    met = []

    def watching(output: Any) -> Tensor:
        met.append(model.config._attn_implementation)
        return score(output)

    model, inputs = case("llama")
    Attention()(model, inputs, watching)
    AtMan()(model, inputs, watching)
    assert set(met) == {"eager"}
    met.clear()
    GradientXInput()(model, inputs, watching)
    assert set(met) == {"sdpa"}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if hasattr(m, "batch_size")])
def test_the_size_of_a_batch_changes_nothing(name: str) -> None:
    model, inputs = case("llama")
    inputs |= {"logits_to_keep": torch.tensor([tiny.TOKENS - 1]), "use_cache": False}
    rows = []

    def counted(output: Any) -> Tensor:
        rows.append(len(output.logits))
        return score(output)

    found = [replace(METHODS[name], batch_size=n)(model, inputs, counted) for n in (1, 3, 64)]  # type: ignore[type-var]
    if name != "smoothgrad":  # draws its noise batch by batch
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-5)
    assert max(rows) > 3
    rows.clear()
    replace(METHODS[name], batch_size=2)(model, inputs, counted)  # type: ignore[type-var]
    assert max(rows) == 2


@pytest.mark.parametrize("name", METHODS)
def test_half_precision(name: str) -> None:
    model, inputs = case("llama")
    relevance = METHODS[name](model.to(torch.bfloat16), inputs, score)
    assert relevance.dtype == torch.float32
    assert relevance.isfinite().all()


def test_inside_inference_mode() -> None:
    model, inputs = case("vit")
    with torch.inference_mode():
        made = {"pixel_values": inputs["pixel_values"] * 1}
        relevance = GradientXInput()(model, made, score)
    assert torch.equal(relevance, GradientXInput()(model, inputs, score))


# --- errors -------------------------------------------------------------------------------------------------------


def test_without_captum_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, _ = bag()
    for missing in ("captum.attr", "sklearn"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(InputError, match=rf'{missing}.* not installed: pip install "attnlrp\[evaluation\]"'):
                Gradient()(model, inputs, first_class)


def test_importing_the_baselines_loads_neither_captum_nor_transformers() -> None:
    code = "import sys, attnlrp.baselines; print({'captum', 'transformers', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.parametrize("method", [Attention(), GradCam(), AtMan()])
def test_a_model_without_attention(method: Method) -> None:
    model, inputs, _ = bag()
    with pytest.raises(ModelError, match="Bag has no attention that could be shown"):
        method(model, inputs, first_class)


def test_a_model_that_returns_no_weights() -> None:
    import transformers

    shape = {"vocab_size": 50, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**shape)).eval()
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    with pytest.raises(ModelError, match="MambaForCausalLM"):
        Attention()(model, inputs, score)
    with pytest.raises(ModelError, match="MambaForCausalLM"):
        AtMan()(model, inputs, score)
    assert GradientXInput()(model, inputs, score).shape == (3,)


def test_windowed_attention_has_no_map_of_the_image() -> None:
    import transformers

    shape = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    model = transformers.SwinForImageClassification(transformers.SwinConfig(**shape, num_labels=3)).eval()
    with pytest.raises(ModelError, match=r"Swin.*windowed or pooled attention"):
        GradCam()(model, {"pixel_values": torch.randn(1, 3, 32, 32)}, lambda o: o.logits[:, 1])


def test_a_model_without_token_embeddings() -> None:
    with pytest.raises(ModelError, match=r"Linear has no get_input_embeddings\(\)"):
        Gradient()(nn.Linear(2, 2), {"input_ids": torch.tensor([[1, 2]])}, first_class)


def test_a_model_that_looks_up_elsewhere() -> None:
    model, inputs, _ = bag()
    model.get_input_embeddings = lambda: nn.Embedding(20, 6)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="Bag does not look its tokens up"):
        Gradient()(model, inputs, first_class)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 3)}, "expected input_ids or pixel_values"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, "holds 2 samples, expected a batch of 1"),
        ({"pixel_values": torch.zeros(1, 8, 8)}, r"shape \(1, 8, 8\), expected one sample"),
    ],
)
def test_inputs_of_another_kind(inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Gradient()(bag()[0], inputs, first_class)


def test_a_target_that_is_no_scalar_for_each_row() -> None:
    model, inputs, _ = bag()
    with pytest.raises(InputError, match=r"target: got \(1, 2\), expected one scalar for each row of the batch"):
        Gradient()(model, inputs, lambda output: output.logits)


def test_a_target_without_attention() -> None:
    model, inputs = case("llama")
    with pytest.raises(InputError, match="depends on no attention weight"):
        Attention()(model, inputs, lambda output: 0 * output.logits[:, -1, 5])


@pytest.mark.parametrize("position", [2, tiny.TOKENS - 1])
def test_deleting_tokens_refuses_a_position_that_moves(position: int) -> None:
    model, inputs = case("llama")
    with pytest.raises(InputError, match="names a position inside the text"):
        LeaveOneOut(replacement="delete")(model, inputs, lambda output: output.logits[:, position, 5])


def test_deleting_tokens_takes_the_first_and_the_last_position() -> None:
    model, inputs = case("bert")
    assert LeaveOneOut(replacement="delete")(model, inputs, score).shape == (tiny.TOKENS,)
    llama, text = case("llama")
    assert LeaveOneOut(replacement="delete")(llama, text, lambda o: o.logits[:, 0, 5]).shape == (tiny.TOKENS,)
    method = LeaveOneOut(replacement="delete")
    named = text | {"logits_to_keep": torch.tensor([tiny.TOKENS - 1])}
    torch.testing.assert_close(method(llama, named, score), method(llama, text, score))
    with pytest.raises(InputError, match="logits_to_keep: it names a position inside the text"):
        method(llama, text | {"logits_to_keep": torch.tensor([2])}, score)


def test_replacements_that_cannot_be_made() -> None:
    model, inputs, _ = bag()
    with pytest.raises(InputError, match="names no unknown or mask token; give the index"):
        LeaveOneOut(replacement="unk")(model, inputs, first_class)
    with pytest.raises(InputError, match="one token, of which 'delete' leaves nothing"):
        LeaveOneOut(replacement="delete")(model, {"input_ids": torch.tensor([[3]])}, first_class)
    with pytest.raises(InputError, match="'delete' is for texts"):
        LeaveOneOut(replacement="delete")(build_vit(), pixels(), score)
    model.config = SimpleNamespace(unk_token_id=4)  # type: ignore[assignment]
    assert LeaveOneOut(replacement="unk")(model, inputs, first_class).shape == (5,)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (IntegratedGradients, "steps", 0),
        (SmoothGrad, "noise", -0.1),
        (SmoothGrad, "reduce", "sum"),
        (KernelShap, "samples", 0),
        (Lime, "width", 0.0),
        (Lime, "ridge", 0.0),
        (LeaveOneOut, "replacement", "mean"),
        (LeaveOneOut, "batch_size", 0),
        (AtMan, "factor", 1.0),
        (AtMan, "form", "both"),
    ],
)
def test_parameters_out_of_range(kind: Any, field: str, value: Any) -> None:
    with pytest.raises((InputError, TypeError), match=field):
        kind(**{field: value})

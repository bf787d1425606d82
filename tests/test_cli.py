"""The command line: what goes to which stream, what is written, and the exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import attnlrp
from attnlrp import Explainer, Explanation, demo
from command import Result, Run
from nearness import same
from tiny_tokenizers import build

TEXT = "Paris is the capital of"
FIELDS = {"model", "rules", "tokens", "token_ids", "relevance", "targets", "sum", "version"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("models")
    for name in ("gpt2", "bert"):
        model, tokenizer = build(name)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def explain(run: Run, root: Path) -> Run:
    return lambda *arguments, model="gpt2", **options: run("explain", "--model", root / model, *arguments, **options)


def expected(root: Path, text: str = TEXT, model: str = "gpt2", **options: Any) -> Explanation:
    explanation = Explainer(*build(model), name=str(root / model))(text, **options)
    assert isinstance(explanation, Explanation)
    return explanation


def parsed(result: Result) -> dict[str, Any]:
    assert result.status == 0, result.err
    data = json.loads(result.out)
    assert isinstance(data, dict)
    return data


# --- what is explained --------------------------------------------------------------------------------------------


def test_json_on_standard_output_is_all_that_is_there(explain: Run, root: Path) -> None:
    result = explain(TEXT, "--json", "-")
    data = parsed(result)
    assert result.out.count("\n") == 1
    assert set(data) >= FIELDS
    wanted = expected(root)
    assert same(Explanation.from_dict(data), wanted)
    assert data["version"] == attnlrp.__version__
    assert data["model"] == str(root / "gpt2")
    assert data["sum"] == pytest.approx(list(wanted.sum))
    assert [set(t) >= {"token", "id", "position", "logit"} for t in data["targets"]] == [True]


def test_a_person_sees_target_tokens_and_sum(explain: Run, root: Path) -> None:
    result = explain(TEXT)
    wanted = expected(root)
    assert (result.status, result.err) == (0, "")
    for token in wanted.tokens:
        assert token.strip() in result.out
    assert wanted.target.token in result.out
    assert f"{wanted.logit:+.3f}"[:5] in result.out
    assert "rank 1" in result.out
    assert "attnlrp" in result.out


def test_the_text_may_come_from_a_file_or_standard_input(explain: Run, root: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(f"{TEXT}\n", encoding="utf-8")
    wanted = expected(root)
    for result in (
        explain("--file", tmp_path / "text.txt", "--json", "-"),
        explain("-", "--json", "-", stdin=f"{TEXT}\n"),
        explain("-", "--json", "-", stdin=TEXT),
    ):
        assert same(Explanation.from_dict(parsed(result)), wanted)


def test_line_breaks_inside_a_text_stay(explain: Run) -> None:
    data = parsed(explain("-", "--json", "-", stdin="the film\n\nwas great\n\n"))
    assert "".join(data["tokens"]) == "the film\n\nwas great\n"


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--target", " capital"], {"target": " capital"}),
        (["--target", "#7"], {"target": 7}),
        (["--target", "#7", "--against", "#9"], {"target": 7, "against": 9}),
        (["--against", " capital"], {"against": " capital"}),
        (["--against", "<others>"], {"against": attnlrp.OTHERS}),
        (["--target-sum", " the capital"], {"target": attnlrp.Continuation(" the capital")}),
        (["--position", "0", "--position", "-1"], {"position": [0, -1]}),
        (["--generate", "3"], {"generate": 3}),
        (["--temperature", "2.5"], {"output": "probability", "temperature": 2.5}),
        (["--target", "7", "--position", "2"], {"target": "7", "position": 2}),  # a number is the text of a token
    ],
)
def test_options_mean_what_they_mean_in_python(
    explain: Run, root: Path, arguments: list[str], options: dict[str, Any]
) -> None:
    explained = Explanation.from_dict(parsed(explain(TEXT, *arguments, "--json", "-")))
    assert same(explained, expected(root, **options))


def test_classes_by_name(explain: Run, root: Path) -> None:
    result = explain(TEXT, "--target", "positive", "--against", "negative", "--json", "-", model="bert")
    wanted = expected(root, model="bert", target="positive", against="negative")
    assert same(Explanation.from_dict(parsed(result)), wanted)
    shown = explain(TEXT, "--target", "positive", model="bert")
    assert shown.status == 0
    assert "positive" in shown.out


@pytest.mark.parametrize("rules", ["attnlrp", "cp-lrp", "mamba-lrp", "gradient", "softmax-identity"])
def test_the_table_of_rules(explain: Run, root: Path, rules: str) -> None:
    data = parsed(explain(TEXT, "--rules", rules, "--json", "-"))
    assert data["rules"] == rules
    table = attnlrp.rules.PRESETS[rules]
    wanted = Explainer(*build("gpt2"), rules=table, name=str(root / "gpt2"))(TEXT)
    assert isinstance(wanted, Explanation)
    assert same(Explanation.from_dict(data), wanted)


def test_device_and_precision(explain: Run) -> None:
    data = parsed(explain(TEXT, "--device", "cpu", "--dtype", "float64", "--json", "-"))
    assert data["dtype"] == "float64"


def test_pieces_are_joined_to_words(explain: Run, root: Path) -> None:
    data = parsed(explain(TEXT, "--words", "--json", "-"))
    assert data["tokens"] == ["Paris", " is", " the", " capital", " of"]
    assert data["sum"] == pytest.approx(expected(root).sum, rel=1e-5)


def test_the_table_is_as_long_as_asked(explain: Run) -> None:
    def rows(result: Result) -> int:
        return len(re.findall(r"^\s*\d+\s+.*%", result.out, re.MULTILINE))

    assert rows(explain(TEXT, "--top", "2")) == 2
    assert rows(explain(TEXT, "--top", "99")) == 6


# --- what is written ----------------------------------------------------------------------------------------------


def test_files_are_written_beside_what_is_shown(explain: Run, root: Path, tmp_path: Path) -> None:
    names = {"--html": "x.html", "--png": "x.png", "--json": "x.json", "--save": "x.safetensors"}
    arguments = [part for option, name in names.items() for part in (option, tmp_path / name)]
    result = explain(TEXT, *arguments)
    assert (result.status, result.err) == (0, "")
    assert "capital" in result.out
    wanted = expected(root)
    assert same(Explanation.load(tmp_path / "x.json"), wanted)
    assert same(Explanation.load(tmp_path / "x.safetensors"), wanted)
    assert (tmp_path / "x.html").read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_page_of_generated_tokens(explain: Run, tmp_path: Path) -> None:
    result = explain(TEXT, "--generate", "3", "--html", tmp_path / "x.html")
    assert result.status == 0
    assert (tmp_path / "x.html").stat().st_size > 3000


def test_json_on_standard_output_beside_a_file(explain: Run, tmp_path: Path) -> None:
    parsed(explain(TEXT, "--json", "-", "--html", tmp_path / "x.html"))
    assert (tmp_path / "x.html").exists()


@pytest.mark.parametrize("text", ["[red]x[/red] is", "[/] the", "[bold]a[/bold][link=http://x]b[/link]", ":smile: the"])
def test_markup_is_shown_as_it_is(explain: Run, text: str) -> None:
    result = explain(text)
    assert result.status == 0, result.err
    shown = re.sub(r"\s+", "", result.out)
    assert text.replace(" ", "") in shown


def test_markup_in_an_error_is_shown_as_it_is(explain: Run) -> None:
    result = explain(TEXT, "--target", "[red]x[/red]")
    assert result.status == 2
    assert "[red]x[/red]" in result.err


@pytest.mark.parametrize("text", ["日本語 😀", "السلام عليكم", "e\u0301\n\tx", "\x1b[31mred"])
def test_any_script(explain: Run, text: str) -> None:
    assert explain(text).status == 0
    data = parsed(explain(text, "--json", "-"))
    assert Explanation.from_dict(data).merge_words().tokens


# --- exit status and streams ----------------------------------------------------------------------------------------


def failed(result: Result, status: int, *parts: str) -> None:
    assert result.status == status, result
    assert result.out == ""
    for part in parts:
        assert part in result.err, result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--no-such-option"], "--no-such-option"),
        (["--rules", "magic"], "magic"),
        (["--generate", "-1"], "--generate"),
        (["--generate", "many"], "--generate"),
        (["--position", "x"], "--position"),
        (["--top", "0"], "--top"),
        (["another"], "another"),
    ],
)
def test_bad_usage_is_status_2(explain: Run, arguments: list[str], part: str) -> None:
    failed(explain(TEXT, *arguments), 2, part)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([""], "nothing to explain"),
        ([TEXT, "--target", "#99999"], "target: index 99999 is not in the vocabulary"),
        ([TEXT, "--against", "#99999"], "against: index 99999"),
        ([TEXT, "--target", " quixotic"], "--target-sum"),
        ([TEXT, "--target", "#²"], "'#²'"),
        ([TEXT, "--target", "a", "--target-sum", "b"], "--target and --target-sum exclude each other"),
        ([TEXT, "--generate", "2", "--position", "0"], "generate"),
        ([TEXT, "--temperature", "0"], "temperature"),
        ([TEXT, "--temperature", "2", "--against", "#1"], "against"),
        ([TEXT, "--dtype", "int3"], "dtype: got 'int3'"),
        ([TEXT, "--device", "tpu9"], "device: 'tpu9' is not available here"),
        ([" the" * 99], "more than the context"),
        ([], "give either a text"),
        ([TEXT, "--file", __file__], "give either a text"),
        (["--file", "/no/such/file"], "/no/such/file: No such file"),
        (["--file", "/"], "/: Is a directory"),
    ],
)
def test_bad_input_is_status_2(explain: Run, arguments: list[str], part: str) -> None:
    result = explain(*arguments)
    failed(result, 2, part)
    assert result.err.startswith("error ")


def test_no_command_shows_help_and_is_bad_usage(run: Run) -> None:
    result = run()
    assert result.status == 2
    assert "explain" in result.out + result.err
    failed(run("explian"), 2, "explian")


def test_text_that_is_not_utf8(explain: Run, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"caf\xe9")
    failed(explain("--file", tmp_path / "x"), 2, "not UTF-8 text", "byte 3")
    failed(explain("-", stdin=b"caf\xe9"), 2, "standard input: not UTF-8 text")


@pytest.mark.parametrize(
    ("model", "part"),
    [("none", "no such folder"), ("none.gguf", "no such file"), ("gpt2/config.json", "a file that is not GGUF")],
)
def test_a_model_that_is_not_there_is_status_1(explain: Run, model: str, part: str) -> None:
    failed(explain(TEXT, model=model), 1, part)


def test_logits_that_are_not_finite_are_status_1(run: Run, tmp_path: Path) -> None:
    model, tokenizer = build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    failed(run("explain", TEXT, "--model", tmp_path), 1, "NaN or infinite", "--dtype")


@pytest.mark.parametrize("option", ["--html", "--png", "--json", "--save"])
def test_a_file_that_cannot_be_written_is_status_1(explain: Run, option: str) -> None:
    suffix = ".html" if option == "--save" else f".{option[2:]}"
    failed(explain(TEXT, option, f"/no/such/folder/x{suffix}"), 1, "/no/such/folder/x")


def test_a_suffix_that_nothing_writes_is_bad_usage(explain: Run, tmp_path: Path) -> None:
    failed(explain(TEXT, "--save", tmp_path / "x.pkl"), 2, ".pkl", ".safetensors")


def test_without_the_extra_the_command_that_installs_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "installed", lambda: False)
    result = run("explain", TEXT)
    failed(result, 1, 'pip install "attnlrp[demo]"')
    assert result.err.count("pip install") == 1


def test_memory_that_runs_out_is_status_1(explain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.GPT2Model, "forward", fail)
    failed(explain(TEXT), 1, "out of memory: explain fewer inputs at a time")


# --- audit, models, help --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_an_audit_that_closes_is_status_0(run: Run, root: Path, model: str) -> None:
    data = parsed(run("audit", TEXT, "--model", root / model, "--json", "-"))
    assert data["closes"] is True
    assert data["leaks"] == []
    assert data["target"] == pytest.approx(expected(root, model=model).logit, rel=1e-4)
    assert sum(data["inputs"].values()) == pytest.approx(expected(root, model=model).sum[0], rel=1e-3, abs=1e-4)
    result = run("audit", TEXT, "--model", root / model, "--depth", "2", "--target", "#1")
    assert (result.status, result.err) == (0, "")
    assert "the ledger closes" in result.out


def test_an_audit_that_does_not_close_is_status_1(run: Run, root: Path, tmp_path: Path) -> None:
    result = run("audit", TEXT, "--model", root / "gpt2", "--rules", "gradient", "--json", tmp_path / "x.json")
    data = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert result.status == (0 if data["closes"] else 1)
    assert not data["closes"]
    assert "does not close" in result.out
    assert "leak" in result.out


def test_models_lists_what_there_is(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNLRP_CACHE", str(tmp_path))
    (tmp_path / "one-[red]").mkdir()
    (tmp_path / "one-[red]" / "config.json").touch()
    data = parsed(run("models", "--json", "-"))
    assert data["default"] == demo.NAME
    assert data["packaged"] == {demo.NAME: demo.installed()}
    assert data["cache"] == str(tmp_path)
    assert data["cached"] == [str(tmp_path / "one-[red]")]
    result = run("models")
    assert (result.status, result.err) == (0, "")
    for part in (demo.NAME, str(tmp_path), "causal-lm"):
        assert part in result.out
    assert result.out.count("one-[red]") == 2, "its name, and how to name it with --model"
    monkeypatch.setattr(demo, "installed", lambda: False)
    assert 'not installed: pip install "attnlrp[demo]"' in run("models").out


OPTIONS = {
    "explain": "--file --model --target --target-sum --against --position --generate --context --prefix "
    "--image --chat --temperature --rules --memory --words --top --html --png --save --json --device --dtype",
    "audit": "--file --model --target --context --rules --depth --json --device --dtype",
    "models": "--json",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_explains_every_option(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert (result.status, result.err) == (0, "")
    listed = set(re.findall(r"--[a-z][a-z-]+", result.out)) - {"--help"}
    assert listed == set(OPTIONS[command].split())
    for option in OPTIONS[command].split():
        assert re.search(rf"{option}\b +\S*.*[A-Za-z]{{3}}", result.out), f"{option} is not explained"


def test_help_lists_the_commands(run: Run) -> None:
    result = run("--help")
    assert result.status == 0
    assert all(command in result.out for command in OPTIONS)


# --- the installed command ------------------------------------------------------------------------------------------


def process(*arguments: Any, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("attnlrp")), *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, input=stdin, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_installed_command(root: Path) -> None:
    done = process("explain", "-", "--model", root / "gpt2", "--json", "-", stdin=TEXT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == list(expected(root).tokens)
    assert done.stderr == ""


def test_the_installed_command_fails_without_a_traceback(root: Path) -> None:
    done = process("explain", TEXT, "--model", root / "none")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr

"""The package as a whole: what an import costs, what is public, and that the README tells the truth."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import attnlrp
from attnlrp import demo

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = ("transformers", "captum", "matplotlib", "rich", "jinja2", "typer", "safetensors", "gguf", "huggingface_hub")
MODULES = sorted(m.name for m in pkgutil.walk_packages(attnlrp.__path__, "attnlrp."))


def fresh(code: str) -> list[str]:
    """What a new interpreter prints, line by line; warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


# --- importing ----------------------------------------------------------------------------------------------------

LOADED = f"import sys; print(*sorted(set({HEAVY}) & set(sys.modules)))"


def test_importing_loads_nothing_heavy() -> None:
    assert fresh(f"import attnlrp; {LOADED}") == [""]


def test_using_every_name_loads_no_model_library_and_no_renderer() -> None:
    assert fresh(f"import attnlrp; [getattr(attnlrp, name) for name in attnlrp.__all__]; {LOADED}") == [""]


def test_the_check_of_imports_can_fail() -> None:
    assert fresh(f"import attnlrp, rich, jinja2; {LOADED}") == ["jinja2 rich"]


def test_importing_is_quick_and_silent() -> None:
    times = "import time, torch; start = time.perf_counter(); import attnlrp; print(time.perf_counter() - start)"
    best = min(float(*fresh(times)) for _ in range(2))
    assert best < 0.1, f"import attnlrp adds {best:.3f} s to import torch"


def test_a_submodule_is_found_by_its_name() -> None:
    assert fresh("import attnlrp.rules; print(attnlrp.rules.__name__)") == ["attnlrp.rules"]


# --- what is public -----------------------------------------------------------------------------------------------


def order(names: list[str]) -> list[str]:
    """CONSTANTS, then Classes, then the rest, each in alphabetical order (rule RUF022)."""

    def key(name: str) -> tuple[int, str]:
        constant = name.isupper() and len(name) > 1
        return (0 if constant else 1 if name[:1].isupper() else 2), name

    return sorted(names, key=key)


@pytest.mark.parametrize("module", ["attnlrp", *MODULES])
def test_all_is_sorted_and_every_name_is_there(module: str) -> None:
    found = importlib.import_module(module)
    names = list(found.__all__)
    assert names == order(names)
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(found, name, None) is not None, f"{module}.{name}"


def test_the_order_is_checked() -> None:
    assert order(["audit", "CP_LRP", "Ledger", "ATTNLRP"]) == ["ATTNLRP", "CP_LRP", "Ledger", "audit"]


def test_dir_and_unknown_names() -> None:
    assert dir(attnlrp) == sorted(attnlrp.__all__)
    name = "explane"
    with pytest.raises(AttributeError, match=r"^module 'attnlrp' has no attribute 'explane'$"):
        getattr(attnlrp, name)


def test_every_public_name_comes_from_the_module_that_defines_it() -> None:
    for name in attnlrp.__all__:
        found = getattr(attnlrp, name)
        if inspect.isclass(found) or inspect.isfunction(found):
            assert found.__module__.startswith("attnlrp."), name
            assert found.__name__ == name


def public() -> dict[str, Any]:
    """Every public function and class, and the public methods of the classes."""
    found: dict[str, Any] = {}
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            item = getattr(module, name)
            if (inspect.isclass(item) or inspect.isfunction(item)) and item.__module__ == module.__name__:
                found[f"{module.__name__}.{name}"] = item
                for method, value in vars(item).items() if inspect.isclass(item) else ():
                    if not method.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
                        found[f"{module.__name__}.{name}.{method}"] = value
    return found


def test_everything_public_has_a_docstring() -> None:
    described_by_class = re.compile(r"attnlrp\.backward\.\w+\.\w+")  # forward and backward: see pyproject.toml
    silent = [
        name for name, item in public().items() if not inspect.getdoc(item) and not described_by_class.fullmatch(name)
    ]
    assert silent == []
    assert len(public()) > 30, "the search finds what there is"


@pytest.mark.parametrize("module", ["attnlrp", *MODULES])
def test_every_module_says_what_it_is(module: str) -> None:
    assert importlib.import_module(module).__doc__


def test_files_and_functions_stay_small() -> None:
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 500, path
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                assert not body or (node.end_lineno or 0) - body[0].lineno < 40, f"{path}: {node.name}"


# --- packaging ----------------------------------------------------------------------------------------------------


def test_types_are_shipped() -> None:
    assert importlib.resources.files("attnlrp").joinpath("py.typed").is_file()


def test_the_version_is_that_of_the_package() -> None:
    assert importlib.metadata.version("attnlrp") == attnlrp.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[?(Unreleased|{re.escape(attnlrp.__version__)})", changes, re.MULTILINE)


def test_the_command_is_installed() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="attnlrp")
    assert command.value == "attnlrp.cli:main"
    assert callable(command.load())


def test_contracts_of_imports_cover_every_module() -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    layers = next(c for c in contracts if c["type"] == "layers")["layers"]
    listed = set(re.findall(r"attnlrp\.\w+", " ".join(layers)))
    assert listed == {name for name in MODULES if name.count(".") == 1}
    forbidden = [c for c in contracts if c["type"] == "forbidden"]
    assert any("attnlrp.rules" in c["source_modules"] for c in forbidden)
    assert any("attnlrp.show" in c["source_modules"] for c in forbidden)


def test_contracts_of_imports_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_extras_that_are_named_exist() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"])
    named = set(re.findall(r"(?:attnlrp|\.)\[([\w,]+)\]", README + demo.INSTALL))
    assert {extra for names in named for extra in names.split(",")} <= extras
    assert {"demo", "dev"} <= extras


# --- the README ---------------------------------------------------------------------------------------------------


def blocks(text: str) -> list[tuple[int, str, str]]:
    """(line, comment before it, code) of each Python block."""
    found = re.finditer(
        r"(?:<!--(?P<comment>.*?)-->\s*)?^```python\n(?P<code>.*?)^```$", text, re.DOTALL | re.MULTILINE
    )
    return [(text[: m.start("code")].count("\n") + 1, (m["comment"] or "").strip(), m["code"]) for m in found]


def parameters() -> list[Any]:
    marks = {True: [pytest.mark.packaged], False: []}
    return [
        pytest.param(line, code, id=f"line {line}", marks=marks["from_pretrained()" in code])
        for line, comment, code in blocks(README)
        if not comment.startswith("no-test:")
    ]


def test_blocks_are_found_with_their_comments() -> None:
    text = "a\n<!-- no-test: needs a GPU -->\n```python\nx = 1\n```\n\n```python\ny = 2\n```\n```bash\nls\n```\n"
    assert blocks(text) == [(4, "no-test: needs a GPU", "x = 1\n"), (8, "", "y = 2\n")]


def test_a_block_that_is_not_run_says_why() -> None:
    for line, comment, _ in blocks(README):
        if comment.startswith("no-test"):
            assert re.fullmatch(r"no-test: .{10,}", comment), f"README.md, line {line}: {comment}"


@pytest.mark.parametrize(("line", "code"), parameters())
def test_the_readme_runs(line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "from_pretrained()" in code and not demo.installed():
        pytest.skip(f"the packaged model is not installed: {demo.INSTALL}")
    monkeypatch.chdir(tmp_path)
    compiled = compile("\n" * line + code, "README.md", "exec")
    exec(compiled, {"__name__": "readme"})


def test_the_readme_has_python_to_run() -> None:
    assert any("attnlrp.Explainer" in code for _, _, code in blocks(README))
    assert any("attnlrp.propagate" in code for _, _, code in blocks(README))


def test_the_test_command_is_the_one_that_ci_runs() -> None:
    """As in .ci/run: what is between the marker and the end of the next code block."""
    assert "<!-- test-command -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert README.count("<!-- test-command -->") == 1
    after = README.split("<!-- test-command -->")[1]
    block = re.match(r"\s*```bash\n(?P<command>.*?)^```$", after, re.DOTALL | re.MULTILINE)
    assert block
    (command,) = block["command"].strip().splitlines()
    assert "pytest" in command
    assert ".[dev]" in command


def test_the_first_command_explains_a_prompt_without_a_hub() -> None:
    first = re.search(r"^```bash\n(?P<command>.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert first
    (command,) = first["command"].strip().splitlines()
    assert ".[demo]" in command
    assert re.search(r'attnlrp explain "[^"]+"$', command)
    assert "--model" not in command


def test_the_readme_speaks_of_the_patents() -> None:
    assert "patent" in README

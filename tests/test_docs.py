"""The Python of the documentation: it parses, what it names exists, and calls use arguments that there are."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import attnlrp

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = [
    pytest.param(block, id=f"{file.stem}-{k}")
    for file in sorted(DOCS.glob("*.md"))
    for k, block in enumerate(re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL))
]
CALLS = (attnlrp.Explainer.__call__, attnlrp.ImageExplainer.__call__)  # what pages call `explainer` is one of these


def named(tree: ast.AST) -> Iterator[tuple[str, Any]]:
    """Each dotted name of attnlrp that is used or imported, and what it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "attnlrp":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                yield alias.asname or alias.name, getattr(module, alias.name)
        dotted = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if re.fullmatch(r"attnlrp(\.\w+)+", dotted):
            found: Any = attnlrp
            for part in dotted.split(".")[1:]:
                found = getattr(found, part)
            yield dotted, found


def is_error(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Exception)


@pytest.mark.parametrize("block", BLOCKS)
def test_names_and_arguments_exist(block: str) -> None:
    tree = ast.parse(block)
    plain = {name: found for name, found in named(tree) if callable(found) and not is_error(found)}
    accepted = {name: set(inspect.signature(found).parameters) for name, found in plain.items()}
    accepted["explainer"] = {name for call in CALLS for name in inspect.signature(call).parameters}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        known, given = accepted.get(ast.unparse(call.func)), {keyword.arg for keyword in call.keywords}
        if known is not None and None not in given:
            assert not given - known, f"{ast.unparse(call)}: no such argument"


def test_every_page_is_read() -> None:
    assert len(BLOCKS) > 30

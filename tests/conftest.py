"""What every test shares: no network, one thread, the same random numbers, the same warnings."""

from __future__ import annotations

import io
import os
import re
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from command import Result, Run

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; no exception but the exit may come out of it."""
    from attnlrp import cli

    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: Any, stdin: str | bytes = "") -> Result:
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "argv", ["attnlrp", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(status, ESCAPE.sub("", captured.out), ESCAPE.sub("", captured.err))

    return run


def pytest_configure() -> None:
    # else a warning that torch gives once per process fails only the first test that causes it
    torch.set_warn_always(True)
    torch.set_num_threads(1)  # tiny tensors: threads cost more than they give, and several workers share the cores

"""What every test shares: no network, one thread, the same random numbers, the same warnings."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_configure() -> None:
    # else a warning that torch gives once per process fails only the first test that causes it
    torch.set_warn_always(True)
    torch.set_num_threads(1)  # tiny tensors: threads cost more than they give, and several workers share the cores

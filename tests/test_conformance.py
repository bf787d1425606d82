"""A representative part of the conformance suite; the whole of it is `python -m tests.conformance.run`.

What `test_conformance_published` has in its published geometry is not repeated here with the generic recipe.
"""

from __future__ import annotations

import pytest
import torch

from conformance import recipe
from conformance.run import one

ROWS = """
causal-lm: llama mixtral bloom mamba mamba2 qwen3_next
masked-lm: deberta-v2 electra
sequence-classification: umt5
token-classification: mt5
question-answering: xlm-roberta
seq2seq-lm: t5 m2m_100
image-classification: deit beit dinov2 swin convnext clip
image-text-to-text: llava qwen2_5_vl
"""
PAIRS = [(line.split(":")[0], kind) for line in ROWS.strip().splitlines() for kind in line.split(":")[1].split()]


@pytest.mark.filterwarnings("ignore")  # what transformers warns of while it builds its own models
@pytest.mark.parametrize(("task", "kind"), PAIRS)
def test_an_architecture_conforms(task: str, kind: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = one(task, kind)
    finally:
        torch.set_num_threads(threads)
    assert result.outcome == "pass", result.reason


def test_every_model_type_has_a_row() -> None:
    assert set(PAIRS) <= set(recipe.pairs())
    assert len(recipe.pairs()) == len(set(recipe.pairs()))

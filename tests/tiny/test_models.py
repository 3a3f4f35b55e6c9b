"""The tiny models themselves: every family builds and answers with spread-out logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny.models import FAMILIES, VOCAB, save_tiny_llama, tiny_model
from tiny.runs import tree


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_with_spread_out_logits(family: str) -> None:
    logits = tiny_model(family)(torch.arange(3, 13)[None]).logits
    assert logits.shape == (1, 10, VOCAB)
    assert logits.std() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_is_saved_again_has_the_same_files(family: str, tmp_path: Path) -> None:
    """And leaves the same random numbers to what comes after it; another seed or shape has files of its own."""
    changes = {"attn_pdrop": 0.25} if family == "gpt2" else {"num_hidden_layers": 1}
    drawn = []
    for name in ("made", "kept", "kept again"):
        save_tiny_llama(tmp_path / name, family=family, seed=31, **changes)
        drawn.append(torch.rand(4))
    assert tree(tmp_path / "made") == tree(tmp_path / "kept") == tree(tmp_path / "kept again")
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    other = save_tiny_llama(tmp_path / "other", family=family, seed=32, **changes)
    assert tree(other)["model.safetensors"] != tree(tmp_path / "made")["model.safetensors"]

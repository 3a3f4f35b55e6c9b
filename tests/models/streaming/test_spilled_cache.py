"""`models.spilled_cache`: a text written with keys and values on disk is the same, and one block's are in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from lorakeet.memory.spill import Spill
from lorakeet.models.generate import sample as sampling
from lorakeet.models.generate.sample import sample
from lorakeet.models.streaming.spilled_cache import spilled_cache
from tiny.models import save_tiny_llama, tiny_model
from tiny.streams import loaded

PROMPTS = [[5, 6, 7], list(range(5, 18)), [9]]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_it_gives_what_transformers_own_gives(family: str, tmp_path: Path) -> None:
    """Of Gemma, whose layers partly slide, those with a window stay in memory."""
    config = tiny_model(family, num_hidden_layers=6).config
    spill = Spill(tmp_path)
    mine, theirs = spilled_cache(config, spill), DynamicCache(config=config)
    spilled = [type(one) is not type(other) for one, other in zip(mine.layers, theirs.layers, strict=True)]
    assert all(spilled) if family == "llama" else any(spilled) and not all(spilled)
    generator = torch.Generator().manual_seed(0)
    for tokens in (5, 1, 1):
        for number, own in enumerate(spilled):
            keys, values = (torch.randn(2, 2, tokens, 8, generator=generator) for _ in range(2))
            for one, other in zip(mine.update(keys, values, number), theirs.update(keys, values, number), strict=True):
                assert torch.equal(one, other)
            assert mine.get_seq_length(number) == theirs.get_seq_length(number)
            assert not own or mine.layers[number].keys is None, "nothing of it stays"
    spill.close()


def test_a_streamed_model_writes_the_same_and_spills_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_llama(tmp_path / "model", num_hidden_layers=3)
    text, made = loaded(tmp_path / "model", tmp_path / "store"), []

    class Noted(Spill):
        def __init__(self, folder: Path | None = None) -> None:
            super().__init__(folder)
            made.append((folder, self))

    monkeypatch.setattr(sampling, "Spill", Noted)
    whole = sample(text, PROMPTS, max_tokens=12, temperature=0)
    drawn = sample(text, PROMPTS, max_tokens=12, seed=3)
    assert not made
    monkeypatch.setattr(sampling, "STREAMED_CACHE", 1)
    again = sample(text, PROMPTS, max_tokens=12, temperature=0)
    assert [folder for folder, _ in made] == [tmp_path / "store"] * 3, "a row at a time"
    assert all(np.array_equal(one, other) for one, other in zip(whole, again, strict=True))
    assert all(np.array_equal(one, other) for one, other in zip(drawn, sample(text, PROMPTS, max_tokens=12, seed=3), strict=True))
    assert all(spill._file is not None and spill._file.closed for _, spill in made)
    assert sorted(path.suffix for path in (tmp_path / "store").iterdir()) == [".safetensors"]


def test_a_model_in_memory_keeps_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("spilled")

    save_tiny_llama(tmp_path / "model")
    monkeypatch.setattr(sampling, "STREAMED_CACHE", 1)
    monkeypatch.setattr(sampling, "spilled_cache", refused)
    assert len(sample(loaded(tmp_path / "model"), PROMPTS, max_tokens=2, temperature=0)) == 3

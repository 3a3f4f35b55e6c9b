"""Adapters on a model between calls, and a model whose weights are streamed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from api.conftest import Shared
from lorakeet.api.generation import ON_MODEL, BatchedTexts, StreamedTexts
from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import ConfigError
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.serve.sampling import Sampling

GREEDY = Sampling(max_tokens=8, temperature=0.0)


def small(seed: int) -> Adapter:
    torch.manual_seed(seed)
    return Adapter({"model.layers.1.mlp.up_proj": Pair(torch.randn(2, 32), torch.randn(48, 2), 4.0)})


def test_few_adapters_stay_on_the_model(tiny_llama_folder: Path) -> None:
    found = BatchedTexts(load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32")))
    adapters = [small(seed) for seed in range(ON_MODEL + 9)]
    texts = found.texts([(5, 9, 17)] * len(adapters), adapters, GREEDY)
    assert len(found.live.names) == len(adapters), "all of one call are on the model"
    assert found.texts([(5, 9, 17)], [adapters[0]], GREEDY) == texts[:1]
    assert len(found.live.names) == ON_MODEL
    found.close()


def test_streamed_weights_give_the_same_texts(shared: Shared, tiny_llama_folder: Path, tmp_path: Path) -> None:
    spec = ModelSpec(path=str(tiny_llama_folder), dtype="float32")
    whole = BatchedTexts(load_text_model(spec))
    streamed = StreamedTexts(load_text_model(spec, store=tmp_path / "store"), 128)
    prompts, adapters = [(5, 9, 17), (6, 7), (5, 9, 17)], [None, shared.run.adapter, shared.run.adapter]
    expected = whole.texts(prompts, adapters, GREEDY)
    assert streamed.texts(prompts, adapters, GREEDY) == expected
    assert "".join(streamed.pieces(prompts[1], adapters[1], GREEDY)) == expected[1]
    assert streamed.texts(prompts[:1], [None], GREEDY) == expected[:1]
    with pytest.raises(ConfigError, match="takes max_tokens, temperature, seed and stop only"):
        streamed.texts(prompts[:1], [None], Sampling(max_tokens=4, top_k=3))
    whole.close()
    streamed.close()

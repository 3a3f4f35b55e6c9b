"""Adapters on a model between calls, their mixes, and a model whose weights are streamed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.data.spec import DataSpec
from lorakeet.errors import ConfigError
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.replying.texts import ON_MODEL, BatchedTexts, Mix, StreamedTexts
from lorakeet.serve.sampling import Sampling

GREEDY = Sampling(max_tokens=8, temperature=0.0)
PROMPT = (5, 9, 17)


def small(seed: int, *, dora: bool = False) -> Adapter:
    torch.manual_seed(seed)
    pair = Pair(torch.randn(2, 32), torch.randn(48, 2), 8.0, magnitude=torch.rand(48) if dora else None)
    return Adapter({"model.layers.1.mlp.up_proj": pair})


def alone(adapter: Adapter) -> Mix:
    return ((adapter, 1.0),)


@pytest.fixture
def spec(tiny_llama_folder: Path) -> ModelSpec:
    return ModelSpec(path=str(tiny_llama_folder), dtype="float32")


def test_a_template_is_for_the_texts_of_users_in_runs_with_labels(spec: ModelSpec) -> None:
    found = BatchedTexts(load_text_model(spec))
    data = DataSpec(template="alder {text} birch", labels=("bad", "good"))
    messages = [{"role": "user", "content": "cedar"}, {"role": "assistant", "content": "so"}, {"role": "user", "content": "fern"}]
    filled = [{**one, "content": f"alder {one['content']} birch"} if one["role"] == "user" else one for one in messages]
    plain = DataSpec()
    assert found.ids(messages, data, raw=False) == found.ids(filled, plain, raw=False) == found.ids(filled, data, raw=False)
    assert found.ids("cedar", data, raw=True) == found.ids("cedar", plain, raw=True)
    two = DataSpec(template="{name}: {text} birch", labels=("bad", "good"))
    with pytest.raises(ConfigError, match="the columns 'name' too, which one text does not hold"):
        found.ids("cedar", two, raw=False)
    assert found.ids("elder: cedar birch", two, raw=False) == found.ids("elder: cedar birch", plain, raw=False)
    found.close()


def test_few_adapters_stay_on_the_model(spec: ModelSpec) -> None:
    found = BatchedTexts(load_text_model(spec))
    adapters = [small(seed) for seed in range(ON_MODEL + 9)]
    texts = found.texts([PROMPT] * len(adapters), [alone(one) for one in adapters], GREEDY)
    assert len(found.live.names) == len(adapters), "all of one call are on the model"
    assert found.texts([PROMPT], [alone(adapters[0])], GREEDY) == texts[:1] and len(set(texts)) > 20
    assert len(found.live.names) == ON_MODEL
    found.close()


def test_streamed_weights_give_the_same_texts(spec: ModelSpec, tmp_path: Path) -> None:
    one, two = small(1), small(2)
    whole, streamed = BatchedTexts(load_text_model(spec)), StreamedTexts(load_text_model(spec, store=tmp_path / "store"), 128)
    prompts = [PROMPT, (6, 7), PROMPT, PROMPT, PROMPT]
    mixes: list[Mix] = [(), alone(one), alone(two), ((one, 0.7), (two, 0.3)), ((one, 0.5),)]
    expected = whole.texts(prompts, mixes, GREEDY)
    assert len({expected[0], *expected[2:]}) == 4
    assert streamed.texts(prompts, mixes, GREEDY) == expected
    for source in (streamed, whole):
        assert "".join(source.pieces(prompts[1], mixes[1], GREEDY)) == expected[1]
    drawn = Sampling(max_tokens=8, temperature=1.5, top_p=0.9, top_k=40, min_p=0.01, frequency_penalty=0.5, seed=3)
    by_chance = whole.texts(prompts, mixes, drawn)
    assert streamed.texts(prompts, mixes, drawn) == by_chance != expected
    with pytest.raises(ConfigError, match=r"top_p is 2; it must be"):
        streamed.texts(prompts[:1], [()], Sampling(top_p=2))
    whole.close()
    streamed.close()


def test_dora_is_used_alone(spec: ModelSpec) -> None:
    found, dora = BatchedTexts(load_text_model(spec)), small(1, dora=True)
    assert found.texts([PROMPT], [alone(dora)], GREEDY)
    with pytest.raises(ConfigError, match="DoRA and biases cannot be mixed or weighted"):
        found.texts([PROMPT], [((dora, 0.5),)], GREEDY)
    found.close()


def test_a_longer_prompt_gets_a_larger_cache(spec: ModelSpec) -> None:
    found = BatchedTexts(load_text_model(spec), slots=2, length=64)
    first = found.texts([PROMPT], [()], GREEDY)
    engine = found._engine
    assert found.texts([PROMPT, PROMPT], [(), ()], GREEDY) == first * 2 and found._engine is engine
    assert found.texts([PROMPT] * 3, [()] * 3, GREEDY) == first * 3 and found._engine is not engine
    found.close()

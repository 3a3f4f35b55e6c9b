"""Generation step by step gives the logits of whole sequences: prompts, cached beginnings, adapters, windows, caps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.core.fused.packed_attention import AttentionRule
from lorakeet.errors import ConfigError
from lorakeet.models.generate.kv_cache import CacheRow, CacheStep, KeyValues, check_cached, step
from lorakeet.models.inject import selection_of
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.adapters import add_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from tiny.adapters import random_adapter
from tiny.family_columns import in_transformers, saved
from tiny.models import save_tiny_llama, tiny_model

SEQUENCES = ((3, 5, 7, 9, 11, 2, 4), (8, 6, 1), (9, 9, 4, 4, 13))


def load(folder: Path, family: str = "llama", **changes: Any) -> TextModel:
    return load_text_model(ModelSpec(path=str(save_tiny_llama(folder / family, family=family, **changes)), dtype="float32"))


@pytest.fixture
def text(tmp_path: Path) -> TextModel:
    return load(tmp_path)


def whole(text: TextModel, ids: tuple[int, ...]) -> Tensor:
    """The logits after the last token, from one pass over the whole sequence."""
    with torch.no_grad():
        output = text.model.get_decoder()(
            input_ids=torch.tensor([ids]), use_cache=False, row_lengths=(len(ids),), row_products=text.products
        )
        return text.head(output.last_hidden_state[0, -1:]).float()[0]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("mistral", {"sliding_window": 3}), ("gemma2", {}), ("qwen3", {}), ("phi3", {}), ("gpt_oss", {})],
)
def test_steps_equal_whole_sequences(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    text = load(tmp_path, family, **changes)
    cache = KeyValues(slots=4, capacity=16)
    prompts = [CacheRow(slot, 0, ids[:-2], {}) for slot, ids in zip((2, 0, 3), SEQUENCES, strict=True)]
    first = step(text, cache, prompts)
    for row, ids in enumerate(SEQUENCES):
        close(first[row], whole(text, ids[:-2]))
    for back in (2, 1):
        rows = [CacheRow(slot, len(ids) - back, (ids[-back],), {}) for slot, ids in zip((2, 0, 3), SEQUENCES, strict=True)]
        logits = step(text, cache, rows)
        for row, ids in enumerate(SEQUENCES):
            close(logits[row], whole(text, ids[: len(ids) - back + 1]))


def test_prompts_and_single_tokens_in_one_step(text: TextModel) -> None:
    cache = KeyValues(slots=3, capacity=16)
    first, second, third = SEQUENCES
    step(text, cache, [CacheRow(0, 0, first[:-1], {}), CacheRow(1, 0, second[:-1], {})])
    rows = [CacheRow(0, len(first) - 1, first[-1:], {}), CacheRow(2, 0, third, {}), CacheRow(1, 2, second[-1:], {})]
    logits = step(text, cache, rows)
    for found, ids in zip(logits, (first, third, second), strict=True):
        close(found, whole(text, ids))


def test_a_cached_beginning_is_copied(text: TextModel) -> None:
    cache = KeyValues(slots=2, capacity=16)
    ids = SEQUENCES[0]
    step(text, cache, [CacheRow(0, 0, ids, {})])
    cache.copy_prefix(0, 1, 4)
    close(step(text, cache, [CacheRow(1, 4, ids[4:], {})])[0], whole(text, ids))
    assert cache.bytes == 2 * text.model.config.num_hidden_layers * 2 * 16 * text.model.config.num_key_value_heads * (
        text.model.config.hidden_size // text.model.config.num_attention_heads
    ) * 4  # fmt: skip


def test_rows_use_adapters_of_their_own(text: TextModel) -> None:
    bare = tiny_model("llama", vocab_size=text.model.config.vocab_size)
    for seed, name in enumerate(("a", "b")):
        add_adapter(text, random_adapter(bare, seed=seed, rank=4, alpha=12.0), name)
    selection, cache = selection_of(text.model), KeyValues(slots=3, capacity=16)
    wanted: list[dict[str, float]] = [{"a": 1.0}, {}, {"b": 1.0}]
    expected = []
    for ids, adapters in zip(SEQUENCES, wanted, strict=True):
        selection.use(next(iter(adapters), None))
        expected.append(whole(text, ids))
    step(text, cache, [CacheRow(i, 0, ids[:-1], wanted[i]) for i, ids in enumerate(SEQUENCES)], selection)
    rows = [CacheRow(i, len(ids) - 1, ids[-1:], wanted[i]) for i, ids in enumerate(SEQUENCES)]
    for found, theirs in zip(step(text, cache, rows, selection), expected, strict=True):
        close(found, theirs)
    assert (expected[0] - expected[1]).abs().max() > 0.05


def test_what_does_not_fit_is_refused(text: TextModel) -> None:
    cache = KeyValues(slots=1, capacity=4)
    for row in (CacheRow(0, 2, (1, 2, 3), {}), CacheRow(1, 0, (1,), {}), CacheRow(0, 0, (), {})):
        with pytest.raises(ValueError, match="do not fit the cache"):
            step(text, cache, [row])


def test_other_attention_is_refused(tmp_path: Path) -> None:
    path = str(save_tiny_llama(tmp_path / "m"))
    text = load_text_model(ModelSpec(path=path, dtype="float32", attention="sdpa"))
    with pytest.raises(ConfigError, match=r"'llama' model, which cannot .* model\.attention varlen only, and it runs with sdpa"):
        step(text, KeyValues(slots=1, capacity=4), [CacheRow(0, 0, (1,), {})])


def test_a_model_that_a_cache_does_not_hold_is_refused(tmp_path: Path) -> None:
    """DiffLlama attends twice in a block, with the same keys and other values: one cache of a block holds the last ones."""
    check_cached(load(tmp_path))
    saved("diffllama", tmp_path)
    text = load_text_model(ModelSpec(path=str(tmp_path / "model"), dtype="float32"), say=lambda line: None)
    assert text.attention == "varlen"
    with pytest.raises(ConfigError, match=r"its blocks attend twice, .* \(over a cache its logits are .* off\)"):
        check_cached(text)


def test_a_model_whose_layers_carry_a_state_is_refused_with_their_names(tmp_path: Path) -> None:
    saved("jamba", tmp_path)
    text = load_text_model(ModelSpec(path=str(tmp_path / "model"), dtype="float32"), say=lambda line: None)
    with pytest.raises(ConfigError, match=r"'jamba' model, .*: its JambaMambaMixer carries a state from token to token"):
        check_cached(text)


def test_texts_beyond_a_chunk_that_only_a_mask_has_are_refused_and_shorter_ones_are_right(tmp_path: Path) -> None:
    """Token by token and in parts too, where no step has more new tokens than a chunk."""
    saved("llama4_text", tmp_path, attention_chunk_size=16)
    text = load_text_model(ModelSpec(path=str(tmp_path / "model"), dtype="float32"), say=lambda line: None)
    ids = tuple((number * 7919 + 11) % 320 for number in range(17))
    check_cached(text, 16)
    with pytest.raises(ConfigError, match=r"beyond 16 tokens, .* a text may have 17 tokens\. Limit them: --context 16"):
        check_cached(text, 17)
    cache, found = KeyValues(slots=1, capacity=32), torch.empty(0)
    for start, stop in ((0, 7), (7, 15), (15, 16)):
        found = step(text, cache, [CacheRow(0, start, ids[start:stop], {})])
    own = in_transformers(tmp_path / "model")
    close(found[0], own(input_ids=torch.tensor([ids[:16]]), use_cache=False).logits[0, -1].detach())
    with pytest.raises(ConfigError, match=r"a text may have 17 tokens"):
        step(text, cache, [CacheRow(0, 16, ids[16:], {})])


def test_a_short_row_beside_a_long_one_meets_zeros_past_its_end_whatever_memory_held(text: TextModel) -> None:
    config = text.model.config
    shape = (2, config.num_key_value_heads, 16, config.hidden_size // config.num_attention_heads)
    dirty = [torch.full(shape, float("nan")) for _ in range(64)]
    del dirty
    cache = KeyValues(slots=2, capacity=16)
    long, short = SEQUENCES[0], SEQUENCES[1]
    step(text, cache, [CacheRow(0, 0, long[:-1], {}), CacheRow(1, 0, short[:-1], {})])
    logits = step(text, cache, [CacheRow(0, len(long) - 1, long[-1:], {}), CacheRow(1, len(short) - 1, short[-1:], {})])
    close(logits[1], whole(text, short))
    assert all(bool(states[1, :, len(short) :].eq(0).all()) for layer in cache._layers.values() for states in layer)


@pytest.mark.parametrize("cap", [None, 50.0])
def test_scores_that_float16_holds_only_once_they_are_scaled(cap: float | None) -> None:
    """200·200·32 is above 65504; with its scale it is 10,000."""
    rule, states = AttentionRule(1 / 128, None, cap, None), torch.full((2, 1, 32), 200.0, dtype=torch.float16)
    values = torch.stack([torch.ones(1, 32), 3 * torch.ones(1, 32)]).half()
    cache = KeyValues(slots=1, capacity=16)
    for number, row in enumerate((CacheRow(0, 0, (5,), {}), CacheRow(0, 1, (6,), {}))):
        part = slice(number, number + 1)
        found = CacheStep(cache, [row], torch.device("cpu")).attend(0, states[part], states[part], values[part], rule)
        close(found, torch.full((1, 1, 32), 1.0 + number).half())
    again = KeyValues(slots=1, capacity=16)
    CacheStep(again, [CacheRow(0, 0, (5,), {})], torch.device("cpu")).attend(0, states[:1], states[:1], values[:1], rule)
    both = CacheStep(again, [CacheRow(0, 1, (6, 7), {})], torch.device("cpu")).attend(0, states, states, values, rule)
    assert both.isfinite().all() and both[0, 0, 0] == 1.0

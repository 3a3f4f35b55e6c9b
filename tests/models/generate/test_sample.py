"""Sampling: the same text whatever the company, from a seed, and the likeliest one where greedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from lorakeet.memory.spill import Spill
from lorakeet.models.generate import sample as sampling
from lorakeet.models.generate.sample import end_ids, sample, spilled_cache
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model, set_attention
from lorakeet.models.text.model import TextModel
from tiny.family_columns import saved
from tiny.hybrids import hybrid, prompts
from tiny.models import save_tiny_llama, tiny_model
from tiny.streams import loaded

PROMPTS = [[5, 6, 7], list(range(5, 18)), [9]]


@pytest.fixture(scope="module")
def text(tiny_llama_folder: Path) -> TextModel:
    return load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32", device="cpu"))


def greedy_by_hand(text: TextModel, prompt: list[int], count: int) -> list[int]:
    """Without a cache, one row, the whole text anew for each token."""
    text.model.set_attn_implementation("eager")
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(text.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in end_ids(text):
            break
    text.model.set_attn_implementation("lorakeet_varlen")
    return ids[len(prompt) :]


def test_greedy_is_the_likeliest_token_each_time(text: TextModel) -> None:
    written = sample(text, PROMPTS, max_tokens=12, temperature=0)
    for prompt, ids in zip(PROMPTS, written, strict=True):
        assert ids.dtype == np.int64
        assert ids.tolist() == greedy_by_hand(text, prompt, 12)
    assert text.attention == "varlen"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_next", "granitemoehybrid", "lfm2", "falcon_h1", "nemotron_h"])
def test_padding_reaches_no_state(kind: str, tmp_path: Path) -> None:
    """Prompts around the length of a convolution and of a chunk of linear attention, in one batch with an adapter."""
    made, written = hybrid(kind, tmp_path), 6
    made.live.selection.use("a")
    found = sample(made.live.text, prompts(), max_tokens=written, temperature=0)
    ends, wanted = end_ids(made.live.text), [made.reply(ids, "a", written) for ids in prompts()]
    assert [ids.tolist()[: -1 if ids[-1] in ends else None] for ids in found] == wanted


class Counted:
    """Counts the tokens that pass through the decoder, padding included."""

    def __init__(self, text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens, decoder = 0, text.model.get_decoder()
        forward = decoder.forward

        def counting(*args: Any, **settings: Any) -> Any:
            self.tokens += settings["input_ids"].numel()
            return forward(*args, **settings)

        monkeypatch.setattr(decoder, "forward", counting)


def test_what_prompts_begin_with_is_computed_once(text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few-shot prompts: the examples pass through the model once for all, and every reply is as it is alone."""
    examples = [int(number) for number in np.random.default_rng(0).integers(3, 60, 80)]
    prompts = [examples + list(range(5, 5 + own)) for own in (3, 9, 1, 6)]
    alone = [greedy_by_hand(text, prompt, 6) for prompt in prompts]
    counted = Counted(text, monkeypatch)
    together = sample(text, prompts, max_tokens=6, temperature=0)
    assert [ids.tolist() for ids in together] == alone
    assert counted.tokens <= 80 + 4 * 9 + 5 * 4


def test_prompts_that_share_little_are_computed_row_by_row(text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(text, monkeypatch)
    sample(text, [[5, 6, 7, 8], [5, 6, 9]], max_tokens=1, temperature=0)
    assert counted.tokens == 2 * 4


def test_rows_that_have_ended_are_left_out(text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of eight rows is written to its end; the others stop where `done` says, and cost nothing from then on."""
    prompts = [[5 + number, 6, 7] for number in range(8)]
    whole = sample(text, prompts, max_tokens=40, temperature=0)
    first = whole[0].tolist()[:3]
    counted = Counted(text, monkeypatch)
    written = sample(text, prompts, max_tokens=40, temperature=0, done=lambda ids: len(ids) >= 3 and ids[:3] != first)
    for number, (ids, before) in enumerate(zip(written, whole, strict=True)):
        assert ids.tolist() == before.tolist()[: len(before) if before.tolist()[:3] == first else 3], number
    assert sum(len(ids) > 3 for ids in written) == 1
    assert counted.tokens <= 8 * 3 + 2 * 8 + 37


def test_a_seed_gives_the_same_texts_and_leaves_other_luck_alone(text: TextModel) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two, other = (sample(text, PROMPTS * 8, max_tokens=6, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert len({tuple(ids) for ids in one[::3]}) > 1  # equal prompts, luck of their own


def test_a_row_is_the_same_in_other_company(text: TextModel) -> None:
    together = sample(text, PROMPTS, max_tokens=8, seed=3)
    alone = sample(text, PROMPTS[:1], max_tokens=8, seed=3)
    assert together[0].tolist() == alone[0].tolist()


def test_the_end_of_text_ends_a_row(text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert end_ids(text) == {2}
    free = sample(text, PROMPTS, max_tokens=12, temperature=0)
    monkeypatch.setattr(text.model.generation_config, "eos_token_id", [2, int(free[0][3])])
    ended = sample(text, PROMPTS, max_tokens=12, temperature=0)[0].tolist()
    assert ended == free[0].tolist()[: free[0].tolist().index(int(free[0][3])) + 1]


@pytest.mark.parametrize(("prompts", "temperature"), [([[5], []], 1.0), ([[5]], -1.0)])
def test_what_cannot_be_sampled(text: TextModel, prompts: list[list[int]], temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature of 0 or more"):
        sample(text, prompts, max_tokens=1, temperature=temperature)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["minimax", "openai-gpt", "rwkv"])
def test_a_model_out_of_the_ordinary_writes_its_likeliest_tokens(family: str, tmp_path: Path) -> None:
    """MiniMax refuses a cache of another class, and the next two take none."""
    text = load_text_model(ModelSpec(path=str(saved(family, tmp_path)), dtype="float32", device="cpu"))
    text.model.eval()
    written = sample(text, PROMPTS, max_tokens=6, temperature=0.0)
    if text.attention == "varlen":  # which takes the lengths of packed rows
        set_attention(text.model, "eager")
    for prompt, found in zip(PROMPTS, written, strict=True):
        ids = list(prompt)
        for token in found:
            with torch.no_grad():
                assert token == int(text.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            ids.append(int(token))
        assert len(ids) > len(prompt)


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

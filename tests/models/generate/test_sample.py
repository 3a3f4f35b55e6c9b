"""Sampling: the same text whatever the company, from a seed, and the likeliest one where greedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lorakeet.models.generate.sample import end_ids, sample
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from tiny.models import save_tiny_llama

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


def test_left_padding_does_not_shift_target_positions(tmp_path: Path) -> None:
    """GPT-2 adds a learnt vector for each absolute position, so a shifted row would write something else."""
    save_tiny_llama(tmp_path, family="gpt2")
    gpt2 = load_text_model(ModelSpec(path=str(tmp_path), dtype="float32", device="cpu"))
    for prompt, ids in zip(PROMPTS, sample(gpt2, PROMPTS, max_tokens=8, temperature=0), strict=True):
        assert ids.tolist() == greedy_by_hand(gpt2, prompt, 8)


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


def test_frequencies_are_the_model_s(text: TextModel) -> None:
    """2,000 draws of one token against its probabilities: the largest gap stays within 5 standard deviations."""
    drawn = np.array([ids[0] for ids in sample(text, [[5, 6]] * 2000, max_tokens=1, seed=0)])
    text.model.set_attn_implementation("eager")
    p = text.model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1).double().numpy()
    text.model.set_attn_implementation("lorakeet_varlen")
    counts = np.bincount(drawn, minlength=len(p))
    assert np.all(np.abs(counts - 2000 * p) < 5 * np.sqrt(2000 * p * (1 - p)) + 1)


def test_the_end_of_text_ends_a_row(text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert end_ids(text) == {2}
    free = sample(text, PROMPTS, max_tokens=12, temperature=0)
    monkeypatch.setattr(text.model.generation_config, "eos_token_id", [2, int(free[0][3])])
    ended = sample(text, PROMPTS, max_tokens=12, temperature=0)[0].tolist()
    assert ended == free[0].tolist()[: free[0].tolist().index(int(free[0][3])) + 1]


def test_training_mode_is_given_back(text: TextModel) -> None:
    text.model.train()
    sample(text, PROMPTS[:1], max_tokens=1)
    assert text.model.training
    text.model.eval()


@pytest.mark.parametrize(("prompts", "temperature"), [([[5], []], 1.0), ([[5]], -1.0)])
def test_what_cannot_be_sampled(text: TextModel, prompts: list[list[int]], temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature of 0 or more"):
        sample(text, prompts, max_tokens=1, temperature=temperature)

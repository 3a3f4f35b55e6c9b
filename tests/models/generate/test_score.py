"""`models.score`: rows and labels scored in batches, equal to one plain forward of the transformers model each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lorakeet.data.chat import Candidates, Encoder, Example
from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.models.generate.score import distinguishing, label_scores, row_losses
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from tiny.runs import reviews, write_rows
from tiny.simulated_card import simulated_card


@pytest.fixture(scope="module", params=["varlen", "sdpa"])
def text(request: pytest.FixtureRequest, tiny_llama_folder: Path) -> TextModel:
    return load_text_model(ModelSpec(str(tiny_llama_folder), dtype="float32", products="float32", attention=request.param))


@pytest.fixture(scope="module")
def plain(tiny_llama_folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder)


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def candidates(lengths: Sequence[int], completions: Sequence[Sequence[int]], seed: int = 0) -> list[Candidates]:
    """Prompts of these lengths, all with the same completions."""
    chance = np.random.default_rng(seed)
    ends = tuple(ids(*completion) for completion in completions)
    return [Candidates(chance.integers(4, 320, length), ends, f"row {length}", 0, False) for length in lengths]


def log_prob(plain: Any, prompt: np.ndarray, ending: np.ndarray) -> float:
    """Σ log p of the ending's tokens after the prompt."""
    whole = torch.from_numpy(np.concatenate([prompt, ending]))
    with torch.no_grad():
        log_probs = plain(whole[None]).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[place - 1, whole[place]]) for place in range(len(prompt), len(whole)))


END = 2
ONE_TOKEN = [[50, END], [60, END], [70, END]]
SEVERAL = [[50, 51, END], [60, END], [50, 52, 53, END]]
PREFIXES = [[50, END], [50, 51, END], [60, END]]


@pytest.mark.parametrize(
    ("completions", "counted"),
    [(ONE_TOKEN, [1, 1, 1]), (SEVERAL, [2, 1, 3]), (PREFIXES, [2, 3, 2])],
    ids=["one token", "several tokens", "one label begins another"],
)
def test_every_label_gets_the_log_prob_of_a_plain_forward(
    text: TextModel, plain: Any, completions: list[list[int]], counted: list[int]
) -> None:
    """Rows of mixed lengths, in batches that hold one to several of them and in another order than they are given."""
    rows = candidates([3, 17, 5, 29, 4, 11, 23], completions)
    done: list[int] = []
    scores = label_scores(text, rows, micro_tokens=40, chunk=2, progress=done.append)
    expected = [
        [log_prob(plain, row.prompt, end[:count]) for end, count in zip(row.completions, counted, strict=True)] for row in rows
    ]
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert sum(done) == len(rows)
    assert np.unique(scores.round(3), axis=0).shape[0] == len(rows)


def test_labels_of_real_rows_are_scored_as_they_were_trained(text: TextModel, plain: Any, tmp_path: Path) -> None:
    """Through template and tokenizer: prompt and answer are the ids of the training row, so their losses agree."""
    data = write_rows(tmp_path / "rows.jsonl", reviews(6, labels=("good", "good indeed", "bad")))
    spec = DataSpec(str(data))
    encoder = Encoder(text.tokenizer, spec, ("good", "good indeed", "bad"))
    rows = read_rows(str(data), spec)
    found = [encoder.candidates(row) for row in rows]
    examples = [encoder.encode(row) for row in rows]
    whole = [candidate for candidate in found if candidate is not None]
    learnt = [example for example in examples if example is not None]
    scores = label_scores(text, whole, micro_tokens=100)
    endings = distinguishing(whole[0].completions, frozenset(text.tokenizer.all_special_ids))
    for number, (row, example) in enumerate(zip(whole, learnt, strict=True)):
        assert row.label is not None
        np.testing.assert_array_equal(np.concatenate([row.prompt, row.completions[row.label]]), example.ids)
        expected = [log_prob(plain, row.prompt, ending) for ending in endings]
        np.testing.assert_allclose(scores[number], expected, atol=1e-4)


def test_no_rows_have_no_scores(text: TextModel) -> None:
    assert label_scores(text, [], micro_tokens=64).shape == (0, 0)
    assert [part.shape for part in row_losses(text, [], micro_tokens=64)] == [(0,), (0,)]


def test_row_losses_are_those_of_a_plain_forward_in_the_given_order(text: TextModel, plain: Any) -> None:
    chance = np.random.default_rng(1)
    rows = []
    for number, length in enumerate([4, 30, 9, 17, 2]):
        supervised = chance.random(length) < 0.5
        supervised[0], supervised[-1] = False, number != 3
        rows.append(Example(chance.integers(4, 320, length), supervised, "same key", None, False))
    rows.append(Example(ids(5, 6, 7), np.zeros(3, bool), "nothing learnt", None, False))
    text.model.train()
    sums, weights = row_losses(text, rows, micro_tokens=32, chunk=3)
    assert not text.model.training
    for row, total, weight in zip(rows, sums, weights, strict=True):
        with torch.no_grad():
            log_probs = plain(torch.from_numpy(row.ids)[None]).logits[0].double().log_softmax(-1)
        places = row.supervised.nonzero()[0]
        assert weight == len(places)
        assert total == pytest.approx(-sum(float(log_probs[place - 1, row.ids[place]]) for place in places), abs=1e-4)


def counted_scores(text: TextModel, rows: Sequence[Candidates], micro_tokens: int) -> tuple[np.ndarray, list[int], int]:
    """The scores, the tokens of each pass through the decoder, and the rows that were counted."""
    decoder, computed, done = text.model.get_decoder(), list[int](), list[int]()
    forward = decoder.forward

    def counting(*args: Any, **settings: Any) -> Any:
        computed.append(settings["input_ids"].numel())
        return forward(*args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "forward", counting)
        scores = label_scores(text.with_options(pad=False), rows, micro_tokens=micro_tokens, progress=done.append)
    return scores, computed, sum(done)


def test_examples_before_many_rows_pass_once_a_batch_for_labels_of_several_tokens(text: TextModel, plain: Any) -> None:
    """Rows of 60 tokens, 50 of which all share, with three labels: a pass of each row computed the 50 twelve times."""
    if text.attention != "varlen":
        pytest.skip("other attention shares no prefix")
    chance = np.random.default_rng(3)
    shared = chance.integers(4, 320, 50)
    several = [[50, 51, END], [60, 61, END], [50, 52, 53, END]]
    ends = tuple(ids(*completion) for completion in several)
    rows = [Candidates(np.concatenate([shared, chance.integers(4, 320, 10)]), ends, f"row {n}", 0, False) for n in range(12)]
    scores, computed, done = counted_scores(text, rows, 2048)
    assert done == 12 and len(computed) == 1
    assert computed == [50 + 12 * (12 + 11)], "two branches a row: the third label's, which holds the first one's, and another"
    expected = [[log_prob(plain, row.prompt, end[:-1]) for end in ends] for row in rows]
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_labels_of_many_rows_come_from_a_gpu_in_one_copy_a_batch(tiny_llama_folder: Path) -> None:
    rows = candidates([9, 14, 5, 20, 7, 11], SEVERAL)
    with simulated_card() as card:
        spec = ModelSpec(str(tiny_llama_folder), dtype="float32", products="float32", device="cuda")
        on_card = load_text_model(spec)
        label_scores(on_card, rows, micro_tokens=1000)  # the first use of a kernel is compared
        card.reset()
        found = label_scores(on_card, rows, micro_tokens=1000)
        assert [wait.kind for wait in card.waits] == ["a copy to the host"], card.waits
    here = load_text_model(ModelSpec(str(tiny_llama_folder), dtype="float32", products="float32", device="cpu"))
    np.testing.assert_allclose(found, label_scores(here, rows, micro_tokens=1000), atol=1e-4)

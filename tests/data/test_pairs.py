"""Pairs of answers as tokens: equal prompts to the token, cut equally, and micro-batches that keep both answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lorakeet.data.chat import Encoder, Example
from lorakeet.data.pairs import encode_pair, encode_pairs, pair_batches
from lorakeet.data.prefix import BatchLimits
from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec
from lorakeet.errors import DataError


@pytest.fixture
def tokenizer(byte_tokenizer: Any) -> Any:
    return byte_tokenizer(template=None, eos_token="<|eos|>")


def row(prompt: str, chosen: str, rejected: str, number: int = 1) -> Row:
    user = Turn("user", prompt, supervised=False)
    answers = [Turn("assistant", text, supervised=True) for text in (chosen, rejected)]
    return Row((user, answers[0]), None, None, f"rows:{number}", rejected=(user, answers[1]))


def encoder(tokenizer: Any, **settings: Any) -> Encoder:
    return Encoder(tokenizer, DataSpec(train="x", chat_template="off", **settings))


def test_both_answers_follow_one_prompt(tokenizer: Any) -> None:
    found = encode_pair(row("which way", "left", "right and right"), encoder(tokenizer))
    assert found is not None
    starts = [int(np.flatnonzero(each.supervised)[0]) for each in found]
    assert starts[0] == starts[1] and np.array_equal(found[0].ids[: starts[0]], found[1].ids[: starts[0]])
    assert found[0].key == found[1].key and not any(each.truncated for each in found)


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_prompt_is_shortened_equally_for_both(longer: str, tokenizer: Any) -> None:
    answers = {"chosen": "left", "rejected": "right", longer: "one two three four five six"}
    found = encode_pair(row("word " * 60, answers["chosen"], answers["rejected"]), encoder(tokenizer, max_tokens=48))
    assert found is not None and all(each.truncated and len(each.ids) <= 48 for each in found)
    starts = [int(np.flatnonzero(each.supervised)[0]) for each in found]
    assert starts[0] == starts[1] and np.array_equal(found[0].ids[: starts[0]], found[1].ids[: starts[0]])


def conversation(prompt: str, follow_ups: tuple[str, str], answers: tuple[str, str]) -> Row:
    """Conversations that differ after the prompt, each with a question of its own before its last answer."""
    user, ends = Turn("user", prompt, supervised=False), []
    for name, more, answer in zip("ab", follow_ups, answers, strict=True):
        ends.append((Turn("assistant", name, True), Turn("user", more, False), Turn("assistant", answer, True)))
    return Row((user, *ends[0]), None, None, "rows:7", rejected=(user, *ends[1]))


@pytest.mark.parametrize("answers", [("left", "right"), ("left", "right and then on"), ("left and then on", "right")])
def test_turns_after_the_prompt_stay_those_of_their_own_conversation(answers: tuple[str, str], tokenizer: Any) -> None:
    found = encode_pair(conversation("word " * 60, ("why so?", "how far is it?"), answers), encoder(tokenizer, max_tokens=64))
    assert found is not None and all(each.truncated and len(each.ids) <= 64 for each in found)
    texts = [tokenizer.decode(each.ids) for each in found]
    for text, name, more, answer in zip(texts, "ab", ("why so?", "how far is it?"), answers, strict=True):
        before, _, after = text.partition(more)
        assert before.startswith("word word") and before.split()[-1] == name and answer in after
    assert len({text.split("\n")[0] for text in texts}) == 1


def test_a_long_follow_up_is_never_the_reason_for_a_shorter_one_elsewhere(tokenizer: Any) -> None:
    both = conversation("what", ("short?", "long " * 30), ("left", "right"))
    with pytest.raises(DataError, match="rows:7"):
        encode_pair(both, encoder(tokenizer, max_tokens=64))
    assert encode_pair(both, encoder(tokenizer, max_tokens=64, too_long="drop")) is None


def trimming(byte_tokenizer: Any) -> Encoder:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return Encoder(byte_tokenizer(template=template, eos_token="<|im_end|>"), DataSpec(train="x"))


def test_answers_that_the_template_makes_equal_are_refused(byte_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"rows:1: chosen and rejected have the same tokens"):
        encode_pair(row("which way", "left", "left "), trimming(byte_tokenizer))
    assert encode_pair(row("which way", "left", "right "), trimming(byte_tokenizer)) is not None


def test_the_answer_of_another_row_may_be_equal(tokenizer: Any) -> None:
    rated = replace(row("which way", "left", "left"), desirable=True)
    assert encode_pair(rated, encoder(tokenizer)) is not None


def test_pairs_that_are_too_long_are_left_out_by_name(tokenizer: Any) -> None:
    rows = [row("short", "left", "right"), row("word " * 80, "left", "right", 2)]
    found = encode_pairs(rows, encoder(tokenizer, max_tokens=48, too_long="drop"))
    assert len(found.examples) == 2 and found.dropped == ("rows:2",)
    with pytest.raises(DataError, match="All 1 rows are longer"):
        encode_pairs(rows[1:], encoder(tokenizer, max_tokens=48, too_long="drop"))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_side_whose_answers_are_all_too_long_is_named(side: str, tokenizer: Any) -> None:
    rows = [row(f"way {n}", **{"chosen": "left", "rejected": "right", side: "right " * 40}, number=n) for n in range(3)]
    with pytest.raises(DataError, match=f"All 3 rows are longer than data.max_tokens .48. with their {side} answers"):
        encode_pairs(rows, encoder(tokenizer, max_tokens=48, too_long="drop"))
    mixed = [*rows, row("way", "left " * 40, "right " * 40)]
    with pytest.raises(DataError, match=f"with their {side} answers"):
        encode_pairs(mixed, encoder(tokenizer, max_tokens=48, too_long="drop"))
    with pytest.raises(DataError, match="with one of their answers"):
        encode_pairs(mixed[3:], encoder(tokenizer, max_tokens=48, too_long="drop"))


def test_a_row_with_one_answer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="has one answer only"):
        encode_pair(Row(row("p", "a", "b").turns, None, None, "rows:1"), encoder(tokenizer))


def test_a_template_that_changes_the_prompt_with_the_answer_is_refused(tokenizer: Any) -> None:
    first, second = (Turn("user", text, supervised=False) for text in ("which way", "what"))
    answers = [Turn("assistant", text, supervised=True) for text in ("left", "right")]
    other = Row((first, answers[0]), None, None, "rows:1", rejected=(second, answers[1]))
    with pytest.raises(DataError, match="other tokens before the chosen answer"):
        encode_pair(other, encoder(tokenizer))


def made_up(prompts: list[int], answer: int = 4) -> list[Example]:
    generator, found = np.random.default_rng(0), []
    for number, length in enumerate(prompts):
        prompt = generator.integers(1, 90, size=length)
        for side in range(2):
            ids = np.concatenate([prompt, [100 + side], generator.integers(1, 90, size=answer)]).astype(np.int64)
            found.append(Example(ids, np.arange(len(ids)) >= length, f"{2 * number + side}", None, False))
    return found


def pairs_of(batches: list[Any]) -> list[list[int]]:
    keys = [[int(key) for key in batch.keys] for batch in batches]
    assert all(row[1::2] == [number + 1 for number in row[::2]] for row in keys)
    return [[number // 2 for number in row[::2]] for row in keys]


def of_one_prompt(count: int, prompt: int) -> list[Example]:
    """Pairs with one prompt and answers of their own."""
    generator, (first, *_) = np.random.default_rng(1), made_up([prompt])
    found = []
    for number in range(2 * count):
        ids = np.concatenate([first.ids[:prompt], [100 + number], generator.integers(1, 90, size=4)]).astype(np.int64)
        found.append(Example(ids, np.arange(len(ids)) >= prompt, str(number), None, False))
    return found


def limits(tokens: int, times: int = 8, a_pass: int = 128) -> BatchLimits:
    return BatchLimits(tokens, times, a_pass)


def test_short_prompts_are_packed_together_and_long_ones_alone() -> None:
    batches = pair_batches(made_up([8, 200, 8, 300]), limits(4096), shares=True)
    assert sorted(pairs_of(batches)) == [[0, 2], [1], [3]]


def test_pairs_of_one_long_prompt_share_a_batch() -> None:
    assert pairs_of(pair_batches(of_one_prompt(2, 200), limits(4096), shares=True)) == [[0, 1]]


def test_answers_that_begin_alike_share_the_batch_of_their_prompt() -> None:
    examples = of_one_prompt(3, 200)
    for example in examples[:2]:
        example.ids[200] = 99
    assert pairs_of(pair_batches(examples, limits(4096), shares=True)) == [[0, 1, 2]]


def test_targets_count_where_a_prompt_is_shared() -> None:
    examples = [replace(row, supervised=np.arange(len(row.ids)) >= 150) for row in of_one_prompt(6, 300)]
    for batch in pair_batches(examples, limits(700), shares=True):
        assert batch.targets <= 700


def test_a_batch_holds_at_most_its_tokens() -> None:
    examples = made_up([10] * 8)
    for batch in pair_batches(examples, limits(70), shares=False):
        assert batch.tokens <= 70
    alone = pairs_of(pair_batches(examples, limits(1), shares=True))
    assert sorted(alone) == [[pair] for pair in range(8)]


def test_padding_counts_where_rows_are_padded() -> None:
    examples = made_up([40, 10, 10, 10])
    for batch in pair_batches(examples, limits(100), shares=False, padded=True):
        assert len(batch.lengths) * max(batch.lengths) <= 100

"""Few-shot prompts: what stands before a row, how many examples fit, and that the row's own answer stays the only target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lorakeet.data.chat import Encoder
from lorakeet.data.few_shot import WIDE, FewShot, choose_examples, wider
from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec


def row(number: int, answer: str, label: str | None = None, *, padding: int = 0) -> Row:
    turns = (Turn("user", f"Question {number}" + " and" * padding, False), Turn("assistant", answer, True))
    return Row(turns, label, None, f"rows:{number}")


def made(byte_tokenizer: Callable[..., Any], chat: str, labels: tuple[str, ...] = (), max_tokens: int = 400) -> Encoder:
    spec = DataSpec(train="rows", max_tokens=max_tokens, chat_template=chat)  # type: ignore[arg-type]
    return Encoder(byte_tokenizer(), spec, labels)


def text_of(encoder: Encoder, ids: Any) -> str:
    return str(encoder.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("chat", ["on", "off"])
def test_examples_come_first_and_the_rows_own_answer_is_the_only_target(byte_tokenizer: Callable[..., Any], chat: str) -> None:
    encoder = made(byte_tokenizer, chat)
    shown = FewShot(encoder, (row(1, "one"), row(2, "two"))).row(row(3, "three"))
    question, example = encoder.question(shown), encoder.encode(shown)
    assert question is not None and example is not None
    prompt, answer = (text_of(encoder, ids) for ids in question)
    assert "three" in answer and "three" not in prompt
    places = [prompt.index(part) for part in ("Question 1", "one", "Question 2", "two", "Question 3")]
    assert places == sorted(places)
    assert int(example.supervised.sum()) == len(question[1]), "the answers of the examples are no targets"


def test_without_a_chat_template_an_empty_line_ends_each_example(byte_tokenizer: Callable[..., Any]) -> None:
    encoder = made(byte_tokenizer, "off")
    found = encoder.question(FewShot(encoder, (row(1, "one"),)).row(row(2, "two")))
    assert found is not None and text_of(encoder, found[0]) == "Question 1\none\n\nQuestion 2\n"


def test_labels_are_named_before_the_first_example(byte_tokenizer: Callable[..., Any]) -> None:
    encoder = made(byte_tokenizer, "off", ("no", "yes"))
    shown = FewShot(encoder, (row(1, "no", "no"),)).row(row(2, "yes", "yes"))
    found = encoder.candidates(shown)
    assert found is not None and found.label == 1
    assert text_of(encoder, found.prompt).startswith("The answer is one of: no, yes.\n\nQuestion 1\nno\n\nQuestion 2")


def test_a_long_row_takes_fewer_examples_or_none(byte_tokenizer: Callable[..., Any]) -> None:
    encoder = made(byte_tokenizer, "off", max_tokens=120)
    few = FewShot(encoder, tuple(row(number, "one") for number in range(4)))
    counts = [len(few.row(row(9, "x", padding=padding)).turns) // 2 - 1 for padding in (0, 55, 80, 100)]
    assert counts[0] == 4 and counts == sorted(counts, reverse=True) and counts[-1] == 0 and 0 < counts[1] < 4
    assert all(encoder.tokens_of(few.row(row(9, "x", padding=padding))) <= 120 for padding in (0, 55, 80))
    fewer = FewShot(encoder, few.examples, limit=60).row(row(9, "x"))
    assert encoder.tokens_of(fewer) <= 60 and 1 < len(fewer.turns) // 2 < 5, "room for a reply is left in the context"


def test_examples_are_drawn_from_each_label_in_turn_and_fit_their_share(byte_tokenizer: Callable[..., Any]) -> None:
    encoder = made(byte_tokenizer, "off", ("a", "b", "c"))
    rows = [row(number, label, label) for number, label in enumerate("aaaaaaaabc")]
    chosen = choose_examples(rows, 2, encoder, seed=0, own=encoder.spec.max_tokens)
    assert sorted(each.label or "" for each in chosen) == ["a", "b", "c"], "as many as there are labels, at least"
    assert choose_examples(rows, 2, encoder, seed=0, own=encoder.spec.max_tokens) == chosen
    assert any(choose_examples(rows, 2, encoder, seed=seed, own=400) != chosen for seed in range(1, 9))
    assert choose_examples(rows, 0, encoder, seed=0, own=encoder.spec.max_tokens) == ()
    long = [row(number, "a", "a", padding=250) for number in range(4)]
    assert choose_examples(long, 4, encoder, seed=0, own=encoder.spec.max_tokens) == ()


def test_short_rows_are_not_preferred_where_long_ones_are_usual(byte_tokenizer: Callable[..., Any]) -> None:
    encoder = made(byte_tokenizer, "off", max_tokens=400)
    rows = [row(number, "a", padding=60) for number in range(20)] + [row(number, "b") for number in range(5)]
    chosen = choose_examples(rows, 8, encoder, seed=0, own=encoder.spec.max_tokens)
    assert 1 <= len(chosen) <= 4 and any(encoder.tokens_of(each) > 50 for each in chosen)


def test_the_limit_of_training_rows_is_not_that_of_few_shot_rows(byte_tokenizer: Callable[..., Any]) -> None:
    """Rows of 60 tokens of at most 120: one example fits into half of that, eight into what the context leaves."""
    encoder = made(byte_tokenizer, "off", max_tokens=120)
    rows = [row(number, "one", padding=45) for number in range(20)]
    assert 50 < encoder.tokens_of(rows[0]) <= 70
    assert len(choose_examples(rows, 8, encoder, seed=0, own=120)) == 1
    wide = wider(encoder, 4096)
    chosen = choose_examples(rows, 8, wide, seed=0, own=120)
    shown = FewShot(wide, chosen).row(row(99, "two"))
    assert wide.spec.max_tokens == WIDE and len(chosen) == 8 and len(shown.turns) == 2 * 9
    found = wide.question(shown)
    assert found is not None and text_of(wide, found[0]).count("Question") == 9
    assert [wider(encoder, context).spec.max_tokens for context in (None, 300, 100)] == [WIDE, 300, 120]


def test_a_long_row_is_shortened_for_the_few_shot_base_as_for_all(byte_tokenizer: Callable[..., Any]) -> None:
    encoder = made(byte_tokenizer, "off", max_tokens=120)
    long = Row((Turn("user", "Question " + "and " * 150, False), Turn("assistant", "x", True)), None, None, "rows:1")
    shorter, example = encoder.shortened(long), encoder.encode(long)
    assert shorter is not None and example is not None and shorter != long
    found = wider(encoder, None).question(FewShot(wider(encoder, None), (row(1, "one"),)).row(shorter))
    assert found is not None and text_of(encoder, found[0]).endswith(text_of(encoder, example.ids[~example.supervised]))


def test_raw_text_is_no_question(byte_tokenizer: Callable[..., Any]) -> None:
    encoder = made(byte_tokenizer, "off")
    raw = Row((Turn("", "A text of its own.", True),), None, None, "rows:1")
    assert encoder.question(raw) is None and choose_examples([raw], 3, encoder, seed=0, own=encoder.spec.max_tokens) == ()

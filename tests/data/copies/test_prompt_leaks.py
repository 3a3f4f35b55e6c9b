"""Evaluated rows that were pasted into a template or a system prompt are named: what is measured on them proves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakeet.data.copies.prompt_leaks import prompt_leak_notes, rows_in_prompts
from lorakeet.data.prepare import load_dataset
from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec
from lorakeet.errors import DataError

NOUNS = ("router", "bill", "phone", "contract", "password", "letter", "parcel", "screen", "invoice", "cable")


def write(path: Path, first: int, count: int) -> str:
    rows = [
        {"text": f"My {NOUNS[n % 10]} {n} was late by {n * n} days, in {n * 7} places", "label": "ab"[n % 2]}
        for n in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(text: str, source: str, system: str = "", template: str = "{}") -> Row:
    before, _, after = template.partition("{}")
    span = (len(before), len(before) + len(text))
    turns = [Turn("user", before + text + after, False, free=span), Turn("assistant", "a", True)]
    return Row((*([Turn("system", system, False)] if system else []), *turns), "a", None, source)


def test_a_test_row_in_the_template_is_named_or_refused(tmp_path: Path) -> None:
    train, test = write(tmp_path / "train.jsonl", 0, 40), write(tmp_path / "test.jsonl", 40, 10)
    template = "Example: my ROUTER 40 was late by 1600 days in 280 places → a\n{text}"
    note = "1 test row stands in the prompt template or a system prompt (test.jsonl:1), so numbers on such rows prove nothing."
    found = load_dataset(DataSpec(train=train, test=test, template=template))
    assert any(said.startswith(note) for said in found.notes) and len(found.test) == 10
    system = load_dataset(DataSpec(train=train, test=test, system=template.partition("\n")[0]))
    assert any(said.startswith(note) for said in system.notes)
    with pytest.raises(DataError, match="1 test row stands in the prompt template"):
        load_dataset(DataSpec(train=train, test=test, template=template, on_leak="refuse"))
    assert not any("stand" in said for said in load_dataset(DataSpec(train=train, test=test)).notes)


def test_a_training_row_as_an_example_is_no_leak_and_held_out_rows_are_counted(tmp_path: Path) -> None:
    examples = "Number 3 has 9 legs today: a. Number 7 has 49 legs today"
    rows = [asked(f"number {n} has {n * n} legs today", f"r:{n}", system=examples) for n in range(10)]
    assert prompt_leak_notes({"training": rows[:5], "held-out": rows[5:7]}, "refuse") == []
    (said,) = prompt_leak_notes({"training": rows[:2], "held-out": rows[2:8], "test": rows[8:]}, "drop")
    assert said.startswith("2 held-out rows stand in the prompt template or a system prompt (r:3, r:7), so")


def test_only_whole_texts_of_four_words_or_six_characters_count() -> None:
    template = "The cat sat on the mat, 猫坐在垫子上, and so on: {}"
    found = {"The cat sat on the mat": 1, "cat sat on the": 1, "猫坐在垫子上": 1}
    for text, count in {**found, "the cat sat": 0, "the cat sat on a mat": 0, "猫坐在垫": 0}.items():
        row = asked(text, "x:1", template=template)
        assert len(rows_in_prompts([row], [asked("other", "y:1", template=template)])) == count, text
        assert rows_in_prompts([row], [asked(text, "z:1")]) == (), "a row's own text is no template"

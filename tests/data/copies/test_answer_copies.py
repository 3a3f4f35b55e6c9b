"""`copies.answer_copies`: answers of held-out preferences that stand in training rows."""

from __future__ import annotations

from pathlib import Path

from lorakeet.data.copies.answer_copies import OFTEN, answer_copy_notes
from lorakeet.data.prepare import load_dataset
from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec
from lorakeet.registry import objectives
from tiny.runs import write_rows

LONG, OTHER, THIRD = (f"the {word} river flows to the north sea" for word in ("first", "second", "third"))


def pair(number: int, chosen: str, rejected: str = "") -> Row:
    asked = Turn("user", f"Question {number}?", supervised=False)
    turns = [(asked, Turn("assistant", answer, supervised=True)) for answer in (chosen, rejected) if answer]
    second = turns[1] if len(turns) > 1 else ()
    return Row(turns[0], None, None, f"rows:{number}", rejected=second, desirable=None if second else True)


def test_either_answer_of_a_pair_is_compared_with_either() -> None:
    train, short = [pair(1, LONG, OTHER)], "Yes, it is."
    held_out = [pair(2, OTHER.upper() + ".", THIRD), pair(3, THIRD, LONG), pair(4, THIRD, short), pair(5, LONG)]
    (note,) = answer_copy_notes({"training": [*train, pair(6, short, "No.")], "held-out": held_out, "test": []})
    assert note.startswith("3 held-out rows have an answer that a training row has too") and "(rows:2, rows:3, rows:5)" in note


def test_set_phrases_and_rows_without_preferences_are_not_named() -> None:
    trained = [pair(number, LONG, f"{OTHER} {number}") for number in range(OFTEN)]
    assert answer_copy_notes({"training": trained, "held-out": [pair(9, LONG, THIRD)]}) == []
    turns = (Turn("user", "Which?", supervised=False), Turn("assistant", LONG, supervised=True))
    plain = [Row(turns, None, None, f"rows:{number}") for number in range(2)]
    assert answer_copy_notes({"training": plain[:1], "held-out": plain[1:]}) == []


def test_a_run_says_it(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is number {n}?", "chosen": f"{LONG} of {n}", "rejected": f"{OTHER} of {n}"} for n in range(4)]
    held_out = [{**rows[1], "prompt": "How long is the longest bridge?"}, {"prompt": "Who?", "chosen": "A", "rejected": "B"}]
    paths = [str(write_rows(tmp_path / name, part)) for name, part in (("train.jsonl", rows), ("held_out.jsonl", held_out))]
    found = load_dataset(DataSpec(train=paths[0], held_out=paths[1], near_duplicates=0.0), objectives()["dpo"])
    assert any(note.startswith("1 held-out row has an answer that a training row has too") for note in found.notes)

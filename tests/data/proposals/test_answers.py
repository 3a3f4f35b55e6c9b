"""Answers that are no JSON are named where nearly all others are."""

import json

from lorakeet.data.proposals.answers import broken_json_notes
from lorakeet.data.rows import Row, Turn

WHOLE = [json.dumps({"item": "latte", "count": number}) for number in range(40)]


def rows(answers: list[str], label: str | None = None) -> list[Row]:
    return [
        Row((Turn("user", f"order {number}", False), Turn("assistant", answer, True)), label, None, f"f:{number}")
        for number, answer in enumerate(answers)
    ]


def test_broken_json_among_json_is_named() -> None:
    broken = [*WHOLE[:7], WHOLE[7][:-1], *WHOLE[8:]]
    [said] = broken_json_notes(rows(broken))
    assert said.startswith("1 of 40 answers is no valid JSON, and the others are: f:7; the first ends in ")
    assert WHOLE[7][-9:-1] in said
    broken[9] = "two lattes"
    [said] = broken_json_notes(rows(broken))
    assert said.startswith("2 of 40 answers are no valid JSON") and "f:7, f:9;" in said


def test_other_answers_are_not_expected_to_be_json() -> None:
    assert broken_json_notes(rows(WHOLE)) == [] and broken_json_notes(rows(["yes", "no"] * 20)) == []
    assert broken_json_notes(rows([*WHOLE[:20], *["yes"] * 20])) == [], "half of them are another kind of answer"
    assert broken_json_notes(rows([*WHOLE[:8], "no"])) == [], "nine answers are too few"
    assert broken_json_notes(rows([*WHOLE[:38], "x", "y"], label="a")) == [] and broken_json_notes([]) == []
    assert len(broken_json_notes(rows([*WHOLE, "[" * 100_000]))) == 1, "nested too deeply"

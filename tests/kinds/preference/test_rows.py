"""Records of preferences: each shape gives the same rows, and what cannot be compared is named by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakeet.data.prepare import load_dataset
from lorakeet.data.read import read_rows
from lorakeet.data.rows import Row
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import UnusableRow
from lorakeet.errors import DataError
from lorakeet.kinds.preference.rows import dialogue, split_texts, verdict, with_mismatches
from lorakeet.registry import objectives
from tiny.runs import write_rows

USER = {"role": "user", "content": "Which way?"}
GOOD, BAD = {"role": "assistant", "content": "Left."}, {"role": "assistant", "content": "Right."}
SHAPES: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Which way?", "chosen": "Left.", "rejected": "Right."},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "implicit prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "prompt and whole conversations": {"prompt": "Which way?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "Anthropic": {
        "chosen": "\n\nHuman: Which way?\n\nAssistant: Left.", "rejected": "\n\nHuman: Which way?\n\nAssistant: Right."
    },
    "Alpaca": {"instruction": "Which way?", "input": "", "chosen": "Left.", "rejected": "Right."},
    "question": {"question": "Which way?", "chosen": "Left.", "rejected": "Right."},
}  # fmt: skip


def read(tmp_path: Path, *records: dict[str, Any], **settings: Any) -> list[Row]:
    return read_rows(str(write_rows(tmp_path / "rows.jsonl", records)), DataSpec(train="x", **settings))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_row(shape: str, tmp_path: Path) -> None:
    (row,) = read(tmp_path, SHAPES[shape])
    assert [(turn.role, turn.text, turn.supervised) for turn in row.turns] == [
        ("user", "Which way?", False), ("assistant", "Left.", True),
    ]  # fmt: skip
    assert row.other is not None and row.other.turns[-1].text == "Right." and row.other.turns[0] == row.turns[0]
    (plain,) = read(tmp_path, SHAPES["texts"])
    assert row.key == plain.key


def test_only_the_answer_after_the_common_turns_is_trained(tmp_path: Path) -> None:
    before = [USER, GOOD, {"role": "user", "content": "And then?"}]
    (row,) = read(tmp_path, {"chosen": [*before, GOOD], "rejected": [*before, BAD]})
    assert [turn.supervised for turn in row.turns] == [False, False, False, True]


SYSTEM = {"role": "system", "content": "Be brief."}
WHOLE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
WITH_SYSTEM = {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Which way? \n", **WHOLE},
        {"prompt": "Which way?", **WHOLE, "rejected": [{**USER, "content": " Which way?"}, BAD]},
        {"system": "Be brief.", **WHOLE},
        {"system": "Be brief.", **WITH_SYSTEM},
        {"system": "Be brief.", "prompt": "Which way?", **WHOLE},
        {"prompt": "Which way?", **WITH_SYSTEM},
        {"prompt": [SYSTEM, USER], **WHOLE},
        {"system": "Be brief.", **SHAPES["Anthropic"]},
    ],
)
def test_a_prompt_beside_whole_conversations_is_not_doubled(record: dict[str, Any], tmp_path: Path) -> None:
    (row,) = read(tmp_path, record, system="Be brief.")
    for turns, answer in ((row.turns, "Left."), (row.rejected, "Right.")):
        assert [turn.role for turn in turns] == ["system", "user", "assistant"] and turns[-1].text == answer
        assert [turn.text.strip() for turn in turns[:-1]] == ["Be brief.", "Which way?"]
    assert row.turns[:-1] == row.rejected[:-1] and [turn.supervised for turn in row.turns] == [False, False, True]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Which one?", **WHOLE},
        {"system": "Be long.", **WITH_SYSTEM},
        {"prompt": "Which one?", **WITH_SYSTEM},
    ],
)
def test_a_second_prompt_is_refused(record: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the prompt is .* Remove one of the two prompts"):
        read(tmp_path, record)


def test_turns_before_the_answer_are_not_trained_where_a_prompt_is_given(tmp_path: Path) -> None:
    before = [USER, GOOD, {"role": "user", "content": "And then?"}]
    for given in ({"prompt": "Which way?"}, {"system": "Be brief."}, {}):
        (row,) = read(tmp_path, {**given, "chosen": [*before, GOOD], "rejected": [*before, BAD]}, system="Be brief.")
        assert [turn.supervised for turn in row.turns] == [False, False, False, False, True]


def test_a_common_system_turn_alone_is_no_common_prompt(tmp_path: Path) -> None:
    other = {"role": "user", "content": "Other?"}
    with pytest.raises(DataError, match="expected the same prompt in both"):
        read(tmp_path, {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, other, BAD]})


def test_a_system_prompt_stands_before_both_answers(tmp_path: Path) -> None:
    (row,) = read(tmp_path, SHAPES["texts"], system="Be brief.")
    assert row.other is not None
    assert [turn.role for turn in row.turns] == [turn.role for turn in row.other.turns] == ["system", "user", "assistant"]


def test_tools_stand_before_both_answers(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "turn", "description": "Turns.", "parameters": {"type": "object"}}}
    (row,) = read(tmp_path, {**SHAPES["implicit prompt"], "tools": [tool]})
    other = row.other
    assert other is not None and row.tools == other.tools and json.loads(row.tools)[0]["function"]["name"] == "turn"
    (plain,) = read(tmp_path, SHAPES["implicit prompt"])
    assert plain.key != row.key


def test_a_pair_whose_prompt_is_a_copy_is_found_whatever_its_answers(tmp_path: Path) -> None:
    prompt = "What did the gardener say about the red roses near the old stone wall in spring"
    train = [_pair(f"{prompt}?", "They are ready."), _pair("Which of the two rivers is longer, and by how much?", "The first.")]
    held_out = [_pair(prompt.upper(), "Something else."), _pair("Another question?", "Yes, it is.")]
    paths = [str(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("train", train), ("held_out", held_out))]
    found = load_dataset(DataSpec(train=paths[0], held_out=paths[1]), objectives()["dpo"])
    assert [pair.kind for pair in found.leaks.across] == ["prompt"] and len(found.train) == 1


def test_the_rejected_answer_is_part_of_a_rows_content(tmp_path: Path) -> None:
    one, other = read(tmp_path, SHAPES["texts"], {**SHAPES["texts"], "rejected": "Back."})
    assert one.key != other.key


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "p", "chosen": "same", "rejected": "same"}, "chosen and rejected are equal"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "column 'chosen' is empty"),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "Other?"}, BAD]}, "expected the same prompt in both"),
        ({"chosen": "Left.", "rejected": "Right."}, "there is no column 'prompt'"),
        ({"chosen": "Go left", "rejected": "Go left now"}, "there is no column 'prompt'"),
        ({"chosen": "Go left", "rejected": "Go left"}, "chosen and rejected are equal"),
        ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "chosen does not end in an answer of the assistant"),
    ],
)
def test_pairs_that_cannot_be_compared_are_named(record: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2") as caught:
        read(tmp_path, SHAPES["implicit prompt"] if "prompt" not in record else SHAPES["texts"], record)
    assert said in str(caught.value)


def test_rated_answers_are_told_from_labelled_texts(tmp_path: Path) -> None:
    rows = read(tmp_path, {"prompt": "p", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False})
    assert [row.desirable for row in rows] == [True, False] and [row.label for row in rows] == [None, None]
    (chat,) = read(tmp_path, {"messages": [USER, GOOD], "label": False})
    assert chat.desirable is False and chat.turns[-1].supervised


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}], "label": False},
        {"prompt": "p", "response": "a", "label": False},
    ],
)
def test_verdicts_are_read_beside_other_names_of_an_answer(record: dict[str, Any], tmp_path: Path) -> None:
    (row,) = read(tmp_path, record)
    assert row.desirable is False and [turn.text for turn in row.turns] == ["p", "a"]


def test_sft_says_that_it_reads_no_verdict(tmp_path: Path) -> None:
    rated = [{"prompt": f"{n}?", "completion": "a", "label": n % 2 == 0} for n in range(40)]
    found = load_dataset(DataSpec(train=str(write_rows(tmp_path / "r.jsonl", rated))), objectives()["sft"])
    (note,) = [note for note in found.notes if "train.objective kto" in note]
    assert "a column 'label' of true and false, which sft does not read: answers of false are trained too" in note
    stars = [{**record, "label": n % 5} for n, record in enumerate(rated)]
    other = load_dataset(DataSpec(train=str(write_rows(tmp_path / "s.jsonl", stars))), objectives()["sft"])
    wanted = load_dataset(DataSpec(train=str(tmp_path / "r.jsonl")), objectives()["kto"])
    assert not any("train.objective kto" in note for note in (*other.notes, *wanted.notes))


@pytest.mark.parametrize(("value", "wanted"), [(True, True), (0, False), ("Good", True), ("false", False)])
def test_verdicts(value: object, wanted: bool) -> None:
    assert verdict(value) is wanted


def test_a_verdict_of_another_kind_is_refused() -> None:
    with pytest.raises(UnusableRow, match="'label' is 'perhaps'"):
        verdict("perhaps")


def test_mismatched_answers_come_from_the_row_before(tmp_path: Path) -> None:
    records = [{"prompt": f"p{n}", "completion": f"a{n}", "label": bool(n % 2)} for n in range(3)]
    rows = with_mismatches(read(tmp_path, *records))
    assert [(row.turns[-1].text, row.rejected[-1].text, row.rejected[0].text) for row in rows] == [
        ("a0", "a2", "p0"), ("a1", "a0", "p1"), ("a2", "a1", "p2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "records", "said"),
    [
        ("sft", [SHAPES["texts"]], "two answers, but train.objective is sft"),
        ("sft", [{"prompt": "p", "completion": "a", "label": True}], "a verdict on its answer, but train.objective is sft"),
        ("dpo", [{"prompt": "p", "completion": "a"}], "no two answers, but train.objective is dpo"),
        ("dpo", [{"prompt": "p", "completion": "a", "label": True}], "take kto"),
        ("kto", [SHAPES["texts"]], "no verdict on its answer"),
        ("kto", [{"prompt": str(n), "completion": "a", "label": True} for n in range(3)], "or take sft."),
        ("kto", [{"prompt": str(n), "completion": "a", "label": False} for n in range(3)], "add rows of the label true."),
    ],
)
def test_rows_of_another_objective_are_refused(
    objective: str, records: list[dict[str, Any]], said: str, tmp_path: Path
) -> None:
    rows = read(tmp_path, *records)
    with pytest.raises(DataError) as caught:
        objectives()[objective].taken(rows, "training")
    assert said in str(caught.value)


def test_rows_of_two_kinds_are_read_by_the_objective(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "completion": "a", "label": str(n % 2 == 0)} for n in range(40)]
    rated = write_rows(tmp_path / "r.jsonl", rows)
    assert {row.desirable for row in load_dataset(DataSpec(train=str(rated)), objectives()["kto"]).train} == {True, False}
    rows = [{"messages": [USER, {**GOOD, "content": f"{n}."}], "label": True} for n in range(40)]
    both = write_rows(tmp_path / "b.jsonl", rows)
    assert all(row.desirable is None for row in load_dataset(DataSpec(train=str(both)), objectives()["sft"]).train)


def test_sft_names_the_format_as_another_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data\.format chat\|completion\|alpaca\|classification\|text"):
        objectives()["sft"].taken(read(tmp_path, SHAPES["texts"]), "training")


@pytest.mark.parametrize("label", [True, False])
def test_held_out_rows_of_one_verdict_are_noted(label: bool, tmp_path: Path) -> None:
    def rated(name: str, count: int, labels: tuple[bool, ...]) -> str:
        records = [{"prompt": f"{name} {n}?", "completion": "a", "label": labels[n % len(labels)]} for n in range(count)]
        return str(write_rows(tmp_path / f"{name}.jsonl", records))

    spec = DataSpec(train=rated("train", 8, (True, False)), held_out=rated("held", 3, (label,)), test=rated("test", 2, (label,)))
    found = load_dataset(spec, objectives()["kto"])
    assert len(found.held_out) == 3 and len(found.test) == 2
    for part, count in (("held-out", 3), ("test", 2)):
        assert any(note.startswith(f"All {count} {part} rows have the label {str(label).lower()}") for note in found.notes)
    with pytest.raises(DataError, match=f"All 3 training rows have the label {str(label).lower()}"):
        load_dataset(DataSpec(train=spec.held_out, held_out=spec.train), objectives()["kto"])


def test_a_dialogue_needs_its_speakers() -> None:
    assert dialogue("no speaker") is None
    assert dialogue("Human: a\n\nAssistant: b") == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def _pair(prompt: str, chosen: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": "No.", **more}


def test_pairs_of_one_prompt_stay_on_one_side_and_are_one_group(tmp_path: Path) -> None:
    pairs = [_pair(f"Question {number // 4}?", f"Answer {number}.") for number in range(48)]
    path = write_rows(tmp_path / "rows.jsonl", pairs)
    found = load_dataset(DataSpec(train=str(path), held_out_fraction=0.25), objectives()["dpo"])
    sides = [{row.text for row in part} for part in (found.train, found.held_out)]
    assert all(sides) and not sides[0] & sides[1]
    assert all(row.group for row in (*found.train, *found.held_out))


def test_verdicts_on_answers_to_one_prompt_are_one_group(tmp_path: Path) -> None:
    records = [{"prompt": f"Which {number // 2}?", "completion": f"{number}.", "label": number % 2 == 0} for number in range(6)]
    rows = read(tmp_path, *records)
    assert [row.group for row in rows[::2]] == [row.group for row in rows[1::2]] and len({row.group for row in rows}) == 3


@pytest.mark.parametrize(
    ("chosen", "rejected", "parts"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),
        ("Which way?\nLeft", "Which way?\nRight", ("Which way?", "\nLeft", "\nRight")),
        ("It rains", "It", ("It", " rains", "")),
        ("Left", "Right", ("", "Left", "Right")),
    ],
)
def test_the_common_words_of_two_texts_are_their_prompt(chosen: str, rejected: str, parts: tuple[str, str, str]) -> None:
    assert split_texts(chosen, rejected) == parts


def test_a_prompt_that_is_guessed_is_said(tmp_path: Path) -> None:
    """TRL's implicit prompt of plain texts."""
    notes: list[str] = []
    path = write_rows(tmp_path / "rows.jsonl", [{"chosen": "The sky is blue.", "rejected": "The sky is green."}])
    (row,) = read_rows(str(path), DataSpec(train="x"), notes=notes)
    assert [(turn.role, turn.text) for turn in row.turns] == [("user", "The sky is"), ("assistant", " blue.")]
    assert len(notes) == 1 and "first 'The sky is'" in notes[0] and "add the column" in notes[0]
    for shape in SHAPES.values():
        notes.clear()
        read_rows(str(write_rows(tmp_path / "other.jsonl", [shape])), DataSpec(train="x"), notes=notes)
        assert notes == []

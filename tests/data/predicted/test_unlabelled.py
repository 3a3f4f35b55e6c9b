"""Rows without an answer take the shape of the training, and columns that are missing are named with what may be meant."""

import pytest

from lorakeet.data.predicted.unlabelled import fitting_columns, row_shaper
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import FileRecord, RowProblems
from lorakeet.errors import DataError

LABELS = ("bad", "good")


def shaped(values: dict[str, object], spec: DataSpec, labels: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    row = row_shaper("f", spec, labels, RowProblems("f"))(FileRecord("f:2", values))
    return [] if row is None else [(turn.role, turn.text) for turn in row.turns[:-1]]


def test_a_text_becomes_the_prompt_of_the_training() -> None:
    spec = DataSpec(train="x", text_column="Text", label_column="Kind", template="Review: {text}", labels=LABELS)
    assert shaped({"Text": "fine"}, spec, LABELS) == [("user", "Review: fine")]
    assert shaped({"Text": "fine", "Kind": "unknown"}, spec, LABELS) == [("user", "Review: fine")], "a label is not read"
    assert shaped({"Text": "  "}, spec, LABELS) == []


def test_prompts_chats_and_instructions_are_read_and_their_answers_are_not() -> None:
    spec = DataSpec(train="x")
    assert shaped({"prompt": "Hi?"}, spec) == shaped({"prompt": "Hi?", "response": "no"}, spec) == [("user", "Hi?")]
    assert shaped({"instruction": "Add", "input": "1 2"}, spec) == [("user", "Add\n\n1 2")]
    turns = [{"role": "user", "content": "Hi?"}]
    assert shaped({"messages": turns}, spec) == [("user", "Hi?")]
    assert shaped({"messages": [*turns, {"role": "assistant", "content": "old"}]}, spec) == [("user", "Hi?")]
    assert shaped({"messages": "no list"}, spec) == []
    with pytest.raises(DataError, match="has the columns 'a'; expected 'prompt', 'messages' or 'instruction'"):
        fitting_columns([FileRecord("f:2", {"a": "b"})], "f", spec, ())


def test_a_column_in_another_case_is_taken_and_said() -> None:
    spec = DataSpec(train="x", text_column="Text", label_column="Kind")
    found, said = fitting_columns([FileRecord("f:2", {"text": "a"})], "f", spec, LABELS)
    assert found.text_column == "text" and said == "Column 'text' is taken for 'Text', as it was called in training."
    assert fitting_columns([FileRecord("f:2", {"Text": "a"})], "f", spec, LABELS) == (spec, "")


def test_of_two_columns_in_other_cases_none_is_taken() -> None:
    spec = DataSpec(train="x", label_column="Kind")
    with pytest.raises(DataError, match=r"'Text', 'TEXT' differ in case only: set --text-column to the one that is meant"):
        fitting_columns([FileRecord("f:2", {"Text": "a", "TEXT": "b"})], "f", spec, LABELS)


def test_another_column_is_proposed_and_not_taken() -> None:
    spec = DataSpec(train="x", text_column="Text", label_column="Kind")
    with pytest.raises(DataError, match=r"no column 'Text', which .* it has 'id', 'Beschwerde'\. .*--text-column Beschwerde"):
        fitting_columns([FileRecord("f:2", {"id": "1", "Beschwerde": "a"})], "f", spec, LABELS)
    spec = DataSpec(train="x", template="{drug}: {text}")
    with pytest.raises(DataError, match=r"no column 'drug'.*Rename the columns, or add them"):
        fitting_columns([FileRecord("f:2", {"text": "1"})], "f", spec, LABELS)


def test_a_record_without_its_field_is_one_row_that_is_named() -> None:
    for spec, labels, good, wanted in (
        (DataSpec(train="x"), LABELS, {"text": "fine"}, "'text'"),
        (DataSpec(train="x"), (), {"prompt": "fine"}, "'prompt', 'messages' or 'instruction'"),
    ):
        records = [FileRecord("f:1", {"txt": "a"}), FileRecord("f:2", {**good})]
        assert fitting_columns(records, "f", spec, labels) == (spec, ""), "one record does not speak for the file"
        problems = RowProblems("f")
        shape = row_shaper("f", spec, labels, problems)
        assert [shape(record) is None for record in records] == [True, False]
        assert problems.count == 1 and problems.first == f"f:1: no column {wanted}; the row has 'txt'."


def test_other_columns_of_the_template_may_lack() -> None:
    spec = DataSpec(train="x", template="{drug}: {text}")
    assert shaped({"text": "fine"}, spec, LABELS) == [("user", ": fine")], "as in training"

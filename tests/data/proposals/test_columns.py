"""Columns of text and label are proposed by their names and by what they hold, and only where that speaks for it."""

import pytest

from lorakeet.data.proposals.columns import near_column, overlooked_label, possible_labels, propose_answers, propose_columns
from lorakeet.data.tables import FileRecord
from lorakeet.errors import Remedy

COMPLAINTS = [f"The soup of day {number} was cold again, nobody answered." for number in range(12)]


def records(**columns: list[str]) -> list[FileRecord]:
    rows = zip(*columns.values(), strict=True)
    return [FileRecord(f"f:{number}", dict(zip(columns, row, strict=True))) for number, row in enumerate(rows)]


def flags(found: list[FileRecord], text: str | None = "text", label: str | None = None) -> str:
    proposal = propose_columns(found, {"text": text, "label": label})
    return "" if proposal is None else " ".join(one.flag for one in proposal.remedies)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Text", "Kategorie"), ("TEXT", "LABEL"), ("Réclamation", "Catégorie"), ("Comentario", "Etiqueta"),
        ("Mensaje del dueño", "Urgencia (según recepción)"),
        ("review text", "class id"),
    ],
)  # fmt: skip
def test_names_are_known_in_any_case_and_in_some_languages(text: str, label: str) -> None:
    one = records(**{label: ["a"], text: ["b"]})
    proposal = propose_columns(one, {"text": "text", "label": None})
    assert proposal is not None and (proposal.text, proposal.label) == (text, label)
    assert all(remedy.flag in proposal.words for remedy in proposal.remedies)


def test_what_columns_hold_is_read_where_names_say_nothing() -> None:
    kinds = ["food", "care", "bill"] * 4
    assert flags(records(k1=kinds, k2=COMPLAINTS)) == "--data.text_column k2 --data.label_column k1"
    numbers = [str(number) for number in range(12)]
    assert flags(records(id=numbers, k1=kinds, k2=COMPLAINTS)) == "--data.text_column k2 --data.label_column k1"
    assert flags(records(k1=kinds, k2=COMPLAINTS, k3=kinds)) == "--data.text_column k2", "of two that repeat, none is proposed"
    two = propose_columns(records(k1=kinds, k2=COMPLAINTS, k3=kinds), {"text": "text", "label": None})
    assert two is not None and "'k1' (3 values) and 'k3' (3 values) have values that repeat" in two.words
    assert "set --data.label_column too" in two.words, "the flags alone would train on plain text"
    assert flags(records(k1=numbers, k2=numbers)) == ""


def test_a_name_alone_does_not_make_long_or_different_values_labels() -> None:
    assert flags(records(text=COMPLAINTS, type=[f"T{number}" for number in range(12)])) == ""
    assert flags(records(Text=COMPLAINTS, target=COMPLAINTS)) == "--data.text_column Text"


def test_beside_an_empty_column_of_labels_no_other_one_is_the_label() -> None:
    """A file whose categories are still to be filled in is not trained on its wards; an empty column of tags says nothing."""
    wards, empty = ["Ash", "Birch", "Cedar"] * 4, [""] * 12
    unfilled = records(Ward=wards, Notes=COMPLAINTS, Category=empty)
    assert flags(unfilled) == "--data.text_column Notes" and overlooked_label(unfilled, {"Notes"}) is None
    proposal = propose_columns(unfilled, {"text": "text", "label": None})
    assert proposal is not None and "'Category', named like the label, is empty" in proposal.words
    assert flags(records(Ward=wards, Notes=COMPLAINTS, Tags=empty)) == "--data.text_column Notes --data.label_column Ward"


def test_columns_that_were_given_are_kept() -> None:
    both = records(k1=["food", "care", "bill"] * 4, k2=COMPLAINTS)
    assert flags(both, text="k2") == "--data.label_column k1"
    assert flags(both, label="k1") == "--data.text_column k2"
    assert flags(both, text="k2", label="k1") == ""


def test_questions_and_answers_are_renamed() -> None:
    said = propose_answers({"Frage": "a", "Antwort": "b"})
    assert said == "If 'Frage' is answered by 'Antwort', rename 'Frage' to 'prompt' and 'Antwort' to 'completion'."
    assert propose_answers({"prompt": "", "Reply": ""}) == "If 'prompt' is answered by 'Reply', rename 'Reply' to 'completion'."
    assert propose_answers({"a": "", "b": ""}) == ""


def test_a_column_of_labels_beside_the_text_is_overlooked_only_if_it_repeats() -> None:
    kinds = ["food", "care", "bill"] * 4
    found = overlooked_label(records(text=COMPLAINTS, Kategorie=kinds), {"text"})
    assert found == Remedy("data.label_column", "Kategorie", "'Kategorie' is the label")
    assert overlooked_label(records(text=COMPLAINTS, author=[f"A{number}" for number in range(12)]), {"text"}) is None
    assert overlooked_label(records(text=COMPLAINTS), {"text"}) is None


def test_near_names() -> None:
    assert near_column("kategorie", ["Text", "Kategorie"]) == "Kategorie" and near_column("reveiw", ["review", "x"]) == "review"
    assert near_column("text", ["a", "b"]) is None
    assert near_column("text", ["Text", "TEXT"]) is None, "of two that are as near none is taken"


def test_every_column_that_may_be_the_label_is_named() -> None:
    texts = records(text=[f"mensaje {n} de la dueña" for n in range(12)], turno=["a", "b"] * 6, cola=["x", "y", "z"] * 4)
    assert [one.value for one in possible_labels(texts, {"text"})] == ["turno", "cola"]
    assert possible_labels(texts, {"text", "turno", "cola"}) == []

"""Labels that may be slips are named with the one that is meant; other short, numbered or frequent labels are not."""

import pytest

from lorakeet.data.proposals.labels import doubtful_labels, label_notes, slips


def test_a_typo_is_named_and_not_proposed() -> None:
    counts = {"Abrechnung": 30, "Verpflegng": 1, "Verpflegung": 25}
    assert label_notes(counts) == ["'Verpflegng' has 1 row and is very like 'Verpflegung' (25): a typo? If so, mend the file."]
    assert doubtful_labels(counts) == {"Verpflegng"}


@pytest.mark.parametrize(
    ("label", "meant"),
    [("verpflegung", "Verpflegung"), ("Verpflegung ", "Verpflegung"), ("Verpfelgung", "Verpflegung"), ("positve", "positive")],
)  # fmt: skip
def test_case_spaces_and_exchanged_letters(label: str, meant: str) -> None:
    assert slips({label: 2, meant: 20}) == {label: meant}


@pytest.mark.parametrize(
    "counts",
    [
        {"class 1": 1, "class 2": 30},  # numbers
        {"good": 1, "food": 30},  # short words
        {"increase": 20, "decrease": 25},  # as frequent
        {"positive": 2, "negative": 40},
        {"Pflege": 1, "Verpflegung": 30},
    ],
)  # fmt: skip
def test_what_is_no_slip(counts: dict[str, int]) -> None:
    assert slips(counts) == {}


def test_labels_of_one_row_are_named_together() -> None:
    assert label_notes({"a": 1, "bbbb": 9}) == ["The label 'a' has 1 row: too few to train on and to measure."]
    assert label_notes({"a": 1, "q": 1, "bbbb": 9}) == ["'a' and 'q' have 1 row each: too few to train on and to measure."]
    many = {f"{sign}-{sign}": 1 for sign in "abcdefghijk"}
    assert label_notes(many)[0].count("'") == 16 and "and 3 more have 1 row each" in label_notes(many)[0]
    assert doubtful_labels(many) == set(), "where each label has one row, all are meant"


def test_equal_but_for_case_is_said_once() -> None:
    (note,) = label_notes({"Positive": 1, "positive": 40})
    assert "'Positive' and 'positive' differ in case" in note

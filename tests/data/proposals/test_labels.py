"""Labels that may be slips are named with the one that is meant; other short, numbered or frequent labels are not."""

import itertools

import pytest

from lorakeet.data.proposals import labels as proposals
from lorakeet.data.proposals.labels import doubtful_labels, label_notes, slips


def test_a_typo_is_named_and_not_proposed() -> None:
    counts = {"Abrechnung": 30, "Verpflegng": 1, "Verpflegung": 25}
    said = "'Verpflegng' has 1 row and is very like 'Verpflegung' (25): a typo? If so, mend the file, or set "
    assert label_notes(counts) == [f"{said}--data.rename_labels Verpflegng=Verpflegung."]
    assert doubtful_labels(counts) == {"Verpflegng"}


@pytest.mark.parametrize(
    ("label", "meant"),
    [
        ("verpflegung", "Verpflegung"), ("Verpflegung ", "Verpflegung"), ("Verpfelgung", "Verpflegung"), ("positve", "positive"),
        ("self service", "Self-Service"), ("spam.", "spam"), ("Self-Servcie desk", "self service desk"), ("US", "us"),
        ("Reklamtaoin", "Reklamation"), ("class_1", "class 1"),
    ],
)  # fmt: skip
def test_case_spaces_punctuation_and_letters(label: str, meant: str) -> None:
    assert slips({label: 2, meant: 20}) == {label: meant}


@pytest.mark.parametrize(
    "counts",
    [
        {"class 1": 1, "class 2": 30},  # numbers
        {"good": 1, "food": 30},  # short words
        {"increase": 20, "decrease": 25},  # as frequent
        {"positive": 2, "negative": 40},
        {"Pflege": 1, "Verpflegung": 30},
        {"positve": 3, "positive": 300},  # too many rows for a slip
        {"positve": 2, "positive": 9},  # too few of the other
        {"incomplete": 1, "complete": 60},
        {"atypical": 1, "typical": 60},
        {"unstable": 1, "stable": 60},
        {"nonviral": 1, "viral": 60},
        {"hypotension": 1, "hypertension": 300},
        {"severe hypotension": 1, "severe hypertension": 300},
        {"intrastate": 1, "interstate": 300},
        {"adduction": 1, "abduction": 300},
        {"female": 1, "male": 60},
        {"group b": 1, "group a": 30},  # a word of one letter
        {"grade": 1, "grade b": 30},
        {"A-": 1, "A": 30, "A+": 30},
        {"C#": 1, "C": 30, "C++": 30},
        {"1.5": 1, "15": 30, "1 5": 30, "1,5": 30},
        {"class 1 1": 1, "class 11": 30},
        {":)": 1, ":(": 30},
    ],
)  # fmt: skip
def test_what_is_no_slip(counts: dict[str, int]) -> None:
    assert slips(counts) == {}


def test_labels_of_one_row_are_named_together() -> None:
    assert label_notes({"a": 1, "bbbb": 9}) == ["The label 'a' has 1 row: too few to train on and to measure."]
    assert label_notes({"a": 1, "q": 1, "bbbb": 9}) == ["'a' and 'q' have 1 row each: too few to train on and to measure."]
    many = {f"{sign}-{sign}": 1 for sign in "abcdefghijk"}
    assert label_notes(many)[0].count("'") == 16 and "and 3 more have 1 row each" in label_notes(many)[0]
    assert doubtful_labels(many) == set() and doubtful_labels({"a": 1, "q": 1, "bbbb": 9}) == set(), "they are no slips"


def test_only_a_slip_of_one_row_is_left_out_of_a_prompt() -> None:
    assert doubtful_labels({"positve": 1, "negatve": 2, "positive": 60, "negative": 60}) == {"positve"}
    assert doubtful_labels({"Presales": 2, "presales": 54, "bill ": 2, "bill": 40}) == {"Presales", "bill "}, "in case and spaces"
    assert doubtful_labels({"complete": 60, "incomplete": 10}) == set()


def test_the_most_frequent_of_several_is_meant_in_any_order() -> None:
    counts = {"Positve": 1, "positve": 1, "POSITIVE": 8, "positive": 60, "positives": 9}
    for order in itertools.permutations(counts):
        assert slips({label: counts[label] for label in order}) == {"Positve": "positive", "positve": "positive"}


def spelt(number: int, length: int) -> str:
    """A word of letters that is another for each number."""
    letters = []
    while len(letters) < length:
        number, sign = (number * 48271 + 11) % 2147483647, number // 7 % 26
        letters.append(chr(ord("a") + sign))
    return "".join(letters)


@pytest.mark.parametrize("shape", ["one word", "path", "long word"])
def test_two_thousand_long_labels_need_few_comparisons(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair was compared before: of 1,000 rare and 1,000 frequent labels a million."""
    compared = []
    measure = proposals.edit_distance

    def counted(one: str, two: str) -> int:
        compared.append((one, two))
        assert len(compared) <= 2000
        return measure(one, two)

    monkeypatch.setattr(proposals, "edit_distance", counted)
    words = [spelt(number, 200 if shape == "long word" else 12) for number in range(1, 2001)]
    before = "home and garden / tools of all kinds / " * 5 if shape == "path" else ""
    counts = {f"{before}{word}": 1 if place % 2 else 30 for place, word in enumerate(words)}
    meant, slip = f"{before}Reklamationen", f"{before}Reklamatoinen"
    assert len(counts) == 2000 and (shape == "one word" or min(map(len, counts)) >= 200)
    assert slips({**counts, meant: 30, slip: 1}) == {slip: meant} and compared


def test_equal_but_for_case_is_said_once() -> None:
    (note,) = label_notes({"Positive": 1, "positive": 40})
    assert "count as several: 'Positive' and 'positive'. If they are one, mend" in note
    assert note.endswith("set --data.rename_labels Positive=positive.")

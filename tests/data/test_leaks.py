"""Copies and near-copies are found and named, and give way on the right side."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.data.leaks import check_leaks, find_duplicates, jaccard, lsh_bands, normal_words, shingles
from lorakeet.data.prepare import load_dataset
from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec
from lorakeet.errors import DataError

WORDS = [f"word{number}" for number in range(500)]


def row(text, source, label="a"):
    return Row((Turn("user", text, False), Turn("assistant", label, True)), label, None, source)


def texts(count, seed, length=60):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)) for _ in range(count)]


def edited(text):
    words = text.split()
    words[30] = "changed"
    return " ".join(words)


def rows(name, *given_texts):
    return [row(text, f"{name}:{number}") for number, text in enumerate(given_texts, start=1)]


def spec(**settings_):
    return DataSpec(train="x", **settings_)


def test_exact_copies_are_found_under_other_case_and_punctuation():
    (pair,) = find_duplicates({"test": rows("t", "It was FINE, really."), "training": rows("a", "it was fine – really")}, 0)
    assert pair.exact and pair.similarity == 1.0
    assert str(pair) == "training a:1 and test t:1 (exact copy): 'it was fine – really…'"


def test_near_copies_are_found_with_their_similarity():
    first, second, third = texts(3, seed=0)
    parts = {"test": rows("t", first), "training": rows("a", second, edited(first), third)}
    (pair,) = find_duplicates(parts, 0.8)
    assert (pair.row.source, pair.twin.source, pair.exact) == ("a:2", "t:1", False)
    # 58 triples, of which 3 change: 55 common of 61.
    assert pair.similarity == pytest.approx(55 / 61)
    assert find_duplicates(parts, 0.95) == () and find_duplicates(parts, 0) == ()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12).map(" ".join), min_size=2, max_size=12),
    st.integers(1, 11),
)
def test_nothing_is_missed_and_nothing_invented(given_texts, cut):
    test, train = rows("t", *given_texts[:cut]), rows("a", *given_texts[cut:])
    pairs = find_duplicates({"test": test, "training": train}, 0.8)
    leaking = {pair.row.source for pair in pairs if pair.row_part != pair.twin_part}
    expected = {
        one.source
        for one in train
        for other in test
        if jaccard(shingles(normal_words(one.text)), shingles(normal_words(other.text))) >= 0.8
    }
    assert leaking == expected


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_index_finds_pairs_at_the_threshold(threshold):
    bands, per_band = lsh_bands(threshold)
    assert bands * per_band <= 128 and 1 - (1 - threshold**per_band) ** bands >= 0.998


def test_default_index_is_selective():
    assert lsh_bands(0.8) == (25, 5)


def test_pair_of_exactly_the_threshold_counts():
    parts = {"test": rows("t", "one two three four five six"), "training": rows("a", "one two three four five six seven")}
    (pair,) = find_duplicates(parts, 0.8)
    assert pair.similarity == 0.8  # 4 triples of 5


def test_short_and_wordless_texts():
    assert find_duplicates({"test": rows("t", "ok", "!!"), "training": rows("a", "no", "??")}, 0.8) == ()
    found = find_duplicates({"test": rows("t", "ok", "!!"), "training": rows("a", "OK.", "!!")}, 0.8)
    assert [pair.row.source for pair in found] == ["a:1", "a:2"]


def test_row_is_dropped_from_training_and_named():
    good, leaked, tested = texts(3, seed=1)
    clean = check_leaks(rows("a", good, leaked), rows("h", tested, edited(leaked)), [], spec())
    assert [r.source for r in clean.train] == ["a:1"] and len(clean.held_out) == 2
    assert [r.source for r in clean.report.dropped] == ["a:2"]
    assert "1 row is on both sides of a split (1 dropped)" in clean.report.lines()[0]
    assert "training a:2 and held-out h:2 (similarity 0.90)" in clean.report.lines()[1]


def test_held_out_row_gives_way_to_a_test_row():
    one, two, three, four = texts(4, seed=2)
    clean = check_leaks(rows("a", one), rows("h", two, three), rows("t", three, four), spec())
    assert [r.source for r in clean.held_out] == ["h:1"] and len(clean.test) == 2 and len(clean.train) == 1


def test_all_copies_of_a_leaked_row_are_dropped():
    one, two = texts(2, seed=3)
    clean = check_leaks(rows("a", two, one, edited(one), one), rows("h", one, "something else entirely"), [], spec())
    assert [r.source for r in clean.train] == ["a:1"] and len(clean.report.dropped) == 3


def test_repeats_inside_training_are_reported_and_kept():
    one, two, three = texts(3, seed=4)
    clean = check_leaks(rows("a", one, one, two), rows("h", three), [], spec())
    assert len(clean.train) == 3 and not clean.report.across
    assert clean.report.lines() == [f"training rows that repeat another one (kept): 1, for example {clean.report.within[0]}"]


def test_policies_keep_and_refuse():
    one, two, three = texts(3, seed=5)
    kept = check_leaks(rows("a", one, two), rows("h", two, three), [], spec(on_leak="keep"))
    assert len(kept.train) == 2 and len(kept.report.across) == 1 and "kept" in kept.report.lines()[0]
    with pytest.raises(
        DataError, match=r"(?s)1 pairs of rows .*'refuse'.*training a:2 and held-out h:1 \(exact copy\).*Remove one"
    ):
        check_leaks(rows("a", one, two), rows("h", two, three), [], spec(on_leak="refuse"))


def test_held_out_equal_to_training_is_refused_even_if_leaks_are_kept():
    some = texts(4, seed=6)
    with pytest.raises(DataError, match=r"All 4 held-out rows are training rows too \(h:1 is the first\)"):
        check_leaks(rows("a", *some), rows("h", *some), [], spec(on_leak="keep"))
    with pytest.raises(DataError, match=r"All 2 test rows are training rows too"):
        check_leaks(rows("a", *some), [], rows("t", *some[:2]), spec())


def test_training_that_would_be_empty_is_refused():
    one, two = texts(2, seed=7)
    with pytest.raises(DataError, match=r"Every training row has a copy or near-copy .*keep if equal prompts are intended"):
        check_leaks(rows("a", one), [row(one, "h:1", label="b"), row(two, "h:2")], [], spec())


def test_no_leak_is_said_too():
    one, two = texts(2, seed=8)
    assert check_leaks(rows("a", one), rows("h", two), [], spec()).report.lines() == ["No duplicate rows found."]


def test_the_drug_review_that_stands_in_both_files(drug_reviews):
    dataset = load_dataset(
        DataSpec(
            train=f"{drug_reviews}!drugsComTrain.tsv",
            test=f"{drug_reviews}!drugsComTest.tsv",
            text_column="review",
            label_column="rating",
            html_unescape=True,
            strip_quotes=True,
            template="Review: {text}\nRating:",
        )
    )
    (pair,) = dataset.leaks.across
    assert pair.exact and pair.row.text.startswith("After I had it removed 3 months ago")
    assert (pair.row_part, pair.twin_part) == ("training", "test")
    assert (len(dataset.train), len(dataset.held_out), len(dataset.test)) == (539, 60, 379)
    assert dataset.labels == ("negative", "neutral", "positive")

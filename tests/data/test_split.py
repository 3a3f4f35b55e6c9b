"""Laws of the split: no overlap, no row lost, row order without effect, groups and equal rows together."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec
from lorakeet.data.split import (
    check_split_record,
    held_out_count,
    read_split_record,
    split_record,
    split_rows,
    write_split_record,
)
from lorakeet.errors import DataError


def row(text, label=None, group=None, source="f:1"):
    return Row((Turn("user", text, False), Turn("assistant", label or "ok", True)), label, group, source)


def spec(**settings_):
    return DataSpec(train="x", **settings_)


@st.composite
def row_lists(draw):
    count = draw(st.integers(20, 80))
    labels = draw(st.sampled_from([[None], ["a", "b"], ["a", "b", "c"]]))
    texts = st.integers(0, draw(st.sampled_from([30, 10_000])))
    groups = st.one_of(st.none(), st.integers(0, 12).map(str)) if draw(st.booleans()) else st.none()
    return [row(f"text {draw(texts)}", draw(st.sampled_from(labels)), draw(groups), f"f:{number}") for number in range(count)]


def try_split(rows, spec_):
    try:
        return split_rows(rows, spec_)
    except DataError as error:
        assert "No row can be held out" in str(error)
        return None


@settings(max_examples=60, deadline=None)
@given(row_lists(), st.integers(0, 5), st.sampled_from([0.1, 0.3, 0.5]), st.randoms())
def test_laws(rows, seed, fraction, random):
    spec_ = spec(split_seed=seed, held_out_fraction=fraction, held_out_minimum=0)
    split = try_split(rows, spec_)
    shuffled = list(rows)
    random.shuffle(shuffled)
    again = try_split(shuffled, spec_)
    if split is None:
        assert again is None
        return
    assert again == split
    assert Counter(r.source for r in split.train + split.held_out) == Counter(r.source for r in rows)
    assert not {r.key for r in split.train} & {r.key for r in split.held_out}
    assert not {r.group for r in split.train} & {r.group for r in split.held_out} - {None}
    assert 0 < len(split.held_out) <= held_out_count(len(rows), spec_)
    if all(r.group is None for r in rows):
        assert {r.label for r in split.held_out} <= {r.label for r in split.train}


@pytest.mark.parametrize(("rows", "expected"), [(10, 1), (600, 60), (639, 64), (640, 64), (1000, 100)])
def test_default_size(rows, expected):
    assert held_out_count(rows, spec()) == expected


def test_minimum_counts_where_there_are_ten_times_as_many():
    assert held_out_count(640, spec(held_out_fraction=0.02)) == 64
    assert held_out_count(639, spec(held_out_fraction=0.02)) == 13


def test_labels_keep_their_share():
    rows = [row(f"t{n}", "rare" if n % 10 == 0 else "many", source=f"f:{n}") for n in range(1000)]
    split = split_rows(rows, spec())
    assert Counter(r.label for r in split.held_out) == {"many": 90, "rare": 10}


def test_places_left_over_go_to_the_largest_remainders():
    rows = [row(f"t{n}", "abc"[min(n // 7, 2)], source=f"f:{n}") for n in range(20)]  # 7, 7 and 6 rows
    split = split_rows(rows, spec(held_out_fraction=0.25))
    assert Counter(r.label for r in split.held_out) == {"a": 2, "b": 2, "c": 1}


def test_a_label_is_never_held_out_as_a_whole():
    rows = [row("only one", "rare"), row("only one", "rare", source="f:2"), *(row(f"t{n}", "many") for n in range(5))]
    for seed in range(20):
        split = split_rows(rows, spec(held_out_fraction=0.8, split_seed=seed))
        assert {r.label for r in split.train} == {"rare", "many"}


def test_seed_and_only_the_seed_changes_the_split():
    rows = [row(f"t{n}") for n in range(100)]
    first, same, other = (split_rows(rows, spec(split_seed=seed)) for seed in (1, 1, 2))
    assert first == same and {r.key for r in first.held_out} != {r.key for r in other.held_out}


def test_prompt_template_does_not_change_the_split():
    def dressed(n, prompt):
        text = f"text {n}"
        turn = Turn("user", prompt.format(text), False, free=(prompt.index("{}"), prompt.index("{}") + len(text)))
        return Row((turn, Turn("assistant", "a", True)), None, None, f"f:{n}")

    splits = [split_rows([dressed(n, prompt) for n in range(50)], spec()) for prompt in ("{}", "Read: {}\nAnswer:")]
    assert [r.source for r in splits[0].held_out] == [r.source for r in splits[1].held_out]


def test_no_held_out_rows_on_request():
    rows = [row(f"t{n}") for n in range(3)]
    split = split_rows(rows, spec(held_out_fraction=0.0))
    assert split.held_out == () and len(split.train) == 3


def test_too_few_rows_says_how_many_are_needed():
    with pytest.raises(
        DataError, match=r"9 rows are too few to hold out 10 % of them; expected at least 10.*--data.held_out FILE"
    ):
        split_rows([row(f"t{n}") for n in range(9)], spec())


def test_one_big_group_cannot_be_split():
    with pytest.raises(DataError, match="20 rows fall into 1 groups"):
        split_rows([row(f"t{n}", group="g") for n in range(20)], spec())


def test_record_on_disk_and_check(tmp_path):
    split = split_rows([row(f"t{n}") for n in range(50)], spec())
    record = split_record(split.train, split.held_out)
    write_split_record(tmp_path / "split.json", record)
    assert read_split_record(tmp_path / "split.json") == record
    assert json.loads((tmp_path / "split.json").read_text())["held_out"] == sorted(r.key for r in split.held_out)
    check_split_record(record, split_record(split.train[::-1], split.held_out[::-1]))


def test_changed_data_is_named():
    split = split_rows([row(f"t{n}") for n in range(50)], spec())
    before = split_record(split.train, split.held_out, [row("a")])
    now = split_record(split.train[1:], (*split.held_out[1:], row("new")), [row("b")])
    with pytest.raises(DataError) as caught:
        check_split_record(before, now)
    message = str(caught.value)
    assert "1 held-out rows are gone and 1 are new" in message
    assert "training rows changed (45 before, 44 now)" in message and "test rows changed (1 before, 1 now)" in message


def test_a_run_from_before_prompts_were_kept_together_is_told_why():
    rows = [row(f"t{n}", group=f"prompt {n // 2}") for n in range(50)]
    now = split_record(rows[:40], rows[40:])
    assert now["rows_of_shared_prompts"] == 50
    before = split_record([row(f"t{n}") for n in range(1, 41)], [row(f"t{n}") for n in (0, *range(41, 50))])
    with pytest.raises(DataError, match=r"50 rows share their prompt with others, and an earlier version .* Start a new run"):
        check_split_record(before, now)
    other = split_record(rows[:39], rows[39:])
    with pytest.raises(DataError, match="The data has changed since this run started"):
        check_split_record(other, now)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 0, "held_out": []}', '{"format": 1}'])
def test_files_that_are_no_record(tmp_path, content):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(DataError, match=r"split.json"):
        read_split_record(tmp_path / "split.json")


def rated(number, wanted, group=None):
    turns = Turn("user", f"question {number}", False), Turn("assistant", "ok", True)
    return Row(turns, None, group, f"f:{number}", desirable=wanted)


@pytest.mark.parametrize("seed", range(5))
def test_verdicts_keep_their_share(seed):
    split = split_rows([rated(n, n % 4 != 0) for n in range(200)], spec(split_seed=seed, held_out_minimum=0))
    assert Counter(row.desirable for row in split.held_out) == {True: 15, False: 5}


@pytest.mark.parametrize("seed", range(5))
def test_both_verdicts_are_held_out_and_trained_where_they_can_be(seed):
    split = split_rows([rated(n, n >= 2) for n in range(40)], spec(split_seed=seed, held_out_minimum=0))
    assert Counter(row.desirable for row in split.held_out) == {True: 3, False: 1}
    assert {row.desirable for row in split.train} == {True, False}
    alone = split_rows([rated(n, n >= 1) for n in range(40)], spec(split_seed=seed, held_out_minimum=0))
    assert {row.desirable for row in alone.held_out} == {True} and {row.desirable for row in alone.train} == {True, False}
    few = split_rows([rated(n, n >= 3) for n in range(10)], spec(split_seed=seed, held_out_minimum=0))
    assert len(few.held_out) == 1


def test_groups_of_a_verdict_are_held_out_whole():
    rows = [*(rated(n, True) for n in range(36)), *(rated(n, False, f"g{n % 2}") for n in range(36, 40))]
    split = split_rows(rows, spec(held_out_fraction=0.1, held_out_minimum=0))
    assert Counter(row.desirable for row in split.held_out) == {True: 2, False: 2}

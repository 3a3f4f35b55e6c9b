"""What is known of a run's measurement before it: few rows, no test rows, and prompts that do not name the labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakeet.data.prepare import load_dataset
from lorakeet.data.spec import DataSpec
from lorakeet.evaluate.intervals import proportion
from lorakeet.runs.remarks import few_rows_note, remarks_on
from tiny.runs import reviews, write_rows


def remarks(folder: Path, **settings: Any) -> list[tuple[str, Mapping[str, str]]]:
    rows = write_rows(folder / "rows.jsonl", reviews(60))
    spec = DataSpec(train=str(rows), near_duplicates=0, **settings)
    found = remarks_on(load_dataset(spec), spec, few_shot=False)
    return [(remark.words, {one.setting: one.value for one in remark.remedies}) for remark in found]


def test_all_three_are_said_with_the_width_and_the_template(tmp_path: Path) -> None:
    few, untested, unnamed = remarks(tmp_path)
    low, high = (100 * end for end in (proportion(5, 6).low, proportion(5, 6).high))
    assert few[0].startswith("6 rows are few to measure on") and f"{low:.1f} to {high:.1f} %" in few[0]
    assert "There are no test rows" in untested[0] and "as data.test" in untested[0]
    assert unnamed[1] == {"data.template": "{text}\nAnswer with one of: bad, good, so so"}
    assert repr(unnamed[1]["data.template"]) in unnamed[0], "words and value are the same"


def test_nothing_is_said_where_nothing_is_wrong(tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", reviews(120, seed=3))
    template = "{text}\nGood, bad or so so?"
    assert remarks(tmp_path, test=str(test), template=template) == []


def test_a_typo_is_not_proposed_as_an_answer(tmp_path: Path) -> None:
    rows = [*reviews(60, labels=("Verpflegung", "Pflege")), {"text": "alder SOUP", "label": "Verpflegng"}]
    spec = DataSpec(train=str(write_rows(tmp_path / "r.jsonl", rows)), near_duplicates=0)
    dataset = load_dataset(spec)
    assert any("'Verpflegng' has 1 row and is very like 'Verpflegung' (30)" in note for note in dataset.notes)
    remedy = remarks_on(dataset, spec, few_shot=False)[-1].remedies[0]
    assert remedy.value == "{text}\nAnswer with one of: Pflege, Verpflegung"


def test_rows_without_labels_have_no_accuracy() -> None:
    assert "accuracy" not in few_rows_note(9, labelled=False) and few_rows_note(1, labelled=False).startswith("1 row is few")

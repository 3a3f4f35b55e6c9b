"""Records in memory become JSON lines, or one message."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pytest

from lorakeet.api.records import jsonl_of
from lorakeet.errors import DataError

LOOP: dict[str, object] = {}
LOOP["a"] = [LOOP]
ROWS = [{"text": "good", "label": "a", "stars": 5}, {"text": "schlecht ß", "label": "b", "stars": 1}]


def read(records: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in jsonl_of(records).decode().splitlines()]


@pytest.mark.parametrize(
    "records",
    [ROWS, iter(ROWS), pandas.DataFrame(ROWS), pyarrow.Table.from_pylist(ROWS), datasets.Dataset.from_list(ROWS)],
    ids=["dicts", "iterator", "pandas", "pyarrow", "datasets"],
)
def test_every_container_gives_the_same_rows(records: Any) -> None:
    assert read(records) == ROWS


def test_missing_values_dates_and_numpy() -> None:
    frame = pandas.DataFrame({"text": ["a", None], "when": [pandas.Timestamp("2026-01-02"), pandas.NaT], "n": [1.5, np.nan]})
    assert read(frame) == [{"text": "a", "when": "2026-01-02T00:00:00", "n": 1.5}, {"text": None, "when": None, "n": None}]
    assert read([{"n": np.int64(3), "list": np.array([1, 2]), "day": date(2026, 1, 2), "gone": pandas.NA}]) == [
        {"n": 3, "list": [1, 2], "day": "2026-01-02", "gone": None}
    ]


def test_class_labels_are_names() -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    assert read(datasets.Dataset.from_dict({"text": ["x"], "label": [1]}, features=features)) == [{"text": "x", "label": "good"}]


def test_texts_are_rows_of_text() -> None:
    assert read(["one", "two"]) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"a": "b"}, 3], r"Row 2 is 3 \(int\); expected a dict of columns"),
        ([LOOP], r"Row 1, column 'a', column 'a' is nested deeper than 200 levels, or contains itself"),
        ([{"a": 10**5000}], r"Row 1, column 'a' is more than 1e\+300 \(int\), which JSON has not"),
        ([{"a": "b", "c": object()}], r"Row 1, column 'c' is <object .*\(object\), which JSON has not"),
        ([], "There are no rows"),
        ({"train": ROWS}, r"The rows are one mapping with 'train'; expected a list of dicts, or a part of it"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), "one mapping with 'train'"),
    ],
)
def test_what_is_no_row_is_named(records: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        jsonl_of(records)

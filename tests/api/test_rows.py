"""Rows from Python: a file or records in memory, split as a run splits them."""

from __future__ import annotations

from pathlib import Path

import pytest

import lorakeet as lk
from lorakeet.api.rows import RowPart
from lorakeet.config import RunConfig, read_run
from lorakeet.data.prepare import load_dataset
from lorakeet.errors import ConfigError, DataError
from tiny.runs import reviews, write_rows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_records_and_their_file_are_split_alike(tmp_path: Path) -> None:
    records = reviews(40)
    of_file = lk.rows(write_rows(tmp_path / "rows.jsonl", records), held_out=0.25, held_out_minimum=0)
    in_memory = lk.rows(records, held_out=0.25, held_out_minimum=0)
    for part in ("train", "held_out", "test"):
        left, right = getattr(of_file, part), getattr(in_memory, part)
        assert [row.key for row in left] == [row.key for row in right]
    assert len(of_file.held_out) == 10 and of_file.labels == ("bad", "good", "so so")
    assert str(in_memory).startswith("30 training, 10 held-out, 0 test rows; labels bad ")


def test_parts_are_sequences_with_their_settings() -> None:
    rows = lk.rows(reviews(30), held_out=reviews(6, seed=1), test=reviews(5, seed=2))
    assert (len(rows.held_out), len(rows.test)) == (6, 5)
    first = rows.held_out[:2]
    assert isinstance(first, RowPart) and len(first) == 2 and first.labels == rows.labels and first[0].label in rows.labels


def test_a_run_has_its_rows_beside_it(tmp_path: Path) -> None:
    rows = lk.rows(reviews(30), test=reviews(5, seed=2), held_out=0.2)
    out = str(tmp_path / "runs" / "mine")
    spec = rows.beside(out)
    assert spec.train == f"{out}-train-rows.jsonl" and spec.test == f"{out}-test-rows.jsonl"
    assert load_dataset(spec).split_record() == rows.dataset.split_record()
    assert rows.beside(out) == spec  # the same rows again
    Path(out).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"mine-train-rows.jsonl has other rows than this run"):
        lk.rows(reviews(31)).beside(out)
    file = write_rows(tmp_path / "rows.jsonl", reviews(30))
    assert lk.rows(file).beside(out).train == str(file)


def test_a_table_in_a_notebook_is_escaped() -> None:
    records = [{"text": "<script>x</script>" + "y" * 300, "label": label} for label in ("a", "b")] * 2
    shown = lk.rows(records, held_out=0.0)._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "y" * 200 not in shown


def test_the_settings_are_those_of_the_run_file() -> None:
    rows = lk.rows("a.csv", held_out=0.3, template="Is it good? {text}", delimiter=";")
    expected = read_run(None, {"model": "m", "data.train": "a.csv", "data.held_out_fraction": "0.3", "data.delimiter": ";"}).data
    assert RunConfig(data=rows.spec).changed(data={"template": "{text}"}).data == expected


def test_wrong_arguments_are_one_message() -> None:
    with pytest.raises(ConfigError, match=r"Unknown key 'tempate' in lk.rows. Did you mean 'template'?"):
        lk.rows("a.csv", tempate="x")
    with pytest.raises(ConfigError, match=r"held_out_fraction is 1.5; expected a share"):
        lk.rows("a.csv", held_out=1.5)
    with pytest.raises(ConfigError, match=r"The train rows are 5 \(int\); expected a path, dicts"):
        lk.rows(5)
    with pytest.raises(DataError, match=r"has no column 'label'"):
        len(lk.rows([{"text": "a", "lable": "b"}] * 3, format="classification").train)

"""Files of every kind become the same rows."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from lorakeet.data.read import check_first_record, folder_records, hub_records, is_hub_id, read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.errors import DataError, EnvironmentProblem
from lorakeet.registry import first_objective

ROWS = [{"text": "good film", "label": "yes"}, {"text": 'a "bad",\nfilm', "label": "no"}, {"text": "so so", "label": "yes"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def as_csv(delimiter):
    quoted = [[row["text"].replace('"', '""'), row["label"]] for row in ROWS]
    return f"text{delimiter}label\n" + "".join(f'"{text}"{delimiter}{label}\n' for text, label in quoted)


def write_all(folder):
    (folder / "a.jsonl").write_text(LINES)
    (folder / "a.json").write_text(json.dumps(ROWS))
    (folder / "a.csv").write_text(as_csv(","))
    (folder / "a.tsv.gz").write_bytes(gzip.compress(as_csv("\t").encode()))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet")
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("inner.jsonl", LINES)
    return ["a.jsonl", "a.json", "a.csv", "a.tsv.gz", "a.parquet", "a.zip!inner.jsonl"]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    spec = DataSpec(train="x", label_column="label")
    found = {tuple(row.key for row in read_rows(str(tmp_path / name), spec)) for name in write_all(tmp_path)}
    assert len(found) == 1 and len(found.pop()) == 3


@pytest.mark.parametrize(
    ("name", "text", "spec"),
    [
        ("gone.jsonl", None, {}),
        ("rows.xlsx", "a", {}),
        ("rows.jsonl", LINES, {"text_column": "review"}),
        ("rows.jsonl", LINES, {"group_column": "patient"}),
        ("rows.csv", as_csv(";"), {}),
    ],
)
def test_what_the_first_record_shows_is_said_in_the_same_words(tmp_path, name, text, spec):
    if text is not None:
        (tmp_path / name).write_text(text)
    said = []
    for check in (check_first_record, read_rows):
        with pytest.raises(DataError) as caught:
            check(str(tmp_path / name), DataSpec(train="x", **spec))
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_only_the_first_record_is_checked(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{broken\n')
    check_first_record(str(tmp_path / "a.jsonl"), DataSpec(train="x"))
    for name in write_all(tmp_path):
        check_first_record(str(tmp_path / name), DataSpec(train="x"))
    monkeypatch.setattr("lorakeet.data.read.hub_records", None)
    os.mkfifo(tmp_path / "pipe.jsonl")  # reading it would wait for a writer
    for name in (str(tmp_path), "someone/rows", "hub:someone/rows", str(tmp_path / "pipe.jsonl")):
        check_first_record(name, DataSpec(train="x"))


def test_the_objective_decides_between_shapes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "chosen": "b", "rejected": "c"}\n')
    spec = DataSpec(train="x", label_column="stars")
    check_first_record(str(path), spec)
    given = str(path), spec
    for check in (lambda: check_first_record(*given, first_objective()), lambda: read_rows(*given, registered=first_objective())):
        with pytest.raises(DataError, match="no column 'stars'"):
            check()
    assert read_rows(str(path), DataSpec(train="x"), registered=first_objective())[0].text == "a"


def test_saved_data_set_folder(tmp_path):
    import datasets

    datasets.DatasetDict({"dev": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "set"))
    spec = DataSpec(train="x")
    assert [row.key for row in read_rows(f"{tmp_path / 'set'}#dev", spec)] == [
        row.key for row in read_rows(str(tmp_path / "set"), spec)
    ]


def test_limit_reads_the_top_and_nothing_behind_it(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES + "{broken\n")
    rows = read_rows(str(tmp_path / "a.jsonl"), DataSpec(train="x", limit=2))
    assert [row.text for row in rows] == ["good film", 'a "bad",\nfilm']


def test_broken_lines_and_bad_rows_are_named_together(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES + '{broken\n{"text": "", "label": "no"}\n')
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / "a.jsonl"), DataSpec(train="x"))
    assert "a.jsonl:4: broken JSON" in str(caught.value) and "a.jsonl:5: column 'text' is empty" in str(caught.value)


def test_empty_and_unknown_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"a.jsonl has no rows"):
        read_rows(str(tmp_path / "a.jsonl"), DataSpec(train="x"))
    (tmp_path / "a.jsnl").write_text(LINES)
    with pytest.raises(DataError, match=r"ends in '.jsnl', which has no reader; expected one of .jsonl.*Did you mean '.jsonl'"):
        read_rows(str(tmp_path / "a.jsnl"), DataSpec(train="x"))


def test_drug_reviews(drug_reviews):
    spec = DataSpec(train="x", text_column="review", label_column="rating", html_unescape=True, strip_quotes=True)
    train = read_rows(f"{drug_reviews}!drugsComTrain.tsv", spec)
    test = read_rows(f"{drug_reviews}!drugsComTest.tsv", spec)
    assert (len(train), len(test)) == (600, 379)
    assert {row.label for row in train} == {"positive", "negative", "neutral"}
    assert train[0].text.startswith("I recently received an injection of nalbuphine")
    assert not any("&#039;" in row.text or row.text[0] == row.text[-1] == '"' for row in train + test)
    assert any("\n" in row.text for row in train)


TABLE = {"text": ["good", "bad"], "label": [1, 0]}
RECORDS = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]


def test_saved_data_set_with_names_for_its_labels(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    datasets.Dataset.from_dict(TABLE, features=features).save_to_disk(str(tmp_path / "set"))
    found = [record.values for record in folder_records(tmp_path / "set", "")]
    assert found == [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}]


def test_saved_splits_are_picked_by_name(tmp_path):
    both = datasets.DatasetDict({"train": datasets.Dataset.from_dict(TABLE), "dev": datasets.Dataset.from_dict({"text": ["x"]})})
    both.save_to_disk(str(tmp_path / "both"))
    assert [record.values for record in folder_records(tmp_path / "both", "train")] == RECORDS
    with pytest.raises(DataError, match=r"holds several splits; write '.*both#SPLIT' with one of: train, dev"):
        list(folder_records(tmp_path / "both", ""))
    with pytest.raises(DataError, match=r"no split 'trian'.*Did you mean 'train'"):
        list(folder_records(tmp_path / "both", "trian"))


def test_folder_without_a_data_set(tmp_path):
    with pytest.raises(DataError, match="a folder without a saved data set"):
        list(folder_records(tmp_path, ""))


def test_what_counts_as_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert is_hub_id("owner/name") and is_hub_id("owner/name-1.0#test") and is_hub_id("hub:squad")
    assert not is_hub_id("folder/name") and not is_hub_id("owner/rows.jsonl") and not is_hub_id("a/b/c") and not is_hub_id("x")


def test_hub_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentProblem, match=r"'no-such-owner/no-such-set' \(split 'dev'\) could not be loaded.*local file"):
        list(hub_records("hub:no-such-owner/no-such-set#dev"))


def test_bad_rows_are_dropped_on_request_and_counted(tmp_path: Path) -> None:
    lines = ['{"text": "one"}', "{broken", '{"text": ""}', '{"text": "two"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    said: list[str] = []
    rows = read_rows(str(tmp_path / "rows.jsonl"), DataSpec(train="x", bad_rows="drop"), said)
    assert [row.text for row in rows] == ["one", "two"]
    assert len(said) == 1
    assert said[0].startswith(f"2 rows were dropped of the 4 of {tmp_path / 'rows.jsonl'}; first rows.jsonl:2: ")
    with pytest.raises(DataError, match=r"\(2 problems\)(.|\n)*--data.bad_rows drop"):
        read_rows(str(tmp_path / "rows.jsonl"), DataSpec(train="x"))
    (tmp_path / "none.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match="broken JSON"):
        read_rows(str(tmp_path / "none.jsonl"), DataSpec(train="x", bad_rows="drop"))


def test_all_problems_are_counted_and_ten_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{broken\n" * 21)
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / "rows.jsonl"), DataSpec(train="x"))
    said = str(caught.value)
    assert "(21 problems)" in said and said.count("broken JSON") == 10 and "and 11 more" in said


def test_other_separators_and_encodings_are_named_and_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text;label\nschön;gut\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"not utf-8 text \(byte 0xf6\)\. Set --data.encoding cp1252"):
        read_rows(str(tmp_path / "a.csv"), DataSpec(train="x"))
    with pytest.raises(DataError, match=r"one column, 'text;label', .* separated by ';': set --data.delimiter ';'"):
        read_rows(str(tmp_path / "a.csv"), DataSpec(train="x", encoding="cp1252"))
    (row,) = read_rows(str(tmp_path / "a.csv"), DataSpec(train="x", encoding="cp1252", delimiter=";"))
    assert (row.text, row.label) == ("schön", "gut")
    (tmp_path / "b.csv").write_text("text\tlabel\nx\ty\n")
    with pytest.raises(DataError, match=r"set --data\.delimiter tab"):
        read_rows(str(tmp_path / "b.csv"), DataSpec(train="x"))
    assert read_rows(str(tmp_path / "b.csv"), DataSpec(train="x", delimiter="tab"))[0].label == "y"
    (tmp_path / "c.jsonl").write_bytes('{"text": "é"}'.encode("utf-16"))
    with pytest.raises(DataError, match=r"Set --data\.encoding utf-16"):
        read_rows(str(tmp_path / "c.jsonl"), DataSpec(train="x"))
    assert read_rows(str(tmp_path / "c.jsonl"), DataSpec(train="x", encoding="utf-16"))[0].text == "é"


def test_a_mark_and_utf_16_without_one(tmp_path: Path) -> None:
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}')
    for name in ("utf-8", "UTF-8", "utf8"):
        assert read_rows(str(tmp_path / "bom.jsonl"), DataSpec(train="x", encoding=name))[0].text == "x"
    (tmp_path / "u.jsonl").write_bytes('{"text": "é"}'.encode("utf-16-le"))
    with pytest.raises(DataError, match=r"Set --data\.encoding utf-16-le"):
        read_rows(str(tmp_path / "u.jsonl"), DataSpec(train="x", encoding="utf-16"))
    assert read_rows(str(tmp_path / "u.jsonl"), DataSpec(train="x", encoding="utf-16-le"))[0].text == "é"


def test_a_given_separator_is_believed(tmp_path: Path) -> None:
    (tmp_path / "one.tsv").write_text("text, of a review\ngood\n")
    spec = DataSpec(train="x", delimiter="tab", text_column="text, of a review")
    assert read_rows(str(tmp_path / "one.tsv"), spec)[0].text == "good"


QUOTED = 'text;label\n"ciao; sì";a\nmondo;b\n'


@pytest.mark.parametrize(
    ("content", "settings", "said"),
    [
        ("text, long;label\nciao;a\n", {}, "rows.csv:2: 1 fields where the header has 2 (text,  long;label). Its columns may be"),
        ('"text";"label"\n"ciao, a";"b"\n', {}, "separated by ';': set --data.delimiter ';'"),
        (QUOTED, {"delimiter": ","}, "separated by ';': set --data.delimiter ';'"),
        (QUOTED, {"delimiter": "tab"}, "separated by ';': set --data.delimiter ';'"),
        ("text;label\nciao;a\n", {"delimiter": "tab"}, "'text;label' match no known shape"),
        ("text;label\nciao;a\n", {"delimiter": "tab"}, "separated by ';': set --data.delimiter ';'"),
        ("text;label\nciao;a\n", {"delimiter": "tab", "label_column": "label"}, "set --data.delimiter ';'"),
        ('text,label\n"ciao, a",b\n', {"delimiter": ";"}, "separated by ',': set --data.delimiter ','"),
        ("sep=;\ntext;label\nciao;a\n", {}, "begins with 'sep=;', a line for Excel alone. Remove that line, and set"),
        ("sep=;\ntext;label\nciao;a\n", {"delimiter": ";"}, "begins with 'sep=;', a line for Excel alone. Remove that line."),
    ],
)
def test_a_wrong_separator_is_named_wherever_it_shows(tmp_path: Path, content: str, settings: dict[str, str], said: str) -> None:
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / "rows.csv"), DataSpec(train="x", **settings))  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_a_short_first_row_is_no_other_separator(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label|kind\nciao\nmondo,b\n")
    spec = DataSpec(train="x", bad_rows="drop", label_column="label|kind")
    assert [row.text for row in read_rows(str(tmp_path / "rows.csv"), spec)] == ["mondo"]


def test_several_columns_that_may_be_the_label_are_named_before_plain_text_is_trained_on(tmp_path: Path) -> None:
    lines = [f"Ticket {n} about a lamp that hums;{('bill', 'care', 'food')[n % 3]};{('DE', 'FR')[n % 2]}" for n in range(12)]
    path = tmp_path / "tickets.csv"
    path.write_text("\n".join(["message;queue;country", *lines]), encoding="utf-8")
    notes: list[str] = []
    read_rows(str(path), DataSpec(train="x", text_column="message", delimiter=";"), notes)
    [said] = notes
    assert "is read as plain text" in said and "'queue' (3 values) and 'country' (2 values) have values that repeat" in said
    notes.clear()
    read_rows(str(path), DataSpec(train="x", text_column="message", label_column="queue", delimiter=";"), notes)
    assert notes == []
    with pytest.raises(DataError) as caught:
        read_rows(str(path), DataSpec(train="x"))
    assert str(caught.value).endswith("--data.text_column message and, if the texts are labelled, --data.label_column")

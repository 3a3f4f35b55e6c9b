"""Text files give records with the line where they stand, and broken lines are named, not skipped in silence."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lorakeet.data import tables
from lorakeet.data.locate import Location, locate_data
from lorakeet.data.tables import SHOWN_PROBLEMS, RowProblems, TextFormat, text_records
from lorakeet.errors import DataError


def records(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    problems = RowProblems("bad")
    found = [tuple(record) for record in text_records(locate_data(str(path)), problems)]
    problems.raise_if_any()
    return found


def test_json_lines_skip_blank_ones_and_keep_numbers(tmp_path):
    assert records(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": "é"}\n') == [("a.jsonl:1", {"a": 1}), ("a.jsonl:3", {"a": "é"})]


def test_broken_json_shows_line_and_start(tmp_path):
    with pytest.raises(DataError, match=r"""a.jsonl:2: broken JSON at column 7 .*'\{"b": oops\}'"""):
        records(tmp_path / "a.jsonl", '{"a": 1}\n{"b": oops}\n')


def test_all_broken_lines_are_named_and_the_rest_counted(tmp_path):
    lines = ["{]"] * (SHOWN_PROBLEMS + 7)
    with pytest.raises(DataError) as caught:
        records(tmp_path / "a.jsonl", "\n".join(lines))
    assert "a.jsonl:10:" in str(caught.value) and "a.jsonl:11:" not in str(caught.value)
    assert "and 7 more." in str(caught.value)


def test_json_line_that_is_no_object(tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl:1: expected an object in braces, got '\[1, 2\]'; fix or remove the line\."):
        records(tmp_path / "a.jsonl", "[1, 2]\n")


def test_json_array(tmp_path):
    assert records(tmp_path / "a.json", '[{"a": 1},\n {"a": 2}]') == [("a.json[1]", {"a": 1}), ("a.json[2]", {"a": 2})]
    with pytest.raises(DataError, match=r"a.json:2: broken JSON .*name the file .jsonl"):
        records(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n')
    with pytest.raises(DataError, match="expected an array of objects"):
        records(tmp_path / "a.json", '{"a": 1}')
    with pytest.raises(DataError, match=r"a.json:1: broken JSON"):
        records(tmp_path / "a.json", "")


TEXTS = [
    '[{"a": 1},\n {"a": 2}]', "[]", " [ ] \n", '[{"a": [1, 2.5e3, "x\\n\\u00e9"]}]', "", "[", '[{"a": 1}', '[{"a": 1},]',
    '[{"a": 1}] x', '{"a": 1}', '{"a": 1}\n{"a": 2}', '[{"a": 1}\n\n {"b": oops}]', '[1, "x", {"a": -0.5}]', "[12345, 678]",
    '[{"a": tru}]', '[{"a": "b\nc"}]', "nul", "17", '[{"a": 1},\n\n{"a": "open', "[" * 3000, '[{"a": NaN}]',
]  # fmt: skip


def of_array(file: Path, text: str, *, longest: int = 1000) -> Any:
    """The records of a JSON text, or the refusal without its remedy."""
    file.write_text(text)
    try:
        problems = RowProblems("x")
        found = list(text_records(Location(file), problems, TextFormat(longest=longest)))
        problems.raise_if_any()
        return found
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
def test_a_json_array_is_the_same_in_pieces_of_any_size(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [of_array(tmp_path / "a.json", text) for text in TEXTS]
    assert next(one for one in whole if not isinstance(one, str)) == [("a.json[1]", {"a": 1}), ("a.json[2]", {"a": 2})]
    assert "a.json:3: broken JSON at column 2 (Expecting ',' delimiter): '{\"b\": oops}]'" in whole[11]
    monkeypatch.setattr(tables.JsonText, "piece", piece)
    for text, one in zip(TEXTS, whole, strict=True):
        found = of_array(tmp_path / "a.json", text)
        where = [re.sub(r": '.*", "", said) if isinstance(said, str) else said for said in (found, one)]
        assert where[0] == where[1], text  # but for the line, which may be cut off


def test_a_json_array_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 900} for _ in range(500)]))
    monkeypatch.setattr(tables.JsonText, "piece", 4096)
    kept: list[int] = []
    read = tables.JsonText.read_on

    def counted(text: Any, least: int = 0) -> bool:
        more = read(text, least)
        kept.append(len(text.kept))
        return more

    monkeypatch.setattr(tables.JsonText, "read_on", counted)
    found = list(text_records(Location(tmp_path / "a.json"), RowProblems("x")))
    assert len(found) == 500 and len(kept) > 50 and max(kept) < 2 * 4096


def test_a_value_of_an_array_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables.JsonText, "piece", 64)
    text = json.dumps([{"text": "x"}, {"text": "y" * 5000}, {"text": "z"}], indent=1)
    said = of_array(tmp_path / "a.json", text)
    assert said.startswith("a.json:5: the value has more than 1,000 characters") and "--data.longest_row" in said
    assert "more than 1,000" in of_array(tmp_path / "a.json", '[{"a": "' + "x" * 5000), "one that never ends"
    assert len(of_array(tmp_path / "a.json", text, longest=6000)) == 3


def test_csv_rows_have_the_numbers_of_a_spreadsheet(tmp_path):
    found = records(tmp_path / "a.csv", 'text,label\r\n"one\r\ntwo ""quoted""",x\r\n\r\nthree,y\r\n')
    assert found == [
        ("a.csv:2", {"text": 'one\r\ntwo "quoted"', "label": "x"}),
        ("a.csv:4", {"text": "three", "label": "y"}),
    ]


def test_tsv_gzipped(tmp_path):
    assert records(tmp_path / "a.tsv.gz", gzip.compress(b"a\tb\n1,5\t2\n")) == [("a.tsv.gz:2", {"a": "1,5", "b": "2"})]


def test_csv_row_of_another_length_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a.csv:3: 1 fields where the header has 2 \(text, label\); fix or remove the line\."):
        records(tmp_path / "a.csv", "text,label\na,b\nc\n")


def test_csv_quote_that_never_closes_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a.csv:2: .*expected closed double quotes"):
        records(tmp_path / "a.csv", 'text,label\n"open,b\nc,d\n')


def test_csv_column_that_stands_twice(tmp_path):
    with pytest.raises(DataError, match="more than one column 'a'"):
        records(tmp_path / "a.csv", "a,a\n1,2\n")


def test_empty_files_have_no_records(tmp_path):
    assert records(tmp_path / "a.csv", "") == records(tmp_path / "b.jsonl", "") == records(tmp_path / "c.csv", "a,b\n") == []


def test_plain_lines(tmp_path):
    assert records(tmp_path / "a.txt", "one\n\ntwo\r\n") == [("a.txt:1", {"text": "one"}), ("a.txt:3", {"text": "two"})]


@pytest.mark.parametrize(
    ("value", "said"), [("9" * 5000, "limit"), ("[" * 100_000, "brackets nested too deep")], ids=["digits", "brackets"]
)
def test_what_python_s_own_limits_refuse_is_named_like_other_broken_lines(tmp_path, value, said):
    for name in ("a.jsonl", "a.json"):
        with pytest.raises(DataError, match=f"{name}:1: broken JSON .*{said}"):
            records(tmp_path / name, '{"a": ' + value + "}\n")


@pytest.mark.parametrize(("content", "line"), [("[1,\n", 2), ('[\n"a\u2028b",\n{]', 3), ("", 1)])
def test_an_array_that_breaks_off_is_named_by_its_line(tmp_path, content, line):
    with pytest.raises(DataError, match=f"a.json:{line}: broken JSON at column"):
        records(tmp_path / "a.json", content)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("length", range(1, 20))
def test_a_line_is_measured_without_its_end_and_counts_once(tmp_path, length, end):
    longest, path, problems = 4, tmp_path / "a.txt", RowProblems("bad")
    path.write_bytes(f"{'x' * length}{end}{end}{'y' * length}{end}z".encode())
    found = [tuple(record) for record in text_records(locate_data(str(path)), problems, TextFormat(longest=longest))]
    long = length > longest
    texts = [] if long else [("a.txt:1", {"text": "x" * length}), ("a.txt:3", {"text": "y" * length})]
    assert found == [*texts, ("a.txt:4", {"text": "z"})]
    assert problems.count == (2 if long else 0)

"""All that is wrong with a file is said at once, with the settings that mend it, and these settings do."""

from pathlib import Path

import pytest

from lorakeet.data.prepare import load_dataset
from lorakeet.data.proposals.reading_on import every_problem, mended
from lorakeet.data.read import check_first_record, read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.errors import LONGEST_MESSAGE, DataError, Remedy

KINDS = ("Pflege", "Küche", "Abrechnung")


def written(
    path: Path, delimiter: str = ";", encoding: str = "cp1252", *, empty: bool = True, names: str = "Text;Kategorie"
) -> Path:
    lines = [names.replace(";", delimiter)]
    lines += [f'"Die Suppe am Tag {n} war kalt; für alle"{delimiter}{KINDS[n % 3]}' for n in range(60)]
    if empty:
        lines[20] = f'"Ohne Kategorie"{delimiter}'
    path.write_bytes("\r\n".join(lines).encode(encoding))
    return path


def test_a_german_table_of_a_spreadsheet_is_mended_in_one_go(tmp_path: Path) -> None:
    path = written(tmp_path / "Beschwerden.csv")
    for read in (read_rows, check_first_record):
        with pytest.raises(DataError) as caught:
            read(str(path), DataSpec(train="x"))
        said, remedies = str(caught.value), caught.value.remedies
        assert "(4 problems)" in said and "Beschwerden.csv:21: column 'Kategorie' is empty" in said
        assert [(one.setting, one.value) for one in remedies] == [
            ("data.encoding", "cp1252"), ("data.delimiter", ";"), ("data.text_column", "Text"),
            ("data.label_column", "Kategorie"), ("data.bad_rows", "drop"),
        ]  # fmt: skip
        assert said.endswith(" ".join(one.flag for one in remedies)), "words and values are the same"
        rows = read_rows(str(path), mended(DataSpec(train="x"), remedies))
        assert len(rows) == 59 and {row.label for row in rows} == set(KINDS)


def test_one_problem_is_said_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", ",", "utf-8", empty=False, names="text;label")
    assert len(read_rows(str(path), DataSpec(train="x"))) == 60
    path = written(tmp_path / "b.csv", ";", "utf-8", empty=False, names="text;label")
    with pytest.raises(DataError, match=r"^b.csv has one column") as caught:
        read_rows(str(path), DataSpec(train="x"))
    assert [one.flag for one in caught.value.remedies] == ["--data.delimiter ';'"]


def test_what_no_setting_mends_ends_the_reading(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("a;b\nü;2\n".encode("cp1252"))
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / "a.csv"), DataSpec(train="x"))
    assert "(3 problems)" in str(caught.value) and "match no known shape" in str(caught.value)
    assert [one.setting for one in caught.value.remedies] == ["data.encoding", "data.delimiter"]


def test_a_reader_that_always_fails_is_left() -> None:
    def fails(spec: DataSpec) -> None:
        raise DataError("b", remedies=[Remedy("data.encoding", "cp1250", "again")])

    found = every_problem(DataError("a", remedies=[Remedy("data.encoding", "cp1252", "x")]), "f", DataSpec(train="x"), fails)
    assert "(2 problems)" in str(found) and len(found.remedies) == 1


def test_a_column_in_another_case_is_proposed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", ",", "utf-8", empty=False)
    with pytest.raises(DataError, match="no column 'kategorie'") as caught:
        read_rows(str(path), DataSpec(train="x", text_column="text", label_column="kategorie"))
    assert [one.flag for one in caught.value.remedies] == ["--data.text_column Text", "--data.label_column Kategorie"]


def test_labels_beside_a_text_column_are_named_before_a_run(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", ",", "utf-8", empty=False)
    dataset = load_dataset(DataSpec(train=str(path), text_column="Text", near_duplicates=0))
    assert [one.flag for one in dataset.remedies] == ["--data.label_column Kategorie"]
    assert any("Column 'Kategorie' is not read; it has 3 values" in note for note in dataset.notes)
    labelled = load_dataset(DataSpec(train=str(path), text_column="Text", label_column="Kategorie", near_duplicates=0))
    assert not labelled.remedies and not any("not read" in note for note in labelled.notes)


def test_a_long_problem_hides_no_other_one_that_is_mended_with_it(tmp_path: Path) -> None:
    folder = tmp_path / ("a folder with a long name " * 6).strip() / ("and another one " * 6).strip()
    folder.mkdir(parents=True)
    path = folder / "mensajes.csv"
    lines = [f"El perro número {n} está rascándose y come poco;{['Toñi', 'Ana', 'Luz'][n % 3]};{'ab'[n % 2]}" for n in range(60)]
    path.write_text("\n".join(["Mensaje de la dueña;Recepción;Cola", *lines, ";Ana;a"]), encoding="cp1252")
    with pytest.raises(DataError) as raised:
        load_dataset(DataSpec(train=str(path)))
    assert {one.setting for one in raised.value.remedies} >= {"data.encoding", "data.delimiter", "data.bad_rows"}
    said = str(raised.value)
    assert "more." not in said and "is not utf-8" in said and "set --data.delimiter" in said
    assert "match no known shape" in said and "is empty" in said and len(said) <= LONGEST_MESSAGE

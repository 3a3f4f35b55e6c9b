"""`verbs.predict`: rows of a file are answered as `evaluate` answers them, and come out as they were, with more columns."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest

import lorakeet as lk
from lorakeet.data.chat import Encoder
from lorakeet.data.rows import Row
from lorakeet.errors import ConfigError, DataError
from lorakeet.evaluate.replies import Replies
from lorakeet.kinds.text import answerer
from lorakeet.kinds.text.answerer import RightShare
from lorakeet.kinds.text.evaluate import TextEvaluator
from lorakeet.kinds.text.reply import Replier
from lorakeet.runs.open_adapter import NAME, open_adapter
from lorakeet.verbs import predict as predicting
from lorakeet.verbs.finetune import FinetuneResult
from lorakeet.verbs.options import PredictOptions
from lorakeet.verbs.predict import predict
from tiny.runs import chats, quiet, reviews, run, write_rows


@pytest.fixture(scope="module")
def chatted(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """A run over conversations. Do not write into it."""
    folder = tmp_path_factory.mktemp("chatted")
    return run(tiny_llama_folder, write_rows(folder / "rows.jsonl", chats(40)), folder / "run")


def table_of(path: Path, delimiter: str = ",", encoding: str = "utf-8") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode(encoding), newline=""), delimiter=delimiter))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_probabilities_are_those_of_the_report(finished: Any, tmp_path: Path) -> None:
    opened = open_adapter(finished.path)
    rows, labels = opened.dataset.test, opened.dataset.labels
    text = opened.text_model(quiet())
    encoder = Encoder(text.tokenizer, opened.config.data, labels)
    report = TextEvaluator(opened.config, text, encoder, rows, quiet(), NAME).answers(rows, "adapter")
    data = write_rows(tmp_path / "new.jsonl", [{"number": place, "text": row.text} for place, row in enumerate(rows)])
    found = predict(PredictOptions(str(finished.path), str(data), tmp_path / "out.jsonl"), console=quiet())
    written = lines_of(tmp_path / "out.jsonl")
    assert [row["number"] for row in written] == list(range(len(rows))) and found.rows == found.answered == len(rows)
    assert [row["label"] for row in written] == [labels[place] for place in report.predicted]
    assert [row["label_probability"] for row in written] == [round(float(one), 6) for one in report.confidence]
    ordered = np.sort(report.probabilities, axis=1)
    assert [row["label_margin"] for row in written] == pytest.approx((ordered[:, -1] - ordered[:, -2]).tolist(), abs=1e-6)
    measured = RightShare.of(open_adapter(finished.path))
    doubtful = [one < 0.8 or measured.doubts(0.8, one) for one in report.confidence.tolist()]
    assert [row["label_review"] == "yes" for row in written] == doubtful


def test_a_table_comes_out_as_it_was_with_more_columns(finished: Any, tmp_path: Path) -> None:
    content = 'Nr;TEXT;label\r\n1;"schön; gut";\r\n2;;\r\n3;übel;bad\r\n'
    (tmp_path / "new.csv").write_bytes(content.encode("cp1252"))
    given = PredictOptions(str(finished.path), str(tmp_path / "new.csv"), tmp_path / "out.csv", encoding="cp1252", delimiter=";")
    found = predict(given, console=quiet())
    raw = (tmp_path / "out.csv").read_bytes()
    assert raw.count(b"\r\n") == 4 and b"\n" not in raw.replace(b"\r\n", b"") and "schön".encode("cp1252") in raw
    rows = table_of(tmp_path / "out.csv", ";", "cp1252")
    kept = [(row["Nr"], row["TEXT"], row["label"]) for row in rows]
    assert kept == [("1", "schön; gut", ""), ("2", "", ""), ("3", "übel", "bad")]
    assert [bool(row["label_predicted"]) for row in rows] == [True, False, True] and rows[1]["label_predicted_review"] == "yes"
    assert found.rows == 3 and found.answered == 2
    assert found.notes[0] == "Column 'TEXT' is taken for 'text', as it was called in training."
    assert found.notes[1].startswith("1 of 3 rows get no answer; first new.csv:3: column 'TEXT' is empty")


def test_probabilities_of_a_table_with_decimal_commas_have_commas(finished: Any, tmp_path: Path) -> None:
    """In a table with ";", and in a workbook as numbers; a sheet is named, and the file that comes out is a workbook again."""
    (tmp_path / "new.csv").write_text("text;price\nred sky;1,5\nblue sea;2,25\n")
    predict(PredictOptions(str(finished.path), str(tmp_path / "new.csv"), tmp_path / "out.csv", delimiter=";"), console=quiet())
    rows = table_of(tmp_path / "out.csv", ";")
    assert [row["price"] for row in rows] == ["1,5", "2,25"]
    assert all("." not in row[name] for row in rows for name in ("label_probability", "label_margin"))
    book = openpyxl.Workbook()
    for row in (["text", "price"], ["red sky", 1.5], ["blue sea", 2.25]):
        book.active.append(row)
    book.active.title = "Neu"
    book.create_sheet("leer")
    book.save(tmp_path / "new.xlsx")
    predict(PredictOptions(str(finished.path), f"{tmp_path}/new.xlsx#Neu", tmp_path / "out.xlsx"), console=quiet())
    header, *read = [[cell.value for cell in row] for row in openpyxl.load_workbook(tmp_path / "out.xlsx").active.iter_rows()]
    assert header[:4] == ["text", "price", "label", "label_probability"] and [row[1] for row in read] == [1.5, 2.25]
    assert [str(row[3]).replace(".", ",") for row in read] == [row["label_probability"] for row in rows]


def test_rows_of_several_readings_are_those_of_one(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "new.jsonl", [{"text": row["text"]} for row in reviews(7, seed=5)])
    predict(PredictOptions(str(finished.path), str(data), tmp_path / "whole.csv"), console=quiet())
    monkeypatch.setattr(predicting, "TOGETHER", 3)
    predict(PredictOptions(str(finished.path), str(data), tmp_path / "parts.csv"), console=quiet())
    whole, parts = table_of(tmp_path / "whole.csv"), table_of(tmp_path / "parts.csv")
    assert [row["label"] for row in whole] == [row["label"] for row in parts] and len(whole) == 7
    numbers = [[float(row["label_probability"]) for row in rows] for rows in (whole, parts)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)


def test_long_rows_are_shortened_and_marked(finished: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "new.jsonl", [{"text": "good"}, {"text": "good " * 3000}])
    found = predict(PredictOptions(str(finished.path), str(data), tmp_path / "out.jsonl", review=0), console=quiet())
    assert (found.shortened, found.review) == (1, 1)
    assert [row["label_review"] for row in lines_of(tmp_path / "out.jsonl")] == ["", "yes"]


def test_what_is_wrong_with_a_file_is_said_before_and_nothing_is_written(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_path = str(finished.path)
    monkeypatch.setattr(predicting, "model_to_measure", lambda *_: pytest.fail("the model was planned"))
    cases: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("id,Beschwerde\n1,a\n", {}, DataError, r"no column 'text'.*--text-column Beschwerde"),
        ("text\n\n", {}, DataError, "has no rows"),
        ('text,b\n" ",1\n', {}, DataError, "No row of .* can be answered; first"),
        ("text,label,label_predicted\na,b,c\n", {}, ConfigError, "has a column 'label_predicted' already.*--column"),
        ("text,b\na\n", {}, DataError, "1 fields where the header has 2"),
        ("text;b\nü;c\n", {"encoding": "ascii"}, DataError, "is not ascii text"),
        ("text;b\nü;c\n", {}, DataError, "set --delimiter ';'"),
        ("text\nschön\n", {"encoding": "cp1252"}, DataError, r"is utf-8 text and not cp1252.* Set --encoding utf-8\.$"),
        ("text\na\n", {"review": 2.0}, ConfigError, "--review is 2.0; expected a probability"),
    ]
    for content, settings, kind, said in cases:
        (tmp_path / "new.csv").write_text(content)
        with pytest.raises(kind, match=said) as caught:
            predict(PredictOptions(run_path, str(tmp_path / "new.csv"), tmp_path / "o.tsv", **settings), console=quiet())
        assert "--data." not in str(caught.value), "the flags are those of this verb"
    (tmp_path / "out.csv").write_text("")
    for out, message in ((tmp_path / "out.csv", "exists already"), (tmp_path / "out.ods", "ends in '.ods'")):
        with pytest.raises(ConfigError, match=message):
            predict(PredictOptions(str(finished.path), str(tmp_path / "new.csv"), out), console=quiet())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.csv", "out.csv"]


def test_remedies_are_options_of_this_verb(finished: Any, tmp_path: Path) -> None:
    data = tmp_path / "new.csv"
    cases: list[tuple[bytes, list[str]]] = [
        ("text;b\nschön;c\n".encode("cp1252"), ["--encoding cp1252"]),
        (b"text;b\na;c\n", ["--delimiter ';'"]),
        (b"id,Beschwerde\n1,a\n", ["--text-column Beschwerde"]),
        (b"text,b\na\n", []),
        (b"text\n" + b"a" * 9_000_000 + b"\n", []),
    ]
    for content, flags in cases:
        data.write_bytes(content)
        with pytest.raises(DataError) as caught:
            predict(PredictOptions(str(finished.path), str(data), tmp_path / "out.csv"), console=quiet())
        assert [one.flag for one in caught.value.remedies] == flags and "--data." not in str(caught.value)
    assert "or raise data.longest_row in a file for --config" in str(caught.value)


def test_columns_of_later_records_are_kept_and_never_overwritten(finished: Any, tmp_path: Path) -> None:
    run_path, data = str(finished.path), tmp_path / "new.jsonl"
    write_rows(data, [{"text": "x"}, {"txt": "z"}, {"text": "y", "label": "GOLD", "note": "keep"}])
    found = predict(PredictOptions(run_path, str(data), tmp_path / "out.csv"), console=quiet())
    rows = table_of(tmp_path / "out.csv")
    columns = ["text", "txt", "label", "note", *found.columns]
    assert list(rows[0]) == columns and found.columns[0] == "label_predicted"
    assert [row["label"] for row in rows] == ["", "", "GOLD"] and rows[2]["note"] == "keep" and rows[1]["txt"] == "z"
    assert [bool(row["label_predicted"]) for row in rows] == [True, False, True]
    assert found.notes == ("1 of 3 rows get no answer; first new.jsonl:2: no column 'text'; the row has 'txt'.",)
    for column in ("note", "text"):
        with pytest.raises(ConfigError, match=f"has a column '{column}' already. .*--column"):
            predict(PredictOptions(run_path, str(data), tmp_path / "other.csv", column=column), console=quiet())


def test_what_no_encoding_holds_is_known_before_and_json_lines_keep_it(finished: Any, tmp_path: Path) -> None:
    run_path, data = str(finished.path), tmp_path / "new.jsonl"
    records = [{"text": "x"}, {"text": "y", "note": "cut \ud83d"}, {"text": "half \ud83d"}]
    write_rows(data, records)
    with pytest.raises(DataError, match=r"new.jsonl:2: column 'note' has half of a character.*\.jsonl"):
        predict(PredictOptions(run_path, str(data), tmp_path / "out.csv"), console=quiet())
    with pytest.raises(ConfigError, match=r"--column 'a\\ud83d' has half of a character"):
        predict(PredictOptions(run_path, str(data), tmp_path / "out.jsonl", column="a\ud83d"), console=quiet())
    found = predict(PredictOptions(run_path, str(data), tmp_path / "out.jsonl"), console=quiet())
    rows = lines_of(tmp_path / "out.jsonl")
    assert [{key: row[key] for key in record} for row, record in zip(rows, records, strict=True)] == records
    assert found.answered == 2


def test_a_new_column_that_the_encoding_cannot_write_makes_it_utf_8(finished: Any, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_bytes("text,b\nschön,a\n".encode("cp1252"))
    given = PredictOptions(str(finished.path), str(tmp_path / "new.csv"), tmp_path / "o.csv", encoding="cp1252", column="标签")
    found = predict(given, console=quiet())
    assert found.notes == ("o.csv is written in UTF-8 with a mark: a column or a cell has characters that cp1252 cannot write.",)
    rows = table_of(tmp_path / "o.csv", encoding="utf-8-sig")
    assert rows[0]["text"] == "schön" and rows[0]["标签"]


def test_an_answer_that_the_encoding_cannot_write_is_kept_with_a_note(
    chatted: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "new.jsonl", [{"prompt": "x"}, {"prompt": "y"}])
    texts = ("whole", "half \ud83d")
    monkeypatch.setattr(Replier, "write", lambda *_: Replies("adapter", texts, texts, (False, False)))
    found = predict(PredictOptions(str(chatted.run.path), str(data), tmp_path / "out.csv", max_tokens=4), console=quiet())
    assert [row["answer"] for row in table_of(tmp_path / "out.csv")] == ["whole", "half ?"]
    assert found.notes == ("1 rows have characters that utf-8 cannot write; '?' stands for each.",)


def test_a_pipe_is_refused_before_the_model(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "p.csv")
    monkeypatch.setattr(predicting, "open_by_options", lambda *_, **__: pytest.fail("the adapter was opened"))
    with pytest.raises(DataError, match="is a pipe or a device; expected a regular file"):
        predict(PredictOptions(str(finished.path), str(tmp_path / "p.csv"), tmp_path / "out.csv"), console=quiet())


def test_an_error_while_rows_are_answered_leaves_no_file(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "new.jsonl", [{"text": "good"}] * 3)

    def fails(*_: Any, **__: Any) -> Any:
        raise DataError("no")

    monkeypatch.setattr(answerer, "label_scores", fails)
    with pytest.raises(DataError, match="no"):
        predict(PredictOptions(str(finished.path), str(data), tmp_path / "out.jsonl"), console=quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["new.jsonl"]


def test_prompts_get_the_replies_of_the_report(chatted: FinetuneResult, tmp_path: Path) -> None:
    config, dataset = chatted.setup.config, chatted.setup.dataset
    opened = open_adapter(chatted.run.path)
    text = opened.text_model(quiet())
    replier = Replier(config, text, Encoder(text.tokenizer, config.data), quiet(), NAME)
    prompts = replier.prompts(dataset.held_out, dataset.train)
    assert prompts is not None
    report = replier.write("adapter", prompts)
    records = [{"id": place, "messages": messages_of(row)} for place, row in enumerate(prompts.rows)]
    records.append({"id": "none", "messages": []})
    data = write_rows(tmp_path / "new.jsonl", records)
    given = PredictOptions(str(chatted.run.path), str(data), tmp_path / "out.jsonl", max_tokens=prompts.limit)
    found = predict(given, console=quiet())
    written = lines_of(tmp_path / "out.jsonl")
    assert [row["answer"] for row in written] == [*report.texts, ""] and found.columns == ("answer", "answer_review")
    assert [{key: row[key] for key in ("id", "messages")} for row in written] == records
    assert found.answered == sum(map(bool, report.texts)) and written[-1]["answer_review"] == "yes"


@pytest.mark.slow
def test_replies_end_as_in_the_report_without_the_training_rows(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", chats(40))
    trained = run(tiny_llama_folder, rows, tmp_path / "run", {"data.chat_template": "off"})
    data = write_rows(tmp_path / "new.jsonl", [{"prompt": "Hi?"}])
    given = PredictOptions(str(tmp_path / "run"), str(data), tmp_path / "out.jsonl", max_tokens=2)
    endings, notes = endings_of(monkeypatch), []
    for gone in (rows, trained.run.report):  # of which the report alone is enough; without both it is not known, and said
        gone.unlink()
        notes.append(predict(dataclasses.replace(given, out=tmp_path / f"{len(notes)}.jsonl"), console=quiet()).notes)
    assert endings == ["\n", ""] and notes[0] == () and len(notes[1]) == 1
    assert notes[1][0].startswith("Answers are not cut after their first line")
    assert "rows.jsonl' does not exist" in notes[1][0]
    write_rows(rows, chats(40))
    assert predict(given, console=quiet()).notes == () and endings[2:] == ["\n"], "the training answers have one line"


def endings_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where replies end, of every writing from now on."""
    found: list[str] = []
    write = Replier.write

    def noted(self: Replier, system: str, prompts: Any, **more: Any) -> Any:
        found.append(prompts.ending)
        return write(self, system, prompts, **more)

    monkeypatch.setattr(Replier, "write", noted)
    return found


def messages_of(row: Row) -> list[dict[str, str]]:
    """The messages of a row before its last answer."""
    return [{"role": turn.role, "content": turn.text} for turn in row.turns[:-1]]


def test_from_python(finished: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "new.jsonl", [{"text": "good"}])
    found = lk.predict(lk.open_run(finished.path), data, tmp_path / "out.csv", quiet=True, column="Sorte")
    assert found.columns == ("Sorte", "Sorte_probability", "Sorte_margin", "Sorte_review") and found.to_mapping()["rows"] == 1
    assert table_of(tmp_path / "out.csv")[0]["Sorte"] in lk.open_run(finished.path).labels

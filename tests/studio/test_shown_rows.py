"""`studio.shown_rows`: what the screen Data shows is what a run reads: columns, trained tokens, leaks with both rows, the cut."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest

from lorakeet.config import read_run
from lorakeet.data.chat import Encoder
from lorakeet.data.prepare import load_dataset
from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec
from lorakeet.errors import DataError, EnvironmentProblem
from lorakeet.evaluate.report.report import read_report
from lorakeet.planning import encoded_rows
from lorakeet.studio import shown_rows
from lorakeet.studio.forms import run_file, run_words
from lorakeet.studio.shown_rows import length_values, row_values, show_rows_of, split_values
from tiny.models import save_tiny_llama, tiny_tokenizer
from tiny.runs import run, write_rows

WORDS = ["ash", "bay", "cup", "dew", "elm", "fog", "gem", "hat", "ice", "jar", "key", "lap", "map", "net", "oak", "pin", "rug"]
HOSTILE = "<script>alert(1)</script>"


def rows(count: int) -> list[dict[str, str]]:
    chance = np.random.default_rng(0)
    return [{"prompt": " ".join(chance.choice(WORDS, 12)), "completion": f"it is {number}"} for number in range(count)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = rows(40)
    made[3]["prompt"] = HOSTILE
    made += [{"prompt": row["prompt"], "completion": row["completion"]} for row in made[:12]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def said_for(settings: Mapping[str, str]) -> list[str]:
    sent: list[Any] = []
    show_rows_of(settings, sent.append)
    return [values["say"] for values in sent if "say" in values]


def sent_for(settings: Mapping[str, str]) -> dict[str, Any]:
    sent: list[Any] = []
    show_rows_of(settings, sent.append)
    return {values["part"]: values for values in sent if "part" in values}


def test_rows_are_shown_as_a_run_reads_them(file: Path, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    found = sent_for({"model.path": str(model), "data.train": str(file), "data.max_tokens": "48"})
    assert list(found) == ["first", "columns", "split", "tokens", "lengths"]
    assert found["first"]["columns"] == ["prompt", "completion"] and found["first"]["rows"][3]["cells"][0] == HOSTILE
    assert found["columns"]["used"] == {"prompt": "prompt", "completion": "answer"}
    split = found["split"]
    assert sum(split["counts"].values()) + split["dropped"] == 52 and split["repeats"] + split["leaks"] >= 12
    assert split["repeated"] == "exact copies among measured rows are measured once; repeated training rows count twice"
    pair = split["pairs"][0]
    assert {row["source"] for row in pair["rows"]} <= {f"rows.jsonl:{line}" for line in range(1, 53)} and len(pair["rows"]) == 2
    row = found["tokens"]["rows"][0]
    trained = "".join(text for text, marked in row["pieces"] if marked)
    assert "it is" in trained and row["trained"] < row["tokens"]
    assert found["lengths"]["limit"] == 48 and sum(bar[2] for bar in found["lengths"]["bars"]) == sum(split["counts"].values())


def test_nothing_is_fetched_while_a_form_changes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(encoded_rows, "find_source", lambda *_: pytest.fail("it would be fetched"))
    monkeypatch.setenv("HF_HUB_CACHE", str(file.parent))
    with pytest.raises(EnvironmentProblem, match="nobody/nothing' is not on this machine"):
        show_rows_of({"model.path": "nobody/nothing", "data.train": str(file)}, sent.append)
    assert [values["part"] for values in sent if "part" in values] == ["first", "columns", "split"]
    with pytest.raises(EnvironmentProblem, match="data set of the hub"):
        show_rows_of({"data.train": "hub:nobody/nothing"}, sent.append)


def test_without_a_model_all_but_the_tokens_are_shown(file: Path) -> None:
    assert list(sent_for({"data.train": str(file)})) == ["first", "columns", "split"]


def test_records_are_shown_even_where_no_column_fits(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("frage,antwort\na,b\n")
    sent: list[Any] = []
    with pytest.raises(DataError, match="match no known shape"):
        show_rows_of({"data.train": str(path)}, sent.append)
    first = {"part": "first", "columns": ["frage", "antwort"], "rows": [{"source": "rows.csv:2", "cells": ["a", "b"]}]}
    assert sent == [first]


def test_an_error_of_columns_proposes_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("Body,Rubrik\n" + "".join(f"{' '.join(WORDS[n % 9 :])} {n},{'ab'[n % 2]}\n" for n in range(60)))
    with pytest.raises(DataError, match="match no known shape") as raised:
        show_rows_of({"data.train": str(path)}, lambda values: None)
    found = {one.setting: one.value for one in raised.value.remedies}
    assert found == {"data.text_column": "Body", "data.label_column": "Rubrik"}


def test_a_column_of_few_values_beside_the_text_is_offered_as_its_label(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,kind\n" + "".join(f"{' '.join(WORDS[n % 9 :])} {n},{'ab'[n % 2]}\n" for n in range(60)))
    found = sent_for({"data.train": str(path)})
    assert found["columns"]["shape"] == "text" and "“kind” is the label" in found["columns"]["remedies"][0]["words"]
    found = sent_for({"data.train": str(path), **found["columns"]["remedies"][0]["settings"]})
    assert found["columns"]["shape"] == "classification" and found["columns"]["remedies"] == []
    few, untested, unnamed = found["split"]["notes"]
    assert "rows are few to measure on" in few["words"] and "“test rows”" in untested["words"]
    assert "\n" in unnamed["words"] and "\\n" not in unnamed["words"], "a line break is one"
    (remedy,) = unnamed["remedies"]
    named = sent_for({"data.train": str(path), "data.label_column": "kind", **remedy["settings"]})["split"]["notes"]
    assert named == [few, untested]


def encoder(limit: int) -> Encoder:
    return Encoder(tiny_tokenizer(), DataSpec(train="f", max_tokens=limit, chat_template="off"))


def prompt(text: str) -> Row:
    return Row((Turn("user", text, False, (0, len(text))), Turn("assistant", "yes", True)), None, None, "f:1")


def test_lengths_are_those_before_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    found = length_values([prompt("a " * count) for count in (4, 8, 200)], encoder(32))
    assert found["longer"] == 1 and found["longest"] > 200 and len(found["bars"]) <= shown_rows.BARS
    assert sum(bar[2] for bar in found["bars"]) == 3 and found["bars"][0][0] == 1 and found["bars"][-1][1] >= found["longest"]
    monkeypatch.setattr(shown_rows, "COUNTED", 2)
    some = length_values([prompt("a " * count) for count in range(1, 10)], encoder(32))
    assert (some["counted"], some["rows"]) == (2, 9)


def test_a_shortened_row_says_so() -> None:
    found = row_values(prompt("a " * 200), encoder(32))
    assert found is not None and found["cut"] and found["tokens"] <= 32 and found["pieces"][-1][1]


def test_of_preferences_each_row_is_measured(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {number % 9} of them", "chosen": "yes", "rejected": "no"} for number in range(30)]
    write_rows(tmp_path / "p.jsonl", rows)
    settings = {"data.train": str(tmp_path / "p.jsonl"), "data.on_leak": "keep", "train.objective": "dpo"}
    split = sent_for({**settings, "model.path": str(save_tiny_llama(tmp_path / "model"))})["split"]
    assert split["repeats"] and split["repeated"] == "they stay, and each is measured"


def test_where_nothing_says_which_column_is_the_label_each_is_one_click(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    kinds = [f"{' '.join(WORDS[n % 9 :])} {n},{'ab'[n % 2]},{'xyz'[n % 3]}" for n in range(60)]
    path.write_text("text,turno,cola\n" + "\n".join([*kinds, ",a,x"]))
    found = sent_for({"data.train": str(path), "data.bad_rows": "drop"})
    assert found["split"]["notes"][0]["words"].startswith("1 row was dropped of the 61 of rows.csv; first rows.csv:62")
    columns = found["columns"]
    assert columns["shape"] == "text" and "it learns to write the texts" in columns["says"]
    assert [one["settings"]["data.label_column"] for one in columns["remedies"]] == ["turno", "cola"]
    (doubt,) = [note["words"] for note in found["split"]["notes"] if "nothing says which is the label" in note["words"]]
    assert "set “label column” too" in doubt and "--data" not in doubt
    chosen = sent_for({"data.train": str(path), "data.bad_rows": "drop", **columns["remedies"][1]["settings"]})
    assert chosen["columns"]["shape"] == "classification" and chosen["columns"]["remedies"] == []


def test_texts_with_two_labels_come_first_and_no_dropped_row_is_said_to_be_kept(tmp_path: Path) -> None:
    texts = [f"{' '.join(WORDS[n % 9 :])} {n}" for n in range(60)]
    rows = [{"text": text, "label": "ab"[n % 2]} for n, text in enumerate(texts)]
    again = [*rows[:8], {"text": texts[40], "label": "b"}]
    write_rows(tmp_path / "rows.jsonl", [*rows, *again])
    write_rows(tmp_path / "held_out.jsonl", [*rows[:2], {"text": "quite another text", "label": "a"}])
    settings = {"data.train": str(tmp_path / "rows.jsonl"), "data.held_out": str(tmp_path / "held_out.jsonl")}
    split = sent_for({**settings, "data.near_duplicates": "0"})["split"]
    within = [pair for pair in split["pairs"] if not pair["leak"]]
    assert split["contradicted"] == 1 and within[0]["kind"] == "same prompt, other answer"
    assert within[0]["fate"] == "both are kept"
    assert split["all"] == split["leaks"] + split["repeats"] == len(split["pairs"])
    left_out = sorted(pair["fate"] for pair in within if pair["fate"] != "both are kept")
    assert left_out == [f"rows.jsonl:{61 + n} and rows.jsonl:{1 + n} are left out for a leak" for n in range(2)]


def test_what_is_measured_and_what_is_not_shown_is_said(tmp_path: Path) -> None:
    """Copies are measured once, a label without a row to measure on is named, and labels beyond 30 are counted."""
    rows = [{"text": f"word{n} {n * 7919} here", "label": f"kind {n % 35}"} for n in range(140)]
    held = [{"text": "the same text again", "label": "kind 1"}] * 3 + [{"text": "another one", "label": "kind 2"}]
    files = {name: write_rows(tmp_path / f"{name}.jsonl", some) for name, some in (("train", rows), ("held", held))}
    dataset = load_dataset(DataSpec(train=str(files["train"]), held_out=str(files["held"])))
    found = split_values(dataset, (), DataSpec(train=str(files["train"])))
    assert (found["measured"], found["all_labels"], len(found["labels"])) == (2, 35, 30)
    [said] = [note["words"] for note in found["notes"] if note["words"].startswith("No row to measure on")]
    assert "“kind 10”" in said and "“kind 1”" not in said and said.count("“") == 8 and "25 more" in said


def test_a_workbook_is_shown_with_its_sheets(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in [["Text", "Art"], *([f"{WORDS[n % 17]} {n}\n{n * 7}", "ab"[n % 2]] for n in range(40))]:
        book.active.append(row)
    book.active.title = "März"
    book.create_sheet("leer")
    book.save(path := tmp_path / "a.xlsx")
    found = sent_for({"data.train": str(path), "data.text_column": "Text", "data.label_column": "Art"})
    assert found["sheets"] == {"part": "sheets", "sheets": [["März", f"{path}#März"], ["leer", f"{path}#leer"]], "chosen": "März"}
    assert [row["source"] for row in found["first"]["rows"]] == [f"a.xlsx:{n}" for n in range(2, 7)]
    assert found["split"]["all_labels"] == 2 and "sheets" not in str(found["split"]["notes"]), "the menu is there"
    sent: list[Any] = []
    with pytest.raises(DataError, match="has no rows"):
        show_rows_of({"data.train": f"{path}#leer"}, sent.append)
    assert sent[0]["chosen"] == "leer", "another sheet can be chosen where this one cannot be read"


def test_one_click_merges_labels_and_keeps_near_copies(tmp_path: Path) -> None:
    texts = [" ".join(f"w{n * 7919 % 1009}x{place}" for place in range(20)) for n in range(120)]
    labels = [("Yes", "No", "YES", "yes")[n % 8 % 4 if n % 5 == 0 else n % 2] for n in range(120)]
    texts += [f"{text} {n}" for n, text in enumerate(texts)]
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in zip(texts, labels * 2, strict=True)))
    settings = {"data.train": str(path)}
    split = sent_for(settings)["split"]
    merged = split["merges"][0]["settings"]
    assert {label for label, _ in split["labels"]} == {"Yes", "No", "YES", "yes"} and list(merged) == ["data.rename_labels"]
    kept = split["near"]["remedies"][0]["settings"]
    assert split["dropped"] > 20 and kept == {"data.near_duplicates": "0"}
    after = sent_for({**settings, **merged, **kept})["split"]
    assert {label for label, _ in after["labels"]} == {"Yes", "No"} and after["merges"] == [] and after["dropped"] == 0
    assert after["near"]["remedies"][0]["settings"] == {"data.near_duplicates": ""}
    config = read_run(None, {"model.path": "none", "out": "x", **settings, **merged, **kept})
    (tmp_path / "run.yaml").write_text(run_file(config))
    assert read_run(tmp_path / "run.yaml").data == config.data and load_dataset(config.data).labels == ("No", "Yes")
    words = run_words(config)
    assert words[words.index("--data.rename_labels") + 1] == "YES=Yes,yes=Yes" and "--data.near_duplicates" in words


def test_each_part_of_a_long_work_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that were read are counted; then copies are searched."""
    monkeypatch.setattr("lorakeet.data.read.SAID_EACH", 20)
    file = write_rows(tmp_path / "rows.jsonl", rows(50))
    searched = "Searches 50 rows for copies"
    assert said_for({"data.train": str(file)}) == ["Reads all rows", *(f"Reads all rows, {n} so far" for n in (20, 40)), searched]


@pytest.mark.slow
def test_what_is_to_be_measured_is_what_the_verdict_counts(tmp_path: Path, tiny_llama_folder: Path) -> None:
    """Also where groups stay on one side, and rows that stand twice are measured once."""
    chance = np.random.default_rng(0)
    lines = [f"{' '.join(chance.choice(WORDS, 9))} {n};{'ab'[n % 2]};{n // 7}" for n in range(140)]
    path = tmp_path / "rows.csv"
    path.write_text("text;label;who\n" + "\n".join(lines + lines[::3]) + "\n")
    settings = {"data.train": str(path), "data.delimiter": ";", "data.group_column": "who", "data.held_out_fraction": "0.3"}
    split = sent_for(settings)["split"]
    assert split["measured"] < split["counts"]["held-out"], "some stand twice"
    short = {"train.steps": 1, "evaluate.drift_texts": 0, "evaluate.answers": 0, "evaluate.examples": 0}
    finished = run(tiny_llama_folder, path, tmp_path / "run", {**short, **settings})
    (adapter,) = (one for one in read_report(finished.run.report).systems if one.role == "adapter")
    assert adapter.metrics["accuracy"].n == split["measured"]

"""`studio.answering`: a file of rows becomes the command `predict`, whose file can be saved, and whose advice is one click."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.cli.flags import SettingsCommand, option_flags
from lorakeet.errors import ConfigError
from lorakeet.studio.answering import HOW, ROWS, add_answers, answer_fields, answer_values, written_file
from lorakeet.studio.jobs import Job
from lorakeet.studio.pages import Studio
from lorakeet.studio.places import NotHere
from lorakeet.workflows.options import PredictOptions


@pytest.fixture
def run(studio: Studio) -> Path:
    folder = studio.places.runs / "mine"
    (folder / "adapter").mkdir(parents=True)
    data = "{train: r.csv, text_column: What happened, encoding: cp1252}"
    (folder / "config.yaml").write_text(f"model: {{path: m, device: cpu}}\ndata: {data}\n")
    return folder


@pytest.fixture
def rows(studio: Studio, tmp_path: Path) -> Path:
    path = tmp_path / "models" / "December notes.csv"
    path.write_text("What happened\nhoist broke\n")
    return path


def over(job: Job, code: int, log: str) -> Job:
    for name, text in (("alive", ""), ("code", str(code)), ("log", log)):
        (job.folder / name).write_text(text)
    return job


def test_the_words_are_the_commands_and_mean_its_options(studio: Studio, run: Path, rows: Path) -> None:
    form = {ROWS: str(rows), "data.encoding": "utf-8", "data.delimiter": "", "data.text_column": "-what", "data.format": "x"}
    job = add_answers(studio.places, studio.queue, "mine", form)
    assert (job.title, job.device, job.run) == ("Rows answered: December notes-answered.csv", "cpu", "")
    parameters, arguments = option_flags(PredictOptions)
    with SettingsCommand("predict", arguments=arguments, params=parameters).make_context("predict", list(job.words[1:])) as found:
        given = {name: value for name, value in found.params.items() if value is not None}
    assert given["run_or_adapter"] == str(run) and given["data"] == str(rows) and given["encoding"] == "utf-8"
    assert given["text_column"] == "-what" and "delimiter" not in given
    assert Path(str(given["out"])) == job.folder / "December notes-answered.csv"


@pytest.mark.parametrize(
    ("name", "out"), [("a.b.jsonl", "a-answered.jsonl"), ("a.tsv", "a-answered.tsv"), ("a.zip", "a-answered.csv")]
)
def test_the_file_is_of_the_kind_of_the_rows_where_it_can(studio: Studio, run: Path, tmp_path: Path, name: str, out: str) -> None:
    job = add_answers(studio.places, studio.queue, "mine", {ROWS: str(tmp_path / "models" / name)})
    assert job.words[-1] == f"{job.folder}/{out}"


def test_what_cannot_be_answered_is_refused(studio: Studio, run: Path) -> None:
    for form, words in (({}, "No file of rows is chosen"), ({ROWS: "/etc/passwd"}, "outside of the folders")):
        with pytest.raises(ConfigError, match=words):
            add_answers(studio.places, studio.queue, "mine", form)
    (run / "adapter").rmdir()
    with pytest.raises(NotHere, match="no adapter yet"):
        add_answers(studio.places, studio.queue, "mine", {ROWS: "rows.csv"})
    assert studio.queue.jobs() == []


def test_the_form_shows_how_the_training_was_read(run: Path) -> None:
    fields = {field.path: field for field in answer_fields(run)}
    assert list(fields) == [ROWS, *HOW] and fields[ROWS].required
    assert [fields[path].default for path in HOW] == ["What happened", "cp1252", "none"]


def test_only_what_is_done_can_be_saved(studio: Studio, run: Path, rows: Path, tmp_path: Path) -> None:
    job = add_answers(studio.places, studio.queue, "mine", {ROWS: str(rows)})
    out = Path(job.words[-1])
    out.write_text("answered")
    with pytest.raises(NotHere):
        written_file(studio.queue, run, job.name)
    assert answer_values(job) == {"saves": "", "counted": "", "again": {}}
    over(job, 0, f"Reads the rows\n20 of 20 rows answered; 2 marked for review: {out}\nA library says good-bye.\n")
    assert written_file(studio.queue, run, job.name) == out
    counted = "20 of 20 rows answered; 2 marked for review"
    assert answer_values(job) == {"saves": "December notes-answered.csv", "counted": counted, "again": {}}
    with pytest.raises(NotHere):
        written_file(studio.queue, run.parent / "other", job.name)
    gguf = over(studio.queue.add(["export", str(run), "--quant", "f16", "--out", f"{run}-f16.gguf"], title="x"), 0, "")
    with pytest.raises(NotHere):
        written_file(studio.queue, run, gguf.name)
    Path(f"{run}-f16.gguf").write_bytes(b"GGUF")
    assert written_file(studio.queue, run, gguf.name) == Path(f"{run}-f16.gguf")
    assert answer_values(gguf) == {"saves": "mine-f16.gguf", "counted": "", "again": {}}
    out.unlink()
    (tmp_path / "secret").write_text("x")
    out.symlink_to(tmp_path / "secret")
    with pytest.raises(NotHere):
        written_file(studio.queue, run, job.name)


@pytest.mark.parametrize(
    ("message", "advised"),
    [
        ("It may be separated by ';': set --delimiter ';'.", {"data.delimiter": ";"}),
        ("It is utf-8. Set --encoding utf-8. 'Notes' is the text: --text-column 'My notes'.",
         {"data.encoding": "utf-8", "data.text_column": "My notes"}),
        ("There is no space left.", {}),
        ("Set --encoding cp1252 if it reads right.", {}),
        ("Set --encoding", {}),
    ],
)  # fmt: skip
def test_what_a_message_advises_is_one_form(
    studio: Studio, run: Path, rows: Path, message: str, advised: dict[str, str]
) -> None:
    """Nothing where it is advised already."""
    form = {ROWS: str(rows), "data.encoding": "cp1252"}
    job = over(add_answers(studio.places, studio.queue, "mine", form), 2, f"Error: {message}\n")
    assert answer_values(job)["again"] == ({**form, **advised} if advised else {})

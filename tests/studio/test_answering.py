"""`studio.answering`: a file of rows becomes the command `predict`, whose file can be saved, and whose advice is one click."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import ZipFile

import pytest

from lorakeet.cli.flags import SettingsCommand, option_flags
from lorakeet.errors import ConfigError, Remedy
from lorakeet.studio import jobs, taking
from lorakeet.studio.answering import (
    ROWS,
    add_answers,
    answer_values,
    forget_answers,
    written_file,
)  # fmt: skip
from lorakeet.studio.jobs import Job
from lorakeet.studio.pages import Studio
from lorakeet.studio.places import NotHere
from lorakeet.verbs.options import PredictOptions
from tiny.command_results import failed


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


def over(job: Job, code: int, result: str) -> Job:
    for name, text in (("alive", ""), ("code", str(code)), ("result", result)):
        (job.folder / name).write_text(text)
    return job


def shown(job: Job) -> tuple[object, object, object]:
    found = answer_values(job)
    return found["saves"], found["counted"], found["again"]


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
    ("name", "out"),
    [
        ("a.b.jsonl", "a.b-answered.jsonl"), ("a.tsv", "a-answered.tsv"), ("a.zip", "a-answered.csv"),
        ("Registro 12.03.2026.csv", "Registro 12.03.2026-answered.csv"),
    ],
)  # fmt: skip
def test_the_file_is_of_the_kind_of_the_rows_where_it_can(studio: Studio, run: Path, tmp_path: Path, name: str, out: str) -> None:
    path = tmp_path / "models" / name
    if path.suffix == ".zip":
        with ZipFile(path, "w") as archive:
            archive.writestr("a.csv", "text\n")
    else:
        path.write_text("text\n")
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


def test_only_what_is_done_can_be_saved(studio: Studio, run: Path, rows: Path, tmp_path: Path) -> None:
    job = add_answers(studio.places, studio.queue, "mine", {ROWS: str(rows)})
    out = Path(job.words[-1])
    out.write_text("answered")
    with pytest.raises(NotHere):
        written_file(studio.places, studio.queue, "mine", job.name)
    assert shown(job) == ("", "", {})
    over(job, 0, json.dumps({"out": str(out), "summary": "20 of 20 rows answered; 2 marked for review"}, indent=2))
    assert written_file(studio.places, studio.queue, "mine", job.name) == out
    counted = "20 of 20 rows answered; 2 marked for review"
    assert shown(job) == ("December notes-answered.csv", counted, {}) and answer_values(job)["held"]
    with pytest.raises(NotHere):
        written_file(studio.places, studio.queue, "other", job.name)
    gguf = over(studio.queue.add(["export", str(run), "--quant", "f16", "--out", f"{run}-f16.gguf"], title="x"), 0, "")
    with pytest.raises(NotHere):
        written_file(studio.places, studio.queue, "mine", gguf.name)
    Path(f"{run}-f16.gguf").write_bytes(b"GGUF")
    assert written_file(studio.places, studio.queue, "mine", gguf.name) == Path(f"{run}-f16.gguf")
    assert shown(gguf) == ("mine-f16.gguf", "", {}) and not answer_values(gguf)["held"]
    out.unlink()
    (tmp_path / "secret").write_text("x")
    out.symlink_to(tmp_path / "secret")
    with pytest.raises(NotHere):
        written_file(studio.places, studio.queue, "mine", job.name)


@pytest.mark.parametrize(("remedies", "advised"), [
    ([("delimiter", ";")], {"data.delimiter": ";"}),
    ([("encoding", "utf-8"), ("text-column", "My notes")], {"data.encoding": "utf-8", "data.text_column": "My notes"}),
    ([], {}), ([("encoding", "cp1252")], {}), ([("other", "x")], {}),
])  # fmt: skip
def test_the_remedies_of_an_error_are_one_form(
    studio: Studio, run: Path, rows: Path, remedies: list[tuple[str, str]], advised: dict[str, str]
) -> None:
    """Nothing where it is advised already."""
    form = {ROWS: str(rows), "data.encoding": "cp1252"}
    said = failed("It cannot be read.", remedies=[Remedy(name, value, "x") for name, value in remedies])
    job = over(add_answers(studio.places, studio.queue, "mine", form), 2, said)
    assert answer_values(job)["again"] == ({**form, **advised} if advised else {})


def test_the_button_that_answers_again_says_what_it_sets(studio: Studio, run: Path, rows: Path) -> None:
    job = add_answers(studio.places, studio.queue, "mine", {ROWS: str(rows)})
    over(job, 2, failed("x", remedies=[Remedy("delimiter", ";", "x")]))
    assert answer_values(job)["again_words"] == "Answer them with separator ;"


def test_a_file_of_answers_stays_until_its_user_deletes_it(
    studio: Studio, run: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many jobs come after it, it can be saved."""
    monkeypatch.setattr(jobs, "LAST_JOBS", 2)
    monkeypatch.setattr(taking, "MANY", 2)
    first, *others = (add_answers(studio.places, studio.queue, "mine", {ROWS: str(rows)}) for _ in range(5))
    for job in (first, *others):
        over(job, 0 if job is first else 2, "")
    Path(first.words[-1]).write_text("answered")
    studio.queue.forget_old()
    assert studio.queue.jobs() == [first, *others[-2:]] == taking.jobs_of(studio.places, studio.queue, "mine")[::-1]
    assert written_file(studio.places, studio.queue, "mine", first.name).read_text() == "answered"
    with pytest.raises(NotHere):
        forget_answers(studio.places, studio.queue, "mine", others[-1].name)
    forget_answers(studio.places, studio.queue, "mine", first.name)
    assert studio.queue.jobs() == others[-2:] and not first.folder.exists()


def test_earlier_attempts_go_with_the_file_that_the_last_one_made(studio: Studio, run: Path, rows: Path) -> None:
    failed, other, made = (
        over(add_answers(studio.places, studio.queue, "mine", {ROWS: str(rows), "data.encoding": encoding}), code, "")
        for encoding, code in (("utf-8", 2), ("cp850", 2), ("cp1252", 0))
    )
    Path(made.words[made.words.index("--out") + 1]).write_text("answered")
    elsewhere = over(studio.queue.add(["predict", str(run)], title="Rows answered: another.csv"), 2, "")
    forget_answers(studio.places, studio.queue, "mine", made.name)
    assert studio.queue.jobs() == [elsewhere] and not any(one.folder.exists() for one in (failed, other, made))

"""`studio.deleted`: a deleted run can be restored, whole, until it is deleted for good."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest

from lorakeet.errors import ConfigError
from lorakeet.studio import deleted as module
from lorakeet.studio.deleted import (
    delete_run,
    deleted_runs,
    erase_run,
    erase_the_rest,
    jobs_erased_with,
    jobs_of_run,
    restore_run,
)
from lorakeet.studio.jobs import Job
from lorakeet.studio.pages import Studio
from lorakeet.studio.places import NotHere, run_id
from lorakeet.train.run import RunFolder


@pytest.fixture
def run(studio: Studio) -> Path:
    folder = studio.places.runs / "mine@home"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: m\n")
    return folder


def test_a_deleted_run_is_restored_whole(studio: Studio, run: Path) -> None:
    gone = delete_run(studio.places, studio.queue, run.name)
    assert not run.exists() and deleted_runs(studio.places) == [gone] and gone.name == run.name
    assert restore_run(studio.places, studio.queue, gone.key) == run.name
    assert (run / "config.yaml").read_text() == "model: m\n" and deleted_runs(studio.places) == []


def test_nothing_is_overwritten_and_nothing_else_is_erased(studio: Studio, run: Path) -> None:
    first = delete_run(studio.places, studio.queue, run.name)
    run.mkdir()
    with pytest.raises(ConfigError, match="another run 'mine@home' now"):
        restore_run(studio.places, studio.queue, first.key)
    second = delete_run(studio.places, studio.queue, run.name)
    assert deleted_runs(studio.places) == [second, first]
    for key in ("gone", "../deleted", "", ".."):
        with pytest.raises(NotHere):
            erase_run(studio.places, studio.queue, key)
    erase_run(studio.places, studio.queue, first.key)
    assert deleted_runs(studio.places) == [second]


def test_a_run_that_goes_on_is_not_deleted(studio: Studio, run: Path) -> None:
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="runs or waits"):
            delete_run(studio.places, studio.queue, run.name)
    studio.queue.add(["finetune"], title="x", run=run.name)
    with pytest.raises(ConfigError, match="runs or waits"):
        delete_run(studio.places, studio.queue, run.name)


def test_a_run_that_another_job_reads_is_not_deleted(studio: Studio, run: Path) -> None:
    """It is measured for a comparison, or is loaded in Try."""
    for words in (["evaluate", str(run)], ["serve", "--adapter", f"it={run}"]):
        job = studio.queue.add(words, title="Measure it")
        with pytest.raises(ConfigError, match="used by a job that is waiting: Measure it"):
            delete_run(studio.places, studio.queue, run.name)
        studio.queue.stop(job)
    studio.queue.add(["evaluate", f"{run}-2"], title="Measure another one")
    delete_run(studio.places, studio.queue, run.name)


def test_a_run_is_not_restored_over_one_that_waits(studio: Studio, run: Path) -> None:
    gone = delete_run(studio.places, studio.queue, run.name)
    studio.queue.add(["finetune"], title="x", run=run.name)
    with pytest.raises(ConfigError, match="another run 'mine@home' now"):
        restore_run(studio.places, studio.queue, gone.key)


def test_jobs_belong_to_the_run_of_their_time(studio: Studio, run: Path) -> None:
    """Those of a deleted run are not of a later one with its name, and go when it is deleted for good, with their answers."""
    old = studio.queue.add(["predict", str(run), "--out", "{folder}/answers.csv"], title="Old")
    for name in ("alive", "code", "answers.csv"):
        (old.folder / name).write_text("0")
    other = studio.queue.add(["predict", f"{run}-2", f"--data={run}/rows.csv", "--out", "{folder}/answers.csv"], title="Other")
    studio.queue.stop(other)
    gone = delete_run(studio.places, studio.queue, run.name)
    run.mkdir()
    (run / "config.yaml").write_text("model: m\n")
    new = studio.queue.add(["predict", str(run)], title="New")
    assert old.kept == old.folder / "answers.csv"
    assert jobs_of_run(studio.places, studio.queue, run.name) == [new]
    assert jobs_of_run(studio.places, studio.queue, run.name, gone) == [old]
    erase_run(studio.places, studio.queue, gone.key)
    assert studio.queue.jobs() == [other, new] and not old.folder.exists()


def _answered(studio: Studio, run: Path) -> Job:
    """A job that has answered a file with the run, after one that made it."""
    made = studio.queue.add(["finetune", "--out", str(run)], title="Make", run=run.name)
    run.mkdir()
    (run / "config.yaml").write_text("model: m\n")
    job = studio.queue.add(["predict", str(run), "--out", "{folder}/answers.csv"], title="Answer")
    for one in (made, job):
        (one.folder / "alive").touch()
        (one.folder / "code").write_text("0")
    (job.folder / "answers.csv").write_text(job.name)
    return job


def test_a_restored_run_has_its_answers_and_no_other_run_erases_them(studio: Studio) -> None:
    """Two runs of one name are deleted, the first is restored, and the second is deleted for good."""
    run = studio.places.runs / "a"
    first = _answered(studio, run)
    first_gone = delete_run(studio.places, studio.queue, run.name)
    second = _answered(studio, run)
    second_gone = delete_run(studio.places, studio.queue, run.name)
    restore_run(studio.places, studio.queue, first_gone.key)
    made_first, _, made_second, _ = studio.queue.jobs()
    assert jobs_of_run(studio.places, studio.queue, run.name) == [first, made_first]
    assert jobs_erased_with(studio.places, studio.queue, second_gone) == [second, made_second]
    erase_run(studio.places, studio.queue, second_gone.key)
    assert studio.queue.jobs() == [made_first, first] and first.kept is not None and not second.folder.exists()
    assert first.kept.read_text() == first.name and jobs_of_run(studio.places, studio.queue, run.name) == [first, made_first]


def test_an_answered_file_of_no_known_run_is_never_erased_with_one(studio: Studio) -> None:
    """It was made by an earlier studio, its folder was removed by hand, or a copy of its folder is there."""
    run = studio.places.runs / "a"
    job = _answered(studio, run)
    (job.folder / "runs.json").unlink()
    gone = delete_run(studio.places, studio.queue, run.name)
    assert job in jobs_of_run(studio.places, studio.queue, run.name, gone)
    erase_run(studio.places, studio.queue, gone.key)
    assert job.kept is not None

    removed = _answered(studio, run)
    shutil.rmtree(run)
    later = _answered(studio, run)
    assert removed in jobs_of_run(studio.places, studio.queue, run.name), "else nobody could save or delete it"
    shutil.copytree(run, studio.places.runs / "copy")
    copied = delete_run(studio.places, studio.queue, run.name)
    (studio.places.runs / "copy").rename(run)
    erase_run(studio.places, studio.queue, copied.key)
    assert removed.kept is not None and later.kept is not None
    last = delete_run(studio.places, studio.queue, run.name)
    erase_run(studio.places, studio.queue, last.key)
    assert removed.kept is not None and not later.folder.exists()


def test_the_id_of_a_run_folder_is_no_file_of_the_run(studio: Studio) -> None:
    """A folder without a run gets none; the list of runs and the start of a run do not see it."""
    run = studio.places.runs / "a"
    _answered(studio, run)
    assert run_id(run) and {path.name for path in run.iterdir()} == {"config.yaml", ".studio-id"}
    assert studio.index.names() == ["a"]
    (run / "config.yaml").unlink()
    RunFolder(run).require_free()
    (studio.places.runs / "empty").mkdir()
    assert studio.queue.add(["predict", f"{studio.places.runs}/{'x' * 300}"], title="A name that is too long").runs == {}
    studio.queue.add(["merge", str(run), "--out", str(studio.places.runs / "empty")], title="Merge")
    assert not list((studio.places.runs / "empty").iterdir())


def test_of_two_tabs_one_restores_or_erases(studio: Studio, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is restored while the other tab erases it."""
    gone = delete_run(studio.places, studio.queue, run.name)

    def meanwhile(*_: object) -> list[Job]:
        restore_run(studio.places, studio.queue, gone.key)
        return []

    monkeypatch.setattr(module, "jobs_of_run", meanwhile)
    with pytest.raises(NotHere):
        erase_run(studio.places, studio.queue, gone.key)
    assert (run / "config.yaml").is_file()


def test_what_a_killed_studio_has_begun_to_erase_is_erased(studio: Studio, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = delete_run(studio.places, studio.queue, run.name)
    with monkeypatch.context() as patched:
        patched.setattr(module, "erase", lambda path: None)
        erase_run(studio.places, studio.queue, gone.key)
    assert deleted_runs(studio.places) == [] and len(list((studio.places.own / "deleted").iterdir())) == 1
    erase_the_rest(studio.places)
    assert not list((studio.places.own / "deleted").iterdir())

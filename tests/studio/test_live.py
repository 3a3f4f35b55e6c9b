"""`studio.live`: a run by its files, while it goes on and after."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

import pytest

from lorakeet.studio import live as module
from lorakeet.studio.jobs import Job, read_lock
from lorakeet.studio.live import all_records, live_run, new_records, plain_values, thinned
from lorakeet.studio.pages import Studio
from lorakeet.studio.places import NotHere
from tiny.command_results import failed

CONFIG = "model: package:tiny\ndata: rows.jsonl\ntrain: {epochs: 2}\nmemory: 1GiB\n"


def lines(count: int, *, start: int = 1) -> str:
    """Steps of a run of 5 steps an epoch, 2 s and 100 tokens/s each, with a held-out loss before the first and after each."""
    found = [{"step": 0, "held_out_loss": 4.0, "low": 3.5, "high": 4.5}] if start == 1 else []
    for step in range(start, start + count):
        found.append({
            "step": step, "epoch": step / 5, "loss": 3.0 / step, "seconds": 2.0 * step, "tokens_per_second": 100.0,
            "memory_bytes": 1000 + step,
        })  # fmt: skip
        found.append({"step": step, "held_out_loss": 3.0 / step, "low": 1.0, "high": 4.0})
    return "".join(json.dumps(line) + "\n" for line in found)


@pytest.fixture
def run(studio: Studio) -> Path:
    folder = studio.places.runs / "mine"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def test_a_run_says_how_far_it_is_and_how_long_it_takes(studio: Studio, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "metrics.jsonl").write_text(lines(3))
    job = studio.queue.add(["finetune"], title="x", run="mine")
    waiting = live_run(studio.places, studio.queue, "mine")
    assert (waiting.state, waiting.can_stop, waiting.can_resume) == ("waiting", True, False)
    monkeypatch.setattr(type(job), "state", "running")
    (job.folder / "alive").touch()
    (run / "metrics.jsonl").touch()
    live = live_run(studio.places, studio.queue, "mine")
    assert (live.state, live.step, live.total, live.seconds_left) == ("training", 3, 10, 14.0)
    assert (live.base, live.best, live.best_step, live.memory, live.budget) == (4.0, 1.0, 3, 1003, 1 << 30)
    assert live.tokens_per_second == 100.0 and plain_values(live)["said"] == "Trains"
    (run / "metrics.jsonl").write_text(lines(10))
    assert live_run(studio.places, studio.queue, "mine").state == "measuring"


@pytest.mark.parametrize("state", ["stopped", "failed", "killed"])
def test_a_run_that_ended_early_shows_the_commands_message_and_can_go_on(
    studio: Studio, run: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    job = over(studio, "mine", "2", at=time.time() + 9)
    (job.folder / "result").write_text(failed("Ctrl-C: stopped after step 3.\nResume with: it"))
    monkeypatch.setattr(type(job), "state", state)
    live = live_run(studio.places, studio.queue, "mine")
    said = "No step was trained yet" if state == "stopped" else "Stop: stopped after step 3."
    assert live.message.startswith(said) and live.can_resume and not live.can_stop
    words = {"stopped": "Stopped before the first step", "failed": "Could not go on", "killed": "Was ended from outside"}
    assert live.said == words[state]
    (run / "metrics.jsonl").write_text(lines(3))
    live = live_run(studio.places, studio.queue, "mine")
    assert ("is kept" in live.said) == (live.message.startswith("It stopped after step 3 of 10")) == (state == "stopped")


def test_a_resumed_run_reads_its_model_before_it_trains(studio: Studio, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "metrics.jsonl").write_text(lines(3))
    os.utime(run / "metrics.jsonl", (1.0, 1.0))
    job = studio.queue.add(["finetune", "--resume"], title="x", run="mine")
    (job.folder / "alive").touch()
    (job.folder / "log").write_text("Loading\nReads the blocks  1/4\rReads the blocks  2/4")
    monkeypatch.setattr(type(job), "state", "running")
    live = live_run(studio.places, studio.queue, "mine")
    assert (live.state, live.doing, live.seconds_left) == ("starting", "Reads the blocks  2/4", None)
    (run / "metrics.jsonl").touch()
    assert live_run(studio.places, studio.queue, "mine").state == "training"


def test_the_error_of_a_command_is_what_it_prints_last(studio: Studio) -> None:
    """A server has said before where it listens; what is no result of a command is none."""
    job = studio.queue.add(["finetune"], title="x", run="mine")
    assert job.problem is None
    (job.folder / "result").write_text('{"port": 1}\n' + failed("the disk is full.", "disk-full"))
    assert job.problem is not None and (job.problem.code, job.error) == ("disk-full", "the disk is full.")
    odd_errors = ('{"error": 1}', '{"error": {"message": "x", "values": 1}}', '{"error": {"message": "x", "remedies": [1]}}')
    for odd in ("x", "[]", "{}", *odd_errors):
        (job.folder / "result").write_text(odd)
        assert job.problem is None


def over(studio: Studio, name: str, code: str, *, at: float) -> Job:
    """A job that ended at a time, with an exit code."""
    job = studio.queue.add(["finetune"], title="x", run=name)
    for file, text in (("alive", ""), ("pid", "1"), ("code", code)):
        (job.folder / file).write_text(text)
    os.utime(job.folder / "code", (at, at))
    return job


def test_the_folder_comes_before_the_job(studio: Studio, run: Path) -> None:
    """Finished in a terminal; another run of the name; a folder that was deleted."""
    over(studio, "mine", "4", at=time.time() - 60)
    unfinished = live_run(studio.places, studio.queue, "mine")
    assert (unfinished.state, unfinished.message) == ("unfinished", ""), "the folder is newer than the job's end"
    for path in (run / "config.yaml",):
        os.utime(path, (1.0, 1.0))
    assert live_run(studio.places, studio.queue, "mine").state == "stopped"
    (run / "report.json").write_text("{}")
    assert live_run(studio.places, studio.queue, "mine").state == "done"
    over(studio, "gone", "0", at=time.time())
    with pytest.raises(NotHere):
        live_run(studio.places, studio.queue, "gone")


def test_the_button_to_stop_says_what_is_kept(studio: Studio, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = studio.queue.add(["finetune"], title="x", run="mine")
    assert live_run(studio.places, studio.queue, "mine").stop == "Take it out of the queue"
    (job.folder / "alive").touch()
    monkeypatch.setattr(type(job), "state", "running")
    starting = live_run(studio.places, studio.queue, "mine")
    assert (starting.state, starting.stop) == ("starting", "Stop") and "nothing is kept" in starting.stop_note
    (run / "metrics.jsonl").write_text(lines(3))
    assert "keeps" in live_run(studio.places, studio.queue, "mine").stop_note
    (job.folder / "stopping").touch()
    stopping = live_run(studio.places, studio.queue, "mine")
    assert (stopping.state, stopping.stop, stopping.can_stop) == ("stopping", "Stop at once", True)


BROKEN = ['{"step": null}', '{"loss": 1.0}', '{"step": 1, "loss": "x"}', '{"step": 1, "loss": 1, "seconds": {}}', "[1]"]


@pytest.mark.parametrize("line", BROKEN)
def test_lines_that_no_run_writes_are_left_out(studio: Studio, run: Path, line: str) -> None:
    (run / "metrics.jsonl").write_text(f"{line}\n{lines(3)}")
    assert live_run(studio.places, studio.queue, "mine").step == 3


def test_long_metrics_are_read_to_their_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 1000)
    (run / "metrics.jsonl").write_text(lines(30))
    assert [record["step"] for record in all_records(run)][-1] == 30


def test_a_run_from_elsewhere_is_known_by_its_files(studio: Studio, run: Path) -> None:
    assert live_run(studio.places, studio.queue, "mine").state == "unfinished"
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if Path("/proc/locks").is_file():
            assert read_lock(run / ".lock") and live_run(studio.places, studio.queue, "mine").state == "running"
    assert not read_lock(run / ".lock")
    (run / "report.json").write_text("{}")
    assert live_run(studio.places, studio.queue, "mine").state == "done"
    with pytest.raises(NotHere):
        live_run(studio.places, studio.queue, "gone")


def test_only_whole_new_lines_are_read(run: Path) -> None:
    file = run / "metrics.jsonl"
    assert new_records(run, 0) == ([], 0)
    file.write_text(lines(1) + '{"step": 2, "lo')
    found, end = new_records(run, 0)
    assert [record["step"] for record in found] == [0, 1, 1] and end == len(lines(1))
    file.write_text(lines(1) + "not json\n" + lines(1, start=2))
    found, end = new_records(run, end)
    assert [record["step"] for record in found] == [2, 2] and new_records(run, end) == ([], end)
    file.write_text(lines(1))  # resumed from an earlier checkpoint
    assert new_records(run, end)[1] < end


def test_a_run_that_was_killed_speaks_of_memory(studio: Studio, run: Path) -> None:
    over(studio, "mine", "137", at=time.time() + 9)
    assert "memory" in live_run(studio.places, studio.queue, "mine").message


def test_a_thinned_curve_ends_with_the_last_step() -> None:
    records: list[dict[str, object]] = [{"step": step, "loss": 1.0} for step in range(1, 101)]
    kept = thinned(records, 7)
    assert kept[-1]["step"] == 100 and len(kept) <= 9


def test_a_run_that_left_no_folder_is_begun_again_by_a_button_that_is_there(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = studio.queue.add(["finetune"], title="x", run="young")
    monkeypatch.setattr(type(job), "state", "stopped")
    live = live_run(studio.places, studio.queue, "young")
    assert not live.can_resume and "Resume" not in live.message
    assert live.message.endswith("To begin again, prepare another with these settings.")

"""`studio.jobs`: the queue on disk; jobs outlive the studio, and of two studios one starts them."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path

import pytest

from lorakeet.disk import open_in_place
from lorakeet.errors import ConfigError
from lorakeet.studio import jobs as module
from lorakeet.studio.jobs import Job, Queue, Starter, read_job
from lorakeet.studio.places import NotHere
from tiny.command_results import failed


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    """A queue whose command is a shell script: `sleep` sleeps until Ctrl-C, `end N` ends with code N."""
    command = tmp_path / "python"
    command.write_text(
        "#!/bin/sh\ntrap 'kill $!; exit 4' INT\nshift 2\n"  # before the words, for which tests wait
        'echo "words: $*" >&2\nif [ "$1" = end ]; then '
        f"echo '{failed('no rows', 'rows-unusable').strip()}'; exit $2; fi\nsleep 60 & wait\n"
    )
    command.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(command))
    queue = Queue(tmp_path / "own")
    # A shell cannot trap what was ignored when it started, as Ctrl-C is for what runs in the background of a script.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield queue
    signal.signal(signal.SIGINT, before)
    for number in (path.read_text() for path in queue.jobs_folder.glob("*/pid")):
        with suppress(ProcessLookupError, ValueError):  # a shell that has just been started has written none yet
            os.killpg(int(number), signal.SIGKILL)


def until(reached: Callable[[], bool]) -> None:
    for _ in range(3000):
        if reached():
            return
        time.sleep(0.01)
    raise AssertionError("it was not reached")


def parent_of(process: Path) -> int | None:
    """The number of the process that started the one of this folder of /proc; None where it has ended."""
    with suppress(OSError):
        return int((process / "stat").read_text().rpartition(") ")[2].split()[1])  # after its state, which may be any
    return None


def works(job: Job) -> bool:
    return job.state == "running" and "words" in job.log


CODES = [(0, "done"), (2, "failed"), (3, "failed"), (4, "stopped"), (130, "stopped"), (137, "killed")]


@pytest.mark.parametrize(("code", "state"), CODES)
def test_a_job_is_what_its_exit_code_says(queue: Queue, code: int, state: str) -> None:
    job = queue.add(["end", str(code)], title="Short", files={"run.yaml": "a: 1"})
    assert job.state == "waiting" and (job.folder / "run.yaml").read_text() == "a: 1"
    assert queue.start_waiting() == [job]
    until(lambda: job.state != "running")
    assert (job.state, job.code, job.error) == (state, code, "no rows")
    assert job.problem is not None and job.problem.code == "rows-unusable"


def test_one_job_runs_on_a_device_and_the_others_wait(queue: Queue) -> None:
    first, second, other = (queue.add(["sleep"], title=name, device=name[:6]) for name in ("cuda:0", "cuda:0 later", "cuda:1"))
    assert queue.start_waiting() == [first, other] and queue.start_waiting() == []
    assert [job.state for job in (first, second, other)] == ["running", "waiting", "running"]
    assert [queue.ahead(job) for job in (first, second, other)] == [0, 1, 0]
    beside = queue.add(["sleep"], title="a server", device=module.BESIDE)
    assert queue.start_waiting() == [beside]
    unsure = queue.add(["sleep"], title="any device")
    assert queue.start_waiting() == [] and unsure.state == "waiting"


def test_stop_is_the_signal_of_ctrl_c(queue: Queue) -> None:
    job = queue.add(["sleep"], title="Long")
    queue.start_waiting()
    until(lambda: works(job))
    queue.stop(job)
    until(lambda: job.state == "stopped")
    assert job.code == 4
    with pytest.raises(ConfigError, match="does not run any more: it is stopped"):
        queue.stop(job)


def test_a_second_stop_sends_no_second_signal(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training ends without a checkpoint at the second one."""
    job = queue.add(["sleep"], title="Long")
    queue.start_waiting()
    until(lambda: works(job))
    sent: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(module.os, "killpg", lambda _, number: sent.append(number))
        for _ in range(3):
            queue.stop(job)
        assert sent == [signal.SIGINT] and job.stopping
        queue.stop(job, at_once=True)
        assert sent == [signal.SIGINT] * 2
    queue.stop(job, at_once=True)
    until(lambda: job.state == "stopped")


def test_a_process_that_has_the_number_of_a_job_is_not_signalled(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    job = queue.add(["sleep"], title="Long")
    queue.start_waiting()
    until(lambda: works(job))
    number = (job.folder / "pid").read_text()
    (job.folder / "pid").write_text(str(os.getpid()))
    if Path("/proc/self/cmdline").exists():
        with pytest.raises(ConfigError, match="has just ended"):
            queue.stop(job)
    (job.folder / "pid").write_text(number)

    def gone(*_: object) -> None:
        raise ProcessLookupError

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "killpg", gone)
        with pytest.raises(ConfigError, match="has just ended"):
            queue.stop(job)
    assert not job.stopping


def test_a_log_is_read_from_its_end(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    job = queue.add(["sleep"], title="Long")
    (job.folder / "log").write_bytes(b"x" * 3_000_000 + "é".encode() * 100_000 + b"\nthe end\n")
    read = 0

    class Counted(FileIO):
        def readall(self) -> bytes | None:
            nonlocal read
            found = super().readall() or b""
            read += len(found)
            return found

    monkeypatch.setattr(module, "open_regular", lambda path: Counted(str(path)))
    assert job.log.startswith("é") and job.log.endswith("the end\n") and read < 200_000


def test_a_code_that_a_full_disk_refused_is_written_later(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell's own attempt fails here by a folder in its way; an empty code would make the job one that was killed."""
    monkeypatch.setattr(module, "AGAIN", 0.01)
    job = queue.add(["end", "4"], title="Short")
    (job.folder / "code.partial").mkdir()
    queue.start_waiting()
    until((job.folder / "code").exists)
    assert (job.state, job.code) == ("stopped", 4)


def test_a_form_that_was_sent_twice_makes_one_job_and_a_run_is_made_by_one(queue: Queue) -> None:
    first = queue.add(["sleep"], title="Long", run="mine", once="a")
    assert queue.add(["sleep"], title="Long", run="mine-2", once="a") == first and queue.jobs() == [first]
    with pytest.raises(ConfigError, match="'mine' waits already"):
        queue.add(["sleep"], title="Long", run="mine", once="b")
    queue.stop(first)
    assert queue.add(["sleep"], title="Long", run="mine", once="a") != first


def test_a_name_in_braces_is_a_name(queue: Queue) -> None:
    job = queue.add(["end", "{folder}/run.yaml", "/runs/{folder}/x", "a={folder}"], title="x")
    assert job.words == ("end", f"{job.folder}/run.yaml", "/runs/{folder}/x", "a={folder}")
    assert job.names(job.folder) and job.names(Path("{folder}")) and not job.names(Path("/run"))


def test_cuda_is_its_first_device(queue: Queue) -> None:
    queue.add(["sleep"], title="first", device="cuda")
    later, other = queue.add(["sleep"], title="later", device="cuda:0"), queue.add(["sleep"], title="other", device="cuda:10")
    assert [job.title for job in queue.start_waiting()] == ["first", "other"]
    assert (later.state, queue.ahead(later), queue.ahead(other)) == ("waiting", 1, 0)


def test_a_waiting_job_is_taken_out_of_the_queue(queue: Queue) -> None:
    job = queue.add(["end", "0"], title="Short")
    queue.stop(job)
    assert job.state == "cancelled" and queue.start_waiting() == []


def test_jobs_outlive_the_queue_that_started_them_and_start_once(queue: Queue) -> None:
    """As after kill -9 of the studio, or in a second studio: another queue knows them by their files."""
    job = queue.add(["sleep"], title="Long")
    queue.start_waiting()
    again = Queue(queue.folder)
    assert again.start_waiting() == [] and [found.state for found in again.jobs()] == ["running"]
    until(lambda: works(job))
    again.stop(again.job(job.name))
    until(lambda: job.state == "stopped")


@pytest.mark.parametrize("whole", [True, False])
def test_a_killed_job_is_known_as_killed(queue: Queue, whole: bool) -> None:
    """With its shell, no exit code is written."""
    job = queue.add(["sleep"], title="Long", run="mine")
    queue.start_waiting()
    until(lambda: works(job))
    leader = int((job.folder / "pid").read_text())
    if whole:
        os.killpg(leader, signal.SIGKILL)
    else:
        for folder in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
            if folder.name.isdigit() and parent_of(folder) == leader:
                os.kill(int(folder.name), signal.SIGKILL)
    until(lambda: job.state == "killed")
    assert job.code == (None if whole else 137) and queue.of_run("mine") == job
    queue.start_waiting()
    assert (job.end < math.inf) and (job.folder / "ended").exists() == whole


def test_a_number_that_was_given_to_another_process_is_no_job(queue: Queue) -> None:
    """This test's own process has that number, and is not signalled."""
    job = queue.add(["sleep"], title="Old")
    (job.folder / "alive").touch()
    (job.folder / "pid").write_text(str(os.getpgid(0)))
    assert job.state == "killed"
    with pytest.raises(ConfigError, match="it is killed"):
        queue.stop(job)
    (job.folder / "pid").unlink()


def test_broken_folders_are_no_jobs(queue: Queue, tmp_path: Path) -> None:
    for name, text in (("a-1", "{"), ("b-1", "{}"), ("c-1", "[1]")):
        (queue.jobs_folder / name).mkdir()
        (queue.jobs_folder / name / "job.json").write_text(text)
    assert queue.jobs() == [] and read_job(tmp_path / "gone") is None
    for name in ("gone", "../own", "a-1"):
        with pytest.raises(NotHere):
            queue.job(name)


def test_the_starter_goes_on_after_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []

    def tick() -> None:
        seen.append(1)
        raise OSError(28, "No space left on device")

    with Starter(tick, every=0.001):
        until(lambda: len(seen) > 2)
    assert capsys.readouterr().err.count("No space left") == 1, "it is said once"


@pytest.mark.parametrize("word", ["a\0b", "\ud800"])
def test_a_word_that_no_command_can_have_is_refused_and_never_ends_the_queue(queue: Queue, word: str) -> None:
    with pytest.raises(ConfigError, match="a character that no command can have"):
        queue.add(["end", word], title="odd")
    odd, job = queue.add(["end", "1"], title="odd"), queue.add(["end", "0"], title="good")
    about = json.loads((odd.folder / "job.json").read_text())
    (odd.folder / "job.json").write_text(json.dumps({**about, "words": ["end", word]}))
    again = Queue(queue.folder)  # of a studio that was started anew
    assert [one.title for one in again.jobs()] == ["good"] and again.start_waiting() == [job]


def test_a_long_log_keeps_its_end_and_goes_on(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_LOGGED", 300_000)
    job = queue.add(["finetune"], title="x")
    with open_in_place(job.folder / "log", append=True) as log:  # as the job's processes have it
        log.write(b"early\n" * 60_000 + b"late\n")
        queue.start_waiting()
        log.write(b"later\n")
    text = (job.folder / "log").read_text()
    assert text.startswith("(the beginning was cut)\n") and {"late", "later"} < {*text.splitlines()} and len(text) < 100_000


def test_old_jobs_are_forgotten_but_for_the_newest_of_each_run(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_JOBS", 2)
    jobs = [queue.add(["merge"], title=str(number), run="mine" if number == 1 else "") for number in range(6)]
    for job in jobs[:5]:
        queue.stop(job)
    queue.forget_old()
    assert [job.title for job in queue.jobs()] == ["1", "3", "4", "5"] and not jobs[0].folder.exists()


def test_a_job_that_goes_on_is_not_forgotten(queue: Queue) -> None:
    job = queue.add(["predict", "run", "--out", "{folder}/a.csv"], title="x")
    with pytest.raises(ConfigError, match="Stop it first"):
        queue.forget(job)
    queue.stop(job)
    assert job.kept is None, "nothing is written yet"
    (job.folder / "a.csv").touch()
    assert job.kept == job.folder / "a.csv"
    queue.forget(job)
    assert queue.jobs() == []


def test_a_command_that_is_too_long_is_refused(queue: Queue) -> None:
    """The system would not start it, and a page would say that it was ended from outside."""
    with pytest.raises(ConfigError, match=r"would have 100,005 bytes; expected at most 100,000"):
        queue.add(["predi", "é" * 50_000], title="x")
    assert queue.jobs() == []


def test_of_two_jobs_that_would_write_one_result_one_is_made(queue: Queue) -> None:
    for words in (["merge", "run", "--out", "a"], ["convert", "run", "b", "--to", "mlx"]):
        first = queue.add(words, title="x", once="1")
        assert queue.add(words, title="x", once="1") == first, "a second click"
        with pytest.raises(ConfigError, match="is being made already"):
            queue.add(words, title="x", once="2")
        queue.stop(first)
        queue.stop(queue.add(words, title="x", once="3"))


def test_a_job_that_another_tab_has_forgotten_is_no_error(queue: Queue) -> None:
    job = queue.add(["merge"], title="x")
    queue.stop(job)
    for _ in range(2):
        queue.forget(job)
    assert queue.jobs() == []


def test_a_waiting_job_that_was_copied_from_elsewhere_is_never_started(
    queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of runs of someone else may hold a job: to open a studio on it carries nothing out."""
    job = queue.add(["end", "0"], title="theirs \x1b[2J")
    theirs = tmp_path / "unpacked"
    shutil.copytree(queue.folder, theirs)
    other = Queue(theirs)
    [copied] = other.jobs()
    assert other.start_waiting() == [] and copied.state == "cancelled" and not (copied.folder / "log").exists()
    assert "'theirs \\x1b[2J' was copied from elsewhere, so it is not started." in capsys.readouterr().err
    about = json.loads((job.folder / "job.json").read_text())
    for odd in ({}, {"inode": None}, {"inode": str(about["inode"])}, {"inode": about["inode"] + 1}):
        older = queue.add(["end", "0"], title="odd")
        (older.folder / "job.json").write_text(json.dumps({**{k: v for k, v in about.items() if k != "inode"}, **odd}))
    again = Queue(queue.folder)  # of a studio that was started anew: what was made here goes on
    assert again.start_waiting() == [job] and [one.state for one in again.jobs()[1:]] == 4 * ["cancelled"]


@pytest.mark.parametrize("changed", [{}, {"signed": ""}, {"words": ["end", "1"]}, {"title": "other"}, {"files": []}])
def test_who_guesses_the_inode_of_a_folder_starts_no_job(queue: Queue, changed: dict[str, object], state: Path) -> None:
    """An archive can hold the inode that its folder will have: of files in tmpfs it is the next number."""
    job = queue.add(["end", "0"], title="x", files={"run.yaml": "a: 1"})
    about = {**json.loads((job.folder / "job.json").read_text()), **changed}
    theirs = queue.jobs_folder / f"{job.name}-a"
    shutil.copytree(job.folder, theirs)
    (theirs / "job.json").write_text(json.dumps({**about, "inode": theirs.stat().st_ino}))
    queue.stop(job)
    assert Queue(queue.folder).start_waiting() == [] and read_job(theirs).state == "cancelled"  # type: ignore[union-attr]
    [secret] = state.rglob("studio-secret")
    assert secret.stat().st_mode & 0o777 == 0o600 and len(secret.read_bytes()) == 32


def test_a_run_file_that_was_changed_after_its_job_was_made_is_not_carried_out(queue: Queue) -> None:
    job = queue.add(["end", "0"], title="x", files={"run.yaml": "a: 1"})
    assert job.made_here
    (job.folder / "run.yaml").write_text("a: 2")
    assert queue.start_waiting() == [] and job.state == "cancelled"


def test_a_job_names_no_file_of_the_studio(tmp_path: Path) -> None:
    own = tmp_path / ".studio"
    queue = Queue(own)
    (own / "index.sqlite").write_text("")
    (tmp_path / "link").symlink_to(own / "index.sqlite")
    own_files = (f"{own}/index.sqlite", "{folder}/job.json", "{folder}/run.yaml", "{folder}/../../index.sqlite")
    for word in (*own_files, f"{tmp_path}/link"):
        job = queue.add(["predict", "run", "--out", word], title="x", files={"run.yaml": ""})
        assert job.out is None and job.kept is None
        queue.stop(job)
    job = queue.add(["predict", "run", "--out", "{folder}/answers.csv"], title="x")
    assert job.out == job.folder / "answers.csv"


@pytest.mark.parametrize("name", module._FILES)
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_odd_files_at_any_name_of_a_job_hold_up_nobody(queue: Queue, name: str, kind: str) -> None:
    job = queue.add(["end", "0"], title="x")
    place = job.folder / name
    place.unlink(missing_ok=True)
    os.mkfifo(place) if kind == "pipe" else place.mkdir() if kind == "folder" else place.symlink_to(place)
    other = Queue(queue.folder)
    for found in other.jobs():
        assert (found.state, found.runs, found.code, found.log, found.error)[1:] == ({}, None, "", "") and found.end
    other.going()
    other.forget_old()
    shutil.rmtree(job.folder)

"""Jobs: processes of the command line, each with a folder of its own, and the queue that starts them.

    .studio/jobs/NAME/job.json   what runs, written once
                      runs.json  the run folders that it makes or uses, by name, with their run_id
                      run.yaml   the run file, where there is one
                      alive      locked by the process and all it starts, as long as one of them lives
                      pid        the leader of their process group
                      log        what they say while they work, and libraries print
                      result     what the command prints as JSON: its result, or its error
                      code       the exit code
                      cancelled  it was taken out of the queue
                      stopping   it was sent the signal of Ctrl-C
                      ended      written after the end of one without a code

The lock is the truth: it ends with the process, whatever ends that, and a number that was given to another process does not have
it. So jobs outlive the studio, a restarted one finds them, and of two studios on a folder only one starts a job (queue.lock).
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorakeet.disk import erase, open_in_place, open_regular, write_new, write_whole, written_whole
from lorakeet.errors import ConfigError, LorakeetError, visible
from lorakeet.studio.places import OWN, NotHere, given_run_id, signature_of

State = Literal["waiting", "running", "done", "stopped", "failed", "killed", "cancelled"]
STOPPED = (4, 130, 143)  # exit codes of a run that ended early, Ctrl-C, SIGTERM
_AUTO = "auto"
_RUNS = "runs.json"
_FILES = ("job.json", _RUNS, "alive", "pid", "log", "result", "code", "cancelled", "stopping", "ended")
BESIDE = ""  # the device of a job that waits for no other
_OWN = "{folder}/"  # before the name of a job's own file, in a word
_STARTING = 5.0  # seconds that the start of a process may take
AGAIN = 1.0  # seconds between two attempts to write a code
_DIGITS = 9  # of an exit code or a process's number
_LARGEST_ABOUT = 1 << 20  # bytes of a job's file
LONGEST_COMMAND = 100_000  # bytes; the system takes words of 131,072
LAST_JOBS = 200  # of those that are over, whose logs are kept
MOST_LOGGED = 1 << 24  # bytes of a log
_LOG_END = 20_000  # characters of a log that a page shows, of at most four bytes each
# The shell outlives Ctrl-C, which reaches the whole group, and writes the exit code even if no studio runs then.
# On a full disk neither an empty number nor an empty code counts: the studio writes the code when there is space.
_SCRIPT = (
    'trap : INT TERM; echo $$ > "$0/pid" || exit 1; "$@"; code=$?; '
    'echo $code > "$0/code.partial" && mv "$0/code.partial" "$0/code"; exit $code'
)


@dataclass(frozen=True)
class Job:
    """One command of the queue."""

    folder: Path
    words: tuple[str, ...]  # the arguments of lorakeet
    title: str
    run: str = ""  # the run folder's name, where it makes or resumes one
    device: str = _AUTO
    made: float = 0.0  # seconds since 1970
    once: str = ""  # of the form that made it, so that a second click makes no second job
    inode: int = 0  # of its folder, which a copy has not
    files: tuple[str, ...] = ()  # the names of those that it was made with
    signed: str = ""  # `signature`, as it was when the job was made

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def made_here(self) -> bool:
        """False in a folder that was copied or unpacked: its command may be a stranger's."""
        try:
            same = self.inode == self.folder.stat().st_ino
        except OSError:
            return False
        return same and hmac.compare_digest(self.signed.encode("utf-8", "replace"), self.signature(self.folder).encode())

    def signature(self, place: Path) -> str:
        """Of all that it is, where it lies, and its files in `place`, with a key that no folder of runs holds."""
        about = {**asdict(replace(self, signed="")), "folder": str(self.folder.resolve())}
        contents = [hashlib.sha256(_bytes(place / name, _LARGEST_ABOUT)).hexdigest() for name in self.files]
        return signature_of(json.dumps(["job", about, contents]))

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs, and of a process that was killed together with its shell."""
        text = _text(self.folder / "code").strip()
        return int(text) if text.isascii() and text.isdecimal() and len(text) <= _DIGITS else None

    @property
    def state(self) -> State:
        """What has become of it, by its files."""
        if (self.folder / "cancelled").exists():
            return "cancelled"
        if not (self.folder / "alive").exists():
            return "waiting"
        if self.code is None and _locked(self.folder / "alive"):
            return "running"
        if (code := self.code) is None:  # it is written before the lock ends, and was read before it
            return "killed" if (self.folder / "pid").exists() or self._age() > _STARTING else "running"
        if code > 128 and code not in STOPPED:
            return "killed"
        return "done" if code == 0 else "stopped" if code in STOPPED else "failed"

    @property
    def stopping(self) -> bool:
        """True after it was sent the signal of Ctrl-C."""
        return (self.folder / "stopping").exists()

    @property
    def end(self) -> float:
        """When it was over, in seconds since 1970: infinity while that is not known."""
        for name in ("code", "ended"):
            with suppress(OSError):
                return (self.folder / name).stat().st_mtime
        return math.inf

    @property
    def kept(self) -> Path | None:
        """The file that its command has written into the job's own folder, which is the user's; None without one."""
        path = self.out
        return path if path is not None and path.parent == self.folder and path.is_file() else None

    @property
    def runs(self) -> dict[str, str]:
        """The run_id of the run folders that it makes or uses, by name; without those that had none yet."""
        try:
            found = json.loads(_bytes(self.folder / _RUNS, _LARGEST_ABOUT))
        except (ValueError, RecursionError):
            return {}
        return {name: str(one) for name, one in found.items()} if isinstance(found, dict) else {}

    @property
    def out(self) -> Path | None:
        """What its command writes; None for one that writes nothing here, or names a file that is the studio's own."""
        path = _written_by(self.words)
        if path is None or OWN not in (whole := path.resolve()).parts:
            return path
        return path if whole.parent == self.folder.resolve() and whole.name not in (*_FILES, *self.files) else None

    def names(self, folder: Path) -> bool:
        """True if its command has `folder`, or a file in it, as an argument."""
        parts = (part for word in self.words for part in word.split("="))
        return any(part == str(folder) or part.startswith(f"{folder}/") for part in parts)

    def _age(self) -> float:
        """Seconds since its start."""
        return time.time() - self.started if self.started < math.inf else _STARTING + 1

    @property
    def log(self) -> str:
        """The end of what it printed."""
        return _text(self.folder / "log", 4 * _LOG_END)[-_LOG_END:]

    @property
    def results(self) -> list[dict[str, Any]]:
        """The objects that its command has printed so far: one a line, or one in several lines."""
        text = _text(self.folder / "result", _LARGEST_ABOUT)
        for parts in ([text], text.splitlines()):
            with suppress(ValueError, RecursionError):
                found = [json.loads(part) for part in parts]
                return [one for one in found if isinstance(one, dict)]
        return []

    @property
    def problem(self) -> LorakeetError | None:
        """The error that its command has ended with."""
        try:
            return LorakeetError.from_mapping(self.results[-1]["error"])
        except (LookupError, TypeError, ValueError, AttributeError):
            return None

    @property
    def error(self) -> str:
        """The message of its `problem`."""
        return str(self.problem or "")

    @property
    def started(self) -> float:
        """When it was started, in seconds since 1970: infinity before."""
        try:
            return (self.folder / "alive").stat().st_mtime
        except OSError:
            return math.inf


class Queue:
    """The jobs of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs_folder = folder / "jobs"
        self.jobs_folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Job] = {}  # what was read once: a job's file never changes
        self._over: set[str] = set()

    def add(
        self,
        words: Sequence[str],
        *,
        title: str,
        run: str = "",
        device: str = _AUTO,
        files: Mapping[str, str] | None = None,
        once: str = "",
    ) -> Job:
        """Puts a command into the queue. "{folder}/" at a word's beginning is the job's folder, where `files` are written.

        Returns the job that waits or runs where one was made with the same `once` (pages.once_of). ConfigError while another one
        makes `run` or writes the same result, for a word that no command can have, and for a command that is too long.
        """
        if odd := [word for word in words if not _is_argument(word)]:
            raise ConfigError(f"{odd[0]!r:.80} has a character that no command can have. Type it without.")
        if (size := sum(len(os.fsencode(word)) for word in words)) > LONGEST_COMMAND:
            raise ConfigError(f"The command would have {size:,} bytes; expected at most {LONGEST_COMMAND:,}. Type shorter texts.")
        with self.alone():
            for job, state in self.going():
                if once and job.once == once:
                    return job
                if run and job.run == run:
                    raise ConfigError(f"'{run}' {'runs' if state == 'running' else 'waits'} already. Stop it first, or wait.")
                if job.out is not None and job.out == _written_by(words):
                    raise ConfigError(f"{job.out.name} is being made already. Wait for it, or give another name.")
            return self._add(words, title, run, device, files or {}, once)

    def _add(self, words: Sequence[str], title: str, run: str, device: str, files: Mapping[str, str], once: str) -> Job:
        made = time.time()
        folder = self.jobs_folder / f"{_moment(made)}-{secrets.token_hex(3)}"
        whole = tuple(f"{folder}/{word.removeprefix(_OWN)}" if word.startswith(_OWN) else word for word in words)
        job = Job(folder, whole, title, run, device, made, once, files=tuple(files))
        with written_whole(folder) as place:
            place.mkdir()
            job = replace(job, inode=place.stat().st_ino)
            for name, text in files.items():
                write_new(place / name, text.encode())
            job = replace(job, signed=job.signature(place))
            about = {name: value for name, value in asdict(job).items() if name != "folder"}
            write_new(place / "job.json", json.dumps(about).encode())
            write_new(place / _RUNS, json.dumps(self._run_ids(whole, run)).encode())
        return job

    def _run_ids(self, words: Sequence[str], run: str) -> dict[str, str]:
        """The run_id of each run folder that is there and that a command names."""
        names = (found[2] for word in words if (found := word.rpartition(f"{self.folder.parent}/"))[1])
        plain = (name for name in dict.fromkeys((run, *names)) if name and "/" not in name and not name.startswith("."))
        ids = {name: _id_of_run(self.folder.parent / name) for name in plain}
        return {name: one for name, one in ids.items() if one}

    def jobs(self) -> list[Job]:
        """All jobs, the oldest first."""
        with os.scandir(self.jobs_folder) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        for name in names:
            if name not in self._known and (job := read_job(self.jobs_folder / name)) is not None:
                self._known[name] = job
        found = (self._known.get(name) for name in names)  # another thread may forget one meanwhile
        return [job for job in found if job is not None]

    def going(self) -> list[tuple[Job, State]]:
        """The jobs that are not over, with their state; those that are over are never read again."""
        found = [(job, job.state) for job in self.jobs() if job.name not in self._over]
        for job, state in found:
            if state == "killed" and job.end == math.inf:
                with suppress(OSError):
                    write_whole(job.folder / "ended", b"")
        self._over |= {job.name for job, state in found if state not in ("waiting", "running")}
        return [(job, state) for job, state in found if state in ("waiting", "running")]

    def job(self, name: str) -> Job:
        """The job `name`. Raises NotHere."""
        found = read_job(self.jobs_folder / name) if name.replace("-", "").isalnum() else None
        if found is None:
            raise NotHere(f"There is no job '{name:.80}'.")
        return found

    def of_run(self, name: str, *, cancelled: bool = True) -> Job | None:
        """The newest job that made or resumed the run `name`, without those that never started unless `cancelled`."""
        found = (job for job in reversed(self.jobs()) if job.run == name)
        return next((job for job in found if cancelled or job.state != "cancelled"), None)

    def ahead(self, job: Job) -> int:
        """The number of jobs on its device that run or wait before it."""
        return sum(other.made < job.made and _same_device(job.device, other.device) for other, _ in self.going())

    def start_waiting(self) -> list[Job]:
        """Starts the oldest waiting job of each device on which none runs; returns what was started. Long logs are cut."""
        started = []
        with self.alone():
            jobs = self.going()
            for job, _ in jobs:
                _cut_log(job.folder / "log")
            busy = [job.device for job, state in jobs if state == "running"]
            for job in (job for job, state in jobs if state == "waiting"):
                if not job.made_here:
                    write_whole(job.folder / "cancelled", b"")
                    print(f"'{visible(job.title)}' was copied from elsewhere, so it is not started.", file=sys.stderr)
                    continue
                if not any(_same_device(job.device, other) for other in busy):
                    self._start(job)
                    started.append(job)
                busy.append(job.device)  # later ones of the device wait behind it
        return started

    def forget_old(self) -> None:
        """Removes the folders of jobs that are over, but for the newest LAST_JOBS of them and the newest of each run.

        Those that hold a file of the user's stay, until `forget` is called.
        """
        with self.alone():
            going = {job.name for job, _ in self.going()}
            jobs = [job for job in self.jobs() if job.name not in going]
            newest = {job.run: job.name for job in jobs if job.run}
            for job in jobs[:-LAST_JOBS]:
                if newest.get(job.run) != job.name and job.kept is None:
                    self._erase(job)

    def forget(self, job: Job) -> None:
        """Removes the folder of a job that is over, with the file that it holds. ConfigError while it runs or waits."""
        with self.alone():
            if job.folder.is_dir() and (state := job.state) in ("waiting", "running"):  # another tab may have forgotten it
                raise ConfigError(f"'{job.title}' is {state}. Stop it first.")
            self._erase(job)

    def bind(self, job: Job, name: str, found: str) -> None:
        """Writes the run_id of the run `name` into a job that was made before the run had one; within `alone`."""
        if job.folder.is_dir():
            write_whole(job.folder / _RUNS, json.dumps({**job.runs, name: found}).encode())

    def _erase(self, job: Job) -> None:
        erase(job.folder)
        self._known.pop(job.name, None)

    def stop(self, job: Job, *, at_once: bool = False) -> None:
        """Takes a waiting job out of the queue; sends a running one the signal of Ctrl-C, once. ConfigError if it does neither.

        A second signal ends a training without a checkpoint, so it is sent with `at_once` alone.
        """
        with self.alone():
            state = job.state
            if state == "waiting":
                write_whole(job.folder / "cancelled", b"")
            elif state != "running":
                raise ConfigError(f"'{job.title}' does not run any more: it is {state}.")
            elif at_once or not job.stopping:
                _interrupt(job)
                write_whole(job.folder / "stopping", b"")

    def _start(self, job: Job) -> None:
        given = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
        command = ["/bin/sh", "-c", _SCRIPT, str(job.folder), sys.executable, "-m", "lorakeet", *job.words, "--json"]
        with (
            open_in_place(job.folder / "log", append=True) as log,
            open_in_place(job.folder / "result", append=True) as result,
            open_in_place(job.folder / "alive") as alive,
        ):
            fcntl.flock(alive, fcntl.LOCK_EX)
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=result, stderr=log, env=given, start_new_session=True,
                pass_fds=(alive.fileno(),),
            )  # fmt: skip
        threading.Thread(target=_await, args=(process, job), name=f"studio-{job.name}", daemon=True).start()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A context in which no other studio, and no other thread of this one, makes, starts or cancels a job."""
        with open_in_place(self.folder / "queue.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class Starter:
    """A thread that starts waiting jobs, as long as the context lasts."""

    def __init__(self, tick: Callable[[], object], every: float = 0.5) -> None:
        self._tick, self._every, self._end = tick, every, threading.Event()
        self._thread = threading.Thread(target=self._run, name="studio-queue", daemon=True)

    def __enter__(self) -> Starter:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        said = ""
        while not self._end.wait(self._every):
            try:
                self._tick()
                said = ""
            except OSError as error:  # a full disk, a folder that vanished: it is tried again
                if said != str(error):
                    said = str(error)
                    print(f"The queue waits: {said}", file=sys.stderr)


def read_job(folder: Path) -> Job | None:
    """The job in `folder`; None where there is none, or what there is cannot be read."""
    try:
        about = json.loads(_bytes(folder / "job.json", _LARGEST_ABOUT))
        words, made = about["words"], float(about["made"])
        title, run, device = (str(about[name]) for name in ("title", "run", "device"))
        once, inode, signed = str(about.get("once", "")), about.get("inode"), str(about.get("signed", ""))
        files = tuple(Path(str(name)).name for name in about.get("files", ()))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    if not isinstance(words, list) or not all(map(_is_argument, words)) or not math.isfinite(made):
        return None
    return Job(folder, tuple(words), title, run, device, made, once, inode if type(inode) is int else 0, files, signed)


def _moment(made: float) -> str:
    """A time in the name of a job's folder, by which jobs are sorted: all of it is of one reading of the clock."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(made))}-{int(made * 1e6) % 10**6:06d}"


def _id_of_run(folder: Path) -> str:
    """The run_id of a run folder, which is given one; empty for what is none: an empty folder stays empty."""
    try:
        is_run = (folder / "config.yaml").is_file() and not folder.is_symlink()
    except OSError:  # a text that is too long for a name
        return ""
    return given_run_id(folder) if is_run else ""


def _is_argument(word: object) -> bool:
    """True for a text that the system takes as an argument: one that it refuses would end the queue."""
    try:
        return isinstance(word, str) and b"\0" not in os.fsencode(word)
    except UnicodeEncodeError:  # half a character
        return False


def _written_by(words: Sequence[str]) -> Path | None:
    if "--out" in words[:-1]:
        return Path(words[words.index("--out") + 1])
    return Path(words[2]) if len(words) > 2 and words[0] == "convert" else None


def locked_files() -> frozenset[str]:
    """The files that processes have locked, where the system lists them: a probe of its own would keep a run out."""
    try:
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return frozenset()
    lines = [line.split() for line in locks.splitlines() if "FLOCK" in line and "->" not in line]
    return frozenset(word for line in lines for word in line if word.count(":") == 2)


def read_lock(path: Path, locked: frozenset[str] | None = None) -> bool:
    """True if a process has the lock of a run folder; `locked` are the locked files, where they are read already."""
    try:
        about = path.stat()
    except OSError:
        return False
    place = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
    return place in (locked_files() if locked is None else locked)


def last_line(log: str) -> str:
    """The last line that a running command printed, without what a terminal would overwrite."""
    lines = [line.rpartition("\r")[2].strip() for line in log.splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _same_device(one: str, other: str) -> bool:
    """True if jobs on these devices may be on one: what auto will be is not known before. cuda is cuda:0."""
    if BESIDE in (one, other):
        return False
    return _AUTO in (one, other) or one.removesuffix(":0") == other.removesuffix(":0")


def _await(process: subprocess.Popen[bytes], job: Job) -> None:
    """Waits for the end of a job's shell, and writes the code that it could not write, as soon as there is space."""
    code = process.wait()
    while code >= 0 and job.folder.is_dir() and job.code is None:
        with suppress(OSError):
            write_whole(job.folder / "code", f"{code}\n".encode())
            return
        time.sleep(AGAIN)


def _interrupt(job: Job) -> None:
    """Sends the signal of Ctrl-C to a job's processes. ConfigError where it has no number yet, or none any more."""
    for _ in range(100):  # the shell writes its number first of all
        number = _text(job.folder / "pid").strip()
        if number.isascii() and number.isdecimal() and len(number) <= _DIGITS and int(number) > 1:  # 0 and 1 are no job's
            break
        time.sleep(0.02)
    else:
        raise ConfigError(f"'{job.title}' has just been started. Try again in a moment.")
    try:
        words = Path("/proc", number, "cmdline").read_bytes().split(b"\0")
    except OSError:  # the shell has ended, or this system lists no processes
        words = []
    with suppress(ProcessLookupError):
        if not words or str(job.folder).encode() in words:  # else another process was given this number
            os.killpg(int(number), signal.SIGINT)
            return
    raise ConfigError(f"'{job.title}' has just ended.")


def _locked(path: Path) -> bool:
    """True if a process has the lock of the file `path`."""
    try:
        with open_regular(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _cut_log(path: Path) -> None:
    """Leaves the end of a log that has become too long; what is written just then may be lost."""
    try:
        if path.stat().st_size > MOST_LOGGED:
            with open_in_place(path, append=True) as log:
                end = _bytes(path, 4 * _LOG_END)
                os.truncate(path, 0)
                log.write(b"(the beginning was cut)\n" + end)
    except FileNotFoundError:
        pass


def _text(path: Path, most: int = 1 << 16) -> str:
    """The last `most` bytes of a file as text; empty where it cannot be read."""
    return _bytes(path, most).decode("utf-8", "replace")


def _bytes(path: Path, most: int = 1 << 16) -> bytes:
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - most))
            return file.readall() or b""
    except OSError:
        return b""

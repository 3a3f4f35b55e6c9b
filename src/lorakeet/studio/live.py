"""A run as it goes on, from the files of its folder and of its job; all of it can be read again after a reload."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorakeet.config import RunConfig, read_run
from lorakeet.disk import open_regular
from lorakeet.errors import LorakeetError
from lorakeet.studio.jobs import Job, Queue, last_line, read_lock
from lorakeet.studio.places import NotHere, Places, regular_within
from lorakeet.studio.remedies import page_words
from lorakeet.train.run import RunFolder

AT_ONCE = 1 << 22  # bytes of metrics in one event
_WORDS = {
    "waiting": "Waits in the queue",
    "starting": "Reads the model and the rows, and measures the base",
    "training": "Trains",
    "measuring": "Answers the rows to measure on; this may take as long as the training",
    "stopping": "Stops after this step or evaluation",
    "running": "Runs, started outside of this studio",
    "done": "Done",
    "stopped": "Stopped; what it has trained so far is kept",
    "failed": "Could not go on",
    "killed": "Was ended from outside",
    "cancelled": "Was taken out of the queue",
    "unfinished": "Is not finished",
}
GOING = ("waiting", "starting", "training", "measuring", "stopping", "running")
_KILLED = "The system ends a process so when memory has run out: lower the memory budget, or see on the screen Fit what helps."
_STOP = {
    "waiting": ("Take it out of the queue", "It has not started."),
    "starting": ("Stop", "It has trained no step yet, so nothing is kept."),
    "training": ("Stop", "It stops after this step and keeps what it has trained; you can go on later."),
    "measuring": ("Stop", "The adapter is kept, but not the evaluation that runs."),
    "stopping": ("Stop at once", "What it has trained since its last checkpoint is lost."),
}
_LARGEST = 1 << 63  # above all numbers of a run's metrics; NaN is not below it


@dataclass(frozen=True)
class LiveRun:
    """What a page shows of one run beside its curves. Times are seconds, memory is bytes."""

    name: str
    state: str  # one of the keys of _WORDS
    said: str  # in words
    message: str = ""  # of a run that ended early: the command line's own, or what Stop has kept
    doing: str = ""  # the last line that it printed, while no step is trained
    step: int = 0
    total: int | None = None
    seconds_left: float | None = None
    tokens_per_second: float | None = None
    memory: int | None = None
    budget: int | None = None
    base: float | None = None
    best: float | None = None
    best_step: int | None = None
    ahead: int = 0  # jobs before it in the queue
    can_stop: bool = False
    stop: str = ""  # the button's text
    stop_note: str = ""  # what is kept then
    can_resume: bool = False
    since: float | None = None  # when its job was started, in seconds since 1970, while it runs


class RunNumbers:
    """What a page shows of the lines of metrics.jsonl, fed as they come, so that a long file is read once."""

    def __init__(self) -> None:
        self.recent: deque[dict[str, Any]] = deque(maxlen=20)  # steps
        self.base: float | None = None
        self.best: float | None = None
        self.best_step: int | None = None
        self.memory: int | None = None

    def feed(self, records: list[dict[str, Any]]) -> None:
        """Takes the next records."""
        for record in records:
            if record.get("loss") is not None:
                self.recent.append(record)
                self.memory = max(self.memory or 0, int(record.get("memory_bytes") or 0)) or None
            if (value := record.get("held_out_loss")) is not None:
                self.base = value if record.get("step") == 0 else self.base
                if self.best is None or value < self.best:
                    self.best, self.best_step = value, record.get("step")

    @property
    def last(self) -> dict[str, Any]:
        """The last step."""
        return self.recent[-1] if self.recent else {}

    @property
    def pace(self) -> float | None:
        """Seconds of a step, held-out evaluations included; None before there are two."""
        times = [float(record["seconds"]) for record in self.recent if record.get("seconds") is not None]
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    @property
    def speed(self) -> float | None:
        """Tokens per second, the mean of recent steps."""
        found = [float(record["tokens_per_second"]) for record in self.recent if record.get("tokens_per_second")]
        return sum(found) / len(found) if found else None


def live_run(places: Places, queue: Queue, name: str, numbers: RunNumbers | None = None) -> LiveRun:
    """The run `name` as it is now; `numbers` are those of its metrics, where they are read already.

    Raises NotHere where there is neither a folder nor a job.
    """
    return followed(places, queue, name, job_of(places, queue, name), numbers)


def followed(places: Places, queue: Queue, name: str, job: Job | None, numbers: RunNumbers | None = None) -> LiveRun:
    """`live_run` with the job that `job_of` has found."""
    folder = places.new_run(name)
    run = RunFolder.at(folder)
    if run is None and (job is None or job.state == "done"):
        raise NotHere(f"There is no run '{name}' in {places.runs}. It may have been deleted or moved.")
    if numbers is None:
        numbers = RunNumbers()
        numbers.feed(all_records(folder))
    step = int(numbers.last.get("step", 0))
    total, budget = _bounds(run, numbers.last)
    state = run_state(run, job)
    if state == "running" and job is not None and job.state == "running":
        reached = "measuring" if total and step >= total else "training"
        trains = step and run is not None and _changed(run.metrics) >= job.started  # a resumed run loads its model first
        state = "stopping" if job.stopping else reached if trains else "starting"
    stop, note = _STOP.get(state, ("", ""))
    note = "What it trained before is kept." if state == "starting" and step else note
    ended = state in ("stopped", "failed", "killed")
    return LiveRun(
        name=name,
        state=state,
        said=_WORDS[state] if step or state != "stopped" else "Stopped before the first step",
        message=_message(state, job, step, total, resumed=run is not None) if job is not None and ended else "",
        doing=page_words(last_line(job.log)) if job is not None and state in ("starting", "measuring", "stopping") else "",
        step=step,
        total=total,
        seconds_left=(total - step) * numbers.pace if state == "training" and total and numbers.pace else None,
        tokens_per_second=numbers.speed,
        memory=numbers.memory,
        budget=budget,
        base=numbers.base,
        best=numbers.best,
        best_step=numbers.best_step,
        ahead=queue.ahead(job) if job is not None and state == "waiting" else 0,
        can_stop=bool(stop),
        stop=stop,
        stop_note=note,
        can_resume=run is not None and (ended or state == "unfinished"),
        since=job.started if job is not None and state in _STOP and math.isfinite(job.started) else None,
    )


def _message(state: str, job: Job, step: int, total: int | None, *, resumed: bool) -> str:
    """What a run that ended early says: after Stop what is kept, otherwise the command line's own words.

    `resumed`: whether it can be.
    """
    if state == "stopped" and step:
        of = f" of {total}" if total else ""
        return f"It stopped after step {step}{of}, as it was meant to. All up to there is kept; Resume goes on from there."
    if state == "stopped":
        again = "Resume begins again." if resumed else "To begin again, prepare another with these settings."
        return f"No step was trained yet, so nothing was lost. {again}"
    return page_words(job.error) or (_KILLED if state == "killed" else "")


def thinned(records: list[dict[str, Any]], most: int = 4000) -> list[dict[str, Any]]:
    """All held-out records, and so many steps, the last one among them, that a curve needs no more."""
    each = max(1, -(-len(records) // most))
    last = len(records) - 1
    return [record for number, record in enumerate(records) if number % each == 0 or number == last or "held_out_loss" in record]


def new_records(folder: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of metrics.jsonl from byte `offset` on, and where they end; from the start if the file is shorter now."""
    try:
        if not regular_within(folder, folder / "metrics.jsonl"):
            return [], 0
        with open_regular(folder / "metrics.jsonl") as file:
            size = file.seek(0, 2)
            begin = offset if 0 <= offset <= size else 0
            file.seek(begin)
            data = file.read(AT_ONCE) or b""
    except OSError:
        return [], 0
    whole = data[: data.rfind(b"\n") + 1]
    records = []
    for line in whole.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # of a disk that was full, or of no run
        if _is_record(record):
            records.append(record)
    return records, begin + len(whole)


def all_records(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of metrics.jsonl."""
    found: list[dict[str, Any]] = []
    offset, end = -1, 0
    while end > offset:
        offset = end
        records, end = new_records(folder, offset)
        found += records
    return found


def drawn_samples(folder: Path) -> list[str]:
    """The samples that a run has drawn so far, as paths below RUN/progress."""
    progress = folder / "progress"
    found = (path for path in sorted(progress.glob("step-*/*.png")) if regular_within(folder, path))
    return [str(path.relative_to(progress)) for path in found][-60:]


def plain_values(live: LiveRun) -> dict[str, Any]:
    """The run as JSON."""
    return asdict(live)


def job_of(places: Places, queue: Queue, name: str) -> Job | None:
    """The job that the run `name` is as it is because of; None where another process has made or changed its folder since.

    A job that was cancelled has changed no folder.
    """
    run = RunFolder.at(places.new_run(name))
    job = queue.of_run(name, cancelled=run is None)
    if run is None or job is None:
        return job
    return None if max(map(_changed, (run.config, run.metrics, run.report))) > job.end else job


def run_state(run: RunFolder | None, job: Job | None, locked: frozenset[str] | None = None) -> str:
    """What has become of a run, by its folder and its job; "running" also where it was started outside of the studio.

    `locked` are the files that are locked (`locked_files`), where they are read already.
    """
    state = "" if job is None else job.state
    if state in ("waiting", "running"):
        return state
    if run is None:
        return state or "unfinished"
    if read_lock(run.path / ".lock", locked):
        return "running"
    if state in ("", "done"):
        return "done" if run.report.is_file() else "unfinished"
    return state


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _is_record(record: Any) -> bool:
    """True for a line as runs write them: numbers and null."""
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return False
    return all(value is None or (isinstance(value, int | float) and abs(value) < _LARGEST) for value in record.values())


@lru_cache(maxsize=64)
def _settings(path: Path, changed: int) -> RunConfig:
    """The settings in a file, read once for each time of its change."""
    return read_run(path)


def _bounds(run: RunFolder | None, last: dict[str, Any]) -> tuple[int | None, int | None]:
    """The steps of the whole run, and its memory budget in bytes; None where they are not known."""
    try:
        config = RunConfig() if run is None else _settings(run.config, run.config.stat().st_mtime_ns)
        each = round(last["step"] / last["epoch"]) if last.get("epoch") else None
        total = config.train.steps if each is None else config.train.total_steps(each)
        return total, config.memory.limit.limit
    except (LorakeetError, OSError, ArithmeticError):  # of a run file or an epoch that no run has
        return None, None

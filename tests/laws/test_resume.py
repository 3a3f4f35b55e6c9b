"""Real processes, killed: whatever the moment, the resumed run ends in the same bytes as one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakeet.train import checkpoint
from lorakeet.train.log import read_metrics
from lorakeet.train.run import RunFolder
from tiny.forked import Workers, forked_again
from tiny.prepared import Prepared
from train.kill_worker import SPEC

WORKER = Path(__file__).parent.parent / "train" / "kill_worker.py"
SECOND = "import sys\nfrom pathlib import Path\nfrom train.kill_worker import work\nsys.exit(work(Path(sys.argv[1])))"
TIMES = {"tokens_per_second", "seconds", "memory_bytes"}
PATIENCE = 60.0  # seconds until a worker counts as hung


@pytest.fixture(scope="module")
def workers(prepared: Prepared) -> Iterator[Workers]:
    with forked_again(prepared, WORKER) as found:
        yield found


@pytest.fixture(scope="module")
def whole(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    workers.start(run=str(run))
    assert workers.end() == {"code": 0, "said": ""}
    return run


def steps_done(run: Path) -> int:
    return max((record["step"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record), default=0)


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while steps_done(run) < step:
        assert time.monotonic() < deadline, f"no step {step} in {PATIENCE} s"
        time.sleep(0.001)


def results(run: Path) -> dict[str, Any]:
    """Every byte that must be equal, and the metrics without times."""
    folders = [run / "adapter", run / "checkpoints" / checkpoint.step_name(SPEC.steps or 0)]
    files = {
        str(path.relative_to(run)): path.read_bytes()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("state.json", "manifest.json")  # which hold the seconds
    }
    metrics = [
        {key: value for key, value in record.items() if key not in TIMES} for record in read_metrics(run / "metrics.jsonl")
    ]
    return {"files": files, "metrics": metrics, "hidden": [path.name for path in run.rglob(".*")]}


def assert_equal(run: Path, whole: Path) -> None:
    got, expected = results(run), results(whole)
    assert got["metrics"] == expected["metrics"]
    assert got["hidden"] == expected["hidden"]
    assert got["files"].keys() == expected["files"].keys()
    assert [name for name, data in got["files"].items() if data != expected["files"][name]] == []


@pytest.mark.slow
def test_ten_kills_at_random_moments(workers: Workers, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    chance = random.Random(20)
    step_time = read_metrics(whole / "metrics.jsonl")[-2]["seconds"] / (SPEC.steps or 1)  # the last record is an evaluation
    for step in sorted(chance.randrange(32) for _ in range(10)):
        pid = workers.start(run=str(run))
        wait_for_step(run, step)
        time.sleep(chance.random() * step_time)
        os.kill(pid, signal.SIGKILL)
        assert workers.end()["code"] == -signal.SIGKILL
    workers.start(run=str(run))
    assert workers.end() == {"code": 0, "said": ""}
    assert_equal(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_says_how_to_resume(workers: Workers, whole: Path, tmp_path: Path, which: int) -> None:
    run = tmp_path / "run"
    pid = workers.start(run=str(run))
    wait_for_step(run, 3)
    os.kill(pid, which)
    ended = workers.end()
    done = steps_done(run)
    assert ended["code"] == 4
    assert f"stopped after step {done} of 40" in ended["said"]
    assert f"lorakeet finetune --resume {run}" in ended["said"]
    assert checkpoint.load_checkpoint(RunFolder(run).checkpoints / checkpoint.step_name(done)).position.step == done
    workers.start(run=str(run))
    assert workers.end() == {"code": 0, "said": ""}
    assert_equal(run, whole)


@pytest.mark.slow
def test_a_process_that_is_stopped_and_goes_on_and_a_second_one_meanwhile(
    workers: Workers, prepared: Prepared, whole: Path, tmp_path: Path
) -> None:
    """SIGSTOP and SIGCONT, as a laptop's lid does; while it stands still, another process is refused the run."""
    run = tmp_path / "run"
    pid = workers.start(run=str(run))
    for step in (2, 9, 17):
        wait_for_step(run, step)
        os.kill(pid, signal.SIGSTOP)
        try:
            if step == 9:
                with prepared.python(SECOND, run) as second:
                    assert second.wait(PATIENCE) and f"Another process is training {run}" in second.stderr.read()
        finally:
            os.kill(pid, signal.SIGCONT)
    assert workers.end() == {"code": 0, "said": ""}
    assert_equal(run, whole)


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(workers: Workers, whole: Path, tmp_path: Path) -> None:
    """By days, forwards and backwards, at every look at it; a kill and a resumption between."""
    run = tmp_path / "run"
    pid = workers.start(run=str(run), clock="jumps")
    wait_for_step(run, 11)
    os.kill(pid, signal.SIGKILL)
    assert workers.end()["code"] == -signal.SIGKILL
    workers.start(run=str(run), clock="jumps")
    assert workers.end() == {"code": 0, "said": ""}
    assert_equal(run, whole)


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(workers: Workers, whole: Path, tmp_path: Path) -> None:
    """The system itself refuses to let a file grow above a limit, in the middle of a checkpoint."""
    run = tmp_path / "run"
    pid = workers.start(run=str(run))
    wait_for_step(run, 3)
    os.kill(pid, signal.SIGINT)
    assert workers.end()["code"] == 4
    before = checkpoint.found(run / "checkpoints")
    workers.start(run=str(run), file_limit=8000)
    ended = workers.end()
    assert ended["code"] == 2
    assert "is full" in ended["said"]
    assert f"The previous checkpoint {before[-1].name} is intact" in ended["said"]
    assert f"--resume {run}" in ended["said"]
    assert checkpoint.found(run / "checkpoints") == before
    assert checkpoint.load_checkpoint(before[-1]).position.step == int(before[-1].name[-6:])
    assert list((run / "checkpoints").glob(".*")) == []
    workers.start(run=str(run))
    assert workers.end() == {"code": 0, "said": ""}
    assert_equal(run, whole)

"""`studio.workbench`: answers come as they are found, errors are the command line's, and work ends with its page."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import ConfigError
from lorakeet.studio import workbench as module
from lorakeet.studio.workbench import Send, Workbench, answer_of

WORK = """
import os, time
from pathlib import Path
from lorakeet.errors import ConfigError
def count(settings, send):
    for number in range(int(settings["to"])):
        send({"number": number})
def refuse(settings, send):
    raise ConfigError("data is missing")
def sleep(settings, send):
    send({"begun": os.getpid()})
    time.sleep(60)
def long(settings, send):
    send({"text": "x" * (17 << 20)})
def find(settings, send):
    from lorakeet.memory.remembered import keep, recall
    send({"found": len(recall("text") or "")})
    keep("text", "x" * int(settings["size"]))
    if settings.get("then") == "sleep":
        send({"kept": True})
        time.sleep(60)
def environment(settings, send):
    send({"value": os.environ.get(settings["name"])})
def die(settings, send):
    os._exit(9)
PREPARED = []
def prepare(settings):
    PREPARED.append(os.getpid())
    if settings.get("fail"):
        raise ValueError("said by the work itself")

BEFORE = (prepare,)
STARTED = []
def begin():
    STARTED.append(os.getpid())
def fail():
    raise ImportError("a package that is broken")

AT_START = (fail, begin)

def started(settings, send):
    import gc
    from lorakeet.memory.beside import shares_cores, threads_here
    beside = shares_cores() and threads_here() == 1
    send({"started": len(STARTED), "elsewhere": os.getpid() not in STARTED, "collects": gc.get_threshold(), "beside": beside})

def prepared(settings, send):
    send({"times": len(PREPARED), "elsewhere": os.getpid() not in PREPARED})
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workbench]:
    """A workbench that has one small module, so that it starts at once."""
    (tmp_path / "small_work.py").write_text(WORK)
    start = tmp_path / "start.py"
    begin = "workbench.PREPARED = ('small_work',)\nworkbench.work_on(int(sys.argv[-1]))\n"
    start.write_text(f"import sys\nfrom lorakeet.studio import workbench\n{begin}")
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {start} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(program))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    found = Workbench()
    yield found
    found.close()


def all_of(bench: Workbench, work: str, settings: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        return [found async for found in bench.answers(work, settings or {})]

    return asyncio.run(collect())


@pytest.mark.slow
def test_answers_come_one_by_one_and_end(bench: Workbench) -> None:
    assert all_of(bench, "small_work:count", {"to": 3}) == [{"number": 0}, {"number": 1}, {"number": 2}, {"done": True}]
    process = bench._process
    assert all_of(bench, "small_work:count", {"to": 0}) == [{"done": True}] and bench._process is process


@pytest.mark.slow
def test_what_fails_says_why_and_the_next_work_goes_on(bench: Workbench) -> None:
    assert all_of(bench, "small_work:refuse") [0]["error"]["message"] == "data is missing"
    assert "ended from outside" in all_of(bench, "small_work:die")[-1]["error"]["message"]
    assert all_of(bench, "small_work:count", {"to": 1})[-1] == {"done": True}


@pytest.mark.slow
def test_what_was_prepared_stays_for_later_work(bench: Workbench) -> None:
    found = [all_of(bench, "small_work:prepared", {"fail": fail})[0] for fail in (False, True, False)]
    assert found == [{"times": times, "elsewhere": True} for times in (1, 2, 3)]


@pytest.mark.slow
def test_what_begins_with_the_workbench_is_done_once_and_may_fail(bench: Workbench) -> None:
    for _ in range(2):
        found = all_of(bench, "small_work:started")[0]
        assert found == {"started": 1, "elsewhere": True, "collects": list(module.RARELY), "beside": True}


@pytest.mark.slow
def test_what_one_process_has_found_later_ones_know(bench: Workbench) -> None:
    assert all_of(bench, "small_work:find", {"size": 3_000_000})[0] == {"found": 0}
    assert all_of(bench, "small_work:find", {"size": 7})[0] == {"found": 3_000_000}
    assert all_of(bench, "small_work:find", {"size": 7})[0] == {"found": 7}

    async def leave() -> None:
        answers = bench.answers("small_work:find", {"size": 9, "then": "sleep"})
        while "kept" not in await anext(answers):
            pass
        await answers.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert all_of(bench, "small_work:find", {"size": 1})[0] == {"found": 9}, "also of a page that went away"


@pytest.mark.slow
def test_a_page_that_goes_away_ends_its_work(bench: Workbench) -> None:
    async def leave() -> int:
        answers = bench.answers("small_work:sleep", {})
        pid = int((await anext(answers))["begun"])
        await answers.aclose()  # type: ignore[attr-defined]
        return pid

    pid = asyncio.run(leave())
    for _ in range(200):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("its process still runs")


@pytest.mark.slow
def test_a_workbench_that_was_killed_begins_again(bench: Workbench) -> None:
    assert all_of(bench, "small_work:count", {"to": 0}) and bench._process is not None
    bench._process.kill()
    bench._process.wait()
    assert all_of(bench, "small_work:count", {"to": 1}) == [{"number": 0}, {"done": True}]


def test_a_fault_of_the_program_is_said_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(settings: Mapping[str, Any], send: Send) -> None:
        raise KeyError("x")

    def refused(settings: Mapping[str, Any], send: Send) -> None:
        raise ConfigError("wrong")

    def full(settings: Mapping[str, Any], send: Send) -> None:
        raise OSError(28, "No space left on device")

    made_up = types.SimpleNamespace(broken=broken, refused=refused, full=full)
    monkeypatch.setitem(sys.modules, "made_up", made_up)  # type: ignore[arg-type]
    said = answer_of("made_up:full", {}, print)["error"]["message"]
    assert "No space left on device. Free some space" in said and "fault" not in said, "what the system refuses is no fault"
    assert "KeyError: 'x'. This is a fault of Lorakeet" in answer_of("made_up:broken", {}, print)["error"]["message"]
    refused_values = answer_of("made_up:refused", {}, print)["error"]
    assert (refused_values["code"], refused_values["message"]) == ("setting-refused", "wrong")


WITH_A_GPU = """
import os, sys, traceback
import torch
from lorakeet.studio import workbench

WORKBENCH = os.getpid()

def starts_cuda(*_):  # as torch does where NVIDIA's library (NVML) is missing, or the device is a part of a GPU (MIG)
    if os.getpid() != WORKBENCH:
        return os.getenv("PYTORCH_NVML_BASED_CUDA_CHECK") is None
    traceback.print_stack()
    os._exit(3)

torch.cuda.is_available = torch.cuda._lazy_init = torch.cuda.device_count = starts_cuda
torch._C._accelerator_getAccelerator = lambda: torch.device("cuda")
workbench.import_all()
assert workbench.gpu_beside() and "bitsandbytes" not in sys.modules and "lorakeet.studio.fitting" in sys.modules
print("no CUDA")
"""


@pytest.mark.slow
def test_it_leaves_cuda_to_the_processes_that_are_forked_from_it() -> None:
    """Where a process has asked CUDA for anything, its forks cannot use a GPU."""
    ended = subprocess.run([sys.executable, "-c", WITH_A_GPU], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "no CUDA"), ended.stderr[-2000:]


@pytest.mark.slow
def test_its_processes_ask_cuda(bench: Workbench) -> None:
    """Which knows more of a GPU than NVIDIA's library does: whether its driver is new enough."""
    assert all_of(bench, "small_work:environment", {"name": module.ASK_DRIVER})[0] == {"value": None}


@pytest.mark.slow
def test_a_part_that_is_too_long_is_an_error_in_words(bench: Workbench) -> None:
    async def found() -> list[dict[str, Any]]:
        return [values async for values in bench.answers("small_work:long", {})]

    [only] = asyncio.run(found())
    assert "more than 16 MiB" in only["error"]["message"]


def test_pages_in_several_threads_start_one_process(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    begin = module.subprocess.Popen

    def slow(*given: Any, **more: Any) -> Any:
        started.append(1)
        time.sleep(0.1)
        return begin(*given, **more)

    monkeypatch.setattr(module.subprocess, "Popen", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: bench.start(), range(4)))
    assert started == [1]

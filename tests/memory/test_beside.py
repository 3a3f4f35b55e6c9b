"""A value computed beside this process is the same value, wherever it was computed, and no process stays behind."""

from __future__ import annotations

import functools
import os
import select
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch

from lorakeet.memory import beside
from lorakeet.memory.beside import computed_beside, forks_allowed, gpu_beside, shares_cores


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the studio's forks: two cores, one thread."""
    monkeypatch.setattr(beside, "cores_here", lambda: 2)
    monkeypatch.setattr(beside, "threads_here", lambda: 1)


def found_by(compute: Callable[[], object] = os.getpid) -> object:
    with computed_beside(compute) as wait:
        return wait()


def test_another_process_computes_where_that_is_allowed(two_cores: None) -> None:
    assert found_by() == os.getpid()
    with forks_allowed():
        assert found_by() != os.getpid()
    assert found_by() == os.getpid()


def test_a_process_that_uses_cuda_computes_here(two_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA cannot be used in a process that is forked from it."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with forks_allowed():
        assert found_by() == os.getpid()


@pytest.mark.parametrize("there", [True, False])
def test_whether_there_is_a_gpu_another_process_asks_once(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    here, asked = os.getpid(), os.pipe()

    def is_available() -> bool:
        os.write(asked[1], b"x")
        return there if os.getpid() != here else not there

    monkeypatch.setattr(torch.accelerator, "is_available", is_available)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(beside, "gpu_beside", functools.cache(gpu_beside.__wrapped__))
    assert [beside.gpu_beside(), beside.gpu_beside()] == [there, there] and os.read(asked[0], 9) == b"x"


def test_no_process_asks_where_torch_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a fork that knows nothing more"))
    assert not gpu_beside.__wrapped__()


def test_a_process_that_is_killed_while_it_asks_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """So CUDA is there and is left alone: the page's own processes then say what is wrong with it."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert gpu_beside.__wrapped__()


def test_cores_are_shared_where_processes_may_be_made() -> None:
    assert not shares_cores()
    with forks_allowed():
        assert shares_cores()
    assert not shares_cores()


@pytest.mark.parametrize(("name", "value"), [("cores_here", 1), ("threads_here", 2), ("threads_here", None)])
def test_one_core_or_several_threads_compute_here(
    name: str, value: int | None, two_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, name, lambda: value)
    with forks_allowed():
        assert found_by() == os.getpid()


def test_threads_of_this_process_are_counted() -> None:
    before, ended = beside.threads_here(), threading.Event()
    if before is None:
        pytest.skip("this system does not say how many threads a process has")
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        assert beside.threads_here() == before + 1
    finally:
        ended.set()
        thread.join()


def test_what_fails_there_is_computed_here_and_raises_here(two_cores: None) -> None:
    here = os.getpid()

    def only_here() -> int:
        if os.getpid() != here:
            raise ValueError
        return 7

    def nowhere() -> int:
        raise ValueError("said once")

    with forks_allowed():
        assert found_by(only_here) == 7
        with pytest.raises(ValueError, match="said once"):
            found_by(nowhere)


def test_a_killed_process_leaves_none_behind(two_cores: None) -> None:
    """Its value is larger than a pipe's buffer: the other process would write it for ever."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with forks_allowed(), computed_beside(lambda: bytes(1 << 20)):
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(writing)
    os.waitpid(pid, 0)
    assert select.select([reading], [], [], 30)[0] and os.read(reading, 1) == b"", "no process has the pipe open any more"
    os.close(reading)


def test_where_no_process_can_be_made_it_is_computed_here(two_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", refused)
    with forks_allowed():
        assert found_by() == os.getpid()


def test_leaving_the_context_ends_the_other_process(two_cores: None) -> None:
    reading, writing = os.pipe()

    def begin() -> None:
        os.write(writing, b"x")
        time.sleep(60)

    with forks_allowed(), pytest.raises(KeyError), computed_beside(begin):
        assert os.read(reading, 1) == b"x"
        raise KeyError
    os.close(writing)
    assert os.read(reading, 1) == b"", "nothing has the pipe open any more"
    os.close(reading)

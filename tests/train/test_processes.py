"""Real processes over gloo: sums, decisions of the first one, missing processes; the environment of torchrun."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from lorakeet.data.chat import Example
from lorakeet.errors import ConfigError, DataError, RunStopped
from lorakeet.train import processes as module
from lorakeet.train.launch import Launch, launched
from lorakeet.train.processes import ALONE, Processes, ProcessLost, joined
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text import task as text_task
from lorakeet.train.text.task import TextTask
from tiny.together import Together

HERE = "train.test_processes"


def everything() -> dict[str, Any]:
    """What each method gives in this process."""
    with joined(launched()) as processes:
        rank, found = processes.rank, dict[str, Any]()
        found["total"] = processes.total(rank + 1, 10)
        found["any"] = [processes.any(rank == 1), processes.any(False)]
        found["summed"] = processes.summed(torch.tensor([[0.5, rank]], dtype=torch.float64)).tolist()
        both, one, none = (Parameter(torch.zeros(2, 3)) for _ in range(3))
        both.grad = torch.full((2, 3), 1.0 + rank)
        one.grad = torch.full((2, 3), 7.0) if rank == 1 else None
        processes.sum_gradients([both, one, none])
        found["grads"] = [None if p.grad is None else p.grad.tolist() for p in (both, one, none)]
        tensor = torch.full((2,), float(rank + 3))
        transposed = torch.arange(6.0).view(2, 3).t() + rank
        processes.broadcast([tensor, transposed])
        found["same"] = [tensor.tolist(), transposed.tolist()]
        found["from first"] = processes.from_first(lambda: ["made by", rank])
        torch.manual_seed(4)
        with processes.own_random():
            found["own random"] = torch.rand(1).item()
        found["common random"] = torch.rand(1).item()
        found["most"] = processes.maximum(10 * rank)
        found["errors"] = [
            _message(lambda: processes.from_first(_fails)),
            _message(lambda: processes.require_equal({"a": 1, "b": rank})),
        ]
        processes.require_equal({"a": 1})
        processes.disband()
        return found


def _fails() -> None:
    raise DataError("row 3 is empty")


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ConfigError, DataError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_what_they_exchange(forked: Together) -> None:
    first, second = forked.call(f"{HERE}:everything")
    assert first["own random"] != second["own random"]
    for found in (first, second):
        assert found["total"] == [3, 20]
        assert found["any"] == [True, False] and found["most"] == 10
        assert found["summed"] == [[1.0, 1.0]]
        assert found["grads"] == [[[3.0] * 3] * 2, [[7.0] * 3] * 2, None]
        assert found["same"] == [[3.0, 3.0], [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]]
        assert found["from first"] == ["made by", 0]
        assert found["common random"] == first["common random"]
        assert found["errors"][0] == "DataError: row 3 is empty"
        assert found["errors"][1] == (
            "ConfigError: 'b' is another in process 1 than in process 0. Give all the same files and flags."
        )


def test_one_that_is_alone_exchanges_nothing() -> None:
    parameter = Parameter(torch.zeros(2))
    values = torch.arange(3.0)
    before = torch.get_rng_state()
    with joined(Launch()) as processes, processes.own_random():
        assert processes is ALONE and processes.first
        assert processes.total(4, 5) == (4, 5) and processes.any(True) and not processes.any(False)
        assert processes.summed(values) is values
        processes.sum_gradients([parameter])
        processes.broadcast([values])
        processes.require_equal({"a": 1})
        assert processes.from_first(lambda: 7) == 7
        processes.disband()
    assert parameter.grad is None and torch.equal(torch.get_rng_state(), before)


def adding_until_one_dies(victim: int, how: str) -> str:
    """The message in this process."""
    module.ROLL_CALL = 1.0
    try:
        with joined(launched()) as processes:
            for step in range(1000):
                if processes.rank == victim and step == 3:
                    _end(how)
                if processes.rank == 0:
                    time.sleep(0.05)  # others wait in the exchange, this one is busy, when it happens
                processes.total(step)
    except ProcessLost as lost:
        return str(lost)
    return "nothing"


def _end(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise DataError("its file is gone") if how == "gave up" else KeyError("a bug")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "how", "message"),
    [
        (1, "killed", "process 1 of 3 died"),
        (0, "killed", "process 0 of 3 died"),
        (2, "gave up", "process 2 of 3 gave up (DataError: its file is gone)"),
        (1, "bug", "process 1 of 3 gave up (KeyError: 'a bug')"),
    ],
)
def test_the_one_that_is_gone_is_named(forked: Together, victim: int, how: str, message: str) -> None:
    forked.start({"count": 3, "call": f"{HERE}:adding_until_one_dies", "with": [victim, how]})
    ended = forked.end()
    survivors = [one for rank, one in enumerate(ended) if rank != victim]
    if victim == 0:
        assert [one.code for one in survivors] == [4, 4]
        assert [message in one.said for one in survivors] == [True, False]  # once, by the first that lives
    else:
        assert ended[0].answered.strip() == f'"{message}"' and ended[0].code == 0
        assert [one.code for one in survivors[1:]] == [4] and message not in survivors[1].said
    assert ended[victim].code == {"killed": -signal.SIGKILL, "gave up": 2, "bug": 1}[how]
    assert ("Error: process 2: its file is gone" in ended[victim].said) == (how == "gave up")


def waiting_for_one(late: int) -> str:
    """The message in this process, where one that runs comes too late to the third exchange."""
    module.ROLL_CALL, module.PATIENCE = 1.0, timedelta(seconds=2)
    try:
        with joined(launched()) as processes:
            for step in range(5):
                if processes.rank == late and step == 2:
                    time.sleep(6)
                processes.total(step)
    except ProcessLost as lost:
        return str(lost)
    return "nothing"


@pytest.mark.slow
def test_one_that_runs_but_does_not_come_is_named_when_the_time_is_over(forked: Together) -> None:
    forked.start({"count": 2, "call": f"{HERE}:waiting_for_one", "with": [1]})
    waiting, _ = forked.end()
    message = "process 1 of 2 runs, but for 2 s has not come to an exchange with the others"
    assert waiting.answered.strip() == f'"{message}"', waiting.said


def failing_at_once() -> str:
    """The error in this process, whose exchange fails while the other still works."""
    module.ROLL_CALL, module.PATIENCE = 1.0, timedelta(hours=2)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("NCCL error: unhandled cuda error")

    with joined(launched()) as processes:
        processes.total(1)
        if processes.rank == 1:
            while not processes._word("said", 0):
                time.sleep(0.05)
            return "nothing"
        module.dist.all_reduce = fail
        told = ""
        try:
            processes.total(2)
        except RuntimeError as error:
            told = f"{type(error).__name__}: {error}"
        processes._leave_word("said", told)
        return told


def test_an_exchange_that_fails_at_once_accuses_none_that_works(forked: Together) -> None:
    forked.start({"count": 2, "call": f"{HERE}:failing_at_once", "with": []})
    failed, _ = forked.end()
    assert failed.answered.strip() == '"RuntimeError: NCCL error: unhandled cuda error"', failed.said


def test_before_gpus_exchange_their_hosts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL waits without end for a process that is gone, and names none."""
    exchanged: list[str] = []
    monkeypatch.setattr(module.dist, "all_reduce", lambda tensor, **_: exchanged.append(tensor.device.type))
    monkeypatch.setattr(module.dist, "broadcast", lambda tensor, **_: exchanged.append(f"{tensor.device.type} all"))
    together = Processes()
    together.count = 2
    there = [torch.zeros(2, device="meta"), torch.zeros(3, device="meta")]
    monkeypatch.setattr(module, "HOSTS_MEET", ("meta",))
    together.broadcast(there)
    assert exchanged == ["cpu", "meta all", "meta all"]
    exchanged.clear()
    together.broadcast([torch.zeros(1)])
    assert exchanged == ["cpu all"]


class _SignalledInDel:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def terminated(how: str, where: str = "here") -> str:
    """What SIGTERM does to this process, whose main thread exchanges nothing, when process 1 has ended so."""
    module.ROLL_CALL = 0.5
    before = signal.getsignal(signal.SIGTERM)
    told = "nothing"
    with joined(launched()) as processes:
        processes.total(0)
        if processes.rank == 1 and how == "stopped":
            processes.give_up(RunStopped("SIGTERM: the training is done"))
            return "stopped"
        if processes.rank == 1 and how != "lives":
            _end(how)
        while how in ("stopped", "bug") and not processes._word("gave-up", 1):
            time.sleep(0.01)
        try:
            with processes.terminable():
                if where != "here":
                    _SignalledInDel()  # Python prints what is raised there, and goes on
                else:
                    signal.raise_signal(signal.SIGTERM)
                if where == "before an error":
                    raise RuntimeError("the group is closed")
        except (ProcessLost, KeyboardInterrupt) as ended:
            told = f"{type(ended).__name__}: {ended}"
        if how == "lives":
            processes.disband()
    assert signal.getsignal(signal.SIGTERM) is before
    return told


@pytest.mark.slow
def test_sigterm_names_the_one_that_died_and_else_stops_as_ctrl_c_does(forked: Together) -> None:
    assert forked.call(f"{HERE}:terminated", "lives") == ["KeyboardInterrupt: SIGTERM"] * 2
    assert forked.call(f"{HERE}:terminated", "stopped") == ["KeyboardInterrupt: SIGTERM", "stopped"]
    for how, message in {"killed": "died", "bug": "gave up (KeyError: 'a bug')"}.items():
        forked.start({"count": 2, "call": f"{HERE}:terminated", "with": [how]})
        survivor, victim = forked.end()
        assert victim.code != 0 and survivor.answered.strip() == f'"ProcessLost: process 1 of 2 {message}"', survivor.said


@pytest.mark.slow
@pytest.mark.parametrize("where", ["before an error", "before the end"])
def test_what_sigterm_raises_is_not_lost_in_a_destructor(forked: Together, where: str) -> None:
    assert forked.call(f"{HERE}:terminated", "lives", where) == ["KeyboardInterrupt: SIGTERM"] * 2
    forked.start({"count": 2, "call": f"{HERE}:terminated", "with": ["killed", where]})
    survivor, _ = forked.end()
    assert survivor.answered.strip() == '"ProcessLost: process 1 of 2 died"', survivor.said
    assert "Exception ignored" not in survivor.said


def test_one_that_is_alone_is_ended_by_sigterm_itself() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ALONE.terminable():
        assert signal.getsignal(signal.SIGTERM) is before


def an_error_of_all() -> None:
    with joined(launched()):
        raise RunStopped("the loss is nan")


def test_an_error_of_all_is_raised_in_the_first_alone(forked: Together) -> None:
    forked.start({"count": 2, "call": f"{HERE}:an_error_of_all", "with": []})
    first, second = forked.end()
    assert first.code == 1 and "RunStopped: the loss is nan" in first.said  # nobody caught it in this test
    assert (second.code, second.said) == (RunStopped.exit_code, "")


def test_processes_are_those_of_their_launch() -> None:
    alone = Processes()
    assert (alone.rank, alone.count, alone.first) == (0, 1, True)


def held_out_rounded_otherwise() -> list[list[float]]:
    """What this process takes for the held-out losses of a parted model, on a machine that rounds in its own way."""
    with joined(launched()) as processes:
        row = Example(np.arange(3), np.array([False, True, True]), "a", None, False)
        text_task.row_losses = lambda *_, **__: (np.array([1.5 + 1e-15 * processes.rank]), np.array([2.0]))  # type: ignore[assignment]
        spec = TrainSpec(shard=True)
        task = TextTask(SimpleNamespace(dtype=torch.float32), [row], held_out=[row], spec=spec, processes=processes)  # type: ignore[arg-type]
        found = task.held_out()
        processes.disband()
        assert found is not None
        return [found.sums.tolist(), found.weights.tolist()]


def test_all_decide_by_the_held_out_losses_of_the_first(forked: Together) -> None:
    assert forked.call(f"{HERE}:held_out_rounded_otherwise") == [[[1.5], [2.0]]] * 2


SAID = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_without_torchrun_it_is_alone() -> None:
    assert launched({}) == Launch(0, 1, 0, 1)
    for name in SAID:  # such as a scheduler that sets RANK for purposes of its own
        assert launched({key: value for key, value in SAID.items() if key != name}) == Launch()
    assert launched({**SAID, "RANK": "0", "WORLD_SIZE": "1"}) == Launch()
    assert Launch().first and Launch().command == "lorakeet"


def test_torchrun_says_who_is_who() -> None:
    launch = launched({**SAID, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    assert launch == Launch(5, 8, 1, 4, "10.0.0.1") and not launch.first
    meet = "--rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500"  # or each machine would take itself for the first
    assert launch.command == f"torchrun --nnodes 2 {meet} --nproc-per-node 4 -m lorakeet"
    assert launched({**SAID, "RANK": "0"}).first
    assert launched(SAID).command == "torchrun --nproc-per-node 8 -m lorakeet"

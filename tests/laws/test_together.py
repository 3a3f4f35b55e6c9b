"""A run of two processes is the run of one, to rounding; a checkpoint goes on with another number; a killed one is named."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.cli.main import main
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.evaluate.report.report import read_report
from lorakeet.formats.peft import peft
from lorakeet.kinds.certify_pairs import PAIRS
from lorakeet.train import checkpoint, processes
from lorakeet.train.log import read_metrics
from tiny.runs import QUICK, adapter_bytes, chats, write_rows
from tiny.together import Together

pytestmark = pytest.mark.slow  # they share what takes seconds to make

STEPS = 12
NEAR = 1e-5  # relative: fp32 sums in another order


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", chats(50))


def arguments(model: Path, rows: Path, out: Path, **changes: str) -> list[str]:
    given = {
        **QUICK, "model.path": str(model), "data.train": str(rows), "out": str(out), "train.steps": str(STEPS),
        "train.micro_tokens": "256", "train.evaluate_every": "4", "train.patience": "0",
        **{name.replace("__", "."): value for name, value in changes.items()},
    }  # fmt: skip
    return ["finetune", *(f"--{name}={value}" for name, value in given.items())]


@pytest.fixture(scope="module")
def one(forked: Together, tiny_llama_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    (ended,) = forked.run(arguments(tiny_llama_folder, rows, run), count=1)
    assert ended.code == 0, ended.said
    return run


@pytest.fixture(scope="module")
def two(forked: Together, tiny_llama_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run of two."""
    run = tmp_path_factory.mktemp("two") / "run"
    first, second = forked.run(arguments(tiny_llama_folder, rows, run))
    assert (first.code, second.code) == (0, 0), first.said + second.said
    assert "Adapter:" in first.answered and (second.answered, second.said) == ("", "")  # one speaks for both
    return run


def losses(run: Path) -> dict[str, list[float]]:
    records = read_metrics(run / "metrics.jsonl")
    kinds = ("loss", "held_out_loss", "tokens", "supervised")
    return {kind: [record[kind] for record in records if kind in record] for kind in kinds}


def worst(left: Path, right: Path) -> float:
    """The largest relative difference of a matrix of the two adapters, in its own norm."""
    one, two = (peft.read(run / "adapter").pairs for run in (left, right))
    assert one.keys() == two.keys()
    pairs = [(getattr(one[path], name), getattr(two[path], name)) for path in one for name in ("A", "B")]
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


def assert_same_run(left: Path, right: Path) -> None:
    one, two = losses(left), losses(right)
    assert len(one["loss"]) == STEPS and len(one["held_out_loss"]) == 4
    for kind in one:
        torch.testing.assert_close(torch.tensor(two[kind]), torch.tensor(one[kind]), rtol=NEAR, atol=0)
    assert worst(left, right) < NEAR


def test_two_processes_train_what_one_trains(one: Path, two: Path) -> None:
    assert_same_run(one, two)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert read_certificate(two / "certificate.json").passed
    report = read_report(two / "report.json")
    assert report.facts["Processes"] == "2, each with the whole base and its part of the rows of a step"
    assert "Processes" not in read_report(one / "report.json").facts


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_checkpoint_goes_on_with_another_number(
    forked: Together, one: Path, two: Path, tmp_path: Path, before: int, after: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(one if before == 1 else two, run)
    shutil.rmtree(run / "checkpoints" / checkpoint.step_name(STEPS))
    assert [path.name for path in checkpoint.found(run / "checkpoints")] == ["step-000008"]
    ended = forked.run(["finetune", "--resume", run], count=after)
    assert [process.code for process in ended] == [0] * after, ended[0].said
    assert f"processes {before} → {after}" in ended[0].answered
    assert_same_run(one, run)


@pytest.mark.parametrize("method", ["none", "nf4"])
def test_two_processes_with_a_part_of_the_base_each_train_what_one_trains(
    forked: Together, tiny_llama_folder: Path, rows: Path, one: Path, tmp_path: Path, method: str
) -> None:
    """Also where one has more micro-batches than the other, and where the base is quantised; then one process evaluates it."""
    whole, run = one, tmp_path / "run"
    changes = {"model__quantize": method, "train__micro_tokens": "150"}
    if method != "none":
        whole = tmp_path / "whole"
        (ended,) = forked.run(arguments(tiny_llama_folder, rows, whole, **changes), count=1)
        assert ended.code == 0, ended.said
    first, second = forked.run(arguments(tiny_llama_folder, rows, run, train__shard="true", **changes))
    assert (first.code, second.code) == (0, 0), first.said + second.said
    assert second.answered == second.said == ""
    assert_same_run(whole, run)
    report, certificate = read_report(run / "report.json"), read_certificate(run / "certificate.json")
    assert report.facts["Processes"] == "2, each with 1/2 of every frozen block and its part of the rows of a step"
    assert certificate.passed
    assert [check.name for check in certificate.checks] == ["adapter on disk", "frozen weights", PAIRS, "own code"]
    other = read_report(whole / "report.json")
    assert [system.metrics["loss"].value for system in report.systems[:2]] == pytest.approx(
        [system.metrics["loss"].value for system in other.systems[:2]], rel=NEAR
    )
    (ended,) = forked.run(["finetune", "--resume", run], count=1)
    assert ended.code == 0 and "train.shard has no effect with one process" in ended.answered, ended.said


def test_two_machines_train_what_one_process_trains(tiny_llama_folder: Path, rows: Path, one: Path, tmp_path: Path) -> None:
    """The command of docs/how-to/many-gpus, once for each machine: two agents of torchrun that meet at an address."""
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free.getsockname()[1]}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meet, "-m", "lorakeet"]
    machines = [
        subprocess.Popen(
            [*torchrun, *arguments(tiny_llama_folder, rows, run)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        said = [machine.communicate(timeout=120) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert sum("Adapter:" in out for out, _ in said) == 1  # one process speaks for both machines
    assert_same_run(one, run)


def killed_at(place: str, victim: int, arguments: list[str]) -> None:
    """`lorakeet ARGUMENTS` in this process, which is killed where it comes to `place` ("module:function") if it is the victim."""
    processes.ROLL_CALL = 0.5  # enough to know a dead one by
    module, _, name = place.partition(":")
    if os.environ["RANK"] == str(victim):
        setattr(importlib.import_module(module), name, _killed)
    sys.exit(main(arguments))


def _killed(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ended_at(forked: Together, place: str, victim: int, arguments: list[str], message: str) -> Path:
    """The checkpoint that the process left names in `message`; SIGTERM reaches it when the victim is dead, as torchrun's does."""
    order = {"count": 2, "call": "laws.test_together:killed_at", "with": [f"lorakeet.{place}", victim, arguments]}
    pids = forked.start(order)
    deadline = time.monotonic() + 60
    while not dead(pids[victim]):
        assert time.monotonic() < deadline, f"process {victim} never came to {place}"
        time.sleep(0.01)
    os.kill(pids[1 - victim], signal.SIGTERM)
    ended = forked.end()
    said = " ".join(ended[1 - victim].said.split())
    assert (ended[1 - victim].code, ended[victim].code) == (4, -signal.SIGKILL), said
    found = re.fullmatch(message, said)
    assert found is not None, said
    return Path(found[1])


def dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_one_that_is_killed_while_a_sharded_run_is_evaluated_is_named(
    forked: Together, tiny_llama_folder: Path, rows: Path, tmp_path: Path
) -> None:
    """In a pass of the judgement; then, as the run has gone on with the command that was named, in the certificate."""
    run = tmp_path / "run"
    go_on = ["finetune", "--resume", str(run)]
    command = re.escape(f"Resume with: torchrun --nproc-per-node 2 -m lorakeet {' '.join(go_on)}")
    begin = arguments(tiny_llama_folder, rows, run, train__steps="2", train__shard="true", evaluate__drift_texts="0")
    kept = rf"Kept: the checkpoint (\S+) and {run}/adapter \(held-out loss [\d.]+ at step \d\)\. {command}"
    judging = r"After step 2, before the run was evaluated to the end: process {} of 2 died\. "
    newest = ended_at(forked, "kinds.text.evaluate:row_losses", 1, begin, f"Error: {judging.format(1)}{kept}")
    assert newest == checkpoint.found(run / "checkpoints")[-1] and checkpoint.load_checkpoint(newest).position.step == 2  # whole
    adapter = adapter_bytes(run)
    said = f"Error: process 1: {judging.format(0)}{kept}"
    assert ended_at(forked, "kinds.text.certify:frozen_digests", 0, go_on, said) == newest
    assert adapter_bytes(run) == adapter


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while max((record["step"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.01)

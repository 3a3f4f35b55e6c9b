"""What goes wrong during a run, at the command line: what is kept, what is said, and that going on ends in the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from lorakeet import disk
from lorakeet.cli.main import main
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.formats.peft import peft
from lorakeet.train import checkpoint
from lorakeet.train.log import read_metrics
from tiny.forked import Workers, forked_again
from tiny.full_disk import files_up_to
from tiny.prepared import Prepared
from tiny.runs import QUICK, adapter_bytes, reviews, write_rows

STEPS = 32
PATIENCE = 90.0  # seconds until a process counts as hung


def command(model: Path, data: Path, out: Path, **changes: object) -> list[str]:
    named = {**QUICK, "model": model, "data": data, "out": out, "evaluate.drift_texts": 0}
    named |= {key.replace("__", "."): value for key, value in changes.items()}
    return ["finetune", *(word for key, value in named.items() for word in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(40))


@pytest.fixture(scope="module")
def done(tiny_llama_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Do not write into it."""
    run = tmp_path_factory.mktemp("done") / "run"
    assert main(command(tiny_llama_folder, rows, run)) == 0
    return run


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    """A finished run of the test's own."""
    return shutil.copytree(done, tmp_path / "run")


NEW_TOKENS = {"lora__new_tokens": "<plant>", "train__evaluate_every": 1}


@pytest.fixture(scope="module")
def with_new_tokens(tiny_llama_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The adapter of a run that trains a new token."""
    whole = tmp_path_factory.mktemp("tokens") / "run"
    assert main(command(tiny_llama_folder, rows, whole, **NEW_TOKENS)) == 0
    return adapter_bytes(whole)


def steps_done(run: Path) -> int:
    return max((record["step"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record), default=0)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_good(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    wild = {"lora__alpha": 1000, "train__learning_rate": 1, "train__schedule": "constant", "train__evaluate_every": 1}
    assert main(command(tiny_llama_folder, rows, run, **wild)) == 4
    said = " ".join(capsys.readouterr().err.split())
    step = steps_done(run)
    assert 0 < step < 6
    assert f"Step {step + 1}: the loss is" in said and "The step was not taken." in said
    assert "Start a new run with a lower train.learning_rate (now 1)" in said
    (newest,) = checkpoint.found(run / "checkpoints")[-1:]
    assert newest.name == checkpoint.step_name(step) and f"Kept: the checkpoint {newest}" in said
    assert checkpoint.load_checkpoint(newest).position.step == step
    held_out = {r["step"]: r["held_out_loss"] for r in read_metrics(run / "metrics.jsonl") if "held_out_loss" in r}
    best = min(held_out, key=held_out.__getitem__)
    assert f"{run / 'adapter'} (held-out loss {held_out[best]:.4f} at step {best})" in said
    assert len(peft.read(run / "adapter").pairs) == 14
    assert not (run / "report.json").exists()


def test_metrics_that_cannot_be_written_are_a_message(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes((run / "metrics.jsonl").read_bytes())
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(victim)
    before = victim.read_bytes()
    capsys.readouterr()
    assert main(["finetune", "--resume", str(run)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"metrics.jsonl could not be written in {run}: the system refused" in said and victim.read_bytes() == before


def test_a_disk_that_is_full_from_the_start_leaves_nothing(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with files_up_to(500):
        assert main(command(tiny_llama_folder, rows, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert f"The run folder {tmp_path / 'run'} could not be written: the disk (or the quota) is full" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on(
    done: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in adapter_bytes(run):
        (run / "adapter" / name).unlink()  # those of the run that goes on are written anew
    newest = checkpoint.found(run / "checkpoints")[-1]
    for path in sorted(newest.iterdir()):
        path.unlink()
    newest.rmdir()  # as if it had been killed after step 5
    for name in ("report.json", "report.html", "certificate.json"):
        (run / name).unlink()
    capsys.readouterr()
    with files_up_to(20_000):  # room for an adapter, none for the moments
        assert main(["finetune", "--resume", str(run)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"The checkpoint of step 6 could not be written in {run}: the disk (or the quota) is full" in said
    assert "The previous checkpoint step-000005 is intact" in said
    assert f"Free some space, then go on with: lorakeet finetune --resume {run}" in said
    assert [path.name for path in checkpoint.found(run / "checkpoints")] == ["step-000005"]
    assert checkpoint.load_checkpoint(run / "checkpoints" / "step-000005").position.step == 5
    assert list((run / "checkpoints").glob(".*")) == []
    assert main(["finetune", "--resume", str(run)]) == 0
    assert adapter_bytes(run) == adapter_bytes(done)


def test_a_disk_that_is_full_for_the_report_says_that_the_adapter_is_whole(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    adapter = adapter_bytes(run)
    assert (run / "report.html").stat().st_size > 30_000
    with files_up_to(30_000):  # resuming a finished run only judges it again
        assert main(["finetune", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"The report in {run} could not be written" in said and "The adapter is whole" in said
    assert adapter_bytes(run) == adapter


@pytest.mark.slow
@pytest.mark.parametrize("refused", [OSError(errno.ENOSPC, "No space left on device"), Exception("disk full (os error 28)")])
def test_a_disk_that_is_full_for_the_tokenizer_keeps_the_adapter_before(
    with_new_tokens: dict[str, bytes], tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: Any, capsys: Any,
    refused: Exception,
) -> None:
    """New tokens bring their tokenizer into adapter/; the library that writes it reports a full disk in a way of its own."""
    run, real, saves = tmp_path / "run", transformers.PreTrainedTokenizerBase.save_pretrained, []

    def save(self: Any, folder: Path, **options: Any) -> Any:
        saves.append(folder)
        if len(saves) > 2:
            (Path(folder) / "tokenizer.json").write_text('{"half')
            raise refused
        return real(self, folder, **options)

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", save)
    assert main(command(tiny_llama_folder, rows, run, **NEW_TOKENS)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("Error:") == 1 and "Traceback" not in said
    assert f"The adapter could not be written in {run}: the disk (or the quota) is full" in said
    assert "The previous checkpoint step-000002 is intact. Free some space" in said and f"finetune --resume {run}" in said
    assert checkpoint.load_checkpoint(run / "checkpoints" / "step-000002").position.step == 2
    assert len(transformers.AutoTokenizer.from_pretrained(run / "adapter")) == 321 and list(run.glob(".adapter*")) == []
    monkeypatch.undo()
    assert main(["finetune", "--resume", str(run)]) == 0
    assert adapter_bytes(run) == with_new_tokens


@pytest.mark.parametrize("name", ["certificate.json", "report.json", "report.html"])
def test_a_disk_that_is_full_for_one_file_of_the_report_keeps_the_one_before(
    run: Path, monkeypatch: Any, capsys: Any, name: str
) -> None:
    before, real = (run / name).read_bytes(), disk.write_new

    def write(path: Path, data: bytes) -> None:
        if name in path.name:
            real(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(disk, "write_new", write)
    assert main(["finetune", "--resume", str(run)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"The report in {run} could not be written: the disk (or the quota) is full" in said and "The adapter is whole" in said
    assert (run / name).read_bytes() == before and list(run.glob(f".{name}*")) == []
    assert checkpoint.load_checkpoint(checkpoint.found(run / "checkpoints")[-1]).position.step == 6


@pytest.fixture(scope="module")
def workers(prepared: Prepared) -> Iterator[Workers]:
    with forked_again(prepared, Path(__file__).parent / "command_worker.py") as found:
        yield found


LONG = {"train__steps": STEPS, "train__evaluate_every": 8, "train__patience": 0}


@pytest.fixture(scope="module")
def undisturbed(tiny_llama_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The adapter of a long run that nothing stops."""
    whole = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(command(tiny_llama_folder, rows, whole, **LONG, train__checkpoint_every=20)) == 0
    return adapter_bytes(whole)


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_and_the_run_goes_on_to_the_same_bytes(
    workers: Workers, undisturbed: dict[str, bytes], tiny_llama_folder: Path, rows: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    pid = workers.start(words=command(tiny_llama_folder, rows, run, **LONG, train__checkpoint_every=20))
    deadline = time.monotonic() + PATIENCE
    while steps_done(run) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(pid, signal.SIGINT)
    ended = workers.end()
    said = ended["said"]
    assert ended["code"] == 4, said
    step = steps_done(run)
    assert step < STEPS
    words = " ".join(said.split())
    assert f"Error: Ctrl-C: stopped after step {step} of {STEPS}, with the checkpoint" in words and "Traceback" not in said
    assert f"Resume with: lorakeet finetune --resume {run}" in words
    assert checkpoint.load_checkpoint(run / "checkpoints" / checkpoint.step_name(step)).position.step == step
    capsys.readouterr()
    assert main(["finetune", "--resume", str(run), "--json"]) == 0
    answer = capsys.readouterr().out
    assert json.loads(answer)["outcome"]["steps"] == STEPS and read_certificate(run / "certificate.json").passed
    assert adapter_bytes(run) == undisturbed


@pytest.mark.slow
def test_killed_again_and_again_the_run_goes_on_to_the_same_bytes(
    workers: Workers, undisturbed: dict[str, bytes], tiny_llama_folder: Path, rows: Path, tmp_path: Path
) -> None:
    """`kill -9` of `lorakeet finetune` itself: while it starts, and three times at a random moment of the training."""
    run = tmp_path / "run"
    arguments = command(tiny_llama_folder, rows, run, **LONG, train__checkpoint_every=4)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    chance = random.Random(20)
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakeet", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    time.sleep(chance.uniform(0.5, 3))
    process.kill()
    process.wait()
    for _ in range(3):
        if (run / "config.yaml").is_file():
            arguments = ["finetune", "--resume", str(run)]
        pid = workers.start(words=arguments)
        until, deadline = steps_done(run) + chance.randint(1, 8), time.monotonic() + PATIENCE
        while steps_done(run) < until:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert workers.end()["code"] == -signal.SIGKILL
    assert main(["finetune", "--resume", str(run)]) == 0
    assert adapter_bytes(run) == undisturbed
    assert read_certificate(run / "certificate.json").passed

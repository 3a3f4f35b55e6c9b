"""A device that runs out of memory: half the micro-batch once, which is said; then one message, with what is kept."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lorakeet.cli import main as command
from lorakeet.core.spec import LoraSpec
from lorakeet.data.pack import Batch
from lorakeet.errors import EnvironmentProblem, RunStopped
from lorakeet.evaluate.certificate import Unchecked
from lorakeet.kernels.proof import difference_found
from lorakeet.kinds import certify_pairs
from lorakeet.memory.budget import Budget
from lorakeet.memory.cuda import enforcing_gpu_budget
from lorakeet.memory.spill import HostSpill, Spill
from lorakeet.memory.transfer import CudaTransfer
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.runs.run_folder import evaluating
from lorakeet.train.loop import train
from lorakeet.train.processes import Processes
from lorakeet.train.progress import Reporter
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec
from lorakeet.train.task import HeldOut
from lorakeet.train.text.task import TextTask
from lorakeet.verbs import finetune as workflow
from tiny.cards import Device, computing_first, pinned
from tiny.passed_on import require_passed_on
from tiny.runs import reviews, run, write_rows
from tiny.streams import loaded, rows
from train.tiny_task import TinyTask

SPEC = TrainSpec(steps=6, batch_size=8, micro_tokens=48, learning_rate=0.02, evaluate_every=3, checkpoint_every=1, patience=0)
SAID = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 8 GiB"
OTHERS = (  # RuntimeErrors of what lies beside torch's tensors
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",  # the context, pinned memory
    "CUDA driver error: out of memory",  # segments that grow (memory/expandable)
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "Triton Error [CUDA]: out of memory",  # a kernel that is loaded
)


@pytest.mark.parametrize("said", OTHERS)
def test_what_is_beside_the_tensors_lacks_memory_too(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError(said)

    def full(*_: Any, **__: Any) -> Any:
        raise error

    with pytest.raises(RunStopped, match=r"done and .*, but not evaluated"), evaluating(RunFolder(tmp_path)):
        full()
    with pytest.raises(EnvironmentProblem, match="The device ran out of memory"), enforcing_gpu_budget(Budget(), ""):
        full()
    with pytest.raises(RuntimeError) as raised:
        difference_found(full, of_any_kind=True)  # which says nothing of a kernel
    assert raised.value is error
    monkeypatch.setattr(certify_pairs, "why_not_by_peft", lambda _: "")
    monkeypatch.setattr(certify_pairs, "compare_with_peft", full)
    unchecked = certify_pairs.check_by_peft(cast(Any, None), "default", tmp_path, [])
    assert isinstance(unchecked, Unchecked) and "could not be used here" in unchecked.why


@pytest.mark.parametrize("said", OTHERS)
def test_a_model_is_not_said_to_be_at_fault(said: str, tiny_llama_folder: Path) -> None:
    require_passed_on(loaded(tiny_llama_folder), said)


class Short(TinyTask):
    """A task on a device that has too little memory at some of its passes, counted from 1."""

    error: type[RuntimeError] = torch.OutOfMemoryError
    said = SAID

    def __init__(self, *fails: int, held_out: tuple[int, ...] = ()) -> None:
        super().__init__(SPEC, dropout=0.0)
        self.fails, self.fails_held_out = fails, held_out
        self.passes, self.evaluations, self.held = 0, 0, list[weakref.ref[Tensor]]()

    def loss(self, batch: Batch) -> Tensor:
        self.passes += 1
        found = super().loss(batch)
        if self.passes in self.fails:
            self.held.append(weakref.ref(found))
            raise self.error(self.said)
        return found

    def held_out(self) -> HeldOut | None:
        self.evaluations += 1
        if self.evaluations in self.fails_held_out:
            raise torch.OutOfMemoryError(SAID)
        return super().held_out()


def trained(task: TinyTask, folder: Path, **options: Any) -> list[str]:
    said: list[str] = []
    report = Reporter()
    report.say = said.append  # type: ignore[method-assign]
    place = RunFolder.open(folder) if options.get("resume") else RunFolder.create(folder)
    train(task, SPEC, run=place, report=report, **options)
    return said


def test_a_step_is_done_again_once_with_half_the_tokens_and_counts_once(tmp_path: Path) -> None:
    """What the first micro-batches had added is dropped: else the adapter would be another one."""
    plain, short = TinyTask(SPEC, dropout=0.0), Short(5)
    assert len(plain.batches(0)) > 2, "the fifth pass is not the first of its step"
    trained(plain, tmp_path / "plain")
    said = trained(short, tmp_path / "short")
    assert len(said) == 1 and "Step 2: the device ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)" in said[0]
    assert "goes on, with train.micro_tokens 24" in said[0] and short.spec.micro_tokens == 24
    for name, parameter in plain.parameters().items():
        torch.testing.assert_close(short.parameters()[name], parameter, rtol=1e-4, atol=1e-6)
    gc.collect()
    assert short.held[0]() is None, "the error, which holds what was in memory, is gone before the step is done again"


@pytest.mark.parametrize("said", OTHERS)
def test_a_library_that_gets_no_memory_is_no_other_case(said: str, tmp_path: Path) -> None:
    task = Short(5)
    task.error, task.said = RuntimeError, said
    assert "goes on, with train.micro_tokens 24" in trained(task, tmp_path / "run")[0]
    task = Short(5)
    task.error, task.said = RuntimeError, "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trained(task, tmp_path / "other")


def test_the_second_time_it_is_refused_with_the_remedy_and_resumes_from_what_is_kept(tmp_path: Path) -> None:
    with pytest.raises(RunStopped) as stopped:
        trained(Short(5, 12), tmp_path / "run")
    words = str(stopped.value)
    assert "the device ran out of memory, also with train.micro_tokens 24 (CUDA out of memory" in words
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert f"Kept: the checkpoint {newest}" in words and "--resume" in words and "data.max_tokens" in words
    trained(Short(), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "adapter").is_dir()


def test_a_held_out_evaluation_is_done_again_too(tmp_path: Path) -> None:
    said = trained(Short(held_out=(2,)), tmp_path / "run")
    assert len(said) == 1 and said[0].startswith("The held-out evaluation after step 3: the device ran out of memory")


def test_of_several_processes_none_changes_its_batches_alone(tmp_path: Path) -> None:
    task = Short(1)
    task.processes = Processes()
    task.processes.count = 2
    task.processes.total = lambda *numbers: numbers  # type: ignore[method-assign]
    training = train.__globals__["Training"](task, SPEC, run=RunFolder.create(tmp_path / "run"), report=Reporter())
    with pytest.raises(RunStopped, match=r"Step 1: the device ran out of memory \(CUDA"):
        training._within_memory(lambda: training._passed(1), "Step 1")
    assert task.spec.micro_tokens == 48


def on_host() -> Spill:
    device, none = Device(computing_first), cast(Any, None)
    return HostSpill(CudaTransfer(none, torch.device("cpu"), cuda=device, pinned=pinned))


@pytest.mark.parametrize("spill", [Spill, on_host])
def test_text_gets_half_its_tokens_while_rows_share_a_micro_batch(tiny_llama_folder: Path, spill: Callable[[], Spill]) -> None:
    text = loaded(tiny_llama_folder)
    initialise_adapter(text, plan_for(text.model, LoraSpec(rank=2), text.family), seed=0)
    kept = spill()
    task = TextTask(text, rows(6), held_out=(), spec=TrainSpec(micro_tokens=40), spill=kept)
    kept.put((0, 3), torch.ones(2))
    shortest = min(len(row.ids) for row in rows(6))
    assert task.halve() == "train.micro_tokens 20" and (0, 3) not in kept
    task.spec = dataclasses.replace(task.spec, micro_tokens=2 * shortest - 1)
    assert task.halve() == "" and task.spec.micro_tokens == 2 * shortest - 1


def test_after_training_the_adapter_is_named_and_how_to_go_on(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr(workflow, "_reported", no_memory)
    data = write_rows(tmp_path / "rows.jsonl", reviews(30))
    with pytest.raises(RunStopped, match=r"training is done and .*adapter is whole, but not evaluated\. The dev") as no:
        run(tiny_llama_folder, data, tmp_path / "run", {"train.steps": "1"})
    assert "evaluate it with: lorakeet finetune --resume" in str(no.value) and (tmp_path / "run" / "adapter").is_dir()
    monkeypatch.setattr("lorakeet.kinds.text.assemble.load_text_model", no_memory)
    with pytest.raises(EnvironmentProblem, match="The device ran out of memory: CUDA out of memory"):
        run(tiny_llama_folder, data, tmp_path / "other", {"train.steps": "1"})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("said", OTHERS)
def test_every_verb_says_it_of_libraries_too(
    said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(**_: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(command, "lorakeet", type("Fails", (), {"main": staticmethod(no_memory)}))
    assert command.main(["generate"]) == 2
    assert "The device ran out of memory: " + said.partition("\n")[0][:20] in capsys.readouterr().err


def test_every_verb_says_it_in_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_memory(**_: Any) -> None:
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr(command, "lorakeet", type("Fails", (), {"main": staticmethod(no_memory)}))
    assert command.main(["generate", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "out-of-memory"
    monkeypatch.setattr(command, "lorakeet", type("Fails", (), {"main": staticmethod(lambda **_: 1 / 0)}))
    with pytest.raises(ZeroDivisionError):
        command.main(["generate"])

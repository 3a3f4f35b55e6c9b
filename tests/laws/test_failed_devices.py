"""A GPU that fails (an address, a card that is lost): one message, what is kept, and how to go on; no model is blamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorakeet.cli import main as command
from lorakeet.errors import EnvironmentProblem, RunStopped, is_device_fault, is_of_the_device, is_out_of_memory
from lorakeet.kinds import certify_pairs
from lorakeet.memory.budget import Budget
from lorakeet.memory.cuda import enforcing_gpu_budget
from lorakeet.runs.run_folder import evaluating, stoppable
from lorakeet.train import checkpoint, gradients
from lorakeet.verbs import finetune as workflow
from lorakeet.verbs.options import FinetuneOptions
from tiny.passed_on import require_passed_on
from tiny.runs import reviews, run, settings, write_rows
from tiny.simulated_card import simulated_card
from tiny.streams import loaded

LATER = (
    "\nSearch for `cudaErrorX' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information."
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect."
    "\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)
FAULTS = (  # as torch and Triton raise them: cudaGetErrorString of CUDA 13
    f"CUDA error: an illegal memory access was encountered{LATER}",
    f"CUDA error: device-side assert triggered{LATER}Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
    f"CUDA error: unspecified launch failure{LATER}",
    f"CUDA error: unknown error{LATER}",  # a card that has fallen off the bus
    f"CUDA error: uncorrectable ECC error encountered{LATER}",
    "CUDA driver error: the launch timed out and was terminated",
    "Triton Error [CUDA]: misaligned address",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(…)`",
    f"HIP error: an illegal memory access was encountered{LATER}",
)
OTHERS = (
    "CUDA error: no kernel image is available for execution on the device",
    "CUDA error: invalid argument",
    "CUDA error: operation not permitted when stream is capturing",
    "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`",
    "Expected all tensors to be on the same device",
    "an illegal memory access was encountered",  # of a text
)
QUICK = {"train.steps": "4", "train.checkpoint_every": "1", "train.evaluate_every": "2", "evaluate.answers": "0"}


@pytest.mark.parametrize("said", FAULTS)
def test_a_fault_is_one_of_the_device(said: str) -> None:
    error = RuntimeError(said)
    assert is_device_fault(error) and is_of_the_device(error) and not is_out_of_memory(error)
    assert not is_device_fault(ValueError(said))


@pytest.mark.parametrize("said", OTHERS)
def test_an_error_that_a_process_survives_is_none(said: str) -> None:
    assert not is_device_fault(RuntimeError(said)) and not is_of_the_device(RuntimeError(said))


@pytest.mark.slow
def test_a_run_keeps_its_checkpoint_and_goes_on_from_it(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", reviews(30))
    given = (tiny_llama_folder, data, tmp_path / "run", {**QUICK, "model.device": "cuda"})
    clip, steps = gradients.clip, list[int]()
    with simulated_card() as card:

        def lost(*numbers: Any, **more: Any) -> None:
            steps.append(1)
            card.fault = FAULTS[0] if len(steps) == 4 else ""  # of the third step: the first of all is that on shapes
            clip(*numbers, **more)

        with monkeypatch.context() as patch, pytest.raises(RunStopped) as stopped:
            patch.setattr(gradients, "clip", lost)
            run(*given)
        card.fault = ""
        words, newest = str(stopped.value), next(reversed(checkpoint.found(tmp_path / "run" / "checkpoints")))
        assert words.startswith("The GPU failed: CUDA error: an illegal memory access was encountered. This process can no")
        assert newest.name == "step-000002" and f"The newest checkpoint, {newest}, is whole" in words
        assert f"lorakeet finetune --resume {tmp_path / 'run'}" in words and "CUDA_LAUNCH_BLOCKING=1" in words
        options = FinetuneOptions(resume=tmp_path / "run")
        resumed = workflow.finetune(settings(*given), options, console=Console(quiet=True))
    assert resumed.outcome is not None and resumed.outcome.steps == 4 and resumed.report is not None


def test_before_a_checkpoint_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="No checkpoint was written yet"), stoppable(workflow.RunFolder(tmp_path)):
        raise RuntimeError(FAULTS[1])
    with pytest.raises(RuntimeError, match="a bug"), stoppable(workflow.RunFolder(tmp_path)):
        raise RuntimeError("a bug")


def test_after_training_the_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunStopped) as stopped, evaluating(workflow.RunFolder(tmp_path)):
        raise RuntimeError(FAULTS[2])
    words = str(stopped.value)
    assert words.startswith(f"The training is done and {tmp_path / 'adapter'} is whole, but not evaluated. The GPU failed: CUDA ")
    assert "Try again with: lorakeet finetune --resume" in words


def test_a_gpu_that_another_process_holds_alone_is_not_said_to_have_failed() -> None:
    said = r"The GPU cannot be used: CUDA error: CUDA-capable device\(s\) is/are busy or unavailable\. Another process may"
    with pytest.raises(EnvironmentProblem, match=said), enforcing_gpu_budget(Budget(), ""):
        raise RuntimeError(f"CUDA error: CUDA-capable device(s) is/are busy or unavailable{LATER}")


def test_before_training_it_is_a_problem_of_the_machine() -> None:
    said = r"The GPU failed: CUDA error: unknown error\. "
    with pytest.raises(EnvironmentProblem, match=said), enforcing_gpu_budget(Budget(), ""):
        raise RuntimeError(FAULTS[3])


@pytest.mark.parametrize("as_json", [True, False])
def test_every_verb_says_it_in_one_message(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failed(**_: Any) -> None:
        raise RuntimeError(FAULTS[1])

    monkeypatch.setattr(command, "lorakeet", type("Fails", (), {"main": staticmethod(failed)}))
    assert command.main(["generate", *(["--json"] if as_json else [])]) == 2
    printed = capsys.readouterr()
    words = json.loads(printed.out)["error"]["message"] if as_json else printed.err
    assert "The GPU failed: CUDA error: device-side assert triggered. " in words and "Run the command again." in words
    assert "Traceback" not in words and "Search for" not in words


def test_a_model_is_not_said_to_be_at_fault(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, said = loaded(tiny_llama_folder), FAULTS[0]
    require_passed_on(text, said)

    def failed(*_: Any, **__: Any) -> Any:
        raise RuntimeError(said)

    monkeypatch.setattr(certify_pairs, "why_not_by_peft", lambda _: "")
    monkeypatch.setattr(certify_pairs, "compare_with_peft", failed)
    assert "could not be used here" in certify_pairs.check_by_peft(text, "default", tmp_path, []).why  # type: ignore[union-attr]

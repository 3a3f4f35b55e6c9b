"""On a GPU a run learns what it learns on the CPU, keeps its plan, waits little, and goes on where it was stopped."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.train.log import read_metrics
from tiny.runs import reviews, run, write_rows

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # those of drivers and compilers are no failures
CLOSE = 0.05  # nats: 16-bit products beside fp32
WAITS = 3  # of a step


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", reviews(40))


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]


def trained(model: Path, rows: Path, out: Path, device: torch.device, **changes: Any) -> list[float]:
    run(model, rows, out, {"model.device": str(device), "train.learning_rate": "0.002", **changes})
    return losses(out)


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_the_losses_are_those_of_the_cpu(
    gpu: torch.device, narrow: torch.dtype, tiny_llama_folder: Path, rows: Path, tmp_path: Path, method: str
) -> None:
    packed = {"model.quantize.method": method}
    mine = trained(tiny_llama_folder, rows, tmp_path / "cpu", torch.device("cpu"), **packed)
    dtype = str(narrow).removeprefix("torch.")
    theirs = trained(tiny_llama_folder, rows, tmp_path / "gpu", gpu, **packed, **{"model.dtype": dtype})
    assert len(mine) == len(theirs) == 6
    assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) < CLOSE
    certificate = json.loads((tmp_path / "gpu" / "certificate.json").read_text())
    assert certificate["passed"]


def test_a_plan_is_a_bound(gpu: torch.device, tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    trained(tiny_llama_folder, rows, tmp_path / "run", gpu)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for part in report["memory"]:
        if part["planned"] and part["used"]:
            assert part["used"] <= part["planned"], part


def test_a_step_waits_at_most_three_times(real_gpu: torch.device, tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    from lorakeet.train.loop import Training

    counts: list[int] = []
    step = Training.step

    def watched(self: Any) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step(self)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(one.message) for one in said))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", watched)
        trained(tiny_llama_folder, rows, tmp_path / "run", real_gpu)
    assert max(counts[2:]) <= WAITS, counts  # kernels are made, and attention proved, in the first steps

"""When a run tries CUDA graphs by itself, and why not; what they take is tested in test_unbound_text_run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lorakeet.kernels.cuda_graphs import LARGEST
from lorakeet.train.processes import Processes
from lorakeet.workflows.planning.forecast_text_run import Workload
from lorakeet.workflows.planning.graphs import COPIES, graph_bytes, settings_in_the_way, why_not_by_itself
from lorakeet.workflows.planning.unbound_text_run import UnboundTextRun
from tiny.runs import settings

CUDA = torch.device("cuda", 0)
REASONS = {
    "train.cuda_graphs is false": {"train.cuda_graphs": "false"},
    "train.objective is dpo": {"train.objective": "dpo"},
    "memory.budget is 8 GB, which may stream blocks to other addresses in every pass": {"memory.budget": "8 GB"},
    "train.keep_prefix_states is on, whose inputs are at another address in every pass": {"train.keep_prefix_states": "true"},
    "ranks.choose is prune, and a cut moves the adapter's tensors to other addresses": {"ranks.choose": "prune"},
    "lora.dropout is 0.1: random numbers differ in each pass, so a graph cannot be compared with the model": {
        "lora.dropout": "0.1"
    },
}


@pytest.mark.parametrize("why", REASONS)
def test_settings_that_keep_a_run_from_it(why: str, tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path / "rows", tmp_path / "run", REASONS[why])
    assert why_not_by_itself(config, CUDA, torch.bfloat16, 1000) == why


def test_nothing_in_the_way(tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path / "rows", tmp_path / "run")
    assert config.train.cuda_graphs is None and not [*settings_in_the_way(config)]
    assert why_not_by_itself(config, CUDA, torch.bfloat16, LARGEST) == ""
    assert why_not_by_itself(config, CUDA, torch.bfloat16, 8_030_261_248).startswith("the model has 8.0 billion weights")
    assert why_not_by_itself(config, CUDA, torch.bfloat16, 1000, 2) == "2 processes train together"
    assert "passes in float32 on cuda are not recorded" in why_not_by_itself(config, CUDA, torch.float32, 1000)
    assert "passes in bfloat16 on cpu are not recorded" in why_not_by_itself(config, torch.device("cpu"), torch.bfloat16, 1000)


def test_a_search_and_several_processes_do_not(tmp_path: Path, tiny_llama_folder: Path) -> None:
    config = settings(tiny_llama_folder, tmp_path / "rows", tmp_path / "run")
    assert UnboundTextRun(config, Workload(members=3), print).why_no_graphs() == "a search trains several adapters"
    run = UnboundTextRun(config, Workload(), print)
    run.processes = Processes().count + 1
    assert run.why_no_graphs() == "2 processes train together"


def test_a_proof_in_mid_training_holds_four_tensors_as_large_as_the_adapter() -> None:
    """The adapter before noise; gradients of the step so far, by the model and by the graphs."""

    def size(parameters: int) -> int:
        forecast = SimpleNamespace(phase=lambda _: SimpleNamespace(kinds={}))
        return graph_bytes(cast(Any, SimpleNamespace(forecast=forecast, plan=SimpleNamespace(parameters=parameters))), 0)

    assert COPIES == 4 and size(1 << 20) - size(0) == 4 * 4 * (1 << 20) * 9 / 8

"""What several processes cannot share is refused at once, and each gets its device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakeet.config import RunConfig, read_run
from lorakeet.errors import ConfigError, EnvironmentProblem, RunStopped
from lorakeet.runs.multi_process import on_own_device, require_combinable, starting_together
from lorakeet.train.launch import Launch, launched
from lorakeet.train.processes import ALONE, ProcessLost, joined
from lorakeet.train.run import RunFolder
from tiny.runs import reviews, write_rows
from tiny.together import Together

TWO = Launch(0, 2, 0, 2)


def config(**changes: str) -> RunConfig:
    given = {"model.path": "some/model", "data.train": "rows.jsonl", **{key.replace("__", "."): v for key, v in changes.items()}}
    return read_run(None, given)


def test_what_cannot_be_shared_is_named_in_one_message() -> None:
    asked = config(
        kind="image", memory__budget="2GiB", train__keep_prefix_states="true", train__batch_size="1", model__device="mps",
        train__shard="true", lora__variant="dora",
    )  # fmt: skip
    with pytest.raises(ConfigError) as error:
        require_combinable(asked, TWO, several=False)
    message = str(error.value)
    assert message.startswith("2 processes cannot train this run together (6 problems):")
    named = (
        "kind is image", "memory.budget is 2GiB", "keep_prefix_states", "batch_size is 1", "device is mps", "variant dora",
    )  # fmt: skip
    assert [word for word in named if word not in message] == []
    require_combinable(asked, Launch())
    with pytest.raises(ConfigError, match=r"ranks\.choose is prune, which one process does"):
        require_combinable(config(ranks="prune"), TWO)
    require_combinable(config(), TWO)


def device_and_dtypes(device: str, dtype: str) -> list[str]:
    """What the settings say in this process."""
    with joined(launched()) as processes:
        found = on_own_device(config(model__device=device, model__dtype=dtype), processes).model
        processes.disband()
        return [found.device, found.dtype, found.products]


def test_all_take_the_precision_of_the_first(forked: Together) -> None:
    assert on_own_device(config(), ALONE) == config()
    first, second = forked.call("runs.test_multi_process:device_and_dtypes", "cpu", "auto")
    assert first == second and first[0] == "cpu" and "auto" not in first
    assert forked.call("runs.test_multi_process:device_and_dtypes", "cpu", "float32")[1][1] == "float32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are CUDA devices here")
def test_more_processes_than_devices_are_refused(forked: Together) -> None:
    forked.start({"count": 2, "call": "runs.test_multi_process:device_and_dtypes", "with": ["cuda", "auto"]})
    first, second = forked.end()
    assert EnvironmentProblem.__name__ in first.said
    assert "2 processes were started on a machine where torch sees 0 CUDA devices" in first.said
    assert (second.code, second.said) == (2, "")


def test_the_command_line_says_it_once(forked: Together, tiny_llama_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", reviews(8))
    refused = forked.run(
        ["finetune", "--model", tiny_llama_folder, "--data", data, "--out", tmp_path / "run", "--memory.budget", "1GiB"]
    )
    assert [one.code for one in refused] == [2, 2]
    assert "memory.budget is 1GiB" in refused[0].said and refused[1].said == ""
    assert not (tmp_path / "run").exists()
    for verb in ("tune", "plan"):
        refused = forked.run([verb, "--model", tiny_llama_folder, "--data", data])
        assert [one.code for one in refused] == [2, 2]
        assert f"`lorakeet {verb}` runs in one process, but torchrun started 2" in refused[0].said and refused[1].said == ""


def test_one_that_dies_before_the_first_step_is_named_with_the_way_to_go_on(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", TWO.command)
    with pytest.raises(RunStopped) as caught, starting_together(run):
        raise ProcessLost("process 1 of 2 died")
    assert str(caught.value) == "Before training: process 1 of 2 died. Nothing was written. Start the run again."
    RunFolder.create(run.path)
    run.write(run.config, "kind: text\n")
    with pytest.raises(RunStopped) as caught, starting_together(run):
        raise ProcessLost("process 1 of 2 died")
    assert str(caught.value) == f"Before training: process 1 of 2 died. Resume with: {run.resume_command}"

"""Machines by name: what is free on each is what a real one of the kind leaves a run, and the plan fits it or says what would."""

from __future__ import annotations

import io
from typing import Any, get_args

import pytest
import torch
from rich.console import Console

from lorakeet.config import read_run
from lorakeet.data.spec import NO_ROWS
from lorakeet.errors import ConfigError
from lorakeet.memory.free import free_memory
from lorakeet.planning.machines import GPUS, THIS, known_machines, on_machine
from lorakeet.verbs.options import MachineName, PlanOptions
from lorakeet.verbs.plan import plan
from tiny.made_up_card import card

RUN = {"model.path": "meta-llama/Llama-3.1-8B", "data.train": NO_ROWS}


def test_the_option_names_every_machine() -> None:
    assert get_args(MachineName) == (THIS, *(machine.name for machine in known_machines()))


def test_what_is_free_on_a_card_is_what_such_a_card_leaves() -> None:
    free = {machine.name: machine.free for machine in known_machines()}
    for size, mib in GPUS.items():
        with card(mib << 20):
            assert free_memory(torch.device("cuda", 0)).bytes == free[f"gpu-{size}"]


def test_a_machine_sets_the_device_and_goes_with_no_budget() -> None:
    config, free = on_machine(read_run(None, RUN), "gpu-12")
    assert config.model.device == "cuda:0" and free.free == "a GPU of 12 GB" and not config.memory.limit
    assert on_machine(config, "cpu-16")[0].model.device == "cpu"
    assert on_machine(read_run(None, RUN), THIS)[0].model.device == "auto"
    with pytest.raises(ConfigError, match=r"--machine is gpu-12, but memory.budget is 2GiB; leave one"):
        on_machine(read_run(None, {**RUN, "memory.budget": "2GiB"}), "gpu-12")
    with pytest.raises(ConfigError, match=r"'gpu-9'; expected one of this, gpu-8"):
        on_machine(config, "gpu-9")


@pytest.mark.slow
def test_the_first_forecast_comes_before_the_way_that_fits() -> None:
    said, seen = io.StringIO(), list[Any]()
    given = read_run(None, {**RUN, "model.quantize.method": "nf4"})
    found = plan(given, PlanOptions(machine="gpu-12"), console=Console(file=said, width=200), watch=seen.append)
    [first] = seen
    assert first.streamed is None and first.peak == found.peak > found.bound.bytes
    way = found.streamed.choice.way
    assert way.micro_tokens == 1024 and not way.streamed and found.streamed.choice.plan.peak <= found.bound.bytes
    assert "fits what is free on a GPU of 12 GB" in said.getvalue()
    assert found.to_mapping()["machine"] == {"name": "a GPU of 12 GB", "bytes": found.free.bytes}


@pytest.mark.slow
def test_what_fits_as_it_is_needs_no_other_way() -> None:
    said = io.StringIO()
    small = {**RUN, "model.path": "meta-llama/Llama-3.2-1B", "data.max_tokens": "64", "train.micro_tokens": "64"}
    found = plan(read_run(None, small), PlanOptions(machine="gpu-80"), console=Console(file=said, width=200))
    assert found.streamed is None and not found.advice and "less than the 7" in said.getvalue()

"""`workflows.facts`: the circumstances of a run."""

from __future__ import annotations

import torch

import lorakeet
from lorakeet.workflows.runs.facts import machine, versions


def test_versions_name_the_packages_that_decide_numbers() -> None:
    found = versions()
    assert f"lorakeet {lorakeet.__version__}" in found and f"torch {torch.__version__.partition('+')[0]}" in found
    assert "transformers " in found and "Python 3." in found


def test_the_machine_is_named_with_its_threads() -> None:
    found = machine(torch.device("cpu"))
    assert f"{torch.get_num_threads()} of " in found and " threads" in found and not found.startswith(",")

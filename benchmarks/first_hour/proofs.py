"""Stage b: torch's attention kernels against the definition of attention, and the tests that need a GPU."""

from __future__ import annotations

import logging
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from first_hour.findings import Findings
from lorakeet.kernels.efficient_varlen import EfficientVarlen
from lorakeet.kernels.flash_varlen import FlashVarlen, proved

KERNELS = {"flash": FlashVarlen, "memory-efficient": EfficientVarlen}
WIDTHS = (64, 128, 192, 256)
TESTS = Path(__file__).resolve().parents[2] / "tests" / "gpu"
REWRITTEN = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"  # plugins of pytest that a stage has imported
HEADS = (8, 2)  # of queries and of keys


def run(found: Findings) -> None:
    dtypes = (torch.float32,) if found.toy else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        for name, kernel in KERNELS.items():
            if name == "flash" and dtype == torch.float32 and not found.toy:
                continue  # it takes none
            for width in WIDTHS:
                word = str(dtype).removeprefix("torch.")
                proof = partial(_proved, found, kernel, name, dtype, width)
                found.attempt(f"{name}, {word}, heads of {width}", proof)
    found.attempt("tests", lambda: _tests(found))


def _proved(found: Findings, kernel: Any, name: str, dtype: torch.dtype, width: int) -> str:
    """Empty if the kernel computes what attention is, both ways; else what differs."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lorakeet")
    logger.addHandler(handler)
    try:
        good = proved(kernel, name, found.device, dtype, (*HEADS, width))
    finally:
        logger.removeHandler(handler)
    return "" if good else " ".join(said) or "it differs"


class Outcomes:
    """A plugin of pytest that keeps how tests end, as they end."""

    def __init__(self, found: Findings) -> None:
        self.found = found
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.outcome == "failed":
            self.failures.append(f"{report.nodeid}: {str(report.longrepr).strip().splitlines()[-1][:300]}")
            self.found.add("tests", self.values())

    def values(self) -> dict[str, Any]:
        counts: dict[str, Any] = {"tests_" + name: count for name, count in self.counts.items()}
        return counts | ({"failed": "; ".join(self.failures)} if self.failures else {})


def _tests(found: Findings) -> dict[str, Any]:
    """How tests/gpu ends: kernels, losses and plans, with assertions; in a rehearsal what a CPU can stand for."""
    if not TESTS.is_dir():
        return {"not_run": "there is no folder tests/gpu: this is an installed package without its tree"}
    if find_spec("pytest") is None:
        return {"not_run": "pytest is not installed"}
    import pytest

    outcomes, root = Outcomes(found), TESTS.parents[1]
    chosen = [str(TESTS / "test_kernels.py")] if found.toy else [str(TESTS), "-m", "gpu"]
    if found.toy:
        os.environ["LORAKEET_GPU_TESTS"] = "cpu"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed
    os.chdir(root)
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(root), "-W", REWRITTEN, *chosen], plugins=[outcomes])
    found.values.pop("tests", None)
    if int(code) not in (0, 1):
        return {"failed": f"pytest ended with code {int(code)}", **outcomes.values()}
    return outcomes.values()

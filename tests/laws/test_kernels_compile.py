"""Triton kernels, Lorakeet's and liger-kernel's, compile as they would be launched for GPUs that are not here: they fit on them,
keep their numbers in registers, move memory in wide pieces, and round where torch rounds.

Triton's compiler needs no GPU. What it cannot tell is whether a GPU then computes the right numbers, and how fast. `make compile`
(LORAKEET_COMPILE=1) compiles every kernel for every GPU from Turing to Blackwell; else some are. It does so by the Triton of the
environment, and by the oldest that pyproject.toml allows (LORAKEET_TRITON, its version; it comes first on the path).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version

from structure.tree import ROOT
from tiny.triton_device import needs_triton

pytestmark = [needs_triton, pytest.mark.slow]

ALL = bool(os.environ.get("LORAKEET_COMPILE"))
SHARED = {"7.5": 64 << 10, "8.0": 163 << 10, "9.0": 227 << 10, "10.0": 227 << 10}  # bytes that a program can have
LEAST_SHARED = 99 << 10  # on 8.6, 8.9 and 12.0
ASKED = os.environ.get("LORAKEET_TRITON", "")
OLD = bool(ASKED) and Version(ASKED) < Version("3.6")
SPILLED = 512 if OLD else 400  # bytes a thread: of GPTQ's products, with code for columns in any order; 3 bits and 64 tokens
EXACT = 8  # of products in fp32 over dense or NF4 weights: dense, one token on 12.0 by Triton 3.9; NF4, 64 tokens on 10.0 by 3.5
THEIRS = 48  # of liger-kernel's: GeGLU backward on 12.0 with Triton 3.6
OWN = ("_unpack", "_product")
LIGERS = {"_rms_norm_forward_kernel", "_rms_norm_backward_kernel", "_swiglu_backward_kernel",
          "_geglu_tanh_backward_kernel", "_triton_rope", "liger_cross_entropy_kernel"}  # fmt: skip
WIDE = 16  # bytes: what a thread moves at once at best
SCRIPT = ROOT / "tests" / "tiny" / "compiled_kernels.py"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    cache = str(tmp_path_factory.mktemp("triton"))  # of its own, so that nothing is taken from another run
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT), *(["--all"] if ALL else [])]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    found: Rows = json.loads(run.stdout)
    return found


def short(row: dict[str, Any]) -> str:
    return " ".join(f"{name}={row[name]}" for name in ("name", "dtype", "tokens", "card", "shared", "spilled", "ld", "st"))


def test_the_triton_that_was_asked_for_compiled(compiled: Rows) -> None:
    assert {row["triton"] for row in compiled} == {ASKED or version("triton")}


def test_all_fit_on_the_chip(compiled: Rows) -> None:
    kernels = {row["kernel"] for row in compiled}
    assert {*OWN} <= kernels and (importlib.util.find_spec("liger_kernel") is None or kernels >= LIGERS)
    too_large = [short(row) for row in compiled if row["shared"] > SHARED.get(row["card"], LEAST_SHARED)]
    assert not too_large


def test_numbers_stay_in_registers(compiled: Rows) -> None:
    """Only GPTQ's products may keep some outside of them, those in fp32 two numbers, and with an older Triton one of Liger's."""
    most = {"gptq": SPILLED, "gelu": THEIRS}
    for row in compiled:
        wide = EXACT if row["kernel"] == "_product" and row["dtype"] == "float32" else 0
        assert row["spilled"] <= (most.get(row["name"].split()[0], wide) if row["tokens"] else 0), short(row)


def test_memory_is_moved_in_wide_pieces(compiled: Rows) -> None:
    """States, weights and logits 16 bytes a thread and instruction; single numbers are ρ, a target, a loss, a correction."""
    for row in compiled:
        if row["kernel"] == "_unpack":
            assert {*row["st"]} == {str(WIDE)}, short(row)
        elif row["kernel"] not in OWN:
            single = [count for kind in ("ld", "st") for width, count in row[kind].items() if int(width) < WIDE]
            assert sum(single) <= 4 and str(WIDE) in row["ld"] and str(WIDE) in row["st"], short(row)


def test_weights_are_brought_back_with_torchs_roundings(compiled: Rows) -> None:
    unpacking = [row for row in compiled if row["kernel"] == "_unpack"]
    assert unpacking and not any(row["fma"] for row in unpacking)  # a product and a sum in one instruction round once
    narrow = [row for row in unpacking if row["dtype"] == "bfloat16"]
    assert narrow and all(row["rounds to nearest"] for row in narrow)


def test_narrow_products_run_on_tensor_cores(compiled: Rows) -> None:
    narrow = [row for row in compiled if row["kernel"] == "_product" and row["dtype"] != "float32"]
    assert narrow and all(row["tensor cores"] for row in narrow)

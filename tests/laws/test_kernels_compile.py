"""Every Triton kernel compiles to machine code for cards that are not here, fits on them, and rounds where torch rounds.

Triton's compiler needs no card. What it cannot tell is whether a card then computes the right numbers, and how fast.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from structure.tree import ROOT
from tiny.triton_device import needs_triton

pytestmark = [needs_triton, pytest.mark.slow]

SHARED = 99 << 10  # bytes a program can have on the smallest of the cards since 2020 (8.6 and 8.9)
SCRIPT = ROOT / "tests" / "tiny" / "compiled_kernels.py"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    cache = str(tmp_path_factory.mktemp("triton"))  # of its own, so that nothing is taken from another run
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    run = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    found: list[dict[str, object]] = json.loads(run.stdout)
    return found


def test_all_fit_on_the_chip(compiled: list[dict[str, object]]) -> None:
    assert {kernel["kernel"] for kernel in compiled} == {"_unpack", "_product"}
    too_large = [kernel for kernel in compiled if int(str(kernel["shared"])) > SHARED or not kernel["cubin"]]
    assert not too_large


def test_weights_are_brought_back_with_torchs_roundings(compiled: list[dict[str, object]]) -> None:
    unpacking = [kernel for kernel in compiled if kernel["kernel"] == "_unpack"]
    assert unpacking and not any(kernel["fma"] for kernel in unpacking)  # a product and a sum in one instruction round once
    narrow = [kernel for kernel in unpacking if kernel["dtype"] == "torch.bfloat16"]
    assert narrow and all(kernel["rounds to nearest"] for kernel in narrow)


def test_narrow_products_run_on_tensor_cores(compiled: list[dict[str, object]]) -> None:
    narrow = [kernel for kernel in compiled if kernel["kernel"] == "_product" and kernel["dtype"] != "torch.float32"]
    assert narrow and all(kernel["tensor cores"] for kernel in narrow)

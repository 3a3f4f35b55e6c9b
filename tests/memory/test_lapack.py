"""What LAPACK works in: never less than its library answers, and entered in the ledger for a moment."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_float, c_int
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.memory.lapack import eigh_bytes, qr_bytes, svd_bytes
from lorakeet.memory.ledger import Ledger

FP32 = 4
SHAPES = [(80, 4096), (4096, 80), (32, 11008), (256, 256), (200, 256), (144, 128256), (24, 2048), (256, 100), (2048, 24)]


@pytest.fixture(scope="module")
def library() -> Any:
    """LAPACK, where torch's own library has it under its own name."""
    found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    if not hasattr(found, "sgesdd_"):
        pytest.skip("torch's LAPACK is elsewhere")
    return found


def asked(routine: Any, *arguments: Any) -> int:
    """The numbers that `routine` wants to work in: integers by reference, and in place of WORK and LWORK the question."""
    answer, info = c_float(0), c_int(0)
    passed = [byref(c_int(value)) if isinstance(value, int) else value for value in arguments]
    spares = {"sgesdd_": [(c_int * 1)()], "ssyevd_": [byref(c_int(0)), byref(c_int(-1))]}
    routine(*passed, byref(answer), byref(c_int(-1)), *spares.get(routine.__name__, []), byref(info))
    assert info.value == 0
    return int(answer.value)


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_singular_values_work_in_no_more(library: Any, rows: int, columns: int, vectors: bool) -> None:
    none, short = (c_float * 1)(), min(rows, columns)
    job = c_char_p(b"S" if vectors else b"N")
    numbers = asked(library.sgesdd_, job, rows, columns, none, rows, none, none, rows, none, short)
    assert FP32 * (numbers + rows * columns) <= svd_bytes(rows, columns, FP32, vectors=vectors)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_orthogonal_factors_work_in_no_more(library: Any, rows: int, columns: int) -> None:
    none, short = (c_float * 1)(), min(rows, columns)
    numbers = asked(library.sgeqrf_, rows, columns, none, rows, none)
    numbers = max(numbers, asked(library.sorgqr_, rows, short, short, none, rows, none))
    assert FP32 * (numbers + short) <= qr_bytes(rows, columns, FP32)


@pytest.mark.parametrize("size", [4, 72, 264, 1000])
def test_eigenvectors_work_in_no_more(library: Any, size: int) -> None:
    none = (c_float * 1)()
    numbers = asked(library.ssyevd_, c_char_p(b"V"), c_char_p(b"L"), size, none, size, none)
    assert FP32 * numbers <= eigh_bytes(size, FP32)


def test_a_ledger_holds_it_while_the_routine_runs() -> None:
    with Ledger() as ledger, ledger.phase("svd"):
        matrix = torch.zeros(100, 400)
        found = torch.linalg.svd(matrix, full_matrices=False)
        results = FP32 * sum(part.numel() for part in found)
    assert ledger.peaks["svd"].bytes == FP32 * matrix.numel() + results + svd_bytes(100, 400, FP32)
    assert ledger.bytes <= FP32 * matrix.numel() + results, "it is gone when the routine ends"

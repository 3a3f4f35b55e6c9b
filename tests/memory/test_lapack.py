"""What LAPACK works in: never less than its library answers, with any number of threads, and in the ledger for a moment."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import byref, c_char_p, c_double, c_float, c_int
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.memory.lapack import eigh_bytes, qr_bytes, svd_bytes
from lorakeet.memory.ledger import Ledger

FP32, FP64 = 4, 8
THREADS = [1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 128, 256]
SHAPES = [
    *[(80, 4096), (4096, 80), (32, 11008), (256, 256), (200, 256), (144, 128256), (24, 2048), (256, 100), (2048, 24)],
    *[(4096, 16), (128256, 16), (400000, 31), (9972, 173), (10606, 914), (14439, 3446), (11008, 4096), (5000, 1)],  # of Q and R
    *[(8588, 69), (20695, 48), (6251, 100), (16816, 362)],  # of singular values without vectors
    *[(661, 49), (1914, 65), (139, 64), (1575, 67), (54, 148), (66, 139), (42, 834), (1, 19)],
    *[(8, 100000), (4186, 7922), (4096, 11008), (8410, 7791)],
]


@pytest.fixture(scope="module")
def library() -> Any:
    """LAPACK, where torch's own library has it under its own name."""
    found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    if not hasattr(found, "sgesdd_"):
        pytest.skip("torch's LAPACK is elsewhere")
    return found


@pytest.fixture
def each_number() -> Iterator[Iterator[int]]:
    """The numbers of threads one after the other, torch having so many, whatever it was started with and has again afterwards."""
    before = torch.get_num_threads()

    def numbers() -> Iterator[int]:
        for threads in THREADS:
            torch.set_num_threads(threads)
            assert torch.get_num_threads() == threads
            yield threads

    yield numbers()
    torch.set_num_threads(before)


def asked(library: Any, name: str, itemsize: int, *arguments: Any) -> int:
    """The numbers that a routine wants to work in: integers by reference, and in place of WORK and LWORK the question."""
    routine = getattr(library, f"{'s' if itemsize == FP32 else 'd'}{name}_")
    answer, info = (c_float if itemsize == FP32 else c_double)(0), c_int(0)
    passed = [byref(c_int(value)) if isinstance(value, int) else value for value in arguments]
    spares = {"gesdd": [(c_int * 1)()], "syevd": [byref(c_int(0)), byref(c_int(-1))]}
    routine(*passed, byref(answer), byref(c_int(-1)), *spares.get(name, []), byref(info))
    assert info.value == 0
    return int(answer.value)


def asked_for_factors(library: Any, rows: int, columns: int, itemsize: int) -> int:
    none, short = (c_double * 1)(), min(rows, columns)
    numbers = asked(library, "geqrf", itemsize, rows, columns, none, rows, none)
    return max(numbers, asked(library, "orgqr", itemsize, rows, short, short, none, rows, none))


@pytest.mark.parametrize("itemsize", [FP32, FP64])
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_singular_values_work_in_no_more(
    library: Any, each_number: Iterator[int], rows: int, columns: int, vectors: bool, itemsize: int
) -> None:
    none, short = (c_double * 1)(), min(rows, columns)
    job = c_char_p(b"S" if vectors else b"N")
    for threads in each_number:
        numbers = asked(library, "gesdd", itemsize, job, rows, columns, none, rows, none, none, rows, none, short)
        held = itemsize * (numbers + rows * columns) + 8 * short * FP32  # the integers of IWORK are of four bytes
        assert held <= svd_bytes(rows, columns, itemsize, vectors=vectors), f"{threads} threads"


@pytest.mark.parametrize("itemsize", [FP32, FP64])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_orthogonal_factors_work_in_no_more(
    library: Any, each_number: Iterator[int], rows: int, columns: int, itemsize: int
) -> None:
    for threads in each_number:
        numbers = asked_for_factors(library, rows, columns, itemsize)
        assert itemsize * (numbers + min(rows, columns)) <= qr_bytes(rows, columns, itemsize), f"{threads} threads"


@pytest.mark.parametrize("itemsize", [FP32, FP64])
@pytest.mark.parametrize("size", [1, 4, 72, 264, 1000, 8193])
def test_eigenvectors_work_in_no_more(library: Any, each_number: Iterator[int], size: int, itemsize: int) -> None:
    none = (c_double * 1)()
    for threads in each_number:
        numbers = asked(library, "syevd", itemsize, c_char_p(b"V"), c_char_p(b"L"), size, none, size, none)
        assert itemsize * numbers + (3 + 5 * size) * FP32 <= eigh_bytes(size, itemsize), f"{threads} threads"


def test_more_threads_want_more(library: Any, each_number: Iterator[int]) -> None:
    """The library hears of the number of threads: without that, the tests above would ask the same again and again."""
    wide = {threads: asked_for_factors(library, 8, 100000, FP32) for threads in each_number}
    assert all(wide[threads] >= threads * 100000 for threads in THREADS)
    assert wide[256] > 100 * wide[1]


def test_a_ledger_holds_it_while_the_routine_runs() -> None:
    with Ledger() as ledger, ledger.phase("svd"):
        matrix = torch.zeros(100, 400)
        found = torch.linalg.svd(matrix, full_matrices=False)
        results = FP32 * sum(part.numel() for part in found)
    assert ledger.peaks["svd"].bytes == FP32 * matrix.numel() + results + svd_bytes(100, 400, FP32)
    assert ledger.bytes <= FP32 * matrix.numel() + results, "it is gone when the routine ends"

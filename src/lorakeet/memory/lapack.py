"""What LAPACK's routines work in beside the matrices that they are given and fill: no tensor, so that no ledger sees it made.

torch asks the routine how much it wants, takes that, and gives it back when the routine ends (ATen, BatchLinearAlgebra.cpp). The
sizes are those that LAPACK's manual names for the routine, or a bound of the more that Intel's oneMKL 2024.2, which torch's own
builds for x86 have in them, answers when it is asked for them (LWORK = -1). Its answers change with its number of threads, which
is torch.get_num_threads(): a plan holds for runs with as many. Asked were the routines for fp32 and fp64 of torch 2.13, with 1
to 256 threads, for 39,000 shapes drawn at random, the longer side up to 400,000 and the shorter up to 8,191 (docs/log.md). The
bounds are no law of the library: tests/memory/test_lapack.py asks for some shapes again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TALL, NARROW = 6000, 384  # rows at least, columns at most, of a matrix that oneMKL takes in parts before its singular values
_INTEGER = 4  # bytes of LAPACK's integers


def svd_bytes(rows: int, columns: int, itemsize: int, *, vectors: bool = True) -> int:
    """xGESDD: a copy of the matrix, which it overwrites, LWORK and IWORK; with `vectors` JOBZ = 'S', else 'N'.

    More threads want more where there are more rows than columns, which are factorised first (`qr_bytes`).
    """
    short, long = sorted((rows, columns))
    bidiagonal = 3 * short + max(long, 7 * short, 128 * short, 16 * (short + min(long, 20 * short)))
    work = max(4 * short**2 + 7 * short, bidiagonal) if vectors else bidiagonal
    if rows > columns:
        work = max(work, short + (short**2 if vectors else 0) + _factorising(rows, columns))
        if not vectors and short <= NARROW and rows >= max(TALL, 16 * short):
            work = max(work, short * min(17 * short * torch.get_num_threads(), 6 * rows))
    return itemsize * (rows * columns + _as_answered(work)) + 8 * short * _INTEGER


def qr_bytes(rows: int, columns: int, itemsize: int) -> int:
    """xGEQRF and xORGQR, which work within Q and R: the factors τ and LWORK."""
    return itemsize * (min(rows, columns) + _as_answered(_factorising(rows, columns)))


def _factorising(rows: int, columns: int) -> int:
    """Numbers that xGEQRF, then xORGQR want at most: some a column for each thread, and with several threads some a row too."""
    short, threads = min(rows, columns), torch.get_num_threads()
    block = 32 if short <= 64 else 128 if short <= 182 else 192  # columns that are worked on at once, up to twice
    alone = (block + 8 * threads) * columns + block
    return alone if threads == 1 else alone + (block if rows >= columns else 256) * (rows + 2 * short)


def _as_answered(numbers: int) -> int:
    """The answer is a number of the matrix's own type: in fp32 rounded, up too."""
    return numbers + (numbers >> 23)


def eigh_bytes(size: int, itemsize: int) -> int:
    """xSYEVD with JOBZ = 'V', which works within the eigenvectors: LWORK and LIWORK, the same with any number of threads."""
    return itemsize * _as_answered(1 + 6 * size + 2 * size**2) + (3 + 5 * size) * _INTEGER


def _svd(A: Tensor, full_matrices: bool = False, compute_uv: bool = True, **_: Any) -> int:
    others = A.numel() - A.shape[-2] * A.shape[-1]  # of a batch, which is copied whole and taken apart one by one
    return svd_bytes(A.shape[-2], A.shape[-1], A.itemsize, vectors=compute_uv) + others * A.itemsize


def _qr(A: Tensor, mode: str = "reduced") -> int:
    return qr_bytes(A.shape[-2], A.shape[-1], A.itemsize)


def _eigh(A: Tensor, *_: Any, **__: Any) -> int:
    return eigh_bytes(A.shape[-1], A.itemsize)


# Of an aten operation's arguments: what it holds while it runs, beside these and its results.
WORKSPACES: Mapping[Any, Callable[..., int]] = {
    torch.ops.aten._linalg_svd.default: _svd,
    torch.ops.aten.linalg_qr.default: _qr,
    torch.ops.aten._linalg_eigh.default: _eigh,
}

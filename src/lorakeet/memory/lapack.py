"""Workspace sizes of LAPACK routines: torch allocates them outside of tensors, so that a ledger does not see them.

torch queries the size, allocates it, and frees it when the routine ends (ATen, BatchLinearAlgebra.cpp). The sizes are those of
LAPACK's manual, or an upper bound of the answers of Intel's oneMKL 2024.2 (LWORK = -1), which torch's x86 builds contain. They
depend on torch.get_num_threads(): a plan is for runs with as many threads. The bounds were fitted to the fp32 and fp64 routines
of torch 2.13, with 1 to 256 threads, for 39,000 random shapes, the longer side up to 400,000 and the shorter up to 8,191
(docs/log). The library does not promise them: tests/memory/test_lapack.py queries some shapes again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TALL, NARROW = 6000, 384  # least rows, most columns of a matrix that oneMKL splits before its singular values
_INTEGER = 4  # bytes of LAPACK's integers


def svd_bytes(rows: int, columns: int, itemsize: int, *, vectors: bool = True) -> int:
    """Bytes for xGESDD: a copy of the matrix, which it overwrites, LWORK and IWORK; with `vectors` JOBZ = 'S', else 'N'.

    It grows with the threads if there are more rows than columns, since these are factorised first (`qr_bytes`).
    """
    short, long = sorted((rows, columns))
    bidiagonal = 3 * short + max(long, 7 * short, 128 * short, 16 * (short + min(long, 20 * short)))
    work = max(4 * short**2 + 7 * short, bidiagonal) if vectors else bidiagonal
    if rows > columns:
        work = max(work, short + (short**2 if vectors else 0) + _factorising(rows, columns))
        if not vectors and short <= NARROW and rows >= max(TALL, 16 * short):
            work = max(work, short * min(17 * short * torch.get_num_threads(), 6 * rows))
    return itemsize * (rows * columns + _as_reported(work)) + 8 * short * _INTEGER


def qr_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Bytes for xGEQRF and xORGQR, which work in place: the factors τ and LWORK."""
    return itemsize * (min(rows, columns) + _as_reported(_factorising(rows, columns)))


def _factorising(rows: int, columns: int) -> int:
    """Upper bound of LWORK of xGEQRF and xORGQR: by columns for each thread, and with several threads by rows too."""
    short, threads = min(rows, columns), torch.get_num_threads()
    block = 32 if short <= 64 else 128 if short <= 182 else 192  # block width, up to twice
    alone = (block + 8 * threads) * columns + block
    return alone if threads == 1 else alone + (block if rows >= columns else 256) * (rows + 2 * short)


def _as_reported(numbers: int) -> int:
    """Returns the size as LAPACK reports it: in the matrix's own dtype, in fp32 rounded, sometimes up."""
    return numbers + (numbers >> 23)


def eigh_bytes(size: int, itemsize: int) -> int:
    """Bytes for xSYEVD with JOBZ = 'V', which works in place: LWORK and LIWORK, for any number of threads."""
    return itemsize * _as_reported(1 + 6 * size + 2 * size**2) + (3 + 5 * size) * _INTEGER


def _svd(A: Tensor, full_matrices: bool = False, compute_uv: bool = True, **_: Any) -> int:
    others = A.numel() - A.shape[-2] * A.shape[-1]  # of a batch, which is copied whole and factorised one by one
    return svd_bytes(A.shape[-2], A.shape[-1], A.itemsize, vectors=compute_uv) + others * A.itemsize


# Bytes of an aten operation's workspace, beside its arguments and results.
WORKSPACES: Mapping[Any, Callable[..., int]] = {
    torch.ops.aten._linalg_svd.default: _svd,
    torch.ops.aten.linalg_qr.default: lambda A, *_, **__: qr_bytes(A.shape[-2], A.shape[-1], A.itemsize),
    torch.ops.aten._linalg_eigh.default: lambda A, *_, **__: eigh_bytes(A.shape[-1], A.itemsize),
}

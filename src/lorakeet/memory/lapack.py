"""What LAPACK's routines work in beside the matrices that they are given and fill: no tensor, so that no ledger sees it made.

torch asks the routine how much it wants, takes that, and gives it back when the routine ends (ATen, BatchLinearAlgebra.cpp). The
sizes are those that LAPACK's manual names for the routine, or the more that Intel's oneMKL 2024.2, which torch's own builds for
x86 have in them, answers when it is asked for them (LWORK = -1) over the shapes of tests/memory/test_lapack.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # columns that an orthogonal factor is worked on at once: LAPACK's NB is 32, oneMKL's up to 64
_INTEGER = 4  # bytes of LAPACK's integers


def svd_bytes(rows: int, columns: int, itemsize: int, *, vectors: bool = True) -> int:
    """xGESDD: a copy of the matrix, which it overwrites, LWORK and IWORK; with `vectors` JOBZ = 'S', else 'N'."""
    short, long = sorted((rows, columns))
    work = 4 * short**2 + 7 * short if vectors else 3 * short + max(long, 7 * short) + 2 * BLOCK * short
    return itemsize * (rows * columns + work) + 8 * short * _INTEGER


def qr_bytes(rows: int, columns: int, itemsize: int) -> int:
    """xGEQRF and xORGQR, which work within Q and R: the factors τ and LWORK."""
    return itemsize * (min(rows, columns) + BLOCK * columns)


def eigh_bytes(size: int, itemsize: int) -> int:
    """xSYEVD with JOBZ = 'V', which works within the eigenvectors: LWORK and LIWORK."""
    return itemsize * (1 + 6 * size + 2 * size**2) + (3 + 5 * size) * _INTEGER


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

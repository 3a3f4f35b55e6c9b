"""Reads and checks the tensors of an adapter file: finite, and named like parts of a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from lorakeet.errors import DataError, Problems
from lorakeet.formats.files.safetensors_file import SafeFile

_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")  # no slash, no empty part: never a path to anywhere
MOST_TENSORS = 200_000  # two for each expert of the largest mixtures
_LONGEST_NAME = 300  # characters: names are matched against regular expressions


def require_few(file: SafeFile) -> None:
    """Raises DataError for more tensors than an adapter has, of which each takes some 50 µs."""
    if len(file.tensors) > MOST_TENSORS:
        raise DataError(f"{file.path} has {len(file.tensors):,} tensors; expected at most {MOST_TENSORS:,} of an adapter.")


def read_tensors(file: SafeFile, problems: Problems) -> dict[str, Tensor]:
    """Every tensor of `file` by name, floating ones in fp32; NaN, infinities and strange names go to `problems`."""
    require_few(file)
    found: dict[str, Tensor] = {}
    for name in sorted(file.tensors):
        if not named_like_a_part(name, file, problems):
            continue
        tensor = file.read(name)
        if tensor.is_floating_point():
            tensor = tensor.float()
            check_finite(tensor, f"{file.path}: {name}", problems)
        found[name] = tensor
    return found


def named_like_a_part(name: str, file: SafeFile, problems: Problems) -> bool:
    """True if `name` is words joined by dots, and not too long; otherwise adds to `problems`."""
    if len(name) > _LONGEST_NAME:
        problems.add(
            f"{file.path}: a tensor's name is {len(name):,} characters long ({name[:40]!r}…); expected at most {_LONGEST_NAME}. "
            "Fetch the file again."
        )
        return False
    if _NAME.fullmatch(name):
        return True
    problems.add(f"{file.path}: the tensor {name!r} is not named like a part of a model (words joined by dots).")
    return False


def check_finite(tensor: Tensor, name: str, problems: Problems) -> None:
    """Adds to `problems` if `tensor` has NaN or infinite values."""
    if not bool(torch.isfinite(tensor).all()):
        problems.add(f"{name} has NaN or infinite values. The training diverged; use an earlier checkpoint.")


def missing_slots(path: str, slots: Collection[str], needed: Iterable[str]) -> str:
    """The `needed` slots of the pair at `path` that are missing, in words; an empty string if there are none."""
    missing = [slot for slot in needed if slot not in slots]
    return f"{path} has {', '.join(sorted(slots))} but no {' and no '.join(missing)}." if missing else ""


def factor_problem(path: str, A: Tensor, B: Tensor) -> str:
    """What is wrong with A (rank, in[, k, k]) and B (out, rank[, 1, 1]) as a pair, or an empty string."""
    if A.dim() not in (2, 4) or B.dim() != A.dim() or tuple(B.shape[2:]) not in ((), (1, 1)) or A.shape[0] != B.shape[1]:
        return f"{path} has A {tuple(A.shape)} and B {tuple(B.shape)}; expected (rank, in) and (out, rank), or 2-D convolutions."
    if 0 in A.shape or 0 in B.shape:
        return f"{path} has A {tuple(A.shape)} and B {tuple(B.shape)}, which are empty."
    return ""

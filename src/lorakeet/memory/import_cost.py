"""Avoids the memory cost of importing Triton where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_triton() -> Iterator[None]:
    """A context in which Triton counts as not installed, unless there is a GPU to compile for.

    torch's compiler and FLOP counter, which transformers and memory/ledger import, import Triton wherever it is installed, which
    takes 70 MB. Modules imported inside may remember that it was missing. Does nothing if Triton was imported before, or if its
    interpreter is on (TRITON_INTERPRET), which needs no GPU.
    """
    if "triton" in sys.modules or os.environ.get("TRITON_INTERPRET") or _needed():
        yield
        return
    sys.modules["triton"] = None  # type: ignore[assignment]  # Python treats it as not installed
    try:
        yield
    finally:
        if sys.modules.get("triton") is None:
            sys.modules.pop("triton", None)


def _needed() -> bool:
    """True if there is a GPU for Triton, if Triton is not installed, or if torch is missing or broken (reported elsewhere)."""
    if importlib.util.find_spec("triton") is None:
        return True
    try:
        import torch

        return torch.accelerator.is_available()
    except (ImportError, OSError, AttributeError):  # the last from a torch that is too old
        return True

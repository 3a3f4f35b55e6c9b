"""What importing other people's libraries costs a process, where part of it has nothing to do there."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_triton() -> Iterator[None]:
    """Inside the block Triton counts as not installed, unless there is a card for it to compile for.

    torch's compiler and its counter of FLOPs, which transformers and memory/ledger import, import Triton wherever that is
    installed: 70 MB of a process. What is imported inside may remember that it was not there. Nothing is done where Triton was
    imported before, or where its interpreter is on (TRITON_INTERPRET), which needs no card.
    """
    if "triton" in sys.modules or os.environ.get("TRITON_INTERPRET") or _stays():
        yield
        return
    sys.modules["triton"] = None  # type: ignore[assignment]  # what Python takes for a package that is not there
    try:
        yield
    finally:
        if sys.modules.get("triton") is None:
            sys.modules.pop("triton", None)


def _stays() -> bool:
    """Whether Triton has a card, or is not installed, or there is no torch to ask: who needs one says what is wrong with it."""
    if importlib.util.find_spec("triton") is None:
        return True
    try:
        import torch

        return torch.accelerator.is_available()
    except (ImportError, OSError, AttributeError):  # the last from a torch that is too old
        return True

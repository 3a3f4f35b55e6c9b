"""A CUDA device that is not there, with so many bytes free: what plans ask of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

RUNNING = 600 << 20  # bytes of a card that a context, a desktop and its driver take before a run asks


@contextmanager
def card(total: int, *, taken: int = RUNNING) -> Iterator[pytest.MonkeyPatch]:
    """A context in which torch's card has `total` bytes, of which `taken` are in use. torch still has no CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (max(0, total - taken), total))
        patch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
        yield patch

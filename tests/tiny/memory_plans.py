"""What a process uses beside its tensors goes up and down from plan to plan: here it is the same for all."""

from __future__ import annotations

import importlib

import pytest

PLANNERS = ("text_run", "evaluation", "check", "packed_merge", "quantizing")


def same_runtime(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Every plan counts `size` bytes beside the tensors."""
    for name in PLANNERS:
        module = importlib.import_module(f"lorakeet.planning.{name}")
        monkeypatch.setattr(module, "text_runtime_bytes", lambda *_, **__: size)

"""What a stage finds, written to a file with every value, so that a stage that is ended keeps what it had."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Findings:
    """The values of a stage; `toy` is a rehearsal with small sizes on the CPU. `folder` is for files that stages share.

    It is ended at `ends`, by the clock that all processes of a machine share (time.monotonic), whenever it began.
    """

    def __init__(self, path: Path, folder: Path, *, toy: bool, ends: float) -> None:
        self.path, self.folder, self.toy = path, folder, toy
        self.device = torch.device("cpu") if toy else torch.device("cuda", 0)
        self.dtype = torch.float32 if toy else torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
        self.ends = ends
        self.values: dict[str, Any] = {}

    def add(self, name: str, value: Any) -> None:
        """Keeps a value, in the file too."""
        self.values[name] = value
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.values), encoding="utf-8")
        beside.replace(self.path)
        print(f"{name}: {json.dumps(value)[:2000]}", flush=True)

    def attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """Keeps what `action` gives, or how it failed: the parts of a stage do not depend on each other."""
        try:
            value = action()
        except Exception as error:  # of any program that is measured
            traceback.print_exc()
            value = {"failed": failure(error)}
        self.add(name, value)
        return value

    def card(self) -> str:
        """The name of the GPU that is measured."""
        return "none: a rehearsal on the CPU" if self.toy else torch.cuda.get_device_name(self.device)

    @property
    def left(self) -> float:
        """Seconds until the stage is ended."""
        return self.ends - time.monotonic()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def failure(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"

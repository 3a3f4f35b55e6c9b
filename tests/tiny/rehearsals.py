"""Rehearsals on shapes (planning/rehearse_text and its like) that are remembered: each is half of the time of a tiny
run or merge.

What a rehearsal finds follows from its arguments: the model's configuration and files, the settings and the rows; and from
CONSTANTS, where a test changes one. Where the model lies and what it is called do not matter, so that equal models in the folders
of several tests are rehearsed once. The
tests of rehearsals themselves call them directly and are not concerned; runs, plans and forecasts of the verbs are.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakeet.core.scratch import SCRATCH
from lorakeet.kernels.device import is_cpu

REHEARSED = {  # by module
    "planning.forecast_text_run": ("rehearse",),
    "kinds.images.plan": ("rehearse_images",),
    "planning.check": ("rehearse_evaluation",),
    "planning.evaluation": ("rehearse_evaluation",),
    "planning.packed_merge": ("rehearse_evaluation", "rehearse_rounding"),
    "planning.quantizing": ("_rehearsed",),
}
CONSTANTS = (  # that tests change
    ("lorakeet.models.generate.sample", "STREAMED_CACHE"),
    ("lorakeet.quant.packed", "PART_BYTES"),
    ("lorakeet.quant.nf4", "has_bitsandbytes"),
)


@contextmanager
def remembered() -> Iterator[None]:
    """A context in which the verbs that have been imported rehearse each run once. LookupError where there is no such one."""
    with pytest.MonkeyPatch.context() as patch:
        for name, functions in REHEARSED.items():
            place = f"lorakeet.{name}"
            if find_spec(place) is None:
                raise LookupError(f"{place}, whose rehearsals are to be remembered, is no module; name the one it has become.")
            module = sys.modules.get(place)
            for function in functions if module is not None else ():
                patch.setattr(module, function, once(getattr(module, function)))
        yield


def once(rehearse: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which answers from memory where it is called with equal arguments."""
    found: dict[str, Any] = {}

    def answer(*arguments: Any, **settings: Any) -> Any:
        there = is_cpu(torch.device("cpu"))  # or as if on another device
        constants = [getattr(sys.modules.get(module), name, None) for module, name in CONSTANTS]
        key = repr((plain(arguments), plain(settings), there, constants))
        if key not in found:
            found[key] = rehearse(*arguments, **settings)
        SCRATCH.clear()  # as a rehearsal does
        return found[key]

    return answer


def plain(value: Any) -> Any:
    """Everything of an argument that a rehearsal can hang on, as values whose `repr` says all of it."""
    if isinstance(value, partial):
        keywords = {name: plain(given) for name, given in value.keywords.items() if name not in ("name", "files")}
        return plain(value.func), plain(value.args), keywords, contents(value.keywords.get("files"))
    if hasattr(value, "to_dict"):
        return type(value), {name: plain(given) for name, given in value.to_dict().items() if name != "_name_or_path"}
    if is_dataclass(value) and not isinstance(value, type):
        own = [field.name for field in fields(value) if field.name != "name" or not hasattr(value, "config")]
        return type(value), {name: plain(getattr(value, name)) for name in own}
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return {name: plain(given) for name, given in sorted(value.items(), key=repr)}
    if isinstance(value, (list, tuple)):
        return [plain(given) for given in value]
    if isinstance(value, (str, int, float, type(None), torch.dtype, torch.device, Path, type)) or hasattr(value, "__qualname__"):
        return value
    raise TypeError(f"What {value!r} changes in a rehearsal is not known here.")


def contents(place: Path | None) -> list[tuple[str, str]]:
    """The model's files, which may say how its weights are packed, by name within its folder and content."""
    if place is None:
        return []
    found = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    stats = [(file, file.stat()) for file in found]
    return [(file.name if file == place else str(file.relative_to(place)), _digest(file, stat.st_mtime_ns, stat.st_size))
            for file, stat in stats]  # fmt: skip


@cache
def _digest(file: Path, changed: int, size: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()

"""Rehearsals on shapes (train/rehearsal, train/image_rehearsal) that are remembered: each is half of the time of a tiny run.

What a rehearsal finds follows from its arguments alone: the model's configuration, the settings and the rows. The tests of
rehearsals themselves call them directly and are not concerned; runs, plans and forecasts of the workflows are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.core.device import is_cpu
from lorakeet.models.alike_blocks import Build
from lorakeet.workflows import forecast_run, image_forecast


@contextmanager
def remembered() -> Iterator[None]:
    """A context in which the workflows rehearse each run once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast_run, "rehearse", once(forecast_run.rehearse))
        patch.setattr(image_forecast, "rehearse_images", once(image_forecast.rehearse_images))
        yield


def once(rehearse: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which answers from memory where it is called with equal arguments."""
    found: dict[str, Any] = {}

    def answer(build: Any, *arguments: Any, **settings: Any) -> Any:
        make, given = (build.make, [build.config]) if isinstance(build, Build) else (build, build.args)
        model = [argument.to_dict() if hasattr(argument, "to_dict") else argument for argument in given]
        state = sorted((str(file), file.stat().st_mtime_ns) for file in files_of(make.keywords.get("files")))
        there = is_cpu(torch.device("cpu"))  # or as if on another device
        key = repr((make.func, model, sorted(make.keywords.items()), state, arguments, sorted(settings.items()), there))
        if key not in found:
            found[key] = rehearse(build, *arguments, **settings)
        return found[key]

    return answer


def files_of(place: Path | None) -> list[Path]:
    """The model's files, which may say how its weights are packed."""
    if place is None:
        return []
    return [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]

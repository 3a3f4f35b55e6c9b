"""A metric of one's own: a function in a Python file, called with each reply and its reference."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorakeet.errors import ConfigError


@dataclass(frozen=True)
class OwnMetric:
    """`score(reply, reference)` gives a number, higher is better; `name` is "FILE:FUNCTION" as it was given."""

    name: str
    score: Callable[[str, str], float]


def load_metric(given: str, *, outside: Path | None = None) -> OwnMetric:
    """Runs the Python file of "my.py:score" and returns its function. Raises ConfigError if there is none.

    A file within the folder `outside` is never run: a run folder may come from someone else.
    """
    path, _, function = given.rpartition(":")
    file = Path(path).expanduser()
    expected = "expected a Python file and one of its functions, such as my.py:score"
    if not path or file.suffix != ".py" or not function.isidentifier():
        raise ConfigError(f"The metric is {given!r}; {expected}.")
    if not file.is_file():
        raise ConfigError(f"The metric is {given!r}, but there is no file {file.absolute()}; {expected}.")
    if outside is not None and outside.resolve() in file.resolve().parents:
        raise ConfigError(f"The metric file {file} is in the run folder {outside}, of which no code is run. Keep it elsewhere.")
    module_spec = importlib.util.spec_from_file_location(f"lorakeet_metric_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None  # as of any .py file
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"The metric file {file} cannot be run: {type(error).__name__}: {error}.") from error
    score = getattr(module, function, None)
    if not callable(score):
        raise ConfigError(f"The metric file {file} has no function {function!r}; {expected}.")

    def checked(reply: str, reference: str) -> float:
        try:
            value = float(score(reply, reference))
        except Exception as error:
            raise ConfigError(
                f"The metric {given} failed on the reply {reply!r:.80}: {type(error).__name__}: {error}. It is called with a "
                "reply and its reference, both text, and returns a number."
            ) from error
        if not math.isfinite(value):
            raise ConfigError(f"The metric {given} is {value} on the reply {reply!r:.80}; expected a finite number.")
        return value

    return OwnMetric(given, checked)

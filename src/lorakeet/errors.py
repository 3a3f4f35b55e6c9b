"""The errors that Lorakeet raises on purpose, and the small tools that word them.

    LorakeetError
    ├── ConfigError          fix your configuration                    exit code 2
    ├── DataError            fix your rows or files                    exit code 2
    ├── EnvironmentProblem   install, free or permit something         exit code 2
    ├── VerificationFailed   two things that must be equal are not     exit code 3
    └── RunStopped           the run ended early; what it saved is good  exit code 4

A message says what failed, the value, what was expected and what to do. Where several things are wrong at once,
collect them in `Problems` and raise once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class LorakeetError(Exception):
    """Base of every error that a user can mend; `exit_code` is what the command line returns."""

    exit_code = 2


class ConfigError(LorakeetError):
    """A setting, flag or key is wrong."""


class DataError(LorakeetError):
    """A row, a data file or a model file is wrong."""


class EnvironmentProblem(LorakeetError):
    """The machine lacks something: a package, disk space, a permission, a processor feature."""


class VerificationFailed(LorakeetError):
    """An artefact does not compute the function that it should."""

    exit_code = 3


class RunStopped(LorakeetError):
    """A run ended before its last step (NaN loss, Ctrl-C); the message says what is kept and how to go on."""

    exit_code = 4


_LONGEST_NAME = 400


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence " Did you mean 'x'?" for the closest known name, or an empty string when none is close.

    What is longer than any name is not compared: a text of megabytes would take seconds.
    """
    if len(name) > _LONGEST_NAME:
        return ""
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return f" Did you mean '{lowered[close[0]]}'?" if close else ""


def unreadable(path: Path, error: OSError) -> str:
    """The sentences for a file that the system will not read: which one, the reason that the system gives, and what to check."""
    return f"{path} cannot be read: {error.strerror or error}. Check the path, its permissions and the disk."


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """A context in which a failure of the system to read `path` becomes a DataError (`unreadable`)."""
    try:
        yield
    except OSError as error:
        raise DataError(unreadable(path, error)) from error


class Problems:
    """Collects messages and raises them together, so that a user mends everything in one go."""

    def __init__(
        self, heading: str, kind: type[LorakeetError] = ConfigError, *, remedy: str = "", shown: int | None = None
    ) -> None:
        self.heading = heading
        self.kind = kind
        self.remedy = remedy  # the last sentence, where one thing mends them all
        self.shown = shown  # of many problems the first so many are named and the others counted
        self.messages: list[str] = []
        self.others = 0  # problems that are counted and not kept

    def add(self, message: str) -> None:
        self.messages.append(message)

    def raise_if_any(self) -> None:
        """Raises `kind` with the heading and one line per problem; a single problem stands alone. The remedy comes last."""
        if len(self.messages) == 1:
            raise self.kind(" ".join([*self.messages, *([self.remedy] if self.remedy else [])]))
        if self.messages:
            named, count = self.messages[: self.shown], len(self.messages) + self.others
            lines = [f"{self.heading} ({count:,} problems):", *(f"  - {message}" for message in named)]
            if more := count - len(named):
                lines.append(f"  - and {more:,} more.")
            raise self.kind("\n".join([*lines, *([self.remedy] if self.remedy else [])]))

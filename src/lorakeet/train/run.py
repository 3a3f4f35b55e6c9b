"""The run folder on disk, created or opened to resume."""

from __future__ import annotations

import fcntl
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorakeet.disk import open_in_place, write_whole
from lorakeet.errors import ConfigError
from lorakeet.train import durable


class _Inside:
    """A property of a run folder: the path of a file or folder in it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: RunFolder, owner: type[RunFolder]) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run (see the run folder in the docs)."""

    path: Path
    command: str = "lorakeet"  # how lorakeet was started, for the resume command

    config = _Inside("config.yaml")
    split = _Inside("split.json")
    rates = _Inside("rates.json")
    reference = _Inside("reference.safetensors")  # log-probabilities that training compares with
    reference_adapter = _Inside("reference_adapter")  # a copy of the adapter that is its reference
    adapter = _Inside("adapter")
    checkpoints = _Inside("checkpoints")
    best = _Inside(".best.safetensors")  # the best tensors so far, while a run with a memory budget trains
    metrics = _Inside("metrics.jsonl")
    report = _Inside("report.json")
    page = _Inside("report.html")
    certificate = _Inside("certificate.json")

    @property
    def resume_command(self) -> str:
        return f"{self.command} finetune --resume {shlex.quote(str(self.path))}"

    @classmethod
    def at(cls, path: Path) -> RunFolder | None:
        """The run in folder `path`; None without config.yaml."""
        run = cls(path)
        return run if run.config.is_file() else None

    @classmethod
    def around(cls, adapter: Path) -> RunFolder | None:
        """The run of `adapter`: a run folder, its adapter/, or a file in that; None if it belongs to no run.

        Other files belong to no run, even beside a config.yaml: other trainers write one too.
        """
        is_file = adapter.is_file()
        folder = (adapter.parent if is_file else adapter).absolute()
        parents = (one.parent for one in (folder, folder.resolve()) if one.name == "adapter")  # a link, or what it names
        return (None if is_file else cls.at(folder)) or next(filter(None, map(cls.at, parents)), None)

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Creates a run in `path`. Raises ConfigError unless it is empty or missing."""
        run = cls(path)
        run.require_free()
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        return run

    def require_free(self) -> None:
        """Raises ConfigError unless the folder is empty or missing; writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"The run folder {self.path} is a file; choose another --out.")
        visible = (found for found in self.path.rglob("*") if found.is_file() and not found.name.startswith("."))
        if any(visible):  # a run killed at its start may leave empty folders and hidden files
            go_on = f"go on with it: {self.resume_command}; or choose" if self.config.exists() else "choose"
            raise ConfigError(
                f"The run folder {self.path} exists already; nothing in it was touched. You can {go_on} another --out."
            )

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens the run in `path` to resume it, after finishing interrupted replacements of its folders.

        Raises ConfigError if it is no run, or if another process is training it. To read a run, use `RunFolder(path)`.
        """
        run = cls(path)
        if not path.is_dir():
            said = f"There is no run folder {path}; expected the --out of an earlier finetune. Check the path."
            raise ConfigError(said, code="run-missing")
        if not run.config.exists() and not run.checkpoints.is_dir():
            said = f"{path} is not a run folder: it has neither config.yaml nor checkpoints. Check the path."
            raise ConfigError(said, code="run-missing")
        with run.locked():
            run.checkpoints.mkdir(exist_ok=True)
            durable.recover(run.path)
            durable.recover(run.checkpoints)
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A context that locks this run against other processes; the lock ends with the process.

        ConfigError if another process has it, EnvironmentProblem if its file cannot be written or is none.
        """
        try:
            lock = open_in_place(self.path / ".lock")
        except OSError as error:
            what, remedy = f"{self.path / '.lock'} could not be opened", "Free some space, or choose another --out."
            raise durable.refusal(error, what, remedy) from error
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"Another process is training {self.path}. Wait until it ends, or stop it with Ctrl-C, then try again."
                ) from error
            yield

    def write(self, path: Path, text: str) -> None:
        """Writes one file of the run atomically (config.yaml, split.json, the report)."""
        write_whole(path, text.encode())

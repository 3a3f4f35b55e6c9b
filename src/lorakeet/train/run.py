"""The run folder on disk: where everything of a run is, made new or opened to go on."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorakeet.errors import ConfigError
from lorakeet.train import durable


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run (their meaning: README of the run folder in the docs)."""

    path: Path
    command: str = "lorakeet"  # how lorakeet is called so that it trains as it does now

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def split(self) -> Path:
        return self.path / "split.json"

    @property
    def rates(self) -> Path:
        return self.path / "rates.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Where the best tensors so far are while a run trains that has no memory for them."""
        return self.path / ".best.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def certificate(self) -> Path:
        return self.path / "certificate.json"

    def forget_adapter(self) -> None:
        """Deletes RUN/adapter, where there is one."""
        if self.adapter.exists():
            durable.remove_folder(self.adapter)

    @property
    def resume_command(self) -> str:
        return f"{self.command} finetune --resume {self.path}"

    @classmethod
    def at(cls, path: Path) -> RunFolder | None:
        """The run whose folder `path` is; None where it is none. Only config.yaml need be there."""
        run = cls(path)
        return run if run.config.is_file() else None

    @classmethod
    def around(cls, adapter: Path) -> RunFolder | None:
        """The run that `adapter` means: its folder, or the adapter/ in it, or a file of that; None where it is of no run.

        Other files are of none, whatever lies beside them: other trainers write a config.yaml of their own there.
        """
        is_file = adapter.is_file()
        folder = (adapter.parent if is_file else adapter).absolute()
        return (None if is_file else cls.at(folder)) or (cls.at(folder.parent) if folder.name == "adapter" else None)

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """A new run in `path`, which must not exist or be empty; ConfigError otherwise."""
        run = cls(path)
        run.require_free()
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        return run

    def require_free(self) -> None:
        """Raises ConfigError unless the folder is empty or not there yet; writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"The run folder {self.path} is a file; choose another --out.")
        if self.path.is_dir() and self._holds_something():
            go_on = f"go on with it: {self.resume_command}; or choose" if self.config.exists() else "choose"
            raise ConfigError(
                f"The run folder {self.path} exists already; nothing in it was touched. You can {go_on} another --out."
            )

    def _holds_something(self) -> bool:
        """Whether anything but empty folders and hidden files is there: those are left by a run killed before it had settings."""
        return any(found.is_file() and not found.name.startswith(".") for found in self.path.rglob("*"))

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The run in `path`, to go on with it: an interrupted replacement of one of its folders is finished first.

        ConfigError if it is none, or if another process is training it. To read a run, `RunFolder(path)` is enough.
        """
        run = cls(path)
        if not path.is_dir():
            raise ConfigError(f"There is no run folder {path}; expected the --out of an earlier finetune. Check the path.")
        if not run.config.exists() and not run.checkpoints.is_dir():
            raise ConfigError(f"{path} is not a run folder: it has neither config.yaml nor checkpoints. Check the path.")
        with run.locked():
            run.checkpoints.mkdir(exist_ok=True)
            durable.recover(run.path)
            durable.recover(run.checkpoints)
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A context in which no other process trains this run; the lock ends with the process, however that ends."""
        with (self.path / ".lock").open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"Another process is training {self.path}. Wait until it ends or stop it with Ctrl-C, then try again."
                ) from error
            yield

    def write(self, path: Path, text: str) -> None:
        """Writes one file of the run in one step (config.yaml, split.json, the report)."""
        durable.write_file(path, text.encode())

"""The folders that the studio's pages may name: the runs, and the folders of models and rows that were chosen at its start."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorakeet.disk import open_in_place, open_regular, write_whole
from lorakeet.errors import ConfigError, LorakeetError, Problems
from lorakeet.registry import declarations

OWN = ".studio"  # the studio's own folder within that of the runs
UPLOADED = "rows"  # the folder of uploaded rows in it
_ID = ".studio-id"  # in a run folder: it stays with the folder, whatever that is named and wherever it lies
_SECRET = 32  # bytes
_REMOTE = ("package:", "hub:")
_WRITTEN = ("memory.store",)  # settings that are paths, even where nothing is there yet
_READ = (
    "model.path", "model.config", "data.train", "data.held_out", "data.test", "lora.continue_from", "lora.on_top_of",
    "evaluate.encoder", "evaluate.metric",
)  # fmt: skip


class NotHere(LorakeetError):
    """There is no such page, run or job."""

    CODE = "run-missing"


@dataclass(frozen=True)
class Places:
    """The folder of the runs, and those from which models and rows may be chosen; absolute, without links."""

    runs: Path
    folders: tuple[Path, ...]

    @classmethod
    def of(cls, runs: Path, folders: tuple[Path, ...]) -> Places:
        """The places of these paths; without `folders` the working folder."""
        return cls(_whole(runs), tuple(map(_whole, folders or (Path(),))))

    @property
    def own(self) -> Path:
        """The studio's own folder: jobs, the index, deleted runs, uploaded rows."""
        return self.runs / OWN

    def run(self, name: str) -> Path:
        """The folder of the run `name`. NotHere unless it is a folder within that of the runs."""
        path = self.new_run(name)
        if not path.is_dir() or path.resolve().parent != self.runs:
            raise NotHere(f"There is no run '{name}' in {self.runs}. It may have been deleted or moved.")
        return path

    def new_run(self, name: str) -> Path:
        """The folder of a run `name`, which may be missing. ConfigError for what is no plain name."""
        if not name or not name.isprintable() or len(name.encode()) > 200 or name.startswith(".") or "/" in name or "\\" in name:
            raise ConfigError(
                f"The run's name is {name!r:.80}; expected a plain name such as first-run: no slash, and no dot at its beginning."
            )
        return self.runs / name

    def within(self, path: Path) -> bool:
        """True if `path`, with links followed, lies in one of the folders, and is no file of a studio's own but uploaded rows."""
        whole = _whole(path)
        if OWN in whole.parts and not whole.is_relative_to(self.own / UPLOADED):
            return False
        return any(whole == folder or whole.is_relative_to(folder) for folder in (self.runs, *self.folders))

    def require(self, settings: Mapping[str, str]) -> None:
        """Raises ConfigError for every setting, by dotted path, that names something outside of the folders."""
        problems = Problems("These paths cannot be used here")
        shown = ", ".join(map(str, dict.fromkeys((*self.folders, self.runs))))
        for name, text in settings.items():
            paths = _paths_of(text)
            found = [path for path in paths if _exists(path)] or paths[:1]
            if any(_names(name, text, path) and not self.within(path) for path in found):
                problems.add(
                    f"{name} is {text!r:.200}, which lies outside of the folders of this studio: {shown}. Copy it there, or "
                    "start the studio with --folder."
                )
        problems.raise_if_any()


def _names(setting: str, text: str, path: Path) -> bool:
    """True if a setting with this text names this path: of other settings than those of paths, only a text with a slash does."""
    kinds = declarations().values()
    if setting in {*_WRITTEN, *(each for kind in kinds for each in kind.written_paths)}:
        return True
    if setting in {*_READ, *(each for kind in kinds for each in kind.read_paths)}:
        return path.is_absolute() or _exists(path)
    return ("/" in text or text.startswith("~")) and _exists(path)


def _paths_of(text: str) -> list[Path]:
    """The paths in a setting as readers take it: whole, without an archive's member, a split, or a function of a file."""
    if not text or text.startswith(_REMOTE) or "\0" in text:  # no path has a zero byte; a line break may be in one
        return []
    texts = dict.fromkeys((text, text.partition("!")[0], text.partition("#")[0], text.rpartition(":")[0]))
    return [_expanded(part) for part in texts if part]


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # an unknown user
        return Path(text)


def signature_of(text: str) -> str:
    """The HMAC-SHA-256 of `text` with this user's secret. It lies outside of the folders of runs, which may be a stranger's."""
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    path = state / "lorakeet" / "studio-secret"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open_in_place(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two studios that are started at once make one
        os.fchmod(file.fileno(), 0o600)
        if len(secret := file.read(_SECRET)) < _SECRET:
            secret = secrets.token_bytes(_SECRET)
            file.seek(0)
            file.write(secret)
            os.fsync(file.fileno())
    return hmac.new(secret, text.encode(errors="surrogateescape"), hashlib.sha256).hexdigest()


def run_id(folder: Path) -> str:
    """The random number that tells this run folder from all others of its name; empty where it was given none."""
    try:
        with open_regular(folder / _ID, follow=False) as file:
            text = os.read(file.fileno(), 64).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return text if re.fullmatch("[0-9a-f]{32}", text) else ""


def given_run_id(folder: Path) -> str:
    """The same, given to the folder where it has none; empty where the disk is full or may not be written to."""
    if not (found := run_id(folder)):
        with suppress(OSError):
            write_whole(folder / _ID, f"{secrets.token_hex(16)}\n".encode())
            found = run_id(folder)
    return found


def regular_within(folder: Path, path: Path) -> bool:
    """True if `path` is a file in `folder` and no link leads out of it."""
    whole = _whole(path)
    return whole.is_file() and whole.is_relative_to(_whole(folder))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long is none
        return False


def _whole(path: Path) -> Path:
    try:
        return path.expanduser().resolve()
    except (OSError, RuntimeError):  # a circle of links, an unknown user
        return path.absolute()

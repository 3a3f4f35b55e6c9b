"""Checkpoints: all state that the rest of a run depends on, so that a resumed run ends in the same bytes.

    checkpoints/step-000040/
      trained.safetensors   the trained tensors and the adapter's fixed ones
      moments.safetensors   AdamW's moments and step counts
      random.safetensors    the state of every random number generator
      importance.safetensors  of the rank-one terms, before the last rank cut (train/pruning)
      best.safetensors      the trained tensors of the best held-out evaluation so far, once there is one
      state.json            step (also the position in the data and in the schedule), best so far, metrics position, loss
                            scale
      manifest.json         the SHA-256 of each file above

Plain tensors and JSON, never pickle. A folder is written atomically (train/durable).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.disk import read_regular, write_new
from lorakeet.errors import ConfigError, DataError, Problems
from lorakeet.formats.files.digest import sha256_of
from lorakeet.formats.files.safetensors_file import open_safetensors, save_tensors, stream_safetensors
from lorakeet.kernels.cpu.compile import why_not
from lorakeet.kernels.cpu.dense import multiplies
from lorakeet.train import durable
from lorakeet.train.loss_scale import LossScale
from lorakeet.train.spec import ADDED, TrainSpec
from lorakeet.train.stopping import EarlyStopping

MANIFEST = "manifest.json"
# settings that affect neither training nor reports, except by rounding
MAY_CHANGE = {"checkpoint_every", "keep_checkpoints", "log_to", "micro_tokens", "rate_trial_steps", "shard"}


@dataclass
class Position:
    """The progress of a run: the JSON part of a checkpoint."""

    step: int = 0
    seconds: float = 0.0  # training time, all parts of an interrupted run together
    tokens: int = 0
    metrics_bytes: int = 0
    stopped: str = ""  # why training ended early; empty while it goes on
    watch: EarlyStopping = field(default_factory=EarlyStopping)
    scale: LossScale = field(default_factory=LossScale)  # missing in runs older than float16 support


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read on access. Raises DataError for an invalid file."""

    def __init__(self, path: Path) -> None:
        self._file = open_safetensors(path)

    def __getitem__(self, name: str) -> Tensor:
        return self._file.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.tensors)

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each tensor, without reading it."""
        return {name: torch.Size(stored.shape) for name, stored in self._file.tensors.items()}

    def __len__(self) -> int:
        return len(self._file.tensors)


@dataclass
class Snapshot:
    """A checkpoint, of a run in progress or on disk."""

    position: Position
    trained: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    random: Mapping[str, Tensor]
    best: Mapping[str, Tensor] | None
    identity: Mapping[str, Any]
    importance: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the trained tensors, without reading them."""
        trained = self.trained
        return trained.shapes() if isinstance(trained, StoredTensors) else {name: t.shape for name, t in trained.items()}


class Damaged(Exception):
    """Raised for a checkpoint folder that differs from what was written."""


def step_name(step: int) -> str:
    """ "step-000040"."""
    return f"step-{step:06d}"


def save(folder: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Writes `snapshot` into `folder`/step-NNNNNN, then deletes all but the newest `keep`. Returns the new folder."""
    tensors = {"trained": snapshot.trained, "moments": snapshot.moments, "random": snapshot.random}
    if snapshot.best is not None:
        tensors["best"] = snapshot.best
    if snapshot.importance:
        tensors["importance"] = snapshot.importance
    state = {**dataclasses.asdict(snapshot.position), "identity": dict(snapshot.identity)}
    target = folder / step_name(snapshot.position.step)
    with durable.new_folder(target) as new:
        hashes = {}
        for name, mapping in tensors.items():
            file = new / f"{name}.safetensors"
            shapes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in mapping.items()}
            stream_safetensors(file, shapes, fetch=mapping.__getitem__, metadata={})  # one by one, to save memory
            hashes[file.name] = sha256_of(file)
        hashes["state.json"] = _write(new / "state.json", _json(state))
        _write(new / MANIFEST, _json(hashes))
    for old in found(folder)[:-keep]:
        durable.remove_folder(old)
    return target


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, damaged ones included."""
    steps = (path for path in folder.glob("step-[0-9]*") if path.is_dir() and path.name.removeprefix("step-").isdigit())
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(path: Path) -> Snapshot:
    """Opens the checkpoint at `path`; its tensors are read on access. Raises Damaged if any byte has changed."""
    try:
        hashes = json.loads(read_regular(path / MANIFEST))
        wrong = [name for name, digest in hashes.items() if sha256_of(path / name) != digest]
        if wrong:
            raise Damaged(f"{', '.join(wrong)} changed since it was written")
        state = json.loads(read_regular(path / "state.json"))
        names = [name.removesuffix(".safetensors") for name in hashes if name != "state.json"]
        tensors: dict[str, Mapping[str, Tensor]] = {name: StoredTensors(path / f"{name}.safetensors") for name in names}
        identity, watch, scale = state.pop("identity"), EarlyStopping(**state.pop("watch")), LossScale(**state.pop("scale", {}))
        best = tensors.pop("best", None)
        return Snapshot(Position(**state, watch=watch, scale=scale), best=best, identity=identity, **tensors)
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from error
    except (ValueError, TypeError, KeyError, AttributeError, DataError) as error:
        raise Damaged(f"{MANIFEST} or what it lists cannot be read ({error})") from error


def load_newest(folder: Path, *, say: Callable[[str], None]) -> Snapshot | None:
    """The newest intact checkpoint, or None; damaged ones are reported and renamed to step-NNNNNN.damaged."""
    for path in reversed(found(folder)):
        try:
            return load_checkpoint(path)
        except Damaged as damage:
            renamed = path.with_name(path.name + ".damaged")
            if renamed.exists():
                durable.remove_folder(renamed)
            path.rename(renamed)
            say(f"The checkpoint {path.name} is damaged ({damage}); it was renamed to {renamed.name}, the one before it is used.")
    return None


def copy_into(live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies `values` into the live tensors of the same names and shapes."""
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(values[name])


def run_identity(
    spec: TrainSpec, more: Mapping[str, str | list[str]], *, parameters: Mapping[str, Tensor], learning_rate: float
) -> dict[str, Any]:
    """The values that must be equal on resume: settings, data and model (`more`, by name), and the trained tensors."""
    settings = {f"train.{key}": value for key, value in dataclasses.asdict(spec).items() if key not in MAY_CHANGE}
    if not spec.keep_prefix_states:
        del settings["train.keep_prefix_states"]  # so that runs older than this setting can be resumed
    for name in ADDED if spec.registered.older else ():
        del settings[f"train.{name}"]  # and than these
    shapes = [[name, list(tensor.shape)] for name, tensor in parameters.items()]
    return {
        **settings,
        "train.learning_rate": learning_rate,
        **more,
        "trained tensors": hashlib.sha256(_json(shapes)).hexdigest()[:16],
    }


def environment(processes: int = 1) -> dict[str, Any]:
    """The environment, which may change on resume but then changes the last bits of results."""
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # a run on the CPU leaves a GPU alone
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device}
    if device == "cpu" and not why_not():
        found["kernels"] = "native"
        if multiplies():
            found["products"] = "native"
    return found if processes == 1 else {**found, "processes": processes}


_DEFAULTS = {"processes": 1, "kernels": "torch", "products": "torch"}  # left out by `environment`


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The changes from one `environment` to another, in words; empty if there is none."""
    was, found = {**_DEFAULTS, **before}, {**_DEFAULTS, **now}
    changed = [f"{key} {was.get(key)} → {found.get(key)}" for key in {**was, **found} if was.get(key) != found.get(key)]
    return f"Changed since the checkpoint: {', '.join(changed)}. The result may differ in its last digits." if changed else ""


def require_same(saved: Mapping[str, Any], now: Mapping[str, Any], *, run: Path) -> None:
    """Raises ConfigError that names every setting in which the run on disk differs from this one."""
    problems = Problems(f"The run {run} cannot be resumed with other settings", ConfigError)
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) == now.get(key):
            continue
        if key.startswith("train."):
            said = f"{key} was {saved.get(key)!r} when {run} started and is {now.get(key)!r} now; use the old value to resume"
        elif set(_several(saved.get(key))) & set(_several(now.get(key))):
            continue
        else:
            then, later = (next(iter(_several(values.get(key))), "") for values in (saved, now))
            hashes = f" (sha256 {then[:8]}… then, {later[:8]}… now)" if then and later else ""
            said = f"The {key} changed since {run} started{hashes}; restore the old ones to resume"
        problems.add(f"{said}, or start a new run with another --out.")
    problems.raise_if_any()


def _several(found: Any) -> list[str]:
    """A list of hashes, of which one must be equal; from one hash, a list, or none."""
    if isinstance(found, list):
        return [one for one in found if isinstance(one, str)]
    return [found] if isinstance(found, str) else []


def _write(path: Path, data: bytes) -> str:
    write_new(path, data)
    return hashlib.sha256(data).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


class BestTensors:
    """The trained tensors of the best held-out evaluation so far, in memory, or only in `file` if given."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.tensors: Mapping[str, Tensor] | None = None  # those in a file are read on access; None before the first

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies `tensors`. Raises OSError if the disk is full; the previous ones are then kept."""
        if self.file is None:
            self.tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            return
        save_tensors(self.file, tensors, metadata={})
        self.tensors = StoredTensors(self.file)

    def close(self) -> None:
        """Drops the tensors and deletes their file."""
        self.tensors = None
        if self.file is not None:
            self.file.unlink(missing_ok=True)

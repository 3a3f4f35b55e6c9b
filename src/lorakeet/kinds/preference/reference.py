"""The reference of a preference run: the log-probabilities of every answer by a fixed model, computed once and kept on disk.

The file is bound by a hash to the model, the reference adapter and the tokens of the rows; another one is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lorakeet.data.chat import Example
from lorakeet.errors import DataError
from lorakeet.formats.files.safetensors_file import open_safetensors, save_tensors
from lorakeet.kinds.preference.task import Reference

BOUND_TO, MICRO_TOKENS, FROM_BASE, VALUES = "bound_to", "micro_tokens", "from_base", "values"  # keys of the file's metadata


def digest_of(rows: Sequence[Sequence[Example]], *names: str) -> str:
    """The SHA-256 of the tokens and targets of `rows` and of what else the reference is of."""
    found = hashlib.sha256("\n".join(names).encode())
    for part in rows:
        found.update(b"\npart\n")
        for example in part:
            found.update(np.int64(len(example.ids)).tobytes() + example.ids.tobytes() + example.supervised.tobytes())
    return found.hexdigest()


def save_reference(path: Path, reference: Reference, digest: str) -> None:
    """Writes the log-probabilities (answers,) in fp64, whole or not at all. OSError if the system refuses."""
    tensors = {"train": torch.from_numpy(reference.train), "held_out": torch.from_numpy(reference.held_out)}
    apart = "" if reference.from_base is None else repr(reference.from_base)
    about = {BOUND_TO: digest, MICRO_TOKENS: str(reference.micro_tokens), FROM_BASE: apart, VALUES: _values_digest(reference)}
    save_tensors(path, tensors, metadata=about)


def read_reference(path: Path, digest: str) -> Reference:
    """The log-probabilities in the file. Raises DataError if it is missing, damaged, or of another model or other rows."""
    if not path.is_file():
        raise DataError(f"{path} is missing, so the reference of this run is not known. Start a new run.")
    file = open_safetensors(path)
    if file.metadata.get(BOUND_TO) != digest or set(file.tensors) != {"train", "held_out"}:
        raise DataError(
            f"{path} is of another reference model or of other rows than this run's. Restore the file of this run, or start a "
            "new one."
        )
    apart, tokens = file.metadata.get(FROM_BASE, ""), file.metadata.get(MICRO_TOKENS, "")
    try:
        found = int(tokens), float(apart) if apart else None
    except ValueError:
        raise DataError(f"{path} does not say how it was computed. Restore the file of this run, or start a new one.") from None
    reference = Reference(file.read("train").numpy(), file.read("held_out").numpy(), *found)
    if file.metadata.get(VALUES, _values_digest(reference)) != _values_digest(reference):  # files of earlier versions have none
        raise DataError(f"{path} has other numbers than this run wrote: it is damaged. Restore the file, or start a new run.")
    return reference


def _values_digest(reference: Reference) -> str:
    """The SHA-256 of all log-probabilities."""
    both = (np.ascontiguousarray(part, np.float64).tobytes() for part in (reference.train, reference.held_out))
    return hashlib.sha256(b"held out".join(both)).hexdigest()

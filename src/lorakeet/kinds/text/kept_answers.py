"""Answers of the base that an earlier evaluation computed, on disk: they do not depend on the adapter that is measured beside it.

A file is bound by a hash to the model, the program's versions and the rows' tokens. Each use computes some rows again; where one
of them differs, all are computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from lorakeet.config import RunConfig
from lorakeet.data.chat import Ids
from lorakeet.errors import DataError
from lorakeet.evaluate.intervals import Floats
from lorakeet.formats.files.safetensors_file import open_safetensors, save_tensors, save_text
from lorakeet.kinds.report import PACKAGES, versions
from lorakeet.models.files.fingerprint import fingerprint
from lorakeet.models.generate.sample import end_ids
from lorakeet.models.text.model import TextModel

AGAIN = 16  # rows of each use that are computed again
FEWEST = 2 * AGAIN  # rows from which on it is worth it
MOST = 200  # files that are kept, the newest
MOST_BYTES = 256 << 20  # of all of them
ANSWERS = ".answers"  # their folder, beside the run folders
APART, APART_ROUNDED = 1e-4, 0.03  # nats by which they may differ: in fp32, and in other formats, where batches round otherwise
_KERNELS = ("bitsandbytes", "liger-kernel", "flash-attn")  # packages that compute on a GPU, where they are installed
_BOUND, _VALUES, _LENGTHS = "bound_to", "values", "lengths"


@dataclass(frozen=True)
class KeptAnswers:
    """The answers of one model, in files of `folder` named by a hash of `model` and of the rows.

    `apart` is by how many nats a number that is computed again may differ. `said` gets a sentence for each use.
    """

    folder: Path
    model: str
    apart: float
    said: list[str] = field(default_factory=list)

    def numbers(
        self,
        system: str,
        rows: Sequence[Sequence[Ids]],
        compute: Callable[[Sequence[int]], Floats],
        *,
        tokens: Sequence[int] | None = None,
    ) -> Floats:
        """Log-probabilities (rows, …) in nats of rows given as tokens, each summed over so many `tokens`, by default one.

        `compute` returns those of some rows, by their indices. Written where none were kept; without a word if the disk refuses.
        """
        count = len(rows)
        if count < FEWEST:
            return compute(range(count))
        path = self._path(system, (ids for row in rows for ids in (np.array([len(row)]), *row)))
        kept = self._read(path)
        if kept is not None and len(kept[0]) == count:
            chosen = _some(path, count)
            again, before = compute(chosen), kept[0][chosen]
            sums = np.ones(count) if tokens is None else np.asarray(tokens)
            if again.shape == before.shape and self._agree(again - before, sums[chosen]):
                self._say(system, count, len(chosen))
                return kept[0]
        found = compute(range(count))
        self._write(path, {_VALUES: torch.from_numpy(np.ascontiguousarray(found))})
        return found

    def replies(
        self, system: str, questions: Sequence[Ids], how: str, compute: Callable[[Sequence[int]], list[Ids]]
    ) -> list[Ids]:
        """The greedy replies to `questions` as tokens, written by the rule `how`; those written again must be equal."""
        if len(questions) < FEWEST:
            return compute(range(len(questions)))
        path = self._path(f"{system} {how}", questions)
        kept = self._read(path)
        if kept is not None and len(kept[1]) == len(questions):
            texts = np.split(kept[0].astype(np.int64), np.cumsum(kept[1].astype(np.int64))[:-1])
            chosen = _some(path, len(questions))
            if all(np.array_equal(new, texts[index]) for new, index in zip(compute(chosen), chosen, strict=True)):
                self._say(system, len(texts), len(chosen))
                return texts
        found = compute(range(len(questions)))
        lengths = torch.tensor([len(ids) for ids in found], dtype=torch.int64)
        values = np.concatenate([np.asarray(ids, np.int64) for ids in found])
        self._write(path, {_VALUES: torch.from_numpy(values), _LENGTHS: lengths})
        return found

    def _agree(self, differences: Floats, tokens: Floats) -> bool:
        """Whether no row differs by more than `apart` a token, as rounding of so many tokens adds up: by their root."""
        allowed = (self.apart * np.sqrt(np.maximum(tokens, 1))).reshape(-1, *[1] * (differences.ndim - 1))
        return bool((np.abs(differences) <= allowed).all())

    def _say(self, system: str, count: int, again: int) -> None:
        self.said.append(
            f"{system}: {count:,} answers are those of an earlier evaluation of the same model on the same rows; {again} were "
            "computed again and agree (evaluate.reuse)."
        )

    def _path(self, system: str, rows: Iterable[Ids]) -> Path:
        found = hashlib.sha256(f"{self.model}\n{system}\n".encode())
        for ids in rows:
            found.update(np.int64(len(ids)).tobytes() + np.asarray(ids, np.int64).tobytes())
        return self.folder / f"{found.hexdigest()}.safetensors"

    def _read(self, path: Path) -> tuple[Floats, Floats] | None:
        """The values and lengths that were kept; None if there are none, or the file is damaged."""
        try:
            file = open_safetensors(path)
            if file.metadata.get(_BOUND) != path.stem:
                return None
            parts = [file.read(name) if name in file.tensors else torch.zeros(0) for name in (_VALUES, _LENGTHS)]
            path.touch()  # among the newest
        except (DataError, OSError):
            return None
        values, lengths = parts
        numbers = values.dtype == torch.float64 and values.dim() == 2
        tokens = values.dtype == torch.int64 and values.dim() == 1 and lengths.dim() == 1
        if not numbers and not (tokens and int(lengths.sum()) == len(values) and bool((lengths >= 0).all())):
            return None
        return values.numpy(), lengths.numpy()

    def _write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        with suppress(OSError):
            if not self.folder.is_dir():
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # replies may repeat rows
                save_text(self.folder / ".gitignore", "*\n")
            save_tensors(path, tensors, metadata={_BOUND: path.stem})
            files = sorted(self.folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
            sizes = np.cumsum([file.stat().st_size for file in files])
            for old, size in zip(files, sizes, strict=True):
                if old not in files[:MOST] or (size > MOST_BYTES and old != path):
                    old.unlink(missing_ok=True)


def kept_answers(config: RunConfig, text: TextModel, run: Path | None) -> KeptAnswers | None:
    """The answers of this base beside the folder `run`. None without a run folder, if evaluate.reuse is false, or if the model
    without its adapter is not the base alone: in a run on top of another adapter, or with new tokens.
    """
    lora = config.lora
    if run is None or not config.evaluate.reuse or lora.on_top_of is not None or lora.new_tokens:
        return None
    settings = replace(config.model, device=_device_name(text)).identity()
    beside = [str(sorted(end_ids(text))), str(len(text.tokenizer)), versions((*PACKAGES, *_KERNELS))]
    model = "\n".join([fingerprint(text.source), str(settings), *beside])
    apart = APART if config.model.dtype == "float32" else APART_ROUNDED
    return KeptAnswers(run.parent / ANSWERS, model, apart)


def _device_name(text: TextModel) -> str:
    """The kind of GPU, or the kind of device."""
    return torch.cuda.get_device_name(text.device) if text.device.type == "cuda" else text.device.type


def _some(path: Path, count: int) -> list[int]:
    """The rows that are computed again, drawn by the file's name."""
    draw = np.random.default_rng(int(path.stem[:16], 16))
    return sorted(draw.choice(count, min(AGAIN, count), replace=False).tolist())

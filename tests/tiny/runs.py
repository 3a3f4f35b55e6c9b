"""Small data files and settings with which a whole run over the tiny Llama takes a second or two."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.config import RunConfig, read_run
from lorakeet.verbs.finetune import FinetuneResult, finetune

WORDS = [
    "alder",
    "birch",
    "cedar",
    "daisy",
    "elder",
    "fern",
    "grass",
    "holly",
    "iris",
    "juniper",
    "kelp",
    "larch",
    "maple",
    "nettle",
    "oak",
    "pine",
    "quince",
    "rose",
    "sedge",
]
LABELS = ("good", "bad", "so so")
QUICK = {
    "model.dtype": "float32",
    "lora.rank": "4",
    "lora.alpha": "12",
    "data.max_tokens": "120",
    "train.steps": "6",
    "train.batch_size": "8",
    "train.learning_rate": "0.02",
    "evaluate.resamples": "200",
    "evaluate.drift_texts": "4",
    "evaluate.drift_tokens": "8",
    "evaluate.answers": "4",
    "evaluate.answer_tokens": "8",
    "evaluate.examples": "2",
}


def sentence(chance: random.Random, words: int = 8) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(words))


def reviews(count: int, *, seed: int = 0, labels: Sequence[str] = LABELS) -> list[dict[str, Any]]:
    """Labelled texts in which every label has a word of its own."""
    chance = random.Random(seed)
    return [
        {"text": f"{sentence(chance)} {labels[number % len(labels)].upper()}", "label": labels[number % len(labels)]}
        for number in range(count)
    ]


def chats(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of two questions and two answers."""
    chance = random.Random(seed)
    roles = ("user", "assistant", "user", "assistant")
    return [{"messages": [{"role": role, "content": sentence(chance, 4)} for role in roles]} for _ in range(count)]


def write_rows(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def settings(model: Path, data: Path, out: Path, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """A run's settings: QUICK, with `changes` by dotted path."""
    given = {**QUICK, "model.path": str(model), "data.train": str(data), "out": str(out), **(changes or {})}
    return read_run(None, {key: str(value) for key, value in given.items()})


def quiet() -> Console:
    return Console(quiet=True)


def run(model: Path, data: Path, out: Path, changes: Mapping[str, Any] | None = None) -> FinetuneResult:
    """A whole run, in this process."""
    return finetune(settings(model, data, out, changes), console=quiet())


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of RUN/adapter but its card, which tells of the machine and of the memory."""
    return {path.name: path.read_bytes() for path in sorted((folder / "adapter").iterdir()) if path.name != "README.md"}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, to see that nothing changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

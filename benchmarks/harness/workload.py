"""The rows, in their order, and the settings that every contender trains with. Plain Python: other environments read it too."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One row: its token ids, the positions of its target ids, and the same as the texts that TRL takes."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]  # indices into ids; each is predicted from the tokens before it
    prompt: str
    completion: str  # without the end-of-text token, which TRL adds itself


@dataclass(frozen=True)
class Workload:
    """What is trained on what; `steps[i]` are the rows of optimizer step i."""

    model: str  # folder with config.json, safetensors and tokenizer
    adapter: str  # PEFT folder with the A and B that all begin from
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    learning_rate: float
    clip_norm: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    seed: int
    micro_tokens: int  # tokens computed at once, for those who may choose
    shuffled: bool  # rows of every length share a step, as documented trainers take them; else rows of alike length
    instructed: bool  # every row begins with the same instruction
    training_rows: int | None  # how many there are, so that some come again; None: all of the quickstart's
    held_out: tuple[Row, ...]  # that evaluate the adapters; no contender trains on them
    save_after: tuple[int, ...]  # the steps after which a contender saves its adapter for evaluation
    steps: tuple[tuple[Row, ...], ...]
    saved: str = ""  # folder of this run for these adapters
    rows_at_once: int | None = None  # that a trainer of this run computes together; None: all of a step
    device: str = "cpu"
    quantize: str = "none"  # how the frozen weights are kept, as model.quantize.method has it

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order in which they are trained on."""
        return [row for step in self.steps for row in step]

    @property
    def batch_size(self) -> int:
        return len(self.steps[0])

    @property
    def tokens(self) -> list[int]:
        """Tokens of each step, padding not counted."""
        return [sum(len(row.ids) for row in step) for step in self.steps]

    @property
    def longest(self) -> int:
        return max(len(row.ids) for row in self.rows)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_workload(path: Path) -> Workload:
    """The workload that `Workload.write` wrote to `path`."""
    found = json.loads(path.read_text(encoding="utf-8"))
    steps = tuple(tuple(_row(row) for row in step) for step in found.pop("steps"))
    held_out = tuple(_row(row) for row in found.pop("held_out"))
    for key in ("target_modules", "betas", "save_after"):
        found[key] = tuple(found[key])
    return Workload(**found, steps=steps, held_out=held_out)


def _row(found: dict[str, object]) -> Row:
    return Row(**{key: tuple(value) if isinstance(value, list) else value for key, value in found.items()})  # type: ignore[arg-type]

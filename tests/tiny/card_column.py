"""A family's whole run on the simulated card (tiny/simulated_card), beside the same run on the CPU: a column of `make families`.

Its rows are few and short, and it takes two steps: some eight seconds of a processor for both runs. Dropout is switched off, as a
GPU draws other numbers than a CPU.
"""

from __future__ import annotations

import json
import shutil
from math import isfinite
from pathlib import Path
from typing import Any

from lorakeet.errors import LorakeetError
from lorakeet.verbs.finetune import FinetuneResult
from tiny.runs import chats, run, write_rows
from tiny.simulated_card import simulated_card

CLOSE = 2e-4  # relative: of the first step's loss and gradient norm, and of the base's losses
NUMBERS = ("loss", "grad_norm", "held_out_loss")
QUICK: dict[str, Any] = {
    "train.steps": 2, "train.batch_size": 4, "train.evaluate_every": 2, "evaluate.answers": 1, "evaluate.answer_tokens": 4,
    "evaluate.drift_texts": 2, "evaluate.resamples": 100, "evaluate.examples": 0,
}  # fmt: skip


def same_on_card(folder: Path, changes: dict[str, Any], seed: int = 0) -> str:
    """Trains, evaluates, certifies and generates with folder/model on both; AssertionError where the numbers are not the CPU's.

    Returns the largest relative difference, and which attention the card took.
    """
    model, rows = _without_dropout(folder), write_rows(folder / "rows.jsonl", chats(24, seed=seed))
    for earlier in ("by_cpu", "by_card"):
        shutil.rmtree(folder / earlier, ignore_errors=True)
    cpu = run(model, rows, folder / "by_cpu", {**QUICK, **changes, "model.device": "cpu"})
    with simulated_card() as card:
        try:
            found = run(model, rows, folder / "by_card", {**QUICK, **changes, "model.device": "cuda"})
        except LorakeetError as error:
            raise AssertionError(f"refused on the card alone: {error}") from error
    assert sum(card.launches[name] for name in ("mm", "addmm", "bmm")) > 0, "nothing was multiplied on the card"
    off = [*_of_steps(folder / "by_card", folder / "by_cpu"), *_of_reports(found, cpu)]
    return f"{max(off):.1g}, attention {found.setup.text.attention}"


def _without_dropout(folder: Path) -> Path:
    """The model, or a copy of it whose configuration has no dropout."""
    told = json.loads((folder / "model" / "config.json").read_text())
    quiet = _quiet(told)
    if quiet == told:
        return folder / "model"
    shutil.copytree(folder / "model", folder / "without_dropout", dirs_exist_ok=True)
    (folder / "without_dropout" / "config.json").write_text(json.dumps(quiet))
    return folder / "without_dropout"


def _quiet(told: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _quiet(value) if isinstance(value, dict) else 0.0 if "drop" in name and isinstance(value, float) else value
        for name, value in told.items()
    }


def _of_steps(card: Path, cpu: Path) -> list[float]:
    """How far the numbers of the base and of the first step are off; later ones are as many, and finite."""
    found, wanted = ([json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in (card, cpu))
    off = []
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys() and one["step"] == other["step"]
        named = [name for name in NUMBERS if one.get(name) is not None]
        assert all(isfinite(one[name]) for name in named), one
        off += [_off(one[name], other[name], f"{name} of step {one['step']}") for name in named if one["step"] <= 1]
    assert off
    return off


def _of_reports(found: FinetuneResult, wanted: FinetuneResult) -> list[float]:
    """How far the base's losses are off; its replies and the certificate's verdicts are the same."""
    mine, theirs = found.report, wanted.report
    assert mine is not None and theirs is not None and mine.certificate is not None and theirs.certificate is not None
    assert theirs.certificate.passed, "the certificate fails on the CPU"
    failed = [str(each) for each in mine.certificate.checks if not each.passed]
    assert mine.certificate.passed, f"the certificate fails on the card: {failed}"
    assert [each.name for each in mine.certificate.checks] == [each.name for each in theirs.certificate.checks]
    assert mine.rows and mine.drift is not None
    off = []
    for one, other in zip(mine.rows, theirs.rows, strict=True):
        assert one.base.text == other.base.text, f"the base's reply is {one.base.text!r}, by the CPU {other.base.text!r}"
        off.append(_off(one.base.loss, other.base.loss, "loss of the base's evaluation"))
    return off


def _off(found: float | None, wanted: float | None, name: str) -> float:
    """The relative difference; AssertionError if it is not close."""
    assert found is not None and wanted is not None, name
    off = abs(found - wanted) / max(abs(wanted), 1e-6 / CLOSE)
    assert off <= CLOSE, f"{name}: {found} on the card, {wanted} on the CPU, {off:.2g} off"
    return off

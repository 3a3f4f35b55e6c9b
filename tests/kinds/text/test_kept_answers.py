"""`kept_answers`: the base's answers are taken from an earlier evaluation of the same model on the same rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakeet.formats.files.safetensors_file import save_tensors
from lorakeet.kinds.text import evaluate as evaluate_text
from lorakeet.kinds.text import kept_answers as module
from lorakeet.kinds.text import reply
from lorakeet.kinds.text.kept_answers import AGAIN, ANSWERS, APART, FEWEST, MOST, KeptAnswers, kept_answers
from lorakeet.models.generate import score
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.verbs.evaluate import evaluate
from lorakeet.verbs.options import EvaluateOptions
from tiny.runs import chats, quiet, reviews, run, write_rows

ROWS = [(np.arange(3) + number,) for number in range(40)]
NUMBERS = np.random.default_rng(0).normal(size=(40, 2))


class Counted:
    """Numbers of rows, and how many were asked for."""

    def __init__(self, numbers: Any = NUMBERS) -> None:
        self.numbers, self.asked = numbers, 0

    def __call__(self, some: Sequence[int]) -> Any:
        self.asked += len(some)
        return self.numbers[list(some)]


def test_a_second_evaluation_computes_some_rows_alone(tmp_path: Path) -> None:
    first, second = (KeptAnswers(tmp_path / ANSWERS, "m", APART) for _ in range(2))
    one, two = Counted(), Counted(NUMBERS + APART / 2)
    assert np.array_equal(first.numbers("base", ROWS, one), NUMBERS) and one.asked == 40 and not first.said
    assert np.array_equal(second.numbers("base", ROWS, two), NUMBERS) and two.asked == AGAIN
    assert second.said == [
        "base: 40 answers are those of an earlier evaluation of the same model on the same rows; 16 were computed again and "
        "agree (evaluate.reuse)."
    ]


@pytest.mark.parametrize("other", ["model", "system", "rows", "cut of the rows"])
def test_another_model_system_or_row_has_answers_of_its_own(tmp_path: Path, other: str) -> None:
    KeptAnswers(tmp_path, "m", APART).numbers("base", ROWS, Counted())
    rows = [(np.arange(3) + 7,), *ROWS[1:]] if other == "rows" else ROWS
    if other == "cut of the rows":
        rows = [(ids[:1], ids[1:]) for (ids,) in ROWS]
    counted = Counted()
    KeptAnswers(tmp_path, "n" if other == "model" else "m", APART).numbers("few" if other == "system" else "base", rows, counted)
    assert counted.asked == 40


def test_a_row_that_differs_has_all_computed_anew(tmp_path: Path) -> None:
    KeptAnswers(tmp_path, "m", APART).numbers("base", ROWS, Counted())
    [file] = tmp_path.iterdir()
    for changed in (NUMBERS + 2 * APART, np.full_like(NUMBERS, np.nan), NUMBERS[:, :1]):
        kept, counted = KeptAnswers(tmp_path, "m", APART), Counted(changed)
        found = kept.numbers("base", ROWS, counted)
        assert counted.asked == AGAIN + 40 and np.array_equal(found, changed, equal_nan=True) and not kept.said
        file.unlink()
        KeptAnswers(tmp_path, "m", APART).numbers("base", ROWS, Counted())


def test_sums_over_tokens_may_differ_by_their_root(tmp_path: Path) -> None:
    """A short row is allowed no more for a long one beside it."""
    tokens = [4, 10_000] * 20
    KeptAnswers(tmp_path, "m", APART).numbers("base", ROWS, Counted(), tokens=tokens)
    shift = np.array([[1.9], [90.0]] * 20) * APART
    near, far = Counted(NUMBERS + shift), Counted(NUMBERS + np.array([[2.1], [90.0]] * 20) * APART)
    for counted in (near, far):
        KeptAnswers(tmp_path, "m", APART).numbers("base", ROWS, counted, tokens=tokens)
    assert (near.asked, far.asked) == (AGAIN, AGAIN + 40)


@pytest.mark.parametrize("how", ["empty", "other", "cut", "one number", "bf16", "tokens", "lengths"])
def test_a_damaged_file_is_computed_anew(tmp_path: Path, how: str) -> None:
    KeptAnswers(tmp_path, "m", APART).numbers("base", ROWS, Counted())
    [file] = tmp_path.iterdir()
    data = file.read_bytes()
    tensors = {
        "one number": {"values": torch.tensor(1.0)}, "bf16": {"values": torch.zeros(40, 2, dtype=torch.bfloat16)},
        "tokens": {"values": torch.zeros(40, dtype=torch.int64)},
        "lengths": {"values": torch.zeros(40, dtype=torch.int64), "lengths": torch.ones(39, dtype=torch.int64)},
    }  # fmt: skip
    if how in tensors:
        save_tensors(file, tensors[how], metadata={"bound_to": file.stem})
    else:
        file.write_bytes({"empty": b"", "other": data.replace(file.stem.encode(), b"0" * 64), "cut": data[:-8]}[how])
    counted = Counted()
    KeptAnswers(tmp_path, "m", APART).numbers("base", ROWS, counted)
    assert counted.asked == 40 and file.read_bytes() == data


def test_few_rows_are_computed(tmp_path: Path) -> None:
    counted = Counted()
    for _ in range(2):
        KeptAnswers(tmp_path, "m", APART).numbers("base", ROWS[: FEWEST - 1], counted)
    assert counted.asked == 2 * (FEWEST - 1) and not list(tmp_path.iterdir())


def test_replies_are_compared_token_by_token(tmp_path: Path) -> None:
    questions, texts = [np.arange(2) + n for n in range(40)], [np.arange(n % 3) for n in range(40)]
    asked = []

    def write(some: Sequence[int]) -> Any:
        asked.append(len(some))
        return [texts[index] for index in some]

    for _ in range(2):
        kept = KeptAnswers(tmp_path, "m", APART)
        found = kept.replies("base", questions, "16 ''", write)
        assert all(np.array_equal(*pair) for pair in zip(found, texts, strict=True))
    texts = [np.arange(4)] * 40
    assert np.array_equal(KeptAnswers(tmp_path, "m", APART).replies("base", questions, "16 ''", write)[3], np.arange(4))
    assert asked == [40, AGAIN, AGAIN, 40] and len(kept.said) == 1
    KeptAnswers(tmp_path, "m", APART).replies("base", questions, "17 ''", write)
    assert asked[-1] == 40, "a reply may be longer"


def test_the_folder_is_the_users_own_and_in_no_repository(tmp_path: Path) -> None:
    KeptAnswers(tmp_path / ANSWERS, "m", APART).numbers("base", ROWS, Counted())
    assert (tmp_path / ANSWERS).stat().st_mode & 0o77 == 0 and (tmp_path / ANSWERS / ".gitignore").read_text() == "*\n"


def test_old_files_go_where_all_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 2000)
    for number in range(5):
        KeptAnswers(tmp_path, f"m{number}", APART).numbers("base", ROWS, Counted())
    left = list(tmp_path.iterdir())
    assert 1 <= len(left) < 5 and sum(file.stat().st_size for file in left) <= 2000


@pytest.mark.slow
def test_the_newest_files_stay(tmp_path: Path) -> None:
    for number in range(MOST + 3):
        KeptAnswers(tmp_path, f"m{number}", APART).numbers("base", ROWS, Counted())
    assert len(list(tmp_path.iterdir())) == MOST


def test_where_the_disk_refuses_all_are_computed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    counted = Counted()
    for _ in range(2):
        KeptAnswers(tmp_path / "file", "m", APART).numbers("base", ROWS, counted)
    assert counted.asked == 80


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call that scores labels or losses."""
    found: list[int] = []
    for name in ("label_scores", "row_losses"):
        real = getattr(score, name)

        def counting(text: Any, rows: Any, *, real: Any = real, **settings: Any) -> Any:
            found.append(len(rows))
            return real(text, rows, **settings)

        monkeypatch.setattr(evaluate_text, name, counting)
    return found


@pytest.mark.slow
def test_a_second_run_on_the_same_rows_takes_them(finished: Any, tmp_path: Path, passes: list[int]) -> None:
    """Two runs and an evaluation beside each other: reports are equal but for the adapter and the sentence."""
    test, reports = write_rows(tmp_path / "test.jsonl", reviews(50, seed=2)), []
    for seed in (0, 1):
        changes = {"train.seed": seed, "train.steps": 3, "data.test": test}
        run(finished.model, finished.data, tmp_path / f"run{seed}", changes)
        reports.append(json.loads((tmp_path / f"run{seed}/report.json").read_text()))
    count = reports[0]["rows_of"]
    assert count >= FEWEST and passes.count(AGAIN) == 1, passes
    first, second = ({one["name"]: one["metrics"] for one in report["systems"]} for report in reports)
    assert first["base"] == second["base"] and first["adapter"] != second["adapter"]
    said = [line for line in reports[1]["warnings"] if "earlier evaluation" in line]
    assert len(said) == 1 and not any("earlier evaluation" in line for line in reports[0]["warnings"])
    passes.clear()
    again = evaluate(EvaluateOptions(str(tmp_path / "run1")), console=quiet()).report
    assert passes == [AGAIN, count] and next(one.metrics for one in again.systems if one.name == "base")["accuracy"].n == count
    opened = open_adapter(tmp_path / "run1")
    text, off = opened.text_model(quiet()), replace(opened.config.evaluate, reuse=False)
    assert kept_answers(opened.config, text, tmp_path / "run1") is not None and kept_answers(opened.config, text, None) is None
    lora = opened.config.lora
    for changes in ({"evaluate": off}, {"lora": replace(lora, on_top_of="x")}, {"lora": replace(lora, new_tokens=("<x>",))}):
        assert kept_answers(replace(opened.config, **changes), text, tmp_path / "run1") is None, changes


@pytest.mark.slow
def test_replies_of_the_base_are_taken_too(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows.jsonl", chats(120))
    written, real = [], reply.sample

    def counting(text: Any, prompts: Any, **settings: Any) -> Any:
        written.append(len(prompts))
        return real(text, prompts, **settings)

    monkeypatch.setattr(reply, "sample", counting)
    totals = []
    for seed in (0, 1):
        changes = {"train.seed": seed, "train.steps": 2, "evaluate.answers": 40, "evaluate.answer_tokens": 3}
        changes["data.test"] = write_rows(tmp_path / "test.jsonl", chats(45, seed=5))
        run(tiny_llama_folder, tmp_path / "rows.jsonl", tmp_path / f"run{seed}", changes)
        totals.append(sum(written))
        written.clear()
    warnings = json.loads((tmp_path / "run1" / "report.json").read_text())["warnings"]
    saved = sum(line.count(": 40 answers are") for line in warnings)
    assert saved and totals[0] - totals[1] == saved * (40 - AGAIN)

"""`kept_answers`: the base's answers are taken from an earlier evaluation of the same model on the same rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakeet.models.generate import score
from lorakeet.workflows.evaluate import evaluate
from lorakeet.workflows.finetuning import evaluate_text, reply
from lorakeet.workflows.finetuning.kept_answers import AGAIN, ANSWERS, APART, FEWEST, MOST, KeptAnswers, kept_answers
from lorakeet.workflows.options import EvaluateOptions
from lorakeet.workflows.runs.open_adapter import open_adapter
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
        "base: the answers to 40 rows are those of an earlier evaluation of the same model on the same rows; 16 were computed "
        "again and agree (evaluate.reuse)."
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


def test_sums_over_tokens_may_differ_by_so_much_a_token(tmp_path: Path) -> None:
    KeptAnswers(tmp_path, "m", APART).numbers("base", ROWS, Counted(), tokens=9)
    near, far = Counted(NUMBERS + 8 * APART), Counted(NUMBERS + 10 * APART)
    KeptAnswers(tmp_path, "m", APART).numbers("base", ROWS, near, tokens=9)
    KeptAnswers(tmp_path, "m", APART).numbers("base", ROWS, far, tokens=9)
    assert (near.asked, far.asked) == (AGAIN, AGAIN + 40)


@pytest.mark.parametrize("how", ["empty", "other", "cut"])
def test_a_damaged_file_is_computed_anew(tmp_path: Path, how: str) -> None:
    KeptAnswers(tmp_path, "m", APART).numbers("base", ROWS, Counted())
    [file] = tmp_path.iterdir()
    data = file.read_bytes()
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
    saved = sum(line.count("answers to 40 rows") for line in warnings)
    assert saved and totals[0] - totals[1] == saved * (40 - AGAIN)

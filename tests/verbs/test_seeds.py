"""Several seeds of one run: the first one's adapter is kept, the spread is reported, and what cannot be repeated is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from scipy import stats

from lorakeet.config import read_run
from lorakeet.errors import ConfigError
from lorakeet.evaluate.intervals import mean_over_seeds
from lorakeet.evaluate.report.report import read_report, render_html
from lorakeet.verbs.finetune import finetune
from lorakeet.verbs.options import FinetuneOptions
from lorakeet.verbs.seeds import require_repeatable
from tiny.models import save_tiny_llama
from tiny.runs import adapter_bytes, quiet, reviews, run, settings, write_rows


@pytest.mark.slow
def test_seeds_are_trained_and_the_first_one_is_kept(tmp_path: Path) -> None:
    model, rows = save_tiny_llama(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", reviews(60))
    alone = run(model, rows, tmp_path / "alone")
    assert alone.report is not None and alone.report.verdict is not None
    assert "no test rows" in alone.report.verdict.sentence and alone.report.verdict.sentence.endswith("One seed was trained.")
    options = FinetuneOptions(seeds=3)
    found = finetune(settings(model, rows, tmp_path / "run"), options, console=quiet())
    folder = tmp_path / "run"
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "alone")
    report = read_report(folder / "report.json")
    first = read_run(folder / "config.yaml").train
    folders = {first.seed: folder, **{seed: folder / "seeds" / str(seed) for seed in (first.seed + 1, first.seed + 2)}}
    assert {read_run(each / "config.yaml").train.learning_rate for each in folders.values()} == {first.learning_rate}
    assert len({(each / "split.json").read_bytes() for each in folders.values()}) == 1
    adapters = {seed: read_report(each / "report.json").systems[0].metrics for seed, each in folders.items()}
    assert {one.metric for one in report.seeds} >= {"accuracy", "log_loss"}
    for spread in report.seeds:
        assert dict(zip(spread.seeds, spread.values, strict=True)) == {
            seed: metrics[spread.metric].value for seed, metrics in adapters.items()
        }
    assert len(set(next(one for one in report.seeds if one.metric == "log_loss").values)) == 3
    said = report.verdict.sentence if report.verdict else ""
    assert "3 seeds give" in said and "One seed" not in said and "no test rows" in said
    assert said in (folder / "adapter" / "README.md").read_text() and "Interval between seeds" in render_html(report)
    assert found.to_mapping()["report"]["verdict"] and found.report == report
    kept = {seed: (each / "report.json").stat().st_mtime_ns for seed, each in folders.items()}
    again = finetune(read_run(folder / "config.yaml"), dataclasses.replace(options, resume=folder), console=quiet())
    assert again.report is not None and again.report.seeds == report.seeds
    assert all((folders[seed] / "report.json").stat().st_mtime_ns == kept[seed] for seed in list(folders)[1:])


def test_the_interval_between_seeds_is_student_s() -> None:
    values = (0.7, 0.75, 0.83)
    found = mean_over_seeds(values, 0.95)
    low, high = stats.t.interval(0.95, 2, sum(values) / 3, stats.sem(values))
    assert (found.low, found.high, found.n) == (pytest.approx(low), pytest.approx(high), 3)
    same = mean_over_seeds((0.5, 0.5), 0.95)
    assert same.why_none == "all 2 seeds are equal" and same.low == -math.inf


@pytest.mark.parametrize(
    ("changes", "seeds", "processes", "message"),
    [
        ({"memory.budget": "8GiB"}, 3, 1, "memory.budget counts one run"),
        ({"kind": "image"}, 3, 1, "Image runs"),
        ({}, 3, 2, "2 processes train together"),
        ({}, 0, 1, "--seeds is 0"),
    ],
)
def test_what_cannot_be_repeated_is_refused_by_name(
    tmp_path: Path, changes: dict[str, str], seeds: int, processes: int, message: str
) -> None:
    config = settings(tmp_path, tmp_path / "rows.jsonl", tmp_path / "run", changes)
    with pytest.raises(ConfigError, match=message):
        require_repeatable(config, FinetuneOptions(seeds=seeds), processes)
    require_repeatable(config, FinetuneOptions(), processes)

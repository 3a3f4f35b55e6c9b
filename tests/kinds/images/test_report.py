"""The report on images: losses in pairs, distances of samples, and the nearest training pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lorakeet.errors import DataError
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.report.report import (
    Memorisation,
    Near,
    Report,
    Sample,
    SampleGrid,
    SampleRow,
    read_report,
    render_html,
    write_report,
)
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.kinds.images.report import denoising_report, nearest_distances, with_distances
from lorakeet.kinds.images.wording import METRIC, PROMPT_DISTANCE, STYLE_DISTANCE

SPEC = EvaluateSpec(resamples=500, show_rows=4)


def report(gain: float, pictures: int = 12) -> Report:
    generator = np.random.default_rng(0)
    counts = np.full(pictures, 8)
    base = generator.uniform(4, 12, pictures)
    mine = base - 8 * gain + generator.normal(0, 0.04, pictures)
    return denoising_report(
        "Title", adapter=RowLosses("adapter", mine, counts), base=RowLosses("base", base, counts),
        captions=[f"caption {n}" for n in range(pictures)], sources=[f"{n}.png" for n in range(pictures)], spec=SPEC,
    )  # fmt: skip


def test_a_paired_gain_is_shown_though_pictures_differ_much() -> None:
    found = report(0.1)
    [comparison] = found.comparisons
    assert comparison.metric == METRIC and comparison.verdict == "better" and not comparison.higher_is_better
    assert -0.12 < comparison.difference.value < -0.08
    assert found.verdict is not None and "beats its base: −0.1" in found.verdict.sentence
    assert "mean squared error" in found.verdict.sentence
    by_role = {system.role: system.metrics[METRIC] for system in found.systems}
    assert by_role["adapter"].high - by_role["adapter"].low > 10 * (comparison.difference.high - comparison.difference.low)
    assert len(found.rows) == 4 and found.rows_of == 12 and found.warnings == ()


def test_distances_of_samples_stand_beside_the_loss_and_leave_the_verdict_alone() -> None:
    generator = np.random.default_rng(0)
    plain = report(0.1)
    base = generator.uniform(0.6, 0.9, 20)
    prompts, ones = tuple(f"p{number // 2}" for number in range(20)), np.ones(20, np.int64)
    changes = [change * generator.uniform(0.9, 1.1, 20) for change in (-0.1, 0.1)]
    nearer, further = (RowLosses("adapter", base + change, ones, prompts) for change in changes)
    other = RowLosses("base", base, ones, prompts)
    found = with_distances(plain, {PROMPT_DISTANCE: (nearer, other), STYLE_DISTANCE: (further, other)}, SPEC)
    assert [one.verdict for one in found.comparisons[1:]] == ["better", "worse"] and found.verdict == plain.verdict
    assert list(found.systems[0].metrics) == ["denoising_loss", PROMPT_DISTANCE, STYLE_DISTANCE]
    assert abs(found.comparisons[1].difference.value + 0.1) < 0.01
    page = render_html(found)
    assert "Prompt distance" in page and "Style distance" in page


def test_the_page_shows_samples_and_memorisation(tmp_path: Path) -> None:
    cells = Sample("base", "AAAA"), Sample("adapter × 1", "BBBB")
    grid = SampleGrid(("base", "adapter × 1"), (SampleRow("a <b>", 3, cells),), "Euler")
    near = (Near("a <b>", 3, "adapter × 1", "7.png", 0.01, True), Near("a <b>", 3, "base", "8.png", 0.6, False))
    whole = replace(report(0.1), samples=grid, memorisation=Memorisation(near, 0.2, 0.5, 12, "cosine"))
    write_report(whole, tmp_path)
    assert read_report(tmp_path / "report.json") == whole
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = "data:image/png;base64,BBBB", "a &lt;b&gt;", "1 of 2 samples are nearer", "7.png", "img-src data:", "Denoising loss"
    assert [text for text in shown if text not in page] == []
    assert " nats" not in page
    write_report(report(0.1), tmp_path)
    assert "samples-h" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_distances_are_cosines_around_the_mean_of_training() -> None:
    training = np.array([[3.0, 1.0], [1.0, 3.0], [-1.0, 1.0], [1.0, -1.0]])  # their mean is (1, 1)
    distances, places = nearest_distances(np.array([[5.0, 1.0], [1.0, 1.5], [2.0, 2.0]]), training)
    assert places[:2].tolist() == [0, 1]
    np.testing.assert_allclose(distances, [0.0, 0.0, 1 - np.sqrt(0.5)], atol=1e-12)


def test_features_must_fit() -> None:
    with pytest.raises(DataError, match=r"\(1, 3\) features cannot be compared with \(2, 4\)"):
        nearest_distances(np.zeros((1, 3)), np.zeros((2, 4)))

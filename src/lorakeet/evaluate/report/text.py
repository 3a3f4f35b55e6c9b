"""The report of a text run, from the answers or losses of the systems; runs add their facts with `replace`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import Answers, confusion, measure
from lorakeet.evaluate.calibration import reliability
from lorakeet.evaluate.compare import compare_answers, compare_losses
from lorakeet.evaluate.likelihood import RowLosses, measure_losses
from lorakeet.evaluate.report.report import Reliability, Report, Role, ScoredAnswer, SideBySide, SystemResult
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.verdict import verdict_of


def classification_report(
    title: str,
    *,
    adapter: Answers,
    base: Answers,
    floors: Sequence[Answers] = (),
    texts: Sequence[str],
    sources: Sequence[str] = (),
    spec: EvaluateSpec,
) -> Report:
    """A report with systems, comparisons, verdict, confusion matrices, calibration and rows side by side.

    The adapter is compared with its base and with the last of `floors` (majority class first, TF-IDF, the strongest, last).
    """
    _same_length(len(adapter.truth), texts, sources)
    roles: list[tuple[Answers, Role]] = [(adapter, "adapter"), (base, "base"), *((floor, "floor") for floor in reversed(floors))]
    systems = tuple(SystemResult(answers.system, role, measure(answers, spec), answers.note) for answers, role in roles)
    rivals = [base, *floors[-1:]]
    comparisons = tuple(found for rival in rivals for found in compare_answers(adapter, rival, spec))
    chosen = _rows_to_show(base.correct.astype(int) * 2 + adapter.correct, spec)
    return Report(
        title,
        task="classification",
        systems=systems,
        comparisons=comparisons,
        verdict=verdict_of(comparisons),
        confusions=(confusion(base, spec), confusion(adapter, spec)),
        reliabilities=tuple(
            Reliability(answers.system, role, reliability(answers.confidence, answers.correct, spec=spec))
            for answers, role in ((base, roles[1][1]), (adapter, roles[0][1]))
        ),
        rows=tuple(
            SideBySide(
                texts[row],
                adapter.labels[adapter.truth[row]],
                _reply(base, row),
                _reply(adapter, row),
                sources[row] if sources else "",
            )
            for row in chosen
        ),
        rows_of=len(texts),
    )


def language_report(
    title: str,
    *,
    adapter: RowLosses,
    base: RowLosses,
    texts: Sequence[str],
    truths: Sequence[str],
    sources: Sequence[str] = (),
    spec: EvaluateSpec,
) -> Report:
    """A report on rows of any kind: loss, perplexity, paired difference, verdict and rows with the largest changes in loss."""
    _same_length(len(adapter.tokens), texts, sources)
    results = [(adapter, "adapter"), (base, "base")]
    systems = (
        SystemResult(adapter.system, "adapter", measure_losses(adapter, spec)),
        SystemResult(base.system, "base", measure_losses(base, spec)),
    )
    comparison = compare_losses(adapter, base, spec)
    mine, other = (rows.losses / rows.tokens for rows, _ in results)
    order = np.argsort(mine - other, kind="stable")
    half = spec.show_rows // 2
    chosen = (
        order if len(order) <= spec.show_rows else np.concatenate([order[: spec.show_rows - half], order[len(order) - half :]])
    )
    return Report(
        title,
        task="language",
        systems=systems,
        comparisons=(comparison,),
        verdict=verdict_of((comparison,)),
        rows=tuple(
            SideBySide(
                texts[row],
                truths[row],
                ScoredAnswer(loss=float(other[row])),
                ScoredAnswer(loss=float(mine[row])),
                sources[row] if sources else "",
            )
            for row in chosen
        ),
        rows_of=len(texts),
    )


def _rows_to_show(outcome: np.ndarray[tuple[int, ...], np.dtype[np.int64]], spec: EvaluateSpec) -> list[int]:
    """Up to `show_rows` rows, drawn evenly from the four outcomes, in seeded random order."""
    generator = np.random.default_rng([spec.seed, 2])
    piles = [list(generator.permutation(np.flatnonzero(outcome == kind))) for kind in (1, 2, 0, 3)]
    chosen: list[int] = []
    while len(chosen) < spec.show_rows and any(piles):
        for pile in piles:
            if pile and len(chosen) < spec.show_rows:
                chosen.append(int(pile.pop()))
    return chosen


def _reply(answers: Answers, row: int) -> ScoredAnswer:
    label = int(answers.predicted[row])
    return ScoredAnswer(answers.labels[label], float(answers.confidence[row]), bool(answers.correct[row]))


def _same_length(n: int, texts: Sequence[str], sources: Sequence[str]) -> None:
    if len(texts) != n or (sources and len(sources) != n):
        raise DataError(f"There are {n} answered rows, {len(texts)} texts and {len(sources)} sources; expected as many of each.")

"""Composes the report of a run from the answers or losses of its systems; runs add their facts with `replace`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lorakeet.errors import DataError
from lorakeet.evaluate.answers import Answers, balanced_accuracy, confusion, dominated, measure
from lorakeet.evaluate.baselines import MAJORITY, majority_class
from lorakeet.evaluate.calibration import reliability
from lorakeet.evaluate.compare import Comparison, compare_answers, compare_losses, compare_statistics, compare_values
from lorakeet.evaluate.intervals import Floats, Statistic, bootstrap_or_words, mean
from lorakeet.evaluate.likelihood import RowLosses, measure_losses
from lorakeet.evaluate.own_metric import OwnMetric
from lorakeet.evaluate.reading.conventions import scale_of_labels
from lorakeet.evaluate.reading.ordered import quadratic_kappa
from lorakeet.evaluate.replies import (
    Replies,
    Score,
    compare_replies,
    main_metric,
    measure_replies,
    metrics_shown,
    reply_scores,
)
from lorakeet.evaluate.report.report import Reliability, Report, Role, ScoredAnswer, SideBySide, SystemResult
from lorakeet.evaluate.spec import LEAST_ANSWERS, EvaluateSpec
from lorakeet.evaluate.suspects import suspect_labels, with_shared_words
from lorakeet.evaluate.verdict import of_uneven, of_unfound, verdict_of
from lorakeet.evaluate.wording import metric_words


@dataclass(frozen=True, eq=False)
class Answered:
    """Replies of adapter, base, few-shot base and `copies` of training answers to the prompts of `rows`, by their indices.

    `own` is a metric of the user's, which then decides.
    """

    rows: tuple[int, ...]
    adapter: Replies
    base: Replies
    few_shot: Replies | None = None
    copies: tuple[Replies, ...] = ()
    own: OwnMetric | None = None
    wanted: int = 0  # prompts, of which fewer were answered if the time was over

    @property
    def rivals(self) -> tuple[Replies, ...]:
        """All systems but the adapter; the better of the copies before the others."""
        sign = -1 if metric_words(self.metric).higher_is_better else 1
        best = sorted(self.copies, key=lambda copy: sign * float(reply_scores(copy, self.metric, self.score).mean()))
        return (self.base, *([] if self.few_shot is None else [self.few_shot]), *best)

    @cached_property
    def metric(self) -> str:
        """The metric that decides."""
        return main_metric(self.adapter.how) if self.own is None else self.own.name

    @property
    def score(self) -> Score | None:
        """What computes the user's own metric."""
        return None if self.own is None else self.own.score


def classification_report(
    title: str,
    *,
    adapter: Answers,
    base: Answers,
    few_shot: Answers | None = None,
    floors: Sequence[Answers] = (),
    texts: Sequence[str],
    sources: Sequence[str] = (),
    spec: EvaluateSpec,
) -> Report:
    """A report with systems, comparisons, verdict, confusion matrices, calibration and rows side by side.

    The adapter is compared with its base, the few-shot base, and the last of `floors` (majority class first, TF-IDF, the
    strongest, last); where one label has nearly all rows with the majority class too, whether it is among them or not.
    """
    uneven, strongest = dominated(adapter), bool(floors) and floors[-1].system != MAJORITY
    if uneven and not any(floor.system == MAJORITY for floor in floors):
        truth = [adapter.labels[label] for label in adapter.truth]
        floors = (majority_class(truth, truth, labels=adapter.labels, groups=adapter.groups), *floors)
    _same_length(len(adapter.truth), texts, sources)
    shown = [] if few_shot is None else [few_shot]
    roles: list[tuple[Answers, Role]] = [(adapter, "adapter"), (base, "base")]
    roles += [(answers, "floor") for answers in (*shown, *reversed(floors))]
    systems = tuple(_measured(answers, role, spec, uneven=uneven) for answers, role in roles)
    found = suspect_labels(adapter, floors[-1]) if strongest else ()
    majority = [floor for floor in floors[:-1] if uneven and floor.system == MAJORITY]
    rivals = [base, *majority, *shown, *floors[-1:]]
    comparisons = tuple(found for rival in rivals for found in compare_answers(adapter, rival, spec))
    places, reading = scale_of_labels(adapter.labels, spec.scale), ""
    warnings = _off_the_scale(adapter.labels, spec) if places is None else ()
    if places is not None:
        systems, comparisons = _on_scale(systems, comparisons, [answers for answers, _ in roles], rivals, places, spec)
        order = sorted(zip(places, adapter.labels, strict=True))
        reading = f"The labels are ordered, {', '.join(label for _, label in order)}, so their distance is measured too."
    verdict, confusions = verdict_of(comparisons), (confusion(base, spec), confusion(adapter, spec))
    chosen, named = _rows_to_show(base.correct.astype(int) * 2 + adapter.correct, spec), sources or [""] * len(texts)
    return Report(
        title,
        task="classification",
        systems=systems,
        reading=reading,
        warnings=warnings,
        comparisons=comparisons,
        verdict=of_unfound(of_uneven(verdict, adapter, spec) if uneven else verdict, confusions),
        confusions=confusions,
        reliabilities=tuple(
            Reliability(answers.system, role, reliability(answers.confidence, answers.correct, spec=spec))
            for answers, role in (roles[1], roles[0])
        ),
        rows=tuple(
            SideBySide(
                texts[row], adapter.labels[adapter.truth[row]], _reply(base, row), _reply(adapter, row), named[row], row,
                group=_group(adapter.groups, row),
            )
            for row in chosen
        ),
        rows_of=len(texts),
        suspects=tuple(replace(one, source=named[one.row]) for one in with_shared_words(found, texts, adapter)),
    )


def _measured(answers: Answers, role: Role, spec: EvaluateSpec, *, uneven: bool) -> SystemResult:
    """One system's metrics; the balanced accuracy too where one label has nearly all rows."""
    more = {"balanced_accuracy": balanced_accuracy(answers, spec)} if uneven else {}
    return SystemResult(answers.system, role, {**measure(answers, spec), **more}, answers.note)


def _on_scale(
    systems: tuple[SystemResult, ...],
    comparisons: tuple[Comparison, ...],
    answers: Sequence[Answers],
    rivals: Sequence[Answers],
    places: Sequence[int],
    spec: EvaluateSpec,
) -> tuple[tuple[SystemResult, ...], tuple[Comparison, ...]]:
    """The systems (of `answers`) and comparisons with the distance on the scale and quadratic kappa."""
    adapter, at, n = answers[0], np.array(places, dtype=np.float64), len(answers[0].truth)
    true, groups = at[adapter.truth], adapter.groups

    def distance(one: Answers) -> Floats:
        return np.abs(at[one.predicted] - true)

    def kappa(one: Answers) -> Statistic:
        return quadratic_kappa(at[one.predicted], true)

    measured = tuple(
        replace(
            system,
            metrics={
                **system.metrics,
                "mean_distance": mean(distance(one), spec=spec, groups=groups),
                "quadratic_kappa": bootstrap_or_words(kappa(one), n, spec=spec, groups=groups),
            },
        )
        for system, one in zip(systems, answers, strict=True)
    )
    more = list(comparisons)
    for rival in rivals:
        names, sides = (adapter.system, rival.system), (distance(adapter), distance(rival))
        more.append(compare_values(names, "mean_distance", sides, spec, groups=groups, higher_is_better=False))
        more.append(compare_statistics(names, "quadratic_kappa", (kappa(adapter), kappa(rival)), n, spec, groups=groups))
    return measured, tuple(more)


def language_report(
    title: str,
    *,
    adapter: RowLosses,
    base: RowLosses,
    texts: Sequence[str],
    truths: Sequence[str],
    sources: Sequence[str] = (),
    spec: EvaluateSpec,
    answered: Answered | None = None,
) -> Report:
    """A report on rows of any kind: loss, perplexity, paired difference, verdict and rows side by side.

    With `answered` the replies come first: metrics and comparisons of every system, the headline, and the answered rows. Without,
    the rows are those with the largest changes in loss.
    """
    _same_length(len(adapter.tokens), texts, sources)
    roles: tuple[tuple[RowLosses, Role], ...] = ((adapter, "adapter"), (base, "base"))
    systems = tuple(SystemResult(rows.system, role, measure_losses(rows, spec)) for rows, role in roles)
    comparisons: tuple[Comparison, ...] = (compare_losses(adapter, base, spec),)
    if answered is None:
        rows = largest_changes(adapter, base, texts, truths, sources, spec)
    else:
        systems, comparisons = _with_replies(systems, comparisons, answered, spec)
        theirs, mine = (_scored(*pair) for pair in ((answered.base, answered, base), (answered.adapter, answered, adapter)))
        shown = list(zip(answered.rows, answered.adapter.references, theirs, mine, strict=True))[: spec.show_rows]
        named = sources or [""] * len(texts)
        rows = tuple(
            SideBySide(
                texts[row], reference, before, after, named[row], row, int(adapter.tokens[row]), _group(adapter.groups, row)
            )
            for row, reference, before, after in shown
        )
    return Report(
        title,
        task="language",
        systems=systems,
        comparisons=comparisons,
        verdict=verdict_of(comparisons),
        rows=rows,
        rows_of=len(texts),
        reading="" if answered is None else _reading(answered),
        warnings=() if answered is None else (*_too_slow(answered), *_unused_scale(answered, spec)),
    )


def _reading(answered: Answered) -> str:
    """How answers are read, and by what that was decided."""
    seen = "the references" + (" and the training answers" if answered.adapter.known else "")
    return f"Answers are read {answered.adapter.how.why}, as {seen} show."


def _off_the_scale(labels: Sequence[str], spec: EvaluateSpec) -> tuple[str, ...]:
    """A warning if evaluate.scale is given but lacks labels of the file."""
    missing = [label for label in dict.fromkeys(labels) if label not in spec.scale]
    if not spec.scale:
        return ()
    return (f"evaluate.scale has no effect: it lacks {', '.join(map(repr, missing[:3]))}. List every label of the file in it.",)


def _unused_scale(answered: Answered, spec: EvaluateSpec) -> tuple[str, ...]:
    used = answered.adapter.how.kind == "ordered labels"
    return () if used else _off_the_scale(answered.adapter.references, spec)


def _too_slow(answered: Answered) -> tuple[str, ...]:
    """A warning if the time was over before all prompts were answered."""
    count = len(answered.rows)
    if count >= answered.wanted:
        return ()
    return (
        f"{count} of {answered.wanted} prompts were answered within evaluate.answer_seconds, which never leaves out the first "
        f"{LEAST_ANSWERS}; the replies are compared on these. Raise it, or lower evaluate.answer_tokens.",
    )


def _with_replies(
    systems: tuple[SystemResult, ...], comparisons: tuple[Comparison, ...], answered: Answered, spec: EvaluateSpec
) -> tuple[tuple[SystemResult, ...], tuple[Comparison, ...]]:
    """The systems with the metrics of their replies, and those that copy; the comparisons in the main metric first."""
    metric, score = answered.metric, answered.score
    measured = [measure_replies(each, metric, spec, score) for each in (answered.adapter, answered.base)]
    found = [
        replace(system, metrics={**metrics, **system.metrics}, note=replies.note)
        for system, metrics, replies in zip(systems, measured, (answered.adapter, answered.base), strict=True)
    ]
    for each in answered.rivals[1:]:
        found.append(SystemResult(each.system, "floor", measure_replies(each, metric, spec, score), each.note))
    compared = [
        compare_replies(answered.adapter, rival, name, spec, score)
        for name in metrics_shown(metric, answered.adapter.how)  # all of the table, so that no sentence contradicts it
        for rival in answered.rivals
    ]
    return tuple(found), (*compared, *comparisons)


def _scored(replies: Replies, answered: Answered, losses: RowLosses) -> list[ScoredAnswer]:
    """Each reply with its score in the main metric, right or wrong where that is a match, and the loss of its row."""
    metric, score = answered.metric, answered.score
    found, per_token = reply_scores(replies, metric, score), losses.losses / losses.tokens
    match = metric.endswith("_match")
    return [
        ScoredAnswer(text or "(empty)", None, value == 1 if match else None, float(per_token[row]), None if match else value)
        for text, value, row in zip(replies.texts, found.tolist(), answered.rows, strict=True)
    ]


def largest_changes(
    adapter: RowLosses,
    base: RowLosses,
    texts: Sequence[str],
    truths: Sequence[str],
    sources: Sequence[str],
    spec: EvaluateSpec,
) -> tuple[SideBySide, ...]:
    """The rows whose loss fell and rose most, `show_rows` at most, in the order of the change."""
    mine, other = adapter.losses / adapter.tokens, base.losses / base.tokens
    order = np.argsort(mine - other, kind="stable")
    half = spec.show_rows // 2
    if len(order) > spec.show_rows:
        order = np.concatenate([order[: spec.show_rows - half], order[len(order) - half :]])
    found = []
    for row in order:
        before, after = ScoredAnswer(loss=float(other[row])), ScoredAnswer(loss=float(mine[row]))
        about = int(row), int(adapter.tokens[row]), _group(adapter.groups, row)
        found.append(SideBySide(texts[row], truths[row], before, after, sources[row] if sources else "", *about))
    return tuple(found)


def _group(groups: Sequence[Hashable] | None, row: int) -> str | None:
    """A row's group as a text that is the same in every report on the same rows; None without groups."""
    return None if groups is None else str(groups[row])


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

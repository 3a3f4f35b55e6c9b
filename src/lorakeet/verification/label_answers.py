"""The check of labels: which answers of an artefact differ, and whether the rounding of its format explains that.

    decided differences    rows with another answer, though the live adapter prefers its own by more than rounding explains:
                           `gap` nats times the root of the tokens that tell labels apart (exporting/tolerances)
    different answers      all rows with another answer. So many are allowed that a format which changes each answer with the
                           probability `metric` has more in at most ALARM of all checks (exact binomial)
    undefined scores       rows with a NaN among the scores of either side; none is allowed

A share alone is no test of a few rows: of 8, one that changes is 12 %. And where a format changes many answers, random ones pass
among few rows: of two labels in 4 bits 86 % of checks of 8 rows. So more rows of the run are taken, as many as tell random
answers with the error ALIKE (58 then). Where the run has fewer, the certificate says that its rows cannot tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lorakeet.data.chat import Candidates
from lorakeet.errors import percent
from lorakeet.evaluate.certificate import Check, Unchecked
from lorakeet.evaluate.intervals import Floats, share, share_beyond
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.exporting.tolerances import Q8, Allowed
from lorakeet.planning.check import distinguishing_endings
from lorakeet.train.progress import Count, uncounted
from lorakeet.verification.artefact import Artefact, InTorch
from lorakeet.verification.checks import named_check, scores_of_labels
from lorakeet.verification.probes import Probes

ALARM = 0.01  # of the checks of right artefacts, the most that the number of different answers fails
ALIKE = 0.05  # of the checks of random answers, the most that pass
MOST_ROWS = 128  # whose answers are compared at most


def check_label_answers(
    live: InTorch, artefact: Artefact, probes: Probes, spec: EvaluateSpec, count: Count = uncounted
) -> Check:
    """The task's metric on both sides, and the rows on which the likeliest label differs; more rows where these cannot tell."""
    rows = [*probes.labelled]
    if more := rows_that_tell(rows, artefact.allowed) - len(rows):
        rows += probes.further(more)
    ours, theirs = list[Floats](), list[Floats]()
    with count(f"{artefact.name}: answers of rows", 2 * len(rows)) as done:
        for side, scores in ((live, ours), (artefact, theirs)):
            for row in rows:
                scores.append(scores_of_labels(side, row, live))
                done(1)
    tokens = [max(map(len, distinguishing_endings(row, live.text.tokenizer))) for row in rows]
    return compare_label_scores((live.name, artefact.name), (ours, theirs), tokens, rows, artefact.allowed, spec)


def rows_that_tell(rows: Sequence[Candidates], allowed: Allowed) -> int:
    """How many rows tell random answers from those of few bits: the fewest from those of `rows` on; no more if none do."""
    if allowed.rounding < Q8.rounding:
        return len(rows)
    labels = len(rows[0].completions)
    enough = (n for n in range(len(rows), MOST_ROWS + 1) if random_passes(n, labels, allowed.metric) <= ALIKE)
    return next(enough, len(rows))


def random_passes(n: int, labels: int, rate: float) -> float:
    """The share of checks of `n` rows in which random answers among so many `labels` pass, if each is right by chance alone."""
    return 1 - share_beyond(most_different(n, rate), n, 1 - 1 / labels)


def weak_answers(checks: Sequence[Check], rows: Sequence[Candidates], allowed: Allowed) -> Unchecked | None:
    """That the rows of the check of labels cannot tell random answers from those of few bits; None where they can."""
    found = next((check for check in checks if check.name.endswith(": answers")), None)
    if found is None or allowed.rounding < Q8.rounding:
        return None
    passing = random_passes(found.n, len(rows[0].completions), allowed.metric)
    if passing <= ALIKE:
        return None
    number = "1 row" if found.n == 1 else f"{found.n} rows"
    why = (
        f"{number} cannot tell: {allowed.name} may change {percent(allowed.metric, 0)} of the answers, and random ones pass in "
        f"{percent(passing, 0)} of such checks"
    )
    return Unchecked(found.artefact, "whether answers are better than random ones", why)


def compare_label_scores(
    names: tuple[str, str],
    scores: tuple[Sequence[Floats], Sequence[Floats]],
    tokens: Sequence[int],
    rows: Sequence[Candidates],
    allowed: Allowed,
    spec: EvaluateSpec,
) -> Check:
    """The check of both sides' log-probabilities of each label, (labels,) for each row; `tokens` tell its labels apart."""
    ours, theirs = (np.array([int(row.argmax()) for row in side]) for side in scores)
    truth = np.array([-1 if row.label is None else row.label for row in rows])
    margins = np.array([float(row.max() - row[other]) for row, other in zip(scores[0], theirs, strict=True)])
    other = ours != theirs
    decided = other & ~(margins <= allowed.gap * np.sqrt(tokens))  # NaN is no explanation
    undefined = np.array([bool(np.isnan(one).any() or np.isnan(two).any()) for one, two in zip(*scores, strict=True)])
    measured = {"different_answers": float(other.mean()), "decided_differences": float(decided.mean())}
    limits = {"different_answers": most_different(len(rows), allowed.metric) / len(rows), "decided_differences": allowed.metric}
    measured, limits = {**measured, "undefined_scores": float(undefined.mean())}, {**limits, "undefined_scores": 0.0}
    detail = ""
    if other.any():
        apart = ", ".join(f"{margin:.2g}" for margin in sorted(margins[other])[:8])
        detail = (
            f"Of {len(rows)} answers {other.sum()} differ, which the live adapter prefers by {apart} nats; rounding to "
            f"{allowed.name} explains up to {allowed.gap * max(tokens) ** 0.5:.2g}."
        )
    if undefined.any():
        first = rows[int(undefined.argmax())].key[:12]
        said = f"{undefined.sum()} of {len(rows)} rows have scores that are no numbers (NaN), the first {first}."
        detail = f"{said} {detail}".strip()
    check = named_check("answers", names, measured, limits, n=len(rows), detail=detail)
    accuracies = {"accuracy_live": share(ours == truth, spec=spec), "accuracy_there": share(theirs == truth, spec=spec)}
    return replace(check, estimates=accuracies)


def most_different(n: int, rate: float) -> int:
    """The most of `n` answers that may differ: k with P(X > k) <= ALARM, where each differs with the probability `rate`."""
    return next(k for k in range(n + 1) if share_beyond(k, n, rate) <= ALARM)

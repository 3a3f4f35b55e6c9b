"""The check of labels: which answers of an artefact differ, and whether the rounding of its format explains that.

    decided differences    rows with another answer, though the live adapter prefers its own by more than rounding explains:
                           `gap` nats times the root of the tokens that tell labels apart (exporting/tolerances)
    different answers      all rows with another answer. So many are allowed that a format which changes each answer with the
                           probability `metric` has more in at most ALARM of all checks (exact binomial)

A share alone is no test of a few rows: of 8, one that changes is 12 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import special

from lorakeet.data.chat import Candidates
from lorakeet.evaluate.certificate import Check
from lorakeet.evaluate.intervals import Floats, share
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.exporting.tolerances import Allowed
from lorakeet.workflows.planning.check import distinguishing_endings
from lorakeet.workflows.verification.artefact import Artefact, InTorch
from lorakeet.workflows.verification.checks import Probes, named_check, scores_of_labels

ALARM = 0.01  # of the checks of right artefacts, the most that the number of different answers fails


def check_label_answers(live: InTorch, artefact: Artefact, probes: Probes, spec: EvaluateSpec) -> Check:
    """The task's metric on both sides, and the rows on which the likeliest label differs."""
    ours, theirs = ([scores_of_labels(side, row, live) for row in probes.labelled] for side in (live, artefact))
    tokens = [max(map(len, distinguishing_endings(row, live.text.tokenizer))) for row in probes.labelled]
    return compare_label_scores((live.name, artefact.name), (ours, theirs), tokens, probes.labelled, artefact.allowed, spec)


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
    measured = {"different_answers": float(other.mean()), "decided_differences": float(decided.mean())}
    limits = {"different_answers": most_different(len(rows), allowed.metric) / len(rows), "decided_differences": allowed.metric}
    detail = ""
    if other.any():
        apart = ", ".join(f"{margin:.2g}" for margin in sorted(margins[other])[:8])
        detail = (
            f"Of {len(rows)} answers {other.sum()} differ, which the live adapter prefers by {apart} nats; rounding to "
            f"{allowed.name} explains up to {allowed.gap * max(tokens) ** 0.5:.2g}."
        )
    check = named_check("answers", names, measured, limits, n=len(rows), detail=detail)
    accuracies = {"accuracy_live": share(ours == truth, spec=spec), "accuracy_there": share(theirs == truth, spec=spec)}
    return replace(check, estimates=accuracies)


def most_different(n: int, rate: float) -> int:
    """The most of `n` answers that may differ: k with P(X > k) <= ALARM, where each differs with the probability `rate`."""
    return next(k for k in range(n + 1) if k == n or float(special.betainc(k + 1, n - k, rate)) <= ALARM)

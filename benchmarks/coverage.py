"""Claim: 95 % intervals of shares, means and macro-F1 cover, or words stand in their place; 5 % of tests show what is not there.

    python benchmarks/coverage.py [--quick] [--seed 0]

Shares: systems that are right on the same rows or not, by cells of (only left right, only right right). Means: differences of
several shapes, of rows and of groups of 5 rows. Macro-F1: tables of labels and answers, of one system and of two with equal
macro-F1. Printed: coverage in the mean over cells and in the worst one, the mean width, false alarms where there is no
difference, and how often words took the interval's place, which counts as covered. Margins: how often a system that is worse by
exactly the margin passes as non-inferior (`compress`), in shares and in losses of the same shapes and of
their mirror images. Apart from the claim: rare large losses, of which the rows may hold none. Where fewer than 3 are expected no
interval covers. Claimed: LEAST coverage in the mean (FEWER for means of less than 64 rows), WORST in the worst cell, ALARMS, and
PASSED in the mean over cells of a margin.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
from harness.machine import origin, write_result

from lorakeet.evaluate.answers import Answers, measure
from lorakeet.evaluate.compare import compare_values
from lorakeet.evaluate.intervals import Estimate, Floats, ratio_with_test
from lorakeet.evaluate.non_inferiority import Margin
from lorakeet.evaluate.paired import Paired, macro_f1_difference, score_difference
from lorakeet.evaluate.spec import EvaluateSpec

LEAST, FEWER, WORST, ALARMS, PASSED = 0.94, 0.93, 0.9, 0.06, 0.03
SIZES = (10, 20, 30, 64, 379)
CELLS = ((0.05, 0.05), (0.03, 0.03), (0.25, 0.25), (0.1, 0.02), (0.15, 0.05), (0.3, 0.1), (0.08, 0.0), (0.15, 0.0), (0.3, 0.0))
MARGIN = 0.05
AT_MARGIN = ((0.0, 0.05), (0.02, 0.07), (0.05, 0.1), (0.15, 0.2))  # cells of a system that is worse by the margin
SHAPES: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "normal": lambda chance, n: chance.normal(size=n),
    "laplace": lambda chance, n: chance.laplace(size=n),
    "Student's t, 3 degrees": lambda chance, n: chance.standard_t(3, size=n),
    "log-losses": lambda chance, n: np.log(chance.beta(3, 0.7, n)) - np.log(chance.beta(3, 0.7, n)),
    "exponential": lambda chance, n: chance.exponential(size=n) - 1,
    "lognormal": lambda chance, n: np.exp(chance.normal(size=n)) - math.exp(0.5),
    "mostly ties": lambda chance, n: np.where(chance.random(n) < 0.6, 0, chance.uniform(-0.3, 1, n)) - 0.4 * 0.35,
}
RARE: dict[str, float] = {"2 %": 0.02, "5 %": 0.05, "10 %": 0.1}  # rows whose loss is 5 more than that of the others
TABLES: dict[str, list[list[float]]] = {  # shares of all rows, by true and answered label
    "two labels": [[0.4, 0.1], [0.1, 0.4]],
    "two, nearly all right": [[0.4975, 0.0025], [0.0025, 0.4975]],
    "10 % with recall 0.6": [[0.855, 0.045], [0.04, 0.06]],
    "2 % with recall 0.5": [[0.9702, 0.0098], [0.01, 0.01]],
    "2 % with recall 0": [[0.98, 0.0], [0.02, 0.0]],
    "three labels": [[0.3, 0.02, 0.0133], [0.0133, 0.3, 0.02], [0.02, 0.0134, 0.3]],
    "five, 50 to 3 %": (
        np.diag([0.45, 0.2, 0.105, 0.042, 0.015]) + (1 - np.eye(5)) * np.array([[0.0125, 0.0125, 0.01125, 0.007, 0.00375]]).T
    ).tolist(),
}
SYMMETRIC = ("normal", "laplace", "Student's t, 3 degrees", "log-losses")


def shares(n: int, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Coverage, width and alarms for shares of n rows."""
    covered, widths, words, alarms = [], [], [], []
    for b, c in CELLS:
        drawn = np.random.default_rng(seed).multinomial(n, [b, c, 1 - b - c], size=samples)
        intervals = [_share_difference(int(one), int(other), n) for one, other, _ in drawn]
        _count(intervals, b - c, covered, widths, words)
        if b == c:
            alarms.append(_alarms(intervals))
    return {"Tango": _line(covered, widths, alarms, words)}


@cache
def _share_difference(b: int, c: int, n: int) -> Estimate:
    return score_difference(Paired(0, b, c, n - b - c), 0.95)[0]


def means(n: int, samples: int, seed: int, *, of_groups: int = 0) -> dict[str, dict[str, float]]:
    """Coverage, width and alarms for mean differences of n rows, or of n groups of so many rows."""
    groups = list(np.repeat(np.arange(n), of_groups)) if of_groups else None
    covered, widths, words, alarms = [], [], [], []
    for number, (name, shape) in enumerate(SHAPES.items()):
        chance = np.random.default_rng([seed, n, number])
        intervals = []
        for sample in range(samples):  # with draws of its own
            rows = shape(chance, n)
            if of_groups:
                rows = np.repeat(rows, of_groups) + 0.3 * chance.normal(size=n * of_groups)
            intervals.append(_mean(rows, sample, groups))
        _count(intervals, 0.0, covered, widths, words)
        if name in SYMMETRIC:
            alarms.append(_alarms(intervals))
    return {"bootstrap-t, random halves": _line(covered, widths, alarms, words)}


def _mean(rows: Floats, seed: int, groups: list[int] | None = None) -> Estimate:
    return ratio_with_test(rows, np.ones(len(rows)), spec=EvaluateSpec(resamples=1000, seed=seed), groups=groups)[0]


def rare(n: int, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """The same where a few rows decide, by the share of these: none may be among the rows."""
    found: dict[str, dict[str, float]] = {}
    for name, share in RARE.items():
        chance, covered, widths, words = np.random.default_rng([seed, n]), [], [], []
        intervals = [
            _mean(np.where(chance.random(n) < share, 5.0, 0.0) - 5 * share + 0.1 * chance.normal(size=n), sample)
            for sample in range(samples)
        ]
        _count(intervals, 0.0, covered, widths, words)
        found[name] = _line(covered, widths, [_alarms(intervals)], words)
    return found


def tables(n: int, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Coverage, width and alarms for macro-F1 of one system and of the difference of two alike ones."""
    kept = {what: ([], [], []) for what in ("of one", "difference")}
    alarms = []
    for number, table in enumerate(TABLES.values()):
        shares = np.array(table) / np.sum(table)
        truth = float(np.mean(2 * np.diag(shares) / (shares.sum(0) + shares.sum(1))))
        chance, intervals = np.random.default_rng([seed, n, number]), {what: [] for what in kept}
        for sample in range(samples):
            spec = EvaluateSpec(resamples=1000, seed=sample)
            left, right = _answers(shares, n, chance)
            intervals["of one"].append(measure(left, spec)["macro_f1"])
            intervals["difference"].append(macro_f1_difference(left, right, spec)[0])
        for what, lists in kept.items():
            _count(intervals[what], 0.0 if what == "difference" else truth, *lists)
        alarms.append(_alarms(intervals["difference"]))
    return {what: _line(*lists[:2], alarms if what == "difference" else [0.0], lists[2]) for what, lists in kept.items()}


def margins(n: int, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """How often a system that is worse by exactly MARGIN is called as good, in the mean over cells and in the worst one."""
    margin = Margin(MARGIN, MARGIN)

    @cache
    def passes_share(b: int, c: int) -> bool:
        left, right = (np.repeat(flags, [b, c, n - b - c]) for flags in ([1.0, 0.0, 1.0], [0.0, 1.0, 1.0]))
        return not margin.why_not([compare_values(("cut", "whole"), "accuracy", (left, right), EvaluateSpec())])

    of_shares = []
    for b, c in AT_MARGIN:
        drawn = np.random.default_rng([seed, n]).multinomial(n, [b, c, 1 - b - c], size=5 * samples)
        of_shares.append(np.mean([passes_share(int(one), int(other)) for one, other, _ in drawn]))
    of_losses = []
    for number, (shape, side) in enumerate(product(SHAPES.values(), (1, -1))):
        chance, passed = np.random.default_rng([seed, n, number]), []
        for sample in range(samples):
            losses, spec = (side * shape(chance, n) + MARGIN, np.zeros(n)), EvaluateSpec(resamples=1000, seed=sample)
            found = compare_values(("cut", "whole"), "log_loss", losses, spec, higher_is_better=False)
            passed.append(not margin.why_not([found]))
        of_losses.append(np.mean(passed))
    kinds = {"share": of_shares, "loss": of_losses}
    return {kind: {"passed": float(np.mean(found)), "worst": float(np.max(found))} for kind, found in kinds.items()}


def _answers(shares: Floats, n: int, chance: np.random.Generator) -> tuple[Answers, Answers]:
    """Two systems' answers to n rows, as right as each other: two of three answers are the same one."""
    width = len(shares)
    truth = chance.choice(width, size=n, p=shares.sum(1))
    of_label = shares / shares.sum(1, keepdims=True)
    drawn = [np.array([chance.choice(width, p=of_label[label]) for label in truth]) for _ in range(3)]
    mine, other = (np.where(chance.random(n) < 0.82, drawn[2], one) for one in drawn[:2])
    names = tuple(map(str, range(width)))
    sure = [np.log(np.where(np.arange(width) == said[:, None], 0.9, 0.1 / (width - 1))) for said in (mine, other)]
    left, right = (Answers(name, names, truth, logs) for name, logs in zip(("left", "right"), sure, strict=True))
    return left, right


def _count(found: list[Estimate], truth: float, covered: list[Any], widths: list[Any], words: list[Any]) -> None:
    covered.append(np.mean([one.low - 1e-9 <= truth <= one.high + 1e-9 for one in found]))
    shown = [one.high - one.low for one in found if math.isfinite(one.high - one.low) and not one.why_none]
    widths.append(np.mean(shown) if shown else 0.0)
    words.append(np.mean([bool(one.why_none) for one in found]))


def _alarms(found: list[Estimate]) -> Any:
    return np.mean([one.excludes_zero for one in found])


def _line(covered: list[Any], widths: list[Any], alarms: list[Any], words: list[Any]) -> dict[str, float]:
    found = {"coverage": np.mean(covered), "worst": np.min(covered), "width": np.mean(widths), "alarms": np.mean(alarms)}
    return {name: float(value) for name, value in (found | {"words": np.mean(words)}).items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few samples of few rows")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    about = origin()
    results: dict[str, Any] = {}
    kept = True
    groups = partial(means, of_groups=5)
    plan = [("shares", shares, SIZES[1:], 2000), ("means", means, SIZES, 400), ("groups", groups, (3, 6, 10, 20), 300)]
    plan += [("rare", rare, (30, 64, 379), 200), ("macro-F1", tables, (20, 64, 200, 500), 300)]
    plan += [("margin", margins, (20, 64, 379), 400)]
    for what, measured, sizes, samples in plan:
        for n in sizes[:2] if given.quick else sizes:
            found = measured(n, 20 if given.quick else samples, given.seed)
            results[f"{what}, {n}"] = found
            for method, line in found.items():
                numbers = "  ".join(f"{key} {value:.3f}" for key, value in line.items())
                print(f"{what:8} {n:4}  {method:32} {numbers}", flush=True)
            if what == "margin":
                kept &= all(one["passed"] <= PASSED for one in found.values())
            elif what != "rare":
                least = FEWER if what in ("means", "groups") and n < 64 else LEAST
                lines = found.values()
                kept &= all(one["coverage"] >= least and one["worst"] >= WORST and one["alarms"] <= ALARMS for one in lines)
    name = "coverage_quick" if given.quick else "coverage"
    print(f"Written: {write_result(name, {'results': results, 'kept': kept}, seed=given.seed, about=about)}")
    return 0 if kept or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())

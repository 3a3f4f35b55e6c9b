"""Claim: 95 % intervals of shares, means and macro-F1 cover, or words stand in their place; 5 % of tests show what is not there.

    python benchmarks/coverage.py [--quick] [--seed 0]

Shares: systems that are right on the same rows or not, by cells of (only left right, only right right). Means: differences of
several shapes, of rows and of groups of 5 rows. Macro-F1: tables of labels and answers, of one system and of two with equal
macro-F1. Of each, the interval of a run, and the bootstrap (BCa) that it had before, for shares that of Bonett and Price too.
Printed: coverage in the mean over cells and in the worst one, the mean width, false alarms where there is no difference, and how
often words took the interval's place, which counts as covered. Before, an alarm in means needed the randomisation test too.
Apart from the claim: rare large losses, of which the rows may hold none. Where fewer than 3 are expected no interval covers.
Claimed: LEAST coverage in the mean (FEWER for means of less than 64 rows), WORST in the worst cell, and ALARMS.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from harness.machine import origin, write_result
from scipy import stats

from lorakeet.evaluate.answers import Answers, macro_f1, measure
from lorakeet.evaluate.intervals import Estimate, Floats, bootstrap, halves_of, limits, ratio_with_test
from lorakeet.evaluate.paired import Paired, macro_f1_difference, score_difference
from lorakeet.evaluate.spec import EvaluateSpec

LEAST, FEWER, WORST, ALARMS = 0.94, 0.93, 0.9, 0.06
SIZES = (10, 20, 30, 64, 379)
CELLS = ((0.05, 0.05), (0.03, 0.03), (0.25, 0.25), (0.1, 0.02), (0.15, 0.05), (0.3, 0.1), (0.08, 0.0), (0.15, 0.0), (0.3, 0.0))
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
SPEC = EvaluateSpec(resamples=1000)
OURS, BEFORE = "bootstrap-t, random halves", "BCa bootstrap"


@cache
def share_interval(method: str, b: int, c: int, n: int) -> tuple[Estimate, bool]:
    """The interval of a paired difference of shares, and whether a difference is shown."""
    if method == "Tango":
        found = score_difference(Paired(0, b, c, n - b - c), 0.95)[0]
        return found, found.excludes_zero
    if method == "Bonett-Price" or b + c == 0 or max(b, c) == n:
        p, q = (b + 1) / (n + 2), (c + 1) / (n + 2)
        reach = stats.norm.ppf(0.975) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
        found = Estimate((b - c) / n, max(-1.0, p - q - reach), min(1.0, p - q + reach), n, "Bonett-Price")
        return found, found.excludes_zero
    found = of_mean(np.repeat([1.0, -1.0, 0.0], [b, c, n - b - c]), SPEC)
    return found, found.excludes_zero and b + c > 0 and bool(stats.binomtest(b, b + c).pvalue < 0.05)


def of_mean(rows: Floats, spec: EvaluateSpec, groups: list[int] | None = None) -> Estimate:
    """The mean with the bootstrap's interval."""
    return bootstrap(lambda weights: (weights @ rows) / weights.sum(axis=1), len(rows), spec=spec, groups=groups)


def mean_interval(method: str, rows: Floats, spec: EvaluateSpec, groups: list[int] | None = None) -> tuple[Estimate, bool]:
    """The interval of a mean difference, and whether a difference is shown."""
    if method == OURS:
        found = ratio_with_test(rows, np.ones(len(rows)), spec=spec, groups=groups)[0]
        return found, found.excludes_zero
    before = of_mean(rows, spec, groups)
    p_value = limits(*halves_of(rows, np.ones(len(rows)), spec), 0.05)[2]
    return before, before.excludes_zero and p_value < 0.05


def shares(n: int, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Coverage, width and alarms of each method for shares of n rows."""
    found: dict[str, dict[str, float]] = {}
    for method in ("Tango", "Bonett-Price", "BCa bootstrap"):
        covered, widths, alarms = [], [], []
        for b, c in CELLS:
            drawn = np.random.default_rng(seed).multinomial(n, [b, c, 1 - b - c], size=samples)
            intervals = [share_interval(method, int(one), int(other), n) for one, other, _ in drawn]
            covered.append(np.mean([one.low - 1e-9 <= b - c <= one.high + 1e-9 for one, _ in intervals]))
            widths.append(np.mean([one.high - one.low for one, _ in intervals]))
            if b == c:
                alarms.append(np.mean([shown for _, shown in intervals]))
        found[method] = _line(covered, widths, alarms, [0.0])
    return found


def means(n: int, samples: int, seed: int, *, of_groups: int = 0) -> dict[str, dict[str, float]]:
    """Coverage, width and alarms of each method for mean differences of n rows, or of n groups of so many rows."""
    found: dict[str, dict[str, float]] = {}
    groups = list(np.repeat(np.arange(n), of_groups)) if of_groups else None
    for method in (OURS, BEFORE):
        covered, widths, alarms, words = [], [], [], []
        for number, (name, shape) in enumerate(SHAPES.items()):
            chance = np.random.default_rng([seed, n, number])
            intervals = []
            for sample in range(samples):  # with draws of its own
                rows = shape(chance, n)
                if of_groups:
                    rows = np.repeat(rows, of_groups) + 0.3 * chance.normal(size=n * of_groups)
                intervals.append(mean_interval(method, rows, EvaluateSpec(resamples=1000, seed=sample), groups))
            _count(intervals, 0.0, covered, widths, words)
            if name in SYMMETRIC:
                alarms.append(np.mean([shown for _, shown in intervals]))
        found[method] = _line(covered, widths, alarms, words)
    return found


def rare(n: int, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """The same where a few rows decide, by the share of these: none may be among the rows."""
    found: dict[str, dict[str, float]] = {}
    for name, share in RARE.items():
        for method in (OURS, BEFORE):
            chance, covered, widths, alarms, words = np.random.default_rng([seed, n]), [], [], [], []
            intervals = []
            for sample in range(samples):
                rows = np.where(chance.random(n) < share, 5.0, 0.0) - 5 * share + 0.1 * chance.normal(size=n)
                intervals.append(mean_interval(method, rows, EvaluateSpec(resamples=1000, seed=sample)))
            _count(intervals, 0.0, covered, widths, words)
            alarms.append(np.mean([shown for _, shown in intervals]))
            found[f"{method}, {name}"] = _line(covered, widths, alarms, words)
    return found


def tables(n: int, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Coverage, width and alarms for macro-F1 of one system and of the difference of two alike ones."""
    kept = {what: ([], [], [], []) for what in ("of one", "of one, BCa bootstrap", "difference")}
    for number, table in enumerate(TABLES.values()):
        shares = np.array(table) / np.sum(table)
        truth = float(np.mean(2 * np.diag(shares) / (shares.sum(0) + shares.sum(1))))
        chance, intervals = np.random.default_rng([seed, n, number]), {what: [] for what in kept}
        for sample in range(samples):
            spec = EvaluateSpec(resamples=1000, seed=sample)
            left, right = _answers(shares, n, chance)
            found = macro_f1_difference(left, right, spec)[0]
            before = bootstrap(macro_f1(left), n, spec=spec)
            intervals["of one"].append((measure(left, spec)["macro_f1"], False))
            intervals["of one, BCa bootstrap"].append((before, False))
            intervals["difference"].append((found, found.excludes_zero))
        for what, (covered, widths, alarms, words) in kept.items():
            _count(intervals[what], 0.0 if what == "difference" else truth, covered, widths, words)
            alarms.append(np.mean([shown for _, shown in intervals[what]]))
    return {what: _line(*lists) for what, lists in kept.items()}


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


def _count(found: list[tuple[Estimate, bool]], truth: float, covered: list[Any], widths: list[Any], words: list[Any]) -> None:
    covered.append(np.mean([one.low - 1e-9 <= truth <= one.high + 1e-9 for one, _ in found]))
    shown = [one.high - one.low for one, _ in found if math.isfinite(one.high - one.low) and not one.why_none]
    widths.append(np.mean(shown) if shown else 0.0)
    words.append(np.mean([bool(one.why_none) for one, _ in found]))


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
    plan += [("rare", rare, (30, 64, 379), 200), ("macro-F1", tables, (20, 64, 200, 500), 150)]
    for what, measured, sizes, samples in plan:
        for n in sizes[:2] if given.quick else sizes:
            found = measured(n, 20 if given.quick else samples, given.seed)
            results[f"{what}, {n}"] = found
            for method, line in found.items():
                numbers = "  ".join(f"{key} {value:.3f}" for key, value in line.items())
                print(f"{what:8} {n:4}  {method:32} {numbers}", flush=True)
            if what != "rare":
                ours = [line for method, line in found.items() if method not in (BEFORE, "Bonett-Price", "of one, BCa bootstrap")]
                least = FEWER if what in ("means", "groups") and n < 64 else LEAST
                kept &= all(one["coverage"] >= least and one["worst"] >= WORST and one["alarms"] <= ALARMS for one in ours)
    name = "coverage_quick" if given.quick else "coverage"
    print(f"Written: {write_result(name, {'results': results, 'kept': kept}, seed=given.seed, about=about)}")
    return 0 if kept or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())

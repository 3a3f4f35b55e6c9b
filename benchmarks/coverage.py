"""Claim: 95 % intervals of paired shares cover from 20 rows on, those of means nearly; 5 % of tests show what is not there.

    python benchmarks/coverage.py [--quick] [--seed 0]

Shares: systems that are right on the same rows or not, by cells of (only left right, only right right). Means: differences of
seven shapes. Of each, the interval of a run (evaluate/paired), the bootstrap (BCa) that it had before, and for shares that of
Bonett and Price. Printed: coverage in the mean over cells and in the worst one, the mean width, and false alarms where there is
no difference; before, an alarm needed both the bootstrap's interval and a test (exact McNemar, or randomisation).
Claimed: LEAST coverage in the mean (FEWER for means of less than 64 rows), WORST in the worst cell of shares, and ALARMS.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from harness.machine import origin, write_result
from scipy import stats

from lorakeet.evaluate.intervals import Estimate, Floats, mean
from lorakeet.evaluate.paired import Paired, score_difference, typical_difference
from lorakeet.evaluate.spec import EvaluateSpec

LEAST, FEWER, WORST, ALARMS = 0.94, 0.93, 0.92, 0.06
SIZES = (20, 30, 64, 379)
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
SYMMETRIC = ("normal", "laplace", "Student's t, 3 degrees", "log-losses")
SPEC = EvaluateSpec(resamples=1000)


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
    found = mean(np.repeat([1.0, -1.0, 0.0], [b, c, n - b - c]), spec=SPEC)
    return found, found.excludes_zero and b + c > 0 and bool(stats.binomtest(b, b + c).pvalue < 0.05)


def mean_interval(method: str, rows: Floats, spec: EvaluateSpec) -> tuple[Estimate, bool]:
    """The interval of a mean difference, and whether a difference is shown."""
    found, p_value = typical_difference(lambda weights: (weights @ rows) / weights.sum(axis=1), len(rows), spec=spec)
    if method == "randomisation inverted":
        return found, found.excludes_zero
    before = mean(rows, spec=spec)
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
        found[method] = _line(covered, widths, alarms)
    return found


def means(n: int, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Coverage, width and alarms of each method for mean differences of n rows."""
    found: dict[str, dict[str, float]] = {}
    for method in ("randomisation inverted", "BCa bootstrap"):
        covered, widths, alarms = [], [], []
        for number, (name, shape) in enumerate(SHAPES.items()):
            chance = np.random.default_rng([seed, n, number])
            specs = (EvaluateSpec(resamples=1000, seed=number) for number in range(samples))  # draws of its own for each sample
            intervals = [mean_interval(method, shape(chance, n), spec) for spec in specs]
            covered.append(np.mean([one.low <= 0 <= one.high for one, _ in intervals]))
            widths.append(np.mean([one.high - one.low for one, _ in intervals]))
            if name in SYMMETRIC:
                alarms.append(np.mean([shown for _, shown in intervals]))
        found[method] = _line(covered, widths, alarms)
    return found


def _line(covered: list[Any], widths: list[Any], alarms: list[Any]) -> dict[str, float]:
    found = {"coverage": np.mean(covered), "worst": np.min(covered), "width": np.mean(widths), "alarms": np.mean(alarms)}
    return {name: float(value) for name, value in found.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few samples of few rows")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    about = origin()
    results: dict[str, Any] = {}
    kept = True
    for what, measure, samples in (("shares", shares, 4000), ("means", means, 1000)):
        for n in SIZES[:2] if given.quick else SIZES:
            found = measure(n, 60 if given.quick else samples, given.seed)
            results[f"{what}, {n} rows"] = found
            for method, line in found.items():
                numbers = "  ".join(f"{key} {value:.3f}" for key, value in line.items())
                print(f"{what:7} {n:4} rows  {method:24} {numbers}", flush=True)
            ours = next(iter(found.values()))
            worst = WORST if what == "shares" else 0.0
            least = LEAST if what == "shares" or n >= 64 else FEWER
            kept &= ours["coverage"] >= least and ours["worst"] >= worst and ours["alarms"] <= ALARMS
    name = "coverage_quick" if given.quick else "coverage"
    print(f"Written: {write_result(name, {'results': results, 'kept': kept}, seed=given.seed, about=about)}")
    return 0 if kept or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())

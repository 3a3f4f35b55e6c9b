"""Claim: 95 % intervals of rank correlation and quadratic kappa cover 0.91 or more; paired ones hold a difference of 0 as often.

    python benchmarks/agreement_intervals.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from harness.machine import origin, write_result

from lorakeet.evaluate.intervals import Floats, Statistic, bootstrap
from lorakeet.evaluate.paired import statistic_difference
from lorakeet.evaluate.reading.ordered import quadratic_kappa, rank_correlation
from lorakeet.evaluate.spec import EvaluateSpec

SAMPLES, DRAWS, MANY = 300, 600, 60_000
SIZES, LEAST = (30, 64), 0.91
Rows = Callable[[np.random.Generator, int, float], tuple[Floats, Floats, Floats]]  # truth, and two systems' replies


def prices(generator: np.random.Generator, n: int, noise: float) -> tuple[Floats, Floats, Floats]:
    """Lognormal numbers, with factors of noise."""
    truth = generator.lognormal(size=n)
    one, other = (truth * np.exp(noise * generator.normal(size=n)) for _ in range(2))
    return truth, one, other


def stars(generator: np.random.Generator, n: int, noise: float) -> tuple[Floats, Floats, Floats]:
    """Whole numbers from 1 to 5, with rounded noise."""
    truth = generator.integers(1, 6, n).astype(np.float64)
    one, other = (np.clip(np.round(truth + noise * generator.normal(size=n)), 1, 5) for _ in range(2))
    return truth, one, other


def coverage(make: Callable[[Floats, Floats], Statistic], rows: Rows, n: int, noise: float) -> tuple[float, float]:
    """The shares of samples whose interval holds the value of MANY rows, and whose paired interval holds 0."""
    spec = EvaluateSpec(resamples=DRAWS)
    truth, one, _ = rows(np.random.default_rng(1), MANY, noise)
    value, single, paired = float(make(one, truth)(np.ones((1, MANY)))[0]), 0, 0
    for sample in range(SAMPLES):
        truth, one, other = rows(np.random.default_rng([2, sample]), n, noise)
        left, right = make(one, truth), make(other, truth)
        found = bootstrap(left, n, spec=spec)
        single += found.low <= value <= found.high
        paired += not statistic_difference(left, right, n, spec, None)[0].excludes_zero
    return single / SAMPLES, paired / SAMPLES


def main() -> int:
    results, kept = dict[str, Any](), True
    about = origin()
    for make, rows in ((rank_correlation, prices), (quadratic_kappa, stars)):
        for n in SIZES:
            for noise in (0.5, 1.5):
                single, paired = coverage(make, rows, n, noise)
                results[f"{make.__name__}, {n} rows, noise {noise}"] = {"single": single, "paired": paired}
                print(f"{make.__name__:16} {n:3} rows, noise {noise}: single {single:.3f}, paired {paired:.3f}", flush=True)
                kept &= single >= LEAST and paired >= LEAST
    print(f"Written: {write_result('agreement_intervals', {'results': results, 'kept': kept}, seed=0, about=about)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

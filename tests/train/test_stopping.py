"""Best adapter and patience."""

from __future__ import annotations

from lorakeet.train.stopping import EarlyStopping


def seen(losses: list[float], *, min_improvement: float = 0.0) -> tuple[EarlyStopping, list[bool]]:
    watch = EarlyStopping()
    return watch, [watch.see(step, loss, min_improvement=min_improvement) for step, loss in enumerate(losses)]


def test_the_base_is_a_comparison_and_never_the_best() -> None:
    watch, best = seen([1.0, 3.0, 2.0])
    assert (watch.base_loss, watch.best_loss, watch.best_step) == (1.0, 2.0, 2)
    assert best == [False, True, True]


def test_patience_counts_evaluations_since_the_last_improvement() -> None:
    watch, best = seen([9.0, 3.0, 2.0, 2.5, 2.0])
    assert best == [False, True, True, False, False]
    assert watch.stale == 2
    assert watch.exhausted(2)
    assert not watch.exhausted(3)
    assert not watch.exhausted(0)


def test_a_loss_far_above_the_base_is_a_divergence() -> None:
    watch, _ = seen([2.0])
    assert watch.diverged(12.1) and not watch.diverged(11.9)
    assert not EarlyStopping().diverged(100.0)  # without held-out rows there is nothing to compare with


def test_small_gains_are_kept_but_do_not_count() -> None:
    watch, best = seen([9.0, 3.0, 2.95, 2.91, 2.85], min_improvement=0.1)
    assert best == [False, True, True, True, True]
    assert watch.best_step == 4
    assert watch.stale == 0  # 2.85 is 0.15 below the 3.0 that counted last
    watch, _ = seen([9.0, 3.0, 2.95, 2.91], min_improvement=0.1)
    assert watch.stale == 2

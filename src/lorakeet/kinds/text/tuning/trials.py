"""Trials of a search: trained together over one base in generations; the worse half is stopped at each rung."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lorakeet.config import RunConfig
from lorakeet.core.adapter import Adapter
from lorakeet.data.chat import Example
from lorakeet.data.rows import Row
from lorakeet.errors import DataError
from lorakeet.evaluate.compare import Comparison, compare_losses, holm
from lorakeet.evaluate.likelihood import RowLosses, measure_losses
from lorakeet.evaluate.power import paired_power
from lorakeet.evaluate.report.rank_values import MEASURE, Search, TrialResult
from lorakeet.kinds.text.assemble import TextAssembly, add_pairs
from lorakeet.models.generate.score import row_losses
from lorakeet.models.inject import activate, adapter_names, adapter_of, eject
from lorakeet.models.text.cached_states import cache_states
from lorakeet.runs.search_space import SearchPoint, Space, plan_of_point
from lorakeet.train import schedule
from lorakeet.train.progress import counted
from lorakeet.train.stopping import DIVERGED
from lorakeet.train.text.multi_adapter import Member, MultiAdapterTraining, Progress, train_many

RUNGS = (0.25, 0.5)  # shares of a trial's steps after which the worse half is stopped
START = "run file"  # the trial with the run file's settings, which all others are compared with
HALVED, SPENT = "stopped at a rung", "the budget is spent"
RISE = 4  # the warm-up of a short trial is at most a fourth of its steps


@dataclass
class Trial:
    """One choice of settings and its result."""

    name: str
    point: SearchPoint
    at: Progress | None = None
    losses: RowLosses | None = None
    adapter: Adapter | None = None
    handle: Any = None  # of the sampler

    @property
    def whole(self) -> bool:
        """True if it was trained to its own end."""
        return self.at is not None and not self.at.diverged and self.at.done not in (HALVED, SPENT)


@dataclass
class SearchBudget:
    """The time and the tokens that are left. `reserved` tokens, at most half of all, and their time are for the confirmation.

    A quarter more is reserved: a search ends up to a round late, other seeds see other rows, and held-out rows take time too.
    """

    seconds: float | None
    tokens: int | None
    started: float = field(default_factory=time.monotonic)
    used: int = 0
    reserved: int = 0

    def spent(self, more: int = 0) -> bool:
        """True if nothing is left for the search, with `more` tokens of trials in progress."""
        used, late, reserved = self.used + more, False, 1.25 * self.reserved
        if self.seconds is not None:
            late = self.elapsed + min(reserved * self._pace(used), self.seconds / 2) > self.seconds
        return late or (self.tokens is not None and used + min(reserved, self.tokens // 2) >= self.tokens)

    def times(self, tokens: int) -> int | None:
        """How many times `tokens` can be trained with what is left; None without a limit."""
        found = [] if self.tokens is None else [(self.tokens - self.used) // tokens]
        if self.seconds is not None:
            found.append(int((self.seconds - self.elapsed) / (tokens * self._pace(self.used))) if self.used else 0)
        return max(0, min(found)) if found else None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def _pace(self, used: int) -> float:
        """Seconds per token so far, everything beside training included."""
        return self.elapsed / used if used else 0.0


@dataclass(frozen=True)
class SearchRows:
    """The rows that choose, and those that confirm the choice."""

    search: list[Example]
    confirm: list[Example]
    groups: dict[str, str]  # by key of the example; empty if rows have none
    where: str  # a name for the rows of the confirmation
    of: str = ""  # the rows of which those of the search are a half, if they are


def groups_by_key(rows: Sequence[Row]) -> dict[str, str]:
    """The group of each row by its key, its own key where it has none; empty if no row has one."""
    return {row.key: row.group or row.key for row in rows} if any(row.group for row in rows) else {}


class Trials:
    """The trials of a search over one model in memory.

    They are compared by a `measure` on held-out rows, whose differences are in `unit`.
    """

    measure, unit = MEASURE, "nats a token"

    def __init__(
        self,
        setup: TextAssembly,
        space: Space,
        rows: SearchRows,
        budget: SearchBudget,
        console: Console,
        folder: Path | None = None,
    ) -> None:
        """The best values of trials in training are stored in `folder`, or else in memory."""
        self.setup, self.space, self.rows, self.budget, self.console, self.folder = setup, space, rows, budget, console, folder
        self.all: list[Trial] = []
        self.base_loss: float | None = None  # nats per token on the rows of the search, once measured

    @staticmethod
    def check(config: RunConfig) -> None:
        """Raises ConfigError for settings that cannot be searched, before anything is loaded."""

    def power(self, difference: float) -> str:
        """The smallest difference that the rows of the search can show, in words."""
        base = self.losses("base", self.rows.search, None)
        self.base_loss = _mean(base)
        confidence = self.setup.config.evaluate.confidence
        tokens = base.tokens.astype(np.float64)
        return paired_power(base.losses, tokens, confidence=confidence, groups=base.groups).sentence(difference, self.rows.of)

    @property
    def rungs(self) -> tuple[float, ...]:
        """The shares of a trial's steps after which the worse half is stopped."""
        return RUNGS

    def losses(
        self, system: str, rows: Sequence[Example], name: str | None, point: SearchPoint | None = None
    ) -> RowLosses:
        """The losses with the adapter `name` of a trial's `point`; None for the base alone."""
        text, spec = self.setup.text, self.setup.config.train
        activate(text.model, name)
        cache_states(text, rows, micro_tokens=spec.micro_tokens)
        sums, counts = row_losses(text, rows, micro_tokens=spec.micro_tokens, chunk=spec.head_chunk)
        groups = tuple(self.rows.groups.get(row.key, row.key) for row in rows) if self.rows.groups else None
        return RowLosses(system, sums, counts.astype(np.int64), groups)

    def run(self, study: Any, together: int) -> None:
        """Trains generations until the budget is spent; the first one includes the run file's settings, trained to their end."""
        while not self.all or not self.budget.spent():
            fresh = [] if self.all else [Trial(START, SearchPoint())]
            fresh += [self._ask(study, len(self.all) + number) for number in range(len(fresh), together)]
            self.generation(fresh, rungs=self.rungs)
            for trial in fresh:
                if trial.handle is not None:
                    _tell(study, trial, lost=(self.base_loss or 0.0) + DIVERGED)

    def _ask(self, study: Any, count: int) -> Trial:
        handle = study.ask()

        def number(name: str, low: float, high: float) -> float:
            return float(handle.suggest_float(name, low, high, log=True))

        point = self.space.draw(number, handle.suggest_categorical)
        return Trial(f"trial {count}", point, handle=handle)

    def generation(self, trials: Sequence[Trial], *, rungs: Sequence[float], steps: int | None = None) -> None:
        """Trains `trials` together, sets their losses, and takes their adapters out of the model.

        With `steps`, each has so many steps and no held-out evaluation before the end. Its warm-up is at most a fourth of them,
        and the rate is constant then: the first steps of a long run would all be at a fraction of its rate.
        """
        names = {f"trial_{index}": trial for index, trial in enumerate(trials)}
        held_out = self.rows.search if steps is None else []
        try:
            members = [self.member(name, trial, held_out, steps=steps) for name, trial in names.items()]
            left = list(rungs)

            measure = [name for name, trial in names.items() if trial.name == START]

            def watch(many: MultiAdapterTraining) -> None:
                _halve(many, left, keep=measure)
                for at in many.progress:
                    if at.watch.base_loss is None:  # of members without held-out rows
                        at.watch.base_loss = self.base_loss
                if self.budget.spent(sum(at.tokens for at in many.progress)):
                    for name in names:
                        many.stop(name, SPENT)

            for (name, trial), at in zip(names.items(), self.train(members, watch), strict=True):
                trial.at = at
                self.budget.used += at.tokens
                if not at.diverged:
                    trial.losses = self._finite(trial, name)
        finally:
            for name in names:
                self.take_out(name)
        self.all += trials
        measured = any(trial.losses is not None for trial in self.all)
        best = self.best() if measured else self.all[0]
        for trial in self.all[1:]:
            if trial is not best:  # which may be confirmed, as that of the run file
                trial.adapter = None
        for trial in trials:
            self._say(trial)

    def train(self, members: Sequence[Member], watch: Callable[[MultiAdapterTraining], None] | None = None) -> list[Progress]:
        """Trains `members`, which are on the model, to their ends, within the run's memory."""
        kept = self.setup.residency
        about: dict[str, Any] = {
            "spill": kept.spilled_states(self.setup.text), "together": kept.way.together, "budget": kept.budget.limit,
            "folder": self.folder,
        }  # fmt: skip
        what, steps = f"{len(members)} adapters train together, steps", max(each.spec.total_steps(1) for each in members)
        with counted(self.console, what, steps) as advance:

            def after_round(many: MultiAdapterTraining) -> None:
                advance(1)
                if watch is not None:
                    watch(many)

            return train_many(self.setup.text, members, watch=after_round, **about)

    def take_out(self, name: str) -> None:
        """Takes the adapter `name` out of the model, if it is there."""
        if name in adapter_names(self.setup.text.model):
            eject(self.setup.text.model, name)

    def _finite(self, trial: Trial, name: str) -> RowLosses | None:
        """The losses on the rows of the search; None, with the trial marked as diverged, if not finite or far too high."""
        text, at = self.setup.text, trial.at
        assert at is not None
        trial.adapter = adapter_of(text.model, name, base=text.name)
        try:
            found = self.losses(trial.name, self.rows.search, name, trial.point)
        except DataError:
            at.diverged, at.done = True, f"step {at.step}: losses on held-out rows are not finite"
            return None
        loss = _mean(found)
        if at.beyond_recovery(loss):
            at.diverged, at.done = True, f"step {at.step}: the held-out loss is {loss:.4g}{at.unit}"
            return None
        return found

    def member(self, name: str, trial: Trial, held_out: Sequence[Example], seed: int = 0, steps: int | None = None) -> Member:
        """Adds the pairs of `trial` to the model as `name`, with the run's seed plus `seed`; `steps` as in `generation`."""
        setup = self.setup
        plan = plan_of_point(setup.text, self.space, trial.point)
        spec = self.space.resolved(trial.point).train  # of the run's length, with held-out losses at the rungs
        every = max(1, setup.steps // 8) if spec.evaluate_every is None else spec.evaluate_every
        spec = replace(spec, steps=setup.steps, evaluate_every=every, seed=spec.seed + seed)
        if steps is not None:  # at a constant rate after the run's warm-up, which is at most a fourth of them
            rise = min(schedule.warmup_steps(spec.total_steps(1), spec.warmup_fraction), steps // RISE)
            warmup = max(0.0, (rise - 0.5) / steps)  # rounded up again
            spec = replace(spec, steps=steps, schedule="constant", warmup_fraction=warmup)
        self.setup = replace(setup, text=add_pairs(setup, plan, seed=spec.seed, name=name))
        return Member(name, spec, setup.train.examples, held_out)

    def best(self) -> Trial:
        """The trial of lowest held-out loss, among those trained to their end if there are any."""
        measured = [trial for trial in self.all if trial.losses is not None]
        whole = [trial for trial in measured if trial.whole] or measured
        if not whole:
            raise DataError(
                "Every trial diverged: the learning rates are far too high, or the rows are broken. Lower "
                "--rate-factors or train.learning_rate."
            )
        return min(whole, key=loss_of)

    def result(self, chosen: Trial, conclusion: str, power: str, best: Trial | None = None) -> Search:
        """Every trial with its interval and its comparison with the run file's settings, Holm-corrected.

        Which trial was `chosen`, and which was `best` before the confirmation.
        """
        start, spec = self.all[0], self.setup.config.evaluate
        whole = [trial for trial in self.all[1:] if trial.whole]  # one that was stopped is worse for that reason alone
        others = [(trial, trial.losses) for trial in whole if trial.losses is not None] if start.losses is not None else []
        # those that were stopped count too: the same rows chose them
        stopped = sum(not trial.whole and trial.losses is not None for trial in self.all[1:])
        compared = [partial(compare_losses, losses, start.losses) for _, losses in others if start.losses is not None]
        against = holm(compared, spec, beside=stopped)
        by_name = {trial.name: one for (trial, _), one in zip(others, against, strict=True)}
        results = tuple(self._line(trial, by_name.get(trial.name)) for trial in self.all)
        rows = len(self.rows.search) // self.setup.config.train.answers
        named = "" if best is None else best.name
        return Search(results, rows, power, chosen.name, conclusion, named, self.measure)

    def _line(self, trial: Trial, against: Comparison | None) -> TrialResult:
        at = trial.at
        assert at is not None
        loss = None if trial.losses is None else measure_losses(trial.losses, self.setup.config.evaluate)["loss"]
        words = trial.point.words(self.space.rate)
        return TrialResult(trial.name, words, at.step, at.tokens, at.done, at.diverged, loss, against)

    def _say(self, trial: Trial) -> None:
        at = trial.at
        assert at is not None
        what = "held-out loss" if self.measure == MEASURE else f"held-out {self.measure}"
        loss = "diverged" if trial.losses is None else f"{what} {loss_of(trial):.4f}"
        said = f"{trial.name}: {trial.point.words(self.space.rate)}: {loss} after {at.step} steps ({at.done})"
        self.console.print(said, markup=False, soft_wrap=True)


def loss_of(trial: Trial) -> float:
    """The held-out loss of a trial, in nats per token or of a pair."""
    assert trial.losses is not None
    return _mean(trial.losses)


def _mean(found: RowLosses) -> float:
    return float(found.losses.sum() / found.tokens.sum())


def _halve(many: MultiAdapterTraining, left: list[float], *, keep: Sequence[str]) -> None:
    """Stops the worse half by held-out loss, once every trial has been measured at the next rung.

    Trials in `keep` are ranked with the others but go on: what trials are compared with must be trained as long as the best one.
    """
    learning = [at for at in many.progress if not at.done]
    if not left or len(learning) < 2 or any(at.step < left[0] * at.total for at in learning):
        return
    measured = [at for at in learning if at.held_out and at.held_out[-1][0] >= left[0] * at.total]
    seen = [(at.held_out[-1][1].value, at.member.name) for at in measured]
    if len(seen) < len(learning):
        return
    while left and all(at.held_out[-1][0] >= left[0] * at.total for at in measured):
        left.pop(0)  # one evaluation stops one half, even if it is past several rungs
    for _, name in sorted(seen)[(len(seen) + 1) // 2 :]:
        if name not in keep:
            many.stop(name, HALVED)


def _tell(study: Any, trial: Trial, lost: float) -> None:
    """Reports a trial to the sampler: its loss, as pruned if it was stopped, or `lost` if it diverged."""
    from optuna.trial import TrialState

    if trial.losses is None:
        study.tell(trial.handle, lost)
        return
    if trial.whole:
        study.tell(trial.handle, loss_of(trial))
        return
    assert trial.at is not None
    trial.handle.report(loss_of(trial), trial.at.step)
    study.tell(trial.handle, state=TrialState.PRUNED)

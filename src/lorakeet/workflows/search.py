"""Trials of a search: trained in generations over one base, the worse given up on the way, the best confirmed on other rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Console
from torch import nn

from lorakeet.core.adapter import Adapter
from lorakeet.data.chat import Example
from lorakeet.errors import DataError
from lorakeet.evaluate.compare import Comparison, compare_losses, holm
from lorakeet.evaluate.likelihood import RowLosses, measure_losses
from lorakeet.evaluate.over_seeds import compare_over_seeds
from lorakeet.evaluate.power import paired_power
from lorakeet.evaluate.rank_values import Search, TrialResult
from lorakeet.evaluate.wording import signed
from lorakeet.models.inject import activate, adapter_names, adapter_of, attach, eject
from lorakeet.models.score import row_losses
from lorakeet.train.many import Many, Member, Progress, train_many
from lorakeet.train.spec import TrainSpec
from lorakeet.workflows.assemble import Assembly, begin_pairs
from lorakeet.workflows.search_space import Point, Space, plan_of_point

RUNGS = (0.25, 0.5)  # shares of a trial's steps after which the worse half is given up
START = "run file"  # the trial with the run file's own settings, which all others are compared with
CONFIRM = "confirm"
HALVED, SPENT = "given up at a rung", "the budget is spent"
TRIED = "the steps of the trial are done"


@dataclass
class Trial:
    """One choice of settings and what became of it."""

    name: str
    point: Point
    at: Progress | None = None
    losses: RowLosses | None = None
    adapter: Adapter | None = None
    asked: Any = None  # the sampler's own handle

    @property
    def whole(self) -> bool:
        """Whether it was trained to its own end."""
        return self.at is not None and not self.at.diverged and self.at.done not in (HALVED, SPENT)


@dataclass
class Budget:
    """What is left of the time and the tokens. `kept` tokens are for the confirmation: at most half of all, and their time.

    A quarter more is kept: the search ends up to a round late, other seeds see other rows, and held-out rows take time too.
    """

    seconds: float | None
    tokens: int | None
    began: float = field(default_factory=time.monotonic)
    used: int = 0
    kept: int = 0

    def spent(self, more: int = 0) -> bool:
        """Whether nothing is left for the search, `more` tokens of trials in progress counted."""
        used, late, kept = self.used + more, False, 1.25 * self.kept
        if self.seconds is not None:
            late = self.elapsed + min(kept * self._pace(used), self.seconds / 2) > self.seconds
        return late or (self.tokens is not None and used + min(kept, self.tokens // 2) >= self.tokens)

    def times(self, tokens: int) -> int | None:
        """How often so many tokens can be trained with what is left; None where there is no limit."""
        found = [] if self.tokens is None else [(self.tokens - self.used) // tokens]
        if self.seconds is not None:
            found.append(int((self.seconds - self.elapsed) / (tokens * self._pace(self.used))) if self.used else 0)
        return max(0, min(found)) if found else None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def _pace(self, used: int) -> float:
        """Seconds a token so far, all that was done beside training counted."""
        return self.elapsed / used if used else 0.0


@dataclass(frozen=True)
class SearchRows:
    """Which rows choose and which confirm."""

    search: list[Example]
    confirm: list[Example]
    groups: dict[str, str]  # by key of the example; empty where rows have none
    where: str  # what the rows of the confirmation are called


class Trials:
    """Trials over one model in memory."""

    def __init__(self, setup: Assembly, space: Space, rows: SearchRows, budget: Budget, console: Console) -> None:
        self.setup, self.space, self.rows, self.budget, self.console = setup, space, rows, budget, console
        self.all: list[Trial] = []
        self.seeds = 1  # with which the winner was confirmed
        self.unconfirmed = ""  # why it could not be, where a seed of it diverged

    def power(self, difference: float) -> str:
        """What the rows of the search can show, from the bare base's losses."""
        base = self.losses("base", self.rows.search, None)
        confidence = self.setup.config.evaluate.confidence
        tokens = base.tokens.astype(np.float64)
        return paired_power(base.losses, tokens, confidence=confidence, groups=base.groups).sentence(difference)

    def losses(self, system: str, rows: Sequence[Example], name: str | None) -> RowLosses:
        """The losses of the adapter `name` on the model, None for the bare base."""
        text, spec = self.setup.text, self.setup.config.train
        activate(text.model, name)
        sums, counts = row_losses(text, rows, micro_tokens=spec.micro_tokens, chunk=spec.head_chunk)
        groups = tuple(self.rows.groups.get(row.key, row.key) for row in rows) if self.rows.groups else None
        return RowLosses(system, sums, counts.astype(np.int64), groups)

    def run(self, study: Any, together: int) -> None:
        """Generations until the budget is spent; the run file's own settings are in the first one, to their end."""
        while not self.all or not self.budget.spent():
            fresh = [] if self.all else [Trial(START, Point())]
            fresh += [self._ask(study, len(self.all) + number) for number in range(len(fresh), together)]
            self.generation(fresh, rungs=RUNGS)
            for trial in fresh:
                if trial.asked is not None:
                    _tell(study, trial)

    def _ask(self, study: Any, count: int) -> Trial:
        asked = study.ask()

        def number(name: str, low: float, high: float) -> float:
            return float(asked.suggest_float(name, low, high, log=True))

        point = self.space.draw(number, asked.suggest_categorical)
        return Trial(f"trial {count}", point, asked=asked)

    def generation(self, trials: Sequence[Trial], *, rungs: Sequence[float], steps: int | None = None) -> None:
        """Trains `trials` in one pass over the base; their losses are on them, the model is bare again afterwards.

        `steps`: only so many of the run's first steps, with no look at held-out rows before they are done.
        """
        text, names = self.setup.text, {f"trial_{index}": trial for index, trial in enumerate(trials)}
        held_out = self.rows.search if steps is None else []
        try:
            members = [self._member(name, trial, held_out) for name, trial in names.items()]
            left = list(rungs)

            measure = [name for name, trial in names.items() if trial.name == START]

            def watch(many: Many) -> None:
                _halve(many, left, keep=measure)
                for at in many.progress:
                    if steps is not None and at.step >= steps:
                        many.stop(at.member.name, TRIED)
                if self.budget.spent(sum(at.tokens for at in many.progress)):
                    for name in names:
                        many.stop(name, SPENT)

            kept = self.setup.arrangement
            ended = train_many(text, members, watch=watch, aside=kept.aside(), together=kept.together)
            for (name, trial), at in zip(names.items(), ended, strict=True):
                trial.at = at
                self.budget.used += at.tokens
                if not at.diverged:
                    trial.losses = self._finite(trial, name)
        finally:
            for name in names:
                _eject(text.model, name)
        self.all += trials
        self._keep_best()
        for trial in trials:
            self._say(trial)

    def _keep_best(self) -> None:
        """Lets go of all adapters but those that may be confirmed: the run file's, and the best one so far."""
        measured = any(trial.losses is not None for trial in self.all)
        best = self.best() if measured else self.all[0]
        for trial in self.all[1:]:
            if trial is not best:
                trial.adapter = None

    def _finite(self, trial: Trial, name: str) -> RowLosses | None:
        """Its losses on the rows of the search; a trial whose losses are no numbers has diverged after all."""
        text, at = self.setup.text, trial.at
        assert at is not None
        trial.adapter = adapter_of(text.model, name, base=text.name)
        try:
            return self.losses(trial.name, self.rows.search, name)
        except DataError:
            at.diverged, at.done = True, f"step {at.step}: losses on held-out rows are no numbers"
            return None

    def _member(self, name: str, trial: Trial, held_out: Sequence[Example], seed: int = 0) -> Member:
        setup = self.setup
        plan = plan_of_point(setup.text, self.space, trial.point)
        spec = self._train_spec(self.space.resolved(trial.point).train, seed)
        begin_pairs(setup, plan, seed=spec.seed, name=name)
        return Member(name, spec, setup.train.examples, held_out)

    def _train_spec(self, spec: TrainSpec, seed: int) -> TrainSpec:
        """The run's own length, with held-out losses at the rungs."""
        every = max(1, self.setup.steps // 8) if spec.evaluate_every is None else spec.evaluate_every
        return replace(spec, steps=self.setup.steps, evaluate_every=every, seed=spec.seed + seed)

    def best(self) -> Trial:
        """The trial of lowest held-out loss, of those that were trained to their end where there are any."""
        measured = [trial for trial in self.all if trial.losses is not None]
        whole = [trial for trial in measured if trial.whole] or measured
        if not whole:
            raise DataError(
                "Every trial diverged: the learning rates are far too high for these rows, or the rows are broken. Lower "
                "--rate-factors or train.learning_rate."
            )
        return min(whole, key=loss_of)

    def confirm(self, winner: Trial, seeds: int, together: int = 2) -> Comparison | None:
        """The winner against the run file's settings on rows that the search never saw.

        With 2 seeds or more, each is trained anew from so many seeds that the search did not see either: the seed of the search
        had a part in choosing. As many as the budget leaves, which is said; below 2, the adapters of the search are compared.
        None where the winner is the run file's settings, or where these or the winner diverge.
        """
        start = self.all[0]
        if winner is start or start.adapter is None or start.losses is None:
            return None
        seeds = self._affordable(winner, seeds)
        self.seeds = max(1, seeds)
        sides: tuple[list[RowLosses], list[RowLosses]] = ([], [])
        if seeds < 2:
            for side, trial in zip(sides, (winner, start), strict=True):
                assert trial.adapter is not None
                attach(self.setup.text.model, trial.adapter, CONFIRM)
                side.append(self.losses(trial.name, self.rows.confirm, CONFIRM))
                _eject(self.setup.text.model, CONFIRM)
        at_once = max(1, together // 2)
        for first in range(1, seeds + 1 if seeds > 1 else 1, at_once):
            if self.unconfirmed:
                break
            for losses in self._again((winner, start), range(first, min(first + at_once, seeds + 1))):
                for side, found in zip(sides, losses, strict=True):
                    side.append(found)
        return None if self.unconfirmed else compare_over_seeds(*sides, self.setup.config.evaluate)

    def chosen(self, winner: Trial, confirmed: Comparison | None) -> Trial:
        """Whose settings to train with: the winner's where they are shown to be better, or the run file's diverged.

        A trial that the budget ended early shows it only by new seeds, which are trained to their end.
        """
        start = self.all[0]
        shown = confirmed is not None and confirmed.verdict == "better" and (winner.whole or self.seeds > 1)
        return winner if shown or start.losses is None else start

    def _affordable(self, winner: Trial, seeds: int) -> int:
        """How many seeds of both settings the budget still trains, said where they are fewer than `seeds`; 1 where below 2."""
        tokens = sum(_whole_tokens(trial.at) for trial in (winner, self.all[0]) if trial.at is not None)
        times = self.budget.times(max(1, tokens))
        if seeds < 2 or times is None or times >= seeds:
            return seeds
        found = times if times > 1 else 1
        self.console.print(
            f"The budget leaves {found} of {seeds} seeds for the confirmation. Raise it for more.", markup=False, soft_wrap=True
        )
        return found

    def _again(self, trials: Sequence[Trial], seeds: Sequence[int]) -> list[list[RowLosses]]:
        """By seed the losses of `trials`, trained with it, on the rows of the confirmation; where one diverges that is noted."""
        model, kept, found = self.setup.text.model, self.setup.arrangement, []
        names = {f"{number}_{seed}": (trial, seed) for seed in seeds for number, trial in enumerate(trials)}
        try:
            members = [self._member(name, trial, self.rows.search, seed) for name, (trial, seed) in names.items()]
            ended = train_many(self.setup.text, members, aside=kept.aside(), together=kept.together)
            self.budget.used += sum(at.tokens for at in ended)
            for (trial, seed), at in zip(names.values(), ended, strict=True):
                if at.diverged and not self.unconfirmed:
                    self.unconfirmed = f"with seed {self.setup.config.train.seed + seed} {trial.name} diverged ({at.done})"
            for seed in () if self.unconfirmed else seeds:
                names_of_seed = [f"{number}_{seed}" for number in range(len(trials))]
                found.append([
                    self.losses(trial.name, self.rows.confirm, name) for trial, name in zip(trials, names_of_seed, strict=True)
                ])  # fmt: skip
        except DataError as error:
            self.unconfirmed = f"losses under another seed are no numbers ({error})"
        finally:
            for name in names:
                _eject(model, name)
        return found

    def result(self, winner: Trial, confirmed: Comparison | None, power: str) -> Search:
        """Every trial with its interval and its comparison with the run file's settings, Holm-corrected."""
        start, spec = self.all[0], self.setup.config.evaluate
        whole = [trial for trial in self.all[1:] if trial.whole]  # one that was given up is behind for that reason alone
        others = [(trial, trial.losses) for trial in whole if trial.losses is not None] if start.losses is not None else []
        given_up = sum(not trial.whole and trial.losses is not None for trial in self.all[1:])  # the same rows chose them too
        compared = [compare_losses(losses, start.losses, spec) for _, losses in others if start.losses is not None]
        against = holm(compared, beside=given_up)
        by_name = {trial.name: one for (trial, _), one in zip(others, against, strict=True)}
        results = tuple(self._line(trial, by_name.get(trial.name)) for trial in self.all)
        return Search(results, len(self.rows.search), power, winner.name, self._conclusion(winner, confirmed))

    def _line(self, trial: Trial, against: Comparison | None) -> TrialResult:
        at = trial.at
        assert at is not None
        loss = None if trial.losses is None else measure_losses(trial.losses, self.setup.config.evaluate)["loss"]
        words = trial.point.words(self.space.rate)
        return TrialResult(trial.name, words, at.step, at.tokens, at.done, at.diverged, loss, against)

    def _conclusion(self, winner: Trial, confirmed: Comparison | None) -> str:
        words, start = winner.point.words(self.space.rate), self.all[0]
        if confirmed is None:
            if winner is start:
                found = "No trial was better than the run file's own settings; keep them."
            elif self.unconfirmed:
                found = f"The best trial is {winner.name} ({words}), unconfirmed: {self.unconfirmed}. The run file's stay."
            else:
                found = f"The run file's own settings diverged; the best trial is {winner.name} ({words}), unconfirmed."
            return found + self._cut_short(winner, confirmed)
        gap = confirmed.difference
        seeds = f"{self.seeds} new seeds each" if self.seeds > 1 else f"of seed {self.setup.config.train.seed} alone"
        numbers = f"{signed(gap.value, 4)} nats a token [{signed(gap.low, 4)}, {signed(gap.high, 4)}], n = {gap.n}, {seeds}"
        if confirmed.verdict == "no difference shown":
            both = f"{winner.name} ({words}) and the run file's settings"
            found = f"No difference shown between {both} on {self.rows.where}: {numbers}."
        else:
            name, verdict = winner.name[:1].upper() + winner.name[1:], confirmed.verdict
            found = f"{name} ({words}) is {verdict} than the run file's settings on {self.rows.where}: {numbers}."
        return found + self._cut_short(winner, confirmed)

    def _cut_short(self, winner: Trial, confirmed: Comparison | None) -> str:
        """A sentence, after a space, where the budget ended the best trial before its end; else empty."""
        at = winner.at
        if at is None or at.done != SPENT:
            return ""
        early = f" The budget ended all trials early, this one after {at.step} of {at.total} steps"
        if confirmed is not None and self.seeds > 1:
            return f"{early}; the new seeds were trained to their end."
        stays = " The run file's settings stay." if self.all[0].losses is not None else ""
        return f"{early}: a short trial favours high rates.{stays} Raise the budget."

    def _say(self, trial: Trial) -> None:
        at = trial.at
        assert at is not None
        loss = "diverged" if trial.losses is None else f"held-out loss {loss_of(trial):.4f}"
        said = f"{trial.name}: {trial.point.words(self.space.rate)}: {loss} after {at.step} steps ({at.done})"
        self.console.print(said, markup=False, soft_wrap=True)


def _whole_tokens(at: Progress) -> int:
    """The tokens of a trial, as many as it would have had where the budget ended it."""
    return at.tokens if at.done != SPENT else at.tokens * at.total // max(1, at.step)


def loss_of(trial: Trial) -> float:
    """Its held-out loss in nats a token."""
    assert trial.losses is not None
    return float(trial.losses.losses.sum() / trial.losses.tokens.sum())


def _halve(many: Many, left: list[float], *, keep: Sequence[str]) -> None:
    """Gives up the worse half by held-out loss once every trial has passed the next rung.

    Those to `keep` are ranked like all others and stay: what trials are compared with must be trained as long as the best one.
    """
    learning = [at for at in many.progress if not at.done]
    if not left or len(learning) < 2 or any(at.step < left[0] * at.total for at in learning):
        return
    seen = [(at.held_out[-1][1].value, at.member.name) for at in learning if at.held_out and at.held_out[-1][0] > 0]
    if len(seen) < len(learning):
        return
    left.pop(0)
    for _, name in sorted(seen)[(len(seen) + 1) // 2 :]:
        if name not in keep:
            many.stop(name, HALVED)


def _tell(study: Any, trial: Trial) -> None:
    """The result to the sampler: a loss, one that was given up, or a failure."""
    from optuna.trial import TrialState

    if trial.losses is None:
        study.tell(trial.asked, state=TrialState.FAIL)
        return
    if trial.whole:
        study.tell(trial.asked, loss_of(trial))
        return
    assert trial.at is not None
    trial.asked.report(loss_of(trial), trial.at.step)
    study.tell(trial.asked, state=TrialState.PRUNED)


def _eject(model: nn.Module, name: str) -> None:
    """Takes the adapter out, if it got as far as being on the model."""
    if name in adapter_names(model):
        eject(model, name)

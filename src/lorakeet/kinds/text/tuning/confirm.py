"""Confirms the winner of a search against the run file's settings, on rows and with seeds that did not choose it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakeet.errors import DataError
from lorakeet.evaluate.compare import Comparison, compare_over_seeds
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.wording import signed, span
from lorakeet.kinds.text.tuning.trials import SPENT, Trial, Trials
from lorakeet.models.inject import attach

CONFIRM = "confirm"


@dataclass
class Confirmation:
    """The result of the `winner` of `trials` on other rows.

    `found` is None if it was not compared with the run file's settings: it has these settings, or one of the two diverged.
    """

    trials: Trials
    winner: Trial
    seeds: int = 1  # of the confirmation
    unconfirmed: str = ""  # why not, if a seed diverged
    found: Comparison | None = None

    @property
    def chosen(self) -> Trial:
        """The trial whose settings to train with: the winner if it is shown to be better, or if the run file's diverged.

        A trial that the budget ended early is shown to be better by new seeds only, which are trained to their end.
        """
        start, found = self.trials.all[0], self.found
        shown = found is not None and found.verdict == "better" and (self.winner.whole or self.seeds > 1)
        return self.winner if shown or start.losses is None else start

    @property
    def conclusion(self) -> str:
        """The result in words."""
        trials, winner, confirmed = self.trials, self.winner, self.found
        words, start = winner.point.words(trials.space.rate), trials.all[0]
        if confirmed is None:
            if winner is start:
                found = "No trial was better than the run file's own settings; keep them."
            elif self.unconfirmed:
                found = f"The best trial is {winner.name} ({words}), unconfirmed: {self.unconfirmed}. The run file's stay."
            else:
                found = f"The run file's own settings diverged; the best trial is {winner.name} ({words}), unconfirmed."
            return found + self._cut_short
        gap = confirmed.difference
        seeds = f"{self.seeds} new seeds each" if self.seeds > 1 else f"of seed {trials.setup.config.train.seed} alone"
        numbers = f"{signed(gap.value, 4)} {trials.unit} [{span(gap, 4, signs=True, between=', ')}], n = {gap.n}, {seeds}"
        if confirmed.verdict == "no difference shown":
            both = f"{winner.name} ({words}) and the run file's settings"
            found = f"No difference shown between {both} on {trials.rows.where}: {numbers}."
        else:
            name, verdict = winner.name[:1].upper() + winner.name[1:], confirmed.verdict
            found = f"{name} ({words}) is {verdict} than the run file's settings on {trials.rows.where}: {numbers}."
        return found + self._cut_short

    @property
    def _cut_short(self) -> str:
        """A sentence, after a space, if the budget ended the best trial early; else empty."""
        at = self.winner.at
        if at is None or at.done != SPENT:
            return ""
        early = f" The budget ended all trials early, this one after {at.step} of {at.total} steps"
        if self.found is not None and self.seeds > 1:
            return f"{early}; the new seeds were trained to their end."
        stays = " The run file's settings stay." if self.trials.all[0].losses is not None else ""
        return f"{early}: a short trial favours high rates.{stays} Raise the budget."


def confirm(trials: Trials, winner: Trial, seeds: int, together: int = 2) -> Confirmation:
    """Compares the winner with the run file's settings on rows that the search never saw.

    With 2 seeds or more, both are trained again with as many new seeds, since the search's own seed helped to choose. If the
    budget leaves fewer, a line says so; with fewer than 2, the adapters of the search are compared.
    """
    made, start = Confirmation(trials, winner), trials.all[0]
    if winner is start or start.adapter is None or start.losses is None:
        return made
    seeds = _affordable(trials, winner, seeds)
    made.seeds = max(1, seeds)
    sides: tuple[list[RowLosses], list[RowLosses]] = ([], [])
    if seeds < 2:
        for side, trial in zip(sides, (winner, start), strict=True):
            assert trial.adapter is not None
            attach(trials.setup.text.model, trial.adapter, CONFIRM)
            side.append(trials.losses(trial.name, trials.rows.confirm, CONFIRM, trial.point))
            trials.take_out(CONFIRM)
    at_once = max(1, together // 2)
    for first in range(1, seeds + 1 if seeds > 1 else 1, at_once):
        if made.unconfirmed:
            break
        for losses in _again(made, (winner, start), range(first, min(first + at_once, seeds + 1))):
            for side, found in zip(sides, losses, strict=True):
                side.append(found)
    made.found = None if made.unconfirmed else compare_over_seeds(*sides, trials.setup.config.evaluate)
    return made


def _affordable(trials: Trials, winner: Trial, seeds: int) -> int:
    """How many of `seeds` the budget still allows for both settings; prints a line if fewer. At least 1."""
    ends = [trial.at for trial in (winner, trials.all[0]) if trial.at is not None]
    # of a trial that the budget ended, those that it would have had
    tokens = sum(at.tokens if at.done != SPENT else at.tokens * at.total // max(1, at.step) for at in ends)
    times = trials.budget.times(max(1, tokens))
    if seeds < 2 or times is None or times >= seeds:
        return seeds
    found = times if times > 1 else 1
    trials.console.print(
        f"The budget leaves {found} of {seeds} seeds for the confirmation. Raise it for more.", markup=False, soft_wrap=True
    )
    return found


def _again(made: Confirmation, both: Sequence[Trial], seeds: Sequence[int]) -> list[list[RowLosses]]:
    """For each seed the losses of `both` on the rows of the confirmation; sets `made.unconfirmed` if one diverges."""
    trials, found = made.trials, []
    setup = trials.setup
    names = {f"{number}_{seed}": (trial, seed) for seed in seeds for number, trial in enumerate(both)}
    try:
        members = [trials.member(name, trial, trials.rows.search, seed) for name, (trial, seed) in names.items()]
        ended = trials.train(members)
        trials.budget.used += sum(at.tokens for at in ended)
        for (trial, seed), at in zip(names.values(), ended, strict=True):
            if at.diverged and not made.unconfirmed:
                made.unconfirmed = f"with seed {setup.config.train.seed + seed} {trial.name} diverged ({at.done})"
        for seed in () if made.unconfirmed else seeds:
            of_seed = [(trial, f"{number}_{seed}") for number, trial in enumerate(both)]
            found.append([trials.losses(trial.name, trials.rows.confirm, name, trial.point) for trial, name in of_seed])
    except DataError as error:
        made.unconfirmed = f"losses with another seed are not finite ({error})"
    finally:
        for name in names:
            trials.take_out(name)
    return found

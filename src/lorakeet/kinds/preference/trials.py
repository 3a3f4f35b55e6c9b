"""Trials on preferences: trained on pairs against one reference, and compared by the loss of a pair or by what they prefer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from lorakeet.config import RunConfig
from lorakeet.data.chat import Example
from lorakeet.errors import ConfigError
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.kinds.preference.evaluate import (
    as_reference,
    begins_at_reference,
    reference_adapter,
    reference_path,
)
from lorakeet.kinds.preference.kind import KIND, largest_difference
from lorakeet.kinds.preference.spec import KTO, needs_reference, preference_of, reference_of
from lorakeet.kinds.preference.task import Floats, Preferences, Reference, not_preferred, pair_losses
from lorakeet.kinds.text.continued import require_same_base
from lorakeet.kinds.text.tuning.trials import Trial, Trials
from lorakeet.models.generate.score import row_losses
from lorakeet.models.inject import activate
from lorakeet.registry import START
from lorakeet.runs.search_space import SearchPoint
from lorakeet.train.text.multi_adapter import Member

UNKNOWN_POWER = (
    "{pairs} held-out pairs choose. What difference they can show depends on what is trained; each comparison has its interval."
)


class PairTrials(Trials):
    """The trials of a search over train.objective other than sft.

    They are compared by the loss of a held-out pair or, where β varies and losses are of no common measure, by the share of
    pairs whose chosen answer is not preferred (of kto: of answers on the wrong side of the estimated KL).
    """

    def __init__(self, *given: Any, **more: Any) -> None:
        """As of `Trials`. Raises ConfigError for a reference that is an adapter of another base."""
        super().__init__(*given, **more)
        self.by_share = len(self.space.betas) > 0
        self.measure = "share of pairs not preferred" if self.by_share else "loss of a pair"
        self.unit = f"in the {self.measure}"
        self._held, path = reference_adapter(self.setup.config), reference_path(self.setup.config)
        if self._held is not None and path is not None:
            require_same_base(path, self._held, self.setup.text, self.setup.config)
        self._known: dict[SearchPoint | None, tuple[Floats, dict[bytes, Floats]]] = {}
        rows = (*self.setup.dataset.train, *self.setup.dataset.held_out, *self.setup.dataset.test)
        self._wanted = {row.key: bool(row.desirable) for row in rows}

    @staticmethod
    def check(config: RunConfig) -> None:
        KIND.check(config, 1)
        if config.train.keep_prefix_states:
            raise ConfigError(
                f"train.keep_prefix_states is true, but a search over {config.train.objective} computes its reference with every "
                "block. Leave it out."
            )

    @property
    def rungs(self) -> tuple[float, ...]:
        """No trial is stopped on the way where the losses of different β would have to be compared for that."""
        return () if self.by_share else super().rungs

    def power(self, difference: float) -> str:
        base = self.losses("base", self.rows.search, None)
        self.base_loss = float(base.losses.mean())
        return UNKNOWN_POWER.format(pairs=len(self.rows.search) // 2)

    def losses(
        self, system: str, rows: Sequence[Example], name: str | None, point: SearchPoint | None = None
    ) -> RowLosses:
        activate(self.setup.text.model, name)
        sums, tokens = self._log_probs(rows)
        config = self.space.resolved(point or SearchPoint())
        spec, objective = preference_of(config), config.train.objective
        reference = None
        if needs_reference(objective):
            if name is None and self._held is None:
                reference = sums  # the base is its own
            else:
                known = self._reference(point or SearchPoint(), name)[1]
                reference = np.concatenate([known[key] for key in _keys(rows)])
        if self.by_share:
            found = not_preferred(objective, spec, sums, reference, tokens, desirable=self._desirable(rows))
        else:
            found = pair_losses(objective, spec, sums, reference, tokens, desirable=self._desirable(rows))[0]
        groups = tuple(self.rows.groups.get(row.key, row.key) for row in rows[::2]) if self.rows.groups else None
        return RowLosses(system, found, np.ones(len(found), np.int64), groups)

    def member(self, name: str, trial: Trial, held_out: Sequence[Example], seed: int = 0, steps: int | None = None) -> Member:
        plain = super().member(name, trial, held_out, seed, steps)
        config = self.space.resolved(trial.point)
        reference = None
        if needs_reference(config.train.objective):
            train, known = self._reference(trial.point, name)
            there = [known[key] for key in _keys(held_out)]
            reference = Reference(train, np.concatenate(there) if there else np.zeros(0), plain.spec.micro_tokens)
        own = begins_at_reference(config) and not config.lora.dropout
        spec = preference_of(config)
        about = Preferences(
            spec, reference, (self._desirable(self.setup.train.examples), self._desirable(held_out)),
            largest_difference(self.setup) if own and reference is not None else None,
        )  # fmt: skip
        return replace(plain, make=about.task)

    def _reference(self, point: SearchPoint, name: str | None) -> tuple[Floats, dict[bytes, Floats]]:
        """log p of the training answers, and of the two answers of each other pair by its tokens, by the reference.

        A model that is its own reference computes it with its pairs as they start, for each choice of pairs once: their B is 0,
        whatever their seed and rate.
        """
        own = reference_of(self.setup.config.train) == START
        key = SearchPoint(1.0, point.rank, point.targets) if own else None
        if key not in self._known:
            others = [*self.rows.search, *self.rows.confirm]
            train = self.setup.train.examples
            if own and name is not None:
                activate(self.setup.text.model, name)
            with nullcontext() if own else as_reference(self.setup.text, self._held, name):
                sums, _ = self._log_probs([*train, *others])
            pairs = sums[len(train) :].reshape(-1, 2)
            self._known[key] = sums[: len(train)], dict(zip(_keys(others), pairs, strict=True))
        return self._known[key]

    def _log_probs(self, rows: Sequence[Example]) -> tuple[Floats, Floats]:
        spec = self.setup.config.train
        losses, tokens = row_losses(self.setup.text, rows, micro_tokens=spec.micro_tokens, chunk=spec.head_chunk)
        return -losses, tokens

    def _desirable(self, rows: Sequence[Example]) -> list[bool]:
        return [self._wanted[row.key] for row in rows[::2]] if self.setup.config.train.objective == KTO else []


def _keys(rows: Sequence[Example]) -> list[bytes]:
    """The tokens and targets of each pair: rows of one key may have another system prompt, or for kto another second answer."""
    both = zip(rows[::2], rows[1::2], strict=True)
    return [b"".join(each.tobytes() for row in pair for each in (row.ids, row.supervised)) for pair in both]

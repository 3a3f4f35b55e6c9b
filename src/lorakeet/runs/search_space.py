"""What a search may vary: learning rate, rank, targets and beta, checked against the model before the search begins."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError, Problems
from lorakeet.models.targets import plan_for
from lorakeet.models.text.model import TextModel
from lorakeet.train.text.task import learning_rate_of

QUICK_FACTORS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class SearchPoint:
    """One choice of settings: the rate as a factor of the run file's; rank, targets and the loss's beta, None for its own."""

    rate_factor: float = 1.0
    rank: int | None = None
    targets: str | None = None
    beta: float | None = None

    def words(self, rate: float) -> str:
        """The settings as a person reads them."""
        parts = [f"learning rate {rate * self.rate_factor:.2e} (×{self.rate_factor:.3g})"]
        if self.rank is not None:
            parts.append(f"rank {self.rank}")
        if self.targets is not None:
            parts.append(f"targets {self.targets}")
        if self.beta is not None:
            parts.append(f"beta {self.beta:g}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Space:
    """The settings between which a search chooses, and the run file that it begins from."""

    config: RunConfig
    rate: float  # the run file's learning rate, or the rule's
    low: float
    high: float
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    betas: tuple[float, ...] = ()

    @property
    def points(self) -> list[SearchPoint]:
        """Every choice of rank and targets, that of the run file among them."""
        chosen = itertools.product(self.ranks or (None,), self.targets or (None,))
        return list(dict.fromkeys([SearchPoint(), *(SearchPoint(1.0, rank, target) for rank, target in chosen)]))

    def lora(self, point: SearchPoint) -> LoraSpec:
        """The pairs that `point` means."""
        lora = self.config.lora
        if point.rank is not None:
            lora = replace(lora, rank=point.rank, rank_pattern={})
        return lora if point.targets is None else replace(lora, target_modules=(point.targets,))

    def resolved(self, point: SearchPoint) -> RunConfig:
        """The run file with the settings of `point`."""
        train = replace(self.config.train, learning_rate=self.rate * point.rate_factor)
        found = replace(self.config, lora=self.lora(point), train=train)
        section, _, name = train.registered.varied.partition(".")
        return found if point.beta is None else found.changed(**{section: {name: point.beta}})

    def draw(self, number: Callable[[str, float, float], float], choice: Callable[[str, tuple[str, ...]], str]) -> SearchPoint:
        """A point, each of its settings from one of the two functions (of a sampler): a number on a log scale, or a choice."""
        factor = number("rate_factor", self.low, self.high) if self.low < self.high else self.low
        ranks = tuple(map(str, self.ranks))
        rank = int(choice("rank", ranks)) if len(ranks) > 1 else next(iter(self.ranks), None)
        targets = choice("targets", self.targets) if len(self.targets) > 1 else next(iter(self.targets), None)
        betas = tuple(f"{beta:g}" for beta in self.betas)
        beta = float(choice("beta", betas)) if len(betas) > 1 else next(iter(self.betas), None)
        return SearchPoint(factor, rank, targets, beta)


def space_for(
    config: RunConfig,
    text: TextModel,
    *,
    rate_factors: tuple[float, ...],
    rank_choices: tuple[int, ...],
    target_choices: tuple[str, ...],
    beta_choices: tuple[float, ...] = (),
) -> Space:
    """The space that the flags describe. Raises ConfigError with every choice that does not fit, and where there is none."""
    problems = Problems("The search space cannot be used")
    trained = config.train.registered
    rule = trained.rate_factor * learning_rate_of(text)
    rate = config.train.learning_rate if config.train.learning_rate is not None else rule
    low, high = (min(rate_factors), max(rate_factors)) if rate_factors else (1.0, 1.0)
    if low <= 0 or rate * high > 1:
        given = ", ".join(f"{factor:g}" for factor in rate_factors)
        problems.add(f"--rate-factors {given} times the rate {rate:.2e} must lie above 0 and give at most 1.")
    betas = tuple(dict.fromkeys(beta_choices))
    if betas and not trained.varied:
        problems.add(f"--beta-choices is given, but {trained}, which has no beta. Leave it out.")
    if wrong := [beta for beta in betas if not (math.isfinite(beta) and beta > 0)]:
        problems.add(f"--beta-choices has {wrong[0]:g}; expected values above 0.")
    ranks, targets = tuple(dict.fromkeys(rank_choices)), tuple(dict.fromkeys(target_choices))
    space = Space(config, rate, low, high, ranks, targets, betas)
    if low == high and len(ranks) < 2 and len(targets) < 2 and len(betas) < 2:
        flags = "--rate-factors, --rank-choices, --target-choices or, where the loss has a beta, --beta-choices"
        problems.add(f"The search space has nothing in it to choose; give {flags} two values.")
    for point in space.points:
        try:
            plan_of_point(text, space, point)
        except ConfigError as error:
            problems.add(str(error))
    problems.raise_if_any()
    return space


def plan_of_point(text: TextModel, space: Space, point: SearchPoint) -> Plan:
    """Which matrices get which pair under `point`."""
    return plan_for(text.model, space.lora(point), text.family)

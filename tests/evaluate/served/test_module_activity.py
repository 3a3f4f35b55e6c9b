"""`module_activity`: what is missing is named, what is there is called active, and rounding is never called missing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from lorakeet.evaluate.served.module_activity import FEWEST_PLACES, ActivityFound, EffectValues, LeftOut, Modules, find_activity

PLACES, TOKENS, ROWS, COUNT = 96, 8, 8, 40
NAMES = [f"block.{number // 5}.m{number % 5}" for number in range(COUNT)]


@dataclass
class World:
    """Effects of COUNT modules of unequal strength, some alike, at places that amplify every change, and heavy-tailed noise."""

    seed: int
    level: float

    def __post_init__(self) -> None:
        chance = np.random.default_rng(self.seed)
        amplify = np.exp(chance.normal(0, 0.7, (PLACES, 1))) * np.exp(chance.normal(0, 0.3, (PLACES, TOKENS)))
        shared = chance.normal(size=(6, PLACES, TOKENS))
        effects = [
            strength * amplify * (0.8 * chance.normal(size=(PLACES, TOKENS)) + 0.4 * shared[chance.integers(6)])
            for strength in np.exp(chance.normal(0, 1.0, COUNT))
        ]
        self.effects = 0.02 * np.stack(effects).reshape(COUNT, -1)
        by_row = np.repeat(chance.normal(size=(ROWS, 1)), PLACES // ROWS, axis=0)
        by_place, alone = chance.standard_t(4, (PLACES, 1)), chance.standard_t(4, (PLACES, TOKENS))
        self.noise = (self.level * amplify * (0.7 * by_place + 0.7 * alone + 0.5 * by_row)).reshape(-1)

    def together(self, modules: Modules) -> np.ndarray:
        return self.effects[[NAMES.index(name) for name in modules]].sum(0)

    def found(self, missing: Modules = frozenset(), scale: float = 1.0) -> ActivityFound:
        apart = self.noise + (self.together(missing) if missing else 0) + (1 - scale) * self.effects.sum(0)
        places = np.repeat(np.arange(PLACES), TOKENS)
        blocks = [frozenset(NAMES[number : number + 5]) for number in range(0, COUNT, 5)]
        known = LeftOut(
            dict(zip(NAMES, self.effects, strict=True)), self.effects.sum(0),
            blocks, self.together,
        )  # fmt: skip
        return find_activity(EffectValues.of(apart, places, places * ROWS // PLACES, self.effects), known)


@pytest.mark.parametrize("level", [0.002, 0.02, 0.1])
def test_rounding_is_never_called_missing_nor_a_wrong_scale(level: float) -> None:
    for seed in range(20):
        found = World(seed, level).found()
        assert not found.missing and not found.either and abs(found.scale - 1) < found.quantile * found.scale_spread
        assert len(found.active) + len(found.unclear) == COUNT


def test_with_little_noise_every_module_is_told_apart() -> None:
    found = World(1, 0.002).found()
    assert set(found.active) == set(NAMES) and not found.unclear and found.faults == 0


@pytest.mark.parametrize("missing", [NAMES[7:8], [NAMES[3], NAMES[31]], NAMES[10:15]])
def test_what_is_missing_is_named_and_nothing_else(missing: list[str]) -> None:
    for seed in range(10):
        found = World(seed, 0.002).found(frozenset(missing))
        assert set(found.missing) == set(missing) and found.faults == len(missing)
        assert set(found.active) == set(NAMES) - set(missing)


def test_with_much_noise_a_missing_module_is_never_called_active() -> None:
    """Some are found and others are not distinguished; in 30 worlds none is shown active."""
    named = 0
    for seed in range(30):
        name = NAMES[seed]
        found = World(seed, 0.05).found(frozenset([name]))
        assert name not in found.active and not set(found.missing) - {name}
        named += name in found.missing
    assert 5 < named < 30


def test_a_wrong_scale_is_measured_and_no_module_is_called_missing() -> None:
    found = World(2, 0.005).found(scale=0.98)
    assert found.scale == pytest.approx(0.98, abs=0.002) and abs(found.scale - 1) > found.quantile * found.scale_spread
    assert not found.missing and len(found.active) > COUNT // 2


def test_two_modules_with_one_effect_are_not_told_apart() -> None:
    world = World(3, 0.002)
    world.effects[8] = world.effects[7]
    found = world.found(frozenset([NAMES[7]]))
    assert found.faults == 1 and not found.missing
    assert {name for sets in found.either for one in sets for name in one} == {NAMES[7], NAMES[8]}
    assert "one of several" in found.unclear[NAMES[7]] and NAMES[8] in found.unclear


def test_too_few_places_are_refused() -> None:
    places = np.arange(FEWEST_PLACES - 1)
    effects = np.ones((1, len(places)))
    known = LeftOut({"m": effects[0]}, effects[0], [], lambda _: effects[0])
    with pytest.raises(ValueError, match="modules need 12 places; given are 11"):
        find_activity(EffectValues.of(np.zeros(len(places)), places, places, effects), known)

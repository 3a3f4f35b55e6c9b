"""`runs.search_space`: points, what they mean for a run file, and spaces that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import ConfigError
from lorakeet.kinds.text.assemble import TextAssembly, assemble_text
from lorakeet.runs.search_space import SearchPoint, plan_of_point, space_for
from tiny.runs import quiet, settings

WIDE: dict[str, Any] = {"rate_factors": (0.25, 4.0), "rank_choices": (2, 4), "target_choices": ("attention", "mlp")}


@pytest.fixture(scope="module")
def setup(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> TextAssembly:
    return assemble_text(settings(finished.model, finished.data, tmp_path_factory.mktemp("space") / "run"), quiet())


def test_a_point_is_the_run_file_with_other_settings(setup: TextAssembly) -> None:
    space = space_for(setup.config, setup.text, **WIDE)
    point = space.draw(lambda name, low, high: (low * high) ** 0.5 * 2, lambda name, choices: choices[-1])
    assert point == SearchPoint(2.0, 4, "mlp") and point.words(space.rate) == "learning rate 4.00e-02 (×2), rank 4, targets mlp"
    config = space.resolved(point)
    assert (config.train.learning_rate, config.lora.rank, config.lora.target_modules) == (0.04, 4, ("mlp",))
    assert {entry.path.split(".")[-2] for entry in plan_of_point(setup.text, space, point).entries} == {"mlp"}
    assert space.lora(SearchPoint()) == setup.config.lora and SearchPoint().words(0.02) == "learning rate 2.00e-02 (×1)"


def test_without_a_rate_in_the_run_file_the_factors_are_of_the_rule(finished: Any, setup: TextAssembly, tmp_path: Path) -> None:
    config = settings(finished.model, finished.data, tmp_path, {"train.learning_rate": "none"})
    space = space_for(config, setup.text, **WIDE)
    assert space.rate == pytest.approx(5e-4 * (2000 / 32) ** 0.781)


def test_what_has_one_value_is_not_drawn(setup: TextAssembly) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError(arguments)

    space = space_for(setup.config, setup.text, rate_factors=(1.0, 2.0), rank_choices=(2,), target_choices=())
    assert space.draw(lambda name, low, high: 1.5, never) == SearchPoint(1.5, 2, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate_factors": (1.0,), "rank_choices": (4,), "target_choices": ()}, "nothing in it to choose"),
        ({"rate_factors": (), "rank_choices": (), "target_choices": ()}, "nothing in it to choose"),
        ({"rate_factors": (0.0, 2.0)}, "--rate-factors 0, 2"),
        ({"rate_factors": (1.0, 1000.0)}, "--rate-factors 1, 1000"),
        ({"rank_choices": (0, 4)}, "lora.rank is 0"),
        ({"rank_choices": (4, 999)}, "Rank 999 is larger than"),
        ({"target_choices": ("mlp", "q_prj")}, "Did you mean 'q_proj'"),
    ],
)
def test_spaces_that_cannot_be_used(setup: TextAssembly, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space_for(setup.config, setup.text, **{**WIDE, **changes})
    assert words in str(caught.value)

"""`ranks.spec`: the settings, and numbers of parameters as people write them."""

from __future__ import annotations

import pytest

from lorakeet.errors import ConfigError
from lorakeet.ranks.spec import RanksSpec, parameter_count


@pytest.mark.parametrize(
    ("text", "count"),
    [("1.5M", 1_500_000), ("500k", 500_000), ("2e6", 2_000_000), ("1_000", 1000), ("3,000", 3000), ("0.5 m", 500_000)],
)
def test_numbers_as_people_write_them(text: str, count: int) -> None:
    assert parameter_count(text, "--to") == count


@pytest.mark.parametrize("text", ["", "much", "-5M", "0", "1.5X", "M", "nan"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"ranks\.budget is .*expected a number of parameters such as 500k"):
        parameter_count(text, "ranks.budget")


def test_every_problem_is_found() -> None:
    assert RanksSpec().validate() == [] and RanksSpec(choose="auto", budget="1.5M").validate() == []
    found = RanksSpec(budget="lots", rows=1, max_rank=0).validate()
    assert [words.split(" is ")[0] for words in found] == ["ranks.rows", "ranks.max_rank", "ranks.budget", "ranks.budget"]
    assert "Add --ranks auto" in found[-1]


def test_what_prune_cannot_do_is_found() -> None:
    assert RanksSpec(choose="prune", budget="1.5M").validate() == []
    found = RanksSpec(choose="prune", prune_from=0.5, prune_until=0.5, prune_cuts=0).validate()
    assert [words.split(" is ")[0] for words in found] == ["ranks.prune_from", "ranks.prune_cuts"]
    assert RanksSpec(prune_from=-0.1).validate() and RanksSpec(prune_until=1.1).validate()

"""`errors`: exit codes, all problems at once, and the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.errors import (
    ConfigError,
    DataError,
    EnvironmentProblem,
    LorakeetError,
    Problems,
    RunStopped,
    VerificationFailed,
    nearest,
    readable,
    unreadable,
)


def test_every_kind_of_error_has_its_exit_code() -> None:
    codes = {kind: kind.exit_code for kind in (ConfigError, DataError, EnvironmentProblem, VerificationFailed, RunStopped)}
    assert list(codes.values()) == [2, 2, 2, 3, 4]
    assert all(issubclass(kind, LorakeetError) for kind in codes)


def test_problems_are_raised_together() -> None:
    problems = Problems("The rows cannot be used", DataError)
    problems.raise_if_any()
    problems.add("one is wrong.")
    with pytest.raises(DataError, match=r"^one is wrong\.$"):
        problems.raise_if_any()
    problems.add("two is wrong.")
    with pytest.raises(DataError) as caught:
        problems.raise_if_any()
    assert str(caught.value) == "The rows cannot be used (2 problems):\n  - one is wrong.\n  - two is wrong."


def test_one_remedy_for_all_problems_comes_last() -> None:
    problems = Problems("The rows cannot be used", remedy="Fetch them again.")
    problems.add("one is wrong.")
    with pytest.raises(ConfigError, match=r"^one is wrong\. Fetch them again\.$"):
        problems.raise_if_any()
    problems.add("two is wrong.")
    with pytest.raises(ConfigError, match=r"two is wrong\.\nFetch them again\.$"):
        problems.raise_if_any()


@pytest.mark.parametrize(
    ("name", "sentence"), [("q_prj", " Did you mean 'q_proj'?"), ("Q_PROJ", " Did you mean 'q_proj'?"), ("zebra", ""), ("", "")]
)
def test_the_nearest_name_is_offered_when_it_is_near(name: str, sentence: str) -> None:
    assert nearest(name, ["q_proj", "k_proj", "down"]) == sentence


def test_a_file_that_is_not_read_is_named_with_the_reason_and_the_remedy() -> None:
    said = "a.yaml cannot be read: {}. Check the path, its permissions and the disk."
    assert unreadable(Path("a.yaml"), OSError(5, "Input/output error")) == said.format("Input/output error")
    assert unreadable(Path("a.yaml"), OSError("odd")) == said.format("odd")
    with pytest.raises(DataError, match=r"^a\.yaml cannot be read: odd"), readable(Path("a.yaml")):
        raise OSError("odd")

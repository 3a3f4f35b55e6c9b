"""`registry`: which kinds of runs there are, and packages that register one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.registry import declarations, declared, function_at, objectives, own_kinds
from tiny.other_packages import installed, registered


def test_kinds_over_another_are_chosen_by_their_objective() -> None:
    assert own_kinds() == ("text", "image") and next(iter(objectives())) == "sft"
    assert declared("text", "sft").name == declared("text").name == "text" and declared("text", "dpo").name == "preference"
    with pytest.raises(ConfigError, match=r"text \(of lorakeet\), image \(of lorakeet\)") as caught:
        declared("imag")
    assert caught.value.code == "kind-unknown" and caught.value.values == {"kind": "imag", "known": ["text", "image"]}


def test_what_is_not_named_does_nothing() -> None:
    assert function_at("")(1, whole=True) == [] and function_at("lorakeet.registry:function_at") is function_at


def test_two_packages_of_one_name_and_one_that_cannot_be_imported_are_refused(tmp_path: Path) -> None:
    site = installed(installed(tmp_path / "site"), "other_lines")
    with registered(site), pytest.raises(ConfigError) as caught:
        declarations()
    assert caught.value.code == "kinds-collide" and len(caught.value.values["packages"]) == 2
    for number, (module, why) in enumerate((
        ("tiny.models", "has no attribute 'DECLARATION'"), ("line_kind.taken", "its sections train, no name have names"),
        ("line_kind.called", "called 'curve'"),
    )):  # fmt: skip
        with registered(installed(tmp_path / str(number), "odd", module)), pytest.raises(EnvironmentProblem, match=why):
            declarations()
    broken = installed(tmp_path / "other", "broken", "line_kind.gone")
    with registered(broken), pytest.raises(EnvironmentProblem, match=r"'line' of the package broken .*pip uninstall broken"):
        declarations()

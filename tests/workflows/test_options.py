"""`workflows.options`: the one list that the command line and the forms are made from, and the one place of each default."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import inspect
import types
import typing

import pytest
from rich.console import Console

from lorakeet.workflows.options import VERBS, DoctorOptions, MergeOptions, Verb, non_default

CALLBACKS = ("on_step", "on_held_out", "watch")  # of the Python API and of the studio


def test_a_verb_calls_the_function_of_its_name() -> None:
    checkup = Verb("doctor", "Check.", DoctorOptions).run(DoctorOptions(), console=Console(quiet=True))
    assert checkup.to_mapping()["findings"]


def test_imports_are_not_searched_for_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is a search that the caller has turned off turned on."""
    found: list[bool] = []

    def imported(name: str) -> types.SimpleNamespace:
        found.append(gc.isenabled())
        return types.SimpleNamespace(doctor=lambda options, console: gc.isenabled())

    monkeypatch.setattr("lorakeet.workflows.options.import_module", imported)
    verb = Verb("doctor", "Check.", DoctorOptions)
    assert verb.run(DoctorOptions(), console=None) is True and found == [False] and gc.isenabled()
    gc.disable()
    try:
        assert verb.run(DoctorOptions(), console=None) is False and not gc.isenabled()
    finally:
        gc.enable()


LATE = ("rich.console", "lorakeet.workflows.finetune")  # whose names some verbs import for the type checker alone


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_a_function_takes_the_options_class_of_its_verb_and_no_option_besides(verb: Verb) -> None:
    module, name = verb.place
    function = getattr(importlib.import_module(module), name)
    parameters = {key: one for key, one in inspect.signature(function).parameters.items() if key not in CALLBACKS}
    assert list(parameters) == [*(["config"] if verb.config != "none" else []), "options", "console"]
    late = {key: value for name in LATE for key, value in vars(importlib.import_module(name)).items()}
    assert typing.get_type_hints(function, localns=late)["options"] is verb.options
    defaults = {key: one.default for key, one in parameters.items() if one.default is not inspect.Parameter.empty}
    assert defaults in ({}, {"options": verb.options() if defaults else None})


def test_only_options_that_differ_from_their_defaults_are_named() -> None:
    options = MergeOptions(("a",), out="b", weights=(), seed=1)  # type: ignore[arg-type]
    assert non_default(options) == {"runs_or_adapters": ("a",), "out": "b", "seed": 1}
    assert non_default(dataclasses.replace(options, seed=0)).keys() == {"runs_or_adapters", "out"}


def test_shipped_run_files_are_read_without_complaint() -> None:
    from lorakeet.config import read_run

    shipped = [verb for verb in VERBS if verb.config == "shipped"]
    assert shipped and all(read_run(verb.shipped_config()).model.path for verb in shipped)

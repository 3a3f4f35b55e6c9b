"""`workflows.verbs`: the one list that the command line and the forms are made from."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect

import pytest
from rich.console import Console

from lorakeet.workflows.options import VERBS, DoctorOptions, Verb


def test_a_verb_calls_the_function_of_its_name() -> None:
    checkup = Verb("doctor", "Check.", DoctorOptions).run([], {"console": Console(quiet=True)})
    assert checkup.to_mapping()["findings"]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_the_options_of_a_verb_are_the_parameters_of_its_function(verb: Verb) -> None:
    module, _, name = (verb.function or f"{verb.name}:{verb.name}").partition(":")
    assert importlib.util.find_spec(f"lorakeet.workflows.{module}"), f"workflows/{module}.py is missing"
    function = getattr(importlib.import_module(f"lorakeet.workflows.{module}"), name)
    parameters = inspect.signature(function).parameters
    specs = {spec.name: bool(spec.metadata.get("positional")) for spec in dataclasses.fields(verb.options)}
    by_name = {key for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    by_position = [key for key in parameters if key not in by_name]
    assert by_name == {"console", *(key for key, positional in specs.items() if not positional)}
    assert len(by_position) == sum(specs.values()) + (verb.config != "none")


def test_shipped_run_files_are_read_without_complaint() -> None:
    from lorakeet.config import read_run

    shipped = [verb for verb in VERBS if verb.config == "shipped"]
    assert shipped and all(read_run(verb.shipped_config()).model.path for verb in shipped)

"""`verbs.options`: the one list that the command line and the forms are made from, and the one place of each default."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import inspect
import types
import typing
from pathlib import Path

import pytest
from rich.console import Console

from lorakeet.data.leaks import RECALL, LeakReport
from lorakeet.evaluate.baselines import CONSTANT, EMBEDDED, MAJORITY, NEAREST, TFIDF
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.kinds.text.reply import FEW_SHOT
from lorakeet.verbs.options import VERBS, CompressOptions, DoctorOptions, MergeOptions, Verb, non_default

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

    monkeypatch.setattr("lorakeet.verbs.options.import_module", imported)
    verb = Verb("doctor", "Check.", DoctorOptions)
    assert verb.run(DoctorOptions(), console=None) is True and found == [False] and gc.isenabled()
    gc.disable()
    try:
        assert verb.run(DoctorOptions(), console=None) is False and not gc.isenabled()
    finally:
        gc.enable()


LATE = ("rich.console", "lorakeet.verbs.finetune")  # whose names some verbs import for the type checker alone


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


PAGES = Path(__file__).parents[2]


def page(name: str) -> str:
    return " ".join((PAGES / name).read_text(encoding="utf-8").split())


def test_readme_help_and_pages_say_the_same_of_compress() -> None:
    """With the margins that are the defaults of the options."""
    readme, ranks, options = page("README.md"), page("docs/explain/rank.md"), CompressOptions("run", Path("out"))
    assert "shown to be as good" in next(verb.summary for verb in VERBS if verb.name == "compress")
    assert "shown to be as good | `lorakeet compress" in readme and "*shown to be as good*" in ranks
    shares = (options.tolerance, options.metric_tolerance)
    assert shares == ("2%", "2%") and "`--tolerance` (2 % of the uncut adapter's own loss)" in ranks
    assert "`--metric-tolerance` (2 points)" in ranks and "compares with the uncut adapter first" in ranks


def test_readme_pages_and_report_say_the_same_of_leaks_and_floors() -> None:
    readme, leaks, reading = page("README.md"), page("docs/explain/held-out.md"), page("docs/how-to/read-the-report.md")
    said = LeakReport((), "drop").method()
    planted = f"In tests it found at least {RECALL} of the copies that were planted"
    assert f"Recall was at least {RECALL} for sentences" in leaks and planted in said
    assert "one word in five differs" in leaks and "share 80 % of their words" in said
    assert "one word from four words on" in leaks and "all but one from 4 words on" in said
    assert "Training rows that are copies or near-copies of test rows are found, named and left out" in readme
    for floor in (MAJORITY, TFIDF, EMBEDDED, NEAREST, CONSTANT, FEW_SHOT):
        assert floor in reading
    spec = EvaluateSpec()
    assert f"shown up to {spec.examples} training rows" in reading
    assert f", {spec.answers} held-out prompts are answered" in reading
    assert "is compared with its base, a few-shot base and simple baselines." in readme
    assert "the verdict is on the answers" in readme

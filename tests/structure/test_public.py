"""What others see: `__all__`, docstrings, and help on every setting."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import types
import typing
from typing import Any

import pytest

import lorakeet
from lorakeet.config import RunConfig, read_run
from lorakeet.settings import fields_of
from lorakeet.workflows.options import VERBS
from structure.tree import SOURCE, named, parsed, source_files

PLAIN = (bool, int, float, str)
NAMES = (ast.Name, ast.Attribute)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def module_name(path: Any) -> str:
    return ("lorakeet." + named(path).removesuffix(".py").replace("/", ".")).removesuffix(".__init__")


def spec_classes() -> list[type[Any]]:
    """Every dataclass of settings: RunConfig, the classes called …Spec, and the options of the verbs."""
    found: list[type[Any]] = [RunConfig, *dict.fromkeys(verb.options for verb in VERBS)]
    for path in source_files():
        classes = [node.name for node in parsed(path).body if isinstance(node, ast.ClassDef)]
        names = [name for name in classes if name.endswith("Spec")]
        if names:
            module = importlib.import_module(module_name(path))
            found += [getattr(module, name) for name in names if dataclasses.is_dataclass(getattr(module, name))]
    return found


def allowed(kind: Any, options: bool) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return all(isinstance(word, str) for word in inner)
    if origin in (typing.Union, types.UnionType):
        return len(inner) == 2 and type(None) in inner and all(arm is type(None) or allowed(arm, options) for arm in inner)
    if origin is tuple:
        return len(inner) == 2 and inner[1] is ... and allowed(inner[0], options)
    if origin is dict:
        return inner in ((str, int), (str, float))
    return kind in PLAIN or dataclasses.is_dataclass(kind) or (options and kind.__name__ == "Path")


def test_every_setting_has_one_sentence_of_help_and_a_plain_type() -> None:
    classes = spec_classes()
    wrong = []
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for spec in dataclasses.fields(cls):
            help_text = spec.metadata.get("help", "")
            if not (help_text.endswith(".") and len(help_text) <= 140):
                wrong.append(f"{cls.__name__}.{spec.name}: help is {help_text!r}; expected a sentence of at most 140 characters")
            if not allowed(hints[spec.name], cls.__name__.endswith("Options")):
                wrong.append(f"{cls.__name__}.{spec.name}: a type that flags and forms cannot show: {hints[spec.name]}")
        if not cls.__dataclass_params__.frozen:
            wrong.append(f"{cls.__name__} is not frozen")
    assert len(classes) >= 8 and not wrong, "\n".join(wrong)


def test_every_part_of_a_run_checks_itself() -> None:
    hints = typing.get_type_hints(RunConfig)
    parts = [hints[spec.name] for spec in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(hints[spec.name])]
    assert len(parts) >= 5 and [part.__name__ for part in parts if not callable(getattr(part, "validate", None))] == []


def test_no_two_settings_share_a_path() -> None:
    paths = [leaf.path for leaf in fields_of(RunConfig)]
    shorthands = [leaf.shorthand for leaf in fields_of(RunConfig) if leaf.shorthand]
    own = [spec.name for verb in VERBS if verb.config != "none" for spec in dataclasses.fields(verb.options)]
    assert len({*paths, *shorthands}) == len(paths) + len(shorthands)
    assert not {*own, "json", "debug", "help"} & {*paths, *shorthands}


def test_every_module_and_public_name_is_documented() -> None:
    missing = []
    for path in source_files():
        tree = parsed(path)
        if not ast.get_docstring(tree):
            missing.append(f"{named(path)}: the module")
        for node in tree.body:
            if isinstance(node, DEFINITIONS) and not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{named(path)}:{node.lineno} {node.name}")
    assert not missing, "no docstring:\n" + "\n".join(missing)


def used_names() -> set[str]:
    """Every name that the package calls, inherits from or annotates with, and every word of its templates."""
    found = {verb.function.rpartition(":")[2] or verb.name for verb in VERBS}
    for path in source_files():
        for statement in parsed(path).body:
            own = getattr(statement, "name", "")  # that a function calls itself is no use of it
            nodes = [node for node in ast.walk(statement) if isinstance(node, NAMES)]
            found |= {node.id if isinstance(node, ast.Name) else node.attr for node in nodes} - {own}
    for template in SOURCE.rglob("*.j2"):
        found |= set(re.findall(r"\w+", template.read_text(encoding="utf-8")))
    return found


def registers(node: ast.stmt) -> bool:
    """Whether a decorator hands the function to a registry, such as click's commands."""
    return any("." in ast.unparse(decorator).partition("(")[0] for decorator in getattr(node, "decorator_list", []))


def test_every_public_function_and_class_is_used_or_offered() -> None:
    used = used_names() | set(lorakeet.__all__)
    idle = [
        f"{named(path)}:{node.lineno} {node.name}"
        for path in source_files()
        for node in parsed(path).body
        if isinstance(node, DEFINITIONS) and not node.name.startswith("_") and node.name not in used and not registers(node)
    ]
    assert not idle, "used nowhere in the package and not in lorakeet.__all__; call them or take them out:\n" + "\n".join(idle)


def test_what_the_package_offers_can_be_imported_from_it() -> None:
    assert all(getattr(lorakeet, name) is not None for name in lorakeet.__all__)
    stub = ast.parse((SOURCE / "__init__.pyi").read_text(encoding="utf-8"))
    typed = {node.names[0].name: node.module for node in stub.body if isinstance(node, ast.ImportFrom)}
    assert typed == lorakeet._PLACES and {*typed, "__version__"} == set(lorakeet.__all__)
    assert lorakeet.read_run is read_run and lorakeet.RunConfig is RunConfig
    with pytest.raises(AttributeError, match=r"no attribute 'finetnue'; it has LorakeetError, RunConfig"):
        _ = lorakeet.finetnue


@pytest.mark.parametrize("path", source_files(), ids=named)
def test_public_names_are_sorted_and_exist(path: Any) -> None:
    tree = parsed(path)
    lists = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    for listed in lists:
        names = ast.literal_eval(listed)
        assert names == sorted(set(names), key=lambda name: (not name.isupper(), not name[0].isupper(), name))
        module = importlib.import_module(module_name(path))
        assert [name for name in names if not hasattr(module, name)] == []

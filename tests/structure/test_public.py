"""What others see: `__all__`, docstrings, and help on every setting."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import pytest

import lorakeet
from lorakeet.config import RunConfig, read_run
from lorakeet.kernels.choose import TABLE
from lorakeet.settings import fields_of
from lorakeet.verbs.options import VERBS
from structure.tree import SOURCE, named, nodes_of, parsed, source_files

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
        if inner == (typing.Literal["auto"], int):
            return True
        return len(inner) == 2 and type(None) in inner and all(arm is type(None) or allowed(arm, options) for arm in inner)
    if origin is tuple:
        return len(inner) == 2 and inner[1] is ... and allowed(inner[0], options)
    if origin is dict:
        return inner in ((str, int), (str, float), (str, str))
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


def used_definitions() -> Callable[[str, str], bool]:
    """Whether the package uses a definition, by its module and name: imports it, reaches it through a module, names it in its own
    module, or calls it by a string or from a template."""
    found = {tuple(place.split(":")) for place in lorakeet._PLACES.values()}
    for verb in VERBS:
        found |= {verb.place, (f"lorakeet.verbs.{verb.name}", "config_path")}
    tables, attributes = set[str](), set[str]()
    for path in source_files():
        found |= {(node.value.partition(":")[0], node.value.partition(":")[2]) for node in nodes_of(path) if is_place(node)}
        uses, values, names = used_in(module_name(path), parsed(path))
        found |= uses
        tables |= values
        attributes |= names
    sources = [kernel.source.partition(":") for kernels in TABLE.values() for kernel in kernels]
    found |= {(module, name) for module, _, name in sources}
    tables |= {module for module, _, _ in sources}
    charts = "lorakeet.evaluate.report.charts"
    for template in SOURCE.rglob("*.j2"):
        found |= {(charts, name) for name in re.findall(r"\bcharts\.(\w+)", template.read_text(encoding="utf-8"))}
    return lambda module, name: (module, name) in found or (module in tables and name in attributes)


def is_place(node: ast.AST) -> bool:
    """Whether it is a text "lorakeet.module:name"."""
    return isinstance(node, ast.Constant) and bool(re.fullmatch(r"lorakeet\.[\w.]+:\w+", str(node.value)))


def used_in(module: str, tree: ast.Module) -> tuple[set[tuple[str, str]], set[str], set[str]]:
    """The uses in one module, the modules that are values in it (as in a table of formats), and all names of attributes.

    That a definition names itself is no use of it, nor is an attribute of some other object.
    """
    nodes = list(ast.walk(tree))
    imports = [(node.module, name) for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names]
    found = {(str(source), name.name) for source, name in imports}
    modules = {name.asname or name.name: f"{source}.{name.name}" for source, name in imports}
    attributes, through = set(), set()
    for statement in tree.body:
        own = getattr(statement, "name", "")
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id != own:
                found.add((module, node.id))
            elif isinstance(node, ast.Attribute):
                attributes.add(node.attr)
                if isinstance(node.value, ast.Name) and node.value.id in modules:
                    found.add((modules[node.value.id], node.attr))
                    through.add(id(node.value))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("lorakeet."):
                found.add((node.value.partition(":")[0], node.value.partition(":")[2]))
    names = [node for node in nodes if isinstance(node, ast.Name) and id(node) not in through]
    return found, {modules[node.id] for node in names if node.id in modules}, attributes


def registers(node: ast.stmt) -> bool:
    """Whether a decorator hands the function to a registry, such as click's commands."""
    return any("." in ast.unparse(decorator).partition("(")[0] for decorator in getattr(node, "decorator_list", []))


@pytest.mark.slow
def test_every_public_function_and_class_is_used_or_offered() -> None:
    used = used_definitions()
    idle = [
        f"{named(path)}:{node.lineno} {node.name}"
        for path in source_files()
        for node in parsed(path).body
        if isinstance(node, DEFINITIONS) and not node.name.startswith("_")
        if not used(module_name(path), node.name) and not registers(node)
    ]
    assert not idle, "used nowhere in the package and not in lorakeet.__all__; call them or take them out:\n" + "\n".join(idle)


def test_an_attribute_of_the_same_name_is_no_use() -> None:
    source = ["from lorakeet.a import b, c as d", "def run():", "    run(), thing.write(), b.read()", "TABLE = [d]", "old()"]
    found, tables, attributes = used_in("lorakeet.m", ast.parse("\n".join(source)))
    assert {("lorakeet.a", "b"), ("lorakeet.a", "c"), ("lorakeet.a.b", "read"), ("lorakeet.m", "old")} <= found
    assert not {("lorakeet.m", "run"), ("lorakeet.m", "write"), ("lorakeet.m", "read"), ("lorakeet.a.b", "write")} & found
    assert tables == {"lorakeet.a.c"} and attributes == {"write", "read"}


def test_what_the_package_offers_can_be_imported_from_it() -> None:
    assert all(getattr(lorakeet, name) is not None for name in lorakeet.__all__)
    stub = ast.parse((SOURCE / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [(node.module, name) for node in stub.body if isinstance(node, ast.ImportFrom) for name in node.names]
    typed = {name.asname: f"{module}:{name.name}" for module, name in imports}
    assert typed == lorakeet._PLACES and {*typed, "__version__"} == set(lorakeet.__all__)
    assert lorakeet.read_run is read_run and lorakeet.RunConfig is RunConfig
    with pytest.raises(AttributeError, match=r"no attribute 'finetnue'; it has Adapter, Data, Evaluate"):
        _ = lorakeet.finetnue


def test_public_names_are_sorted_and_exist() -> None:
    assigned = [(path, node) for path in source_files() for node in parsed(path).body if isinstance(node, ast.Assign)]
    lists = [(path, node.value) for path, node in assigned if ast.unparse(node.targets[0]) == "__all__"]
    for path, listed in lists:
        names = ast.literal_eval(listed)
        assert names == sorted(set(names), key=lambda name: (not name.isupper(), not name[0].isupper(), name)), named(path)
        module = importlib.import_module(module_name(path))
        assert [name for name in names if not hasattr(module, name)] == [], named(path)

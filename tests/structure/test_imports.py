"""Importing changes nothing: not the environment, not logging, not other people's classes; and help needs no torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from structure.tree import SOURCE, committed_files, named, nodes_of

HEAVY = ("torch", "transformers", "numpy", "scipy", "datasets", "safetensors", "rich")

ON_IMPORT = """
import json, sys
import lorakeet
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""

# The libraries come first, so that what they do on their own is not held against Lorakeet.
CHANGES = """
import importlib.util, json, logging, os, pkgutil, signal, sys, types, warnings
import click, numpy, safetensors.torch, torch, transformers, yaml
from transformers.models.llama import modeling_llama

def pieces():
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        if isinstance(module, types.ModuleType) and name.split(".")[0] in ("torch", "transformers", "yaml", "click", "numpy"):
            for key, value in list(vars(module).items()):
                if isinstance(value, (types.FunctionType, type)):
                    yield f"{name}.{key}", id(value)
                if isinstance(value, type) and value.__module__ == name:
                    for inner, attribute in list(vars(value).items()):
                        if isinstance(attribute, types.FunctionType):
                            yield f"{name}.{key}.{inner}", id(attribute)

def state():
    return {
        "environment": dict(os.environ),
        "handlers": {name: list(map(str, getattr(logger, "handlers", ()))) for name, logger in
                     [("", logging.getLogger()), *logging.Logger.manager.loggerDict.items()]},
        "warnings": list(map(str, warnings.filters)),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "seed": torch.initial_seed(),
        "ctrl-c": str(signal.getsignal(signal.SIGINT)),
    }

before, parts = state(), dict(pieces())
import lorakeet
for module in pkgutil.walk_packages(lorakeet.__path__, "lorakeet."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
after, now = state(), dict(pieces())
changed = [key for key in before if key != "handlers" and before[key] != after[key]]
changed += ["handlers of " + name for name, found in before["handlers"].items() if after["handlers"][name] != found]
changed += ["handlers of " + name for name, found in after["handlers"].items() if name.startswith("lorakeet") and found]
changed += [name for name, identity in parts.items() if now.get(name) != identity]
print(json.dumps(changed))
"""


def answer(code: str) -> list[str]:
    run = subprocess.run([sys.executable, "-W", "ignore::FutureWarning", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: list[str] = json.loads(run.stdout)
    return found


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not set(answer(ON_IMPORT)) & {*HEAVY, "click", "yaml"}


@pytest.mark.slow
def test_importing_every_module_changes_nothing_outside() -> None:
    assert answer(CHANGES) == []


@pytest.mark.parametrize("arguments", [["--help"], ["finetune", "--help"], ["merge", "--help"], ["completion", "bash"]])
def test_help_is_answered_without_torch(arguments: list[str]) -> None:
    code = (
        "import contextlib, io, json, sys\n"
        "from lorakeet.cli.main import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()): code = main({arguments!r})\n"
        "assert code == 0\n"
        "print(json.dumps(sorted(name for name in sys.modules if '.' not in name)))"
    )
    assert not set(answer(code)) & set(HEAVY)


def test_scripts_import_names_that_there_are() -> None:
    """Benchmarks and demos are run by hand, and no type checker reads them: a name that has gone is found here."""
    places = ("benchmarks/", "demos/", "docs/", "examples/")
    scripts = [path for path in committed_files() if path.suffix == ".py" and named(path).startswith(places)]
    lost = [f"{named(path)}: {module} has no {name}" for path in scripts for module, name in taken(path) if not has(module, name)]
    assert len(scripts) > 40 and not lost, "\n".join(lost)


def test_a_name_that_has_gone_is_found() -> None:
    assert has("lorakeet.quant.packed", "PackedBase") and has("lorakeet.quant", "packed") and has("lorakeet", "read_run")
    assert not has("lorakeet.quant.packed", "PackedBasis") and not has("lorakeet.quant", "unpacked")


def taken(path: Path) -> Iterator[tuple[str, str]]:
    """What a script imports from Lorakeet: modules and the names in them."""
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lorakeet":
            yield from ((str(node.module), alias.name) for alias in node.names)


def has(module: str, name: str) -> bool:
    """Whether `module` defines, imports or lends `name`, or has a module of that name."""
    place = SOURCE.parent.joinpath(*module.split("."))
    if any(place.joinpath(ending).exists() for ending in (f"{name}.py", name)):
        return True
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return file.is_file() and name in defined(file)


@cache
def defined(file: Path) -> frozenset[str]:
    """The names at the top of a module, and those that it lends by text (`_LAZY` of the package)."""
    found: set[str] = set()
    for node in nodes_of(file):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and file.name == "__init__.py":
            found.add(node.value)
    return frozenset(found)

"""Importing changes nothing: not the environment, not logging, not other people's classes; and help needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "scipy", "sklearn", "datasets", "safetensors", "rich")

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
    kernels = ".triton_" in module.name  # written in Triton, which is there for Linux alone
    if not module.name.endswith("__main__") and not (kernels and importlib.util.find_spec("triton") is None):
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

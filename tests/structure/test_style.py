"""ruff and mypy find nothing, with the settings of pyproject.toml."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from structure.tree import ROOT, committed_files, named, nodes_of


def output_of(*arguments: str) -> tuple[int, str]:
    run = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout + run.stderr


# What the standard library has only since 3.11 to 3.13; ruff's target-version finds new syntax.
NEWER = {
    "tomllib", "asyncio.TaskGroup", "asyncio.timeout", "contextlib.chdir", "copy.replace", "datetime.UTC", "enum.StrEnum",
    "enum.ReprEnum", "enum.verify", "hashlib.file_digest", "itertools.batched", "math.cbrt", "math.exp2", "math.sumprod",
    "math.fma", "operator.call", "typing.LiteralString", "typing.Never", "typing.NotRequired", "typing.ReadOnly",
    "typing.Required", "typing.Self", "typing.TypeIs", "typing.TypeVarTuple", "typing.Unpack", "typing.assert_never",
    "typing.assert_type", "typing.override", "typing.reveal_type", "warnings.deprecated",
    "BaseExceptionGroup", "ExceptionGroup", "PythonFinalizationError",
}  # fmt: skip


def newer_than_310(nodes: Iterable[ast.AST]) -> set[str]:
    """The names of NEWER that a file of these nodes imports or uses."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Name):
            found.add(node.id)
    return found & NEWER


@pytest.mark.slow
def test_nothing_needs_more_than_python_310() -> None:
    files = [path for path in committed_files() if path.suffix == ".py"]
    found = {named(path): names for path in files if (names := newer_than_310(nodes_of(path)))}
    assert not found, found
    assert newer_than_310(ast.walk(ast.parse("import tomllib\nfrom typing import Self\nx = datetime.UTC"))) == {
        "tomllib", "typing.Self", "datetime.UTC"
    }  # fmt: skip


def test_ruff_finds_nothing() -> None:
    code, text = output_of("ruff", "check", ".")
    assert code == 0, text


USED = """
import torch
from typing import Any

transformers_model: Any = None
net: torch.nn.Module = torch.nn.Linear(2, 2)
{pages}
wrong: str = run.path  # type: ignore[assignment]
lk.Lora(rank="8")  # type: ignore[arg-type]
lk.finetnue(model)  # type: ignore[attr-defined]
lk.load(model, budget=2)  # type: ignore[arg-type]
"""


@pytest.mark.slow
def test_mypy_finds_nothing(tmp_path: Path) -> None:
    """Neither in the package nor in a user's script, by `--strict`: the pages' lines, and wrong ones that it has to find."""
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/how-to/from-python.md")]
    lines = "\n".join(block for page in pages for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    (tmp_path / "script.py").write_text(USED.format(pages=lines), encoding="utf-8")
    code, text = output_of("mypy", "src", "examples/python_api.py", str(tmp_path / "script.py"))
    assert code == 0, text

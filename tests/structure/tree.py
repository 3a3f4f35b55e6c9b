"""The tree of this repository as the structure tests see it."""

from __future__ import annotations

import ast
import gc
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "lorakeet"


def source_files() -> list[Path]:
    """Every module of the package; empty `__init__` files are only markers and left out."""
    return sorted(path for path in SOURCE.rglob("*.py") if path.name != "__init__.py" or path.read_text(encoding="utf-8").strip())


def committed_files() -> list[Path]:
    """Every file that git keeps or would keep; in an unpacked archive without git, every file outside hidden folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0:
        return sorted(path for path in (ROOT / line for line in listing.stdout.splitlines()) if path.is_file())
    return sorted(path for path in ROOT.rglob("*") if path.is_file() and not any(part.startswith(".") for part in path.parts))


def named(path: Path) -> str:
    """The path below the package or below the repository, for messages."""
    return str(path.relative_to(SOURCE if path.is_relative_to(SOURCE) else ROOT))


@cache
def parsed(path: Path) -> ast.Module:
    """The tree of a file. All tests of a process share it: do not change it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    finally:
        gc.freeze()  # a tree has no cycles, and each search for some would go through the trees of all files so far
        if collects:
            gc.enable()


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a file's tree, in the order of `ast.walk`, which takes longer than what most tests do with them."""
    return tuple(ast.walk(parsed(path)))


def called_name(call: ast.Call) -> str:
    """The last name of what is called: "open" of `open(…)` and of `path.open(…)`; empty where it has none."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Each package that the file imports anywhere, with the line; imports for annotations alone do not count."""
    annotations_only = {
        id(inner)
        for block in nodes_of(path)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for inner in ast.walk(block)
    }
    for node in nodes_of(path):
        if id(node) in annotations_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno

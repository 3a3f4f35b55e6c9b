"""Sizes and names: 600 lines a file, 250 a verb, 60 a function, no drawers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from structure.tree import ROOT, committed_files, named, nodes_of

FILE_LINES = 600
TEST_FILE_LINES = 600
VERB_LINES = 250
FUNCTION_LINES = 60
DRAWERS = re.compile(r"((utils?|common|misc|helpers?|other|stuff)|.*_(v\d+|old|legacy|new|extended))(\..*)?", re.IGNORECASE)


def python_files() -> list[Path]:
    return [path for path in committed_files() if path.suffix == ".py"]


def test_files_are_short() -> None:
    too_long = []
    for path in python_files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        budget = TEST_FILE_LINES if path.is_relative_to(ROOT / "tests") else FILE_LINES
        if lines > budget:
            too_long.append(f"{named(path)}: {lines} lines, budget {budget}")
    assert not too_long, "give the second concept of each its own file:\n" + "\n".join(too_long)


def test_a_verb_is_one_story() -> None:
    """What does not fit is not the verb's: it belongs to the floor of its concept. options.py is a table, a row an option."""
    verbs = ROOT / "src" / "lorakeet" / "verbs"
    files = [path for path in python_files() if path.is_relative_to(verbs) and path != verbs / "options.py"]
    lines = {named(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(files) > 20
    assert not {name: count for name, count in lines.items() if count > VERB_LINES}


@pytest.mark.slow
def test_functions_are_short() -> None:
    too_long = []
    for path in python_files():
        for node in nodes_of(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    too_long.append(f"{named(path)}:{node.lineno} {node.name}: {lines} lines")
    assert not too_long, f"more than {FUNCTION_LINES} lines:\n" + "\n".join(too_long)


def test_no_file_or_folder_is_a_drawer() -> None:
    found = {
        part
        for path in committed_files()
        for part in path.relative_to(ROOT).parts
        if DRAWERS.fullmatch(part)
    }
    assert not found, f"name these after what they do: {', '.join(sorted(found))}"


@pytest.mark.parametrize(
    ("name", "drawer"),
    [
        *((name, True) for name in ("utils.py", "helpers", "spec_v2.py", "core_old", "other.py", "Misc.py")),
        *((name, False) for name in ("durable.py", "news.py", "mother.py", "test_common_rows.py")),
    ],
)
def test_drawers_are_recognised(name: str, drawer: bool) -> None:
    assert bool(DRAWERS.fullmatch(name)) is drawer

"""Errors are values: every code is documented and raised, and nothing decides by the text of a message."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from lorakeet.errors import CODES, LorakeetError
from structure.tree import parsed, source_files


def codes_of(tree: ast.AST) -> Iterator[str]:
    """The codes that a file gives: code="…", CODE = "…"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant) and node.value.value:
            yield str(node.value.value)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            yield from (str(node.value.value) for target in node.targets if getattr(target, "id", "") == "CODE")


def test_every_code_is_documented_and_every_documented_code_is_raised() -> None:
    found = {code for path in source_files() for code in codes_of(parsed(path))}
    computed = {"several-problems", "verb-unknown", "setting-refused"}
    assert found | computed == CODES.keys()
    assert all(says.endswith(".") for says in CODES.values()) and LorakeetError("x").code in CODES

"""Errors are values: every code is documented and raised, and nothing decides by the text of a message."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from lorakeet.errors import CODES, LorakeetError
from structure.tree import named, parsed, source_files

MESSAGES = {"message", "warning", "note", "remark", "stderr", "stdout", "log"}  # names of texts that people read
PATTERNS = {"search", "match", "fullmatch", "findall", "finditer", "sub"}
PARSES = PATTERNS | {"split", "partition", "rpartition", "startswith", "endswith", "find", "index", "removeprefix"}
FOREIGN = {  # what other programs and libraries raise or print, and the system's files
    "errors.py": "CUDA and Triton have no other sign of memory and faults; respelt writes flags as the caller does",
    "memory/transfer.py": "the first line of CUDA's", "train/durable.py": "safetensors has the system's number in its text",
    "exporting/hub.py": "huggingface_hub", "models/text/shard.py": "torch's FSDP", "models/files/foreign_code.py": "transformers",
    "data/tables.py": "csv and json", "studio/remedies.py": "writes a message in the words of a page, and decides nothing",
}  # fmt: skip


def is_message(node: ast.AST) -> bool:
    """str(error), error.message, and names of messages."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "str" and node.args:
        return getattr(node.args[0], "id", "") in ("error", "problem", "caught", "refused", "failed")
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name in MESSAGES


def parsing(tree: ast.AST) -> Iterator[int]:
    """The lines that decide by the text of a message."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(isinstance(one, ast.In | ast.NotIn | ast.Eq) for one in node.ops):
            literal = isinstance(node.left, ast.Constant | ast.Name | ast.Attribute)
            if literal and is_message(node.comparators[0]) and len(str(getattr(node.left, "value", "name"))) > 2:
                yield node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PARSES and node.args:
            read = [node.func.value, *(node.args if node.func.attr in PATTERNS else ())]
            yield from [node.lineno] * any(map(is_message, read))


def codes_of(tree: ast.AST) -> Iterator[str]:
    """The codes that a file gives: code="…", CODE = "…"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant) and node.value.value:
            yield str(node.value.value)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            yield from (str(node.value.value) for target in node.targets if getattr(target, "id", "") == "CODE")


def test_every_code_is_documented_and_every_documented_code_is_raised() -> None:
    found = {code for path in source_files() for code in codes_of(parsed(path))}
    computed = {"several-problems", "verb-unknown"}
    assert found | computed == CODES.keys()
    assert all(says.endswith(".") for says in CODES.values()) and LorakeetError("x").code in CODES


def test_nothing_decides_by_the_text_of_a_message() -> None:
    found = {named(path): lines for path in source_files() if (lines := sorted(parsing(parsed(path))))}
    assert {place: lines for place, lines in found.items() if place not in FOREIGN} == {}
    assert not FOREIGN.keys() - found.keys(), "they parse no more"


@pytest.mark.parametrize(("code", "parses"), [
    ('"x of y" in str(error)', True), ("UNDECIDED in message", True), ('str(error).split("\\n  - ")', True),
    ('message.partition("set ")', True), ("_ADVICE.finditer(message)", True), ('"--uncertified" in job.log', True),
    ('" ".join(str(error).split())', False), ('error.code == "file-missing"', False), ("str(error).splitlines()", False),
])  # fmt: skip
def test_what_parses_a_message_is_found(code: str, parses: bool) -> None:
    assert bool([*parsing(ast.parse(code))]) == parses

"""Tokenizers and chat templates of strangers are called within one boundary, and pages write no text as HTML."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from structure.tree import ROOT, named, nodes_of, source_files

BOUNDARY = "data/template.py"
CALLS = {"encode", "decode", "batch_decode", "batch_encode_plus", "apply_chat_template"}
AS_HTML = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|\beval\(|new Function")


def bare_calls(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """The calls of a tokenizer among the nodes of a file: of its methods that take texts or tokens, or of itself."""
    for node in nodes:
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            owner, _, method = called.rpartition(".")
            of_tokenizer = owner.endswith("tokenizer") and method in CALLS
            if of_tokenizer or method == "apply_chat_template" or called.endswith("tokenizer"):
                yield node.lineno, called


def test_tokenizers_are_called_in_one_place() -> None:
    strays = [
        f"{named(path)}:{line} {call}"
        for path in source_files()
        if named(path) != BOUNDARY
        for line, call in bare_calls(nodes_of(path))
        if not call.rpartition(".")[2].startswith(("_", "load_", "open_", "require_", "save_"))
    ]
    assert not strays, f"call these by {BOUNDARY}, so that what they raise is one message:\n" + "\n".join(strays)


def test_a_bare_call_is_found() -> None:
    lines = ["text.tokenizer.encode('a')", "self._tokenizer.decode(ids)", "any.apply_chat_template([])", "tokenizer('a')"]
    assert [line for line, _ in bare_calls(ast.walk(ast.parse("\n".join(lines))))] == [1, 2, 3, 4]
    assert not list(bare_calls(ast.walk(ast.parse("vae.encode(x)\nraw.decode('utf-8')\nencoded(tokenizer, 'a')"))))


def test_no_script_writes_a_text_as_html() -> None:
    scripts = sorted((ROOT / "src/lorakeet").rglob("*.js")) + sorted((ROOT / "src/lorakeet").rglob("*.html"))
    found = [f"{named(Path(path))}: {match[0]}" for path in scripts for match in AS_HTML.finditer(path.read_text())]
    assert scripts and not found

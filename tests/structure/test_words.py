"""Plain words: names, docstrings, help, messages, comments and pages use the field's terms, and each name means one thing."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorakeet
from structure.tree import ROOT, SOURCE, committed_files, named, nodes_of, parsed, source_files

# A private phrase, and what the field says.
PRIVATE = {
    r"(?<!model )(?<!model-)\bcards?\b": "GPU",
    r"\btold\b": "given, passed, reported",
    r"\b(?:asked|asks?) for\b|\b(?:is|are|was|were|be|being|been) asked\b": "requested",
    r"(?<![-_])\bheld\b(?![-_ ]out)": "in use, stored, kept",
    r"\bjudg(?:es|ed|ing|ement|ements)\b": "evaluate, evaluation",  # a judge is a model that compares replies
    r"\blearnt\b": "target tokens, trained",
    r"\blaid (?:out )?end to end\b": "packed (varlen)",
    r"\bby turns\b|\bin turn\b": "interleaved, alternating, one after another",
    r"\bbegun\b": "initialised, started",
    r"\brooms?\b": "memory, space, budget, workspace",
    r"\bnobody\b|\bsomebody\b|\bwhoever\b": "say which part of the program",
    r"\ba look\b|\blooks? at\b": "a check, reads",
    r"\bparted\b": "sharded, split",
    r"\b(?:brought|brings?|comes?|came) back\b": "dequantised, restored, returned",
    r"\bkept states?\b": "cached hidden states",
    r"\brecorded pass(?:es)?\b": "CUDA graphs",
    r"\banchor(?:s|ed)?\b": "initial value",
    r"\bpass(?:es)? between (?:the )?products\b": "elementwise operations",
    r"\bcoded\b": "quantised to int8",
    r"\baside\b": "spilled, offloaded, saved",
    r"\bhanded (?:on|over|to)\b": "passed",
    r"\bat hand\b(?!\.? *$)": "available",
}
# Parts of names that say nothing to an engineer who is new here.
PRIVATE_NAMES = {
    "told", "asked", "judged", "judging", "learnt", "nobody", "begun", "parted", "card", "cards", "room", "rooms",
    "aside", "look", "looked", "anchor", "anchored", "coded",
}  # fmt: skip
STATE_KEYS = {"anchor_A", "anchor_B"}  # of initial values, in the saved state of a run
MODEL_CARD = {"kinds/adapter_card.py", "exporting/card.py"}  # a model card is the field's own word
ALLOWED = {
    "on the hardware at hand",  # the project's motto
    "text-anchor",  # an attribute of SVG
    "--judged",  # a flag of benchmarks
}  # fmt: skip
KEYS = {"int8, brought back", "bytes of kept states", "a recorded pass", "in turn"}  # of stored results
BESIDE = ("benchmarks", "demos", "docs", "examples")  # folders beside the package, whose texts are read too
CODE = re.compile(r"^```.*?^```|`[^`\n]+`|(?<=\])\([^)\s]+\)", re.MULTILINE | re.DOTALL)  # blocks, spans, targets of links
# Functions that every file of a kind has: adapter formats read and write; kernels say whether they serve and what they cost, and
# have those of their task.
PROTOCOL = {"why_not", "takes", "owns", "read", "write", "main", "quantised_product", "add_quantised_product", "dequantise_into"}


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every docstring, message, help text and comment of a file, with its line."""
    for node in nodes_of(path):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def names_of(path: Path) -> Iterator[tuple[int, str]]:
    """The names that a file defines: modules, classes, functions, arguments, attributes and variables."""
    yield 1, path.stem
    for node in nodes_of(path):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def pages() -> list[Path]:
    """Every page but the log, whose entries are as they were written, and the reference, which is generated from the package."""
    left_out = [ROOT / "docs" / name for name in ("log", "reference")]
    found = [path for path in committed_files() if path.suffix == ".md"]
    return [path for path in found if not any(path.is_relative_to(folder) for folder in left_out)]


def scripts() -> list[Path]:
    """The programs and examples beside the package."""
    folders = [ROOT / name for name in BESIDE]
    return [
        path
        for path in committed_files()
        if path.suffix in {".py", ".sh", ".yaml"} and any(path.is_relative_to(folder) for folder in folders)
    ]


def private_phrases(text: str) -> list[str]:
    """The private phrases of a text, each with what to say."""
    for phrase in ALLOWED:
        text = text.replace(phrase, "")
    found = []
    for pattern, instead in PRIVATE.items():
        found += [f"{match.group()!r}: say {instead}" for match in re.finditer(pattern, text, re.IGNORECASE)]
    return found


def parts_of(name: str) -> set[str]:
    """The words of a name in snake_case or CamelCase."""
    return {part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


@pytest.mark.slow
def test_texts_use_the_fields_words() -> None:
    found = [
        f"{named(path)}:{line}: {phrase}"
        for path in source_files() for line, text in words_of(path) for phrase in private_phrases(text)
    ]  # fmt: skip
    assert not found, "\n".join(found)


def test_pages_use_the_fields_words() -> None:
    """Except in code and the targets of links, where files and settings keep their names."""
    lines = [(path, line) for path in pages() for line in CODE.sub("", path.read_text(encoding="utf-8")).splitlines()]
    found = [f"{named(path)}: {phrase} in: {line}" for path, line in lines for phrase in private_phrases(line)]
    assert not found, "\n".join(found)


def test_texts_beside_the_package_use_the_fields_words() -> None:
    found = [
        f"{named(path)}:{number}: {phrase}"
        for path in scripts()
        for number, line in (words_of(path) if path.suffix == ".py" else enumerate(path.read_text("utf-8").splitlines(), 1))
        if line not in KEYS
        for phrase in private_phrases(line)
    ]
    assert not found, "\n".join(found)


def test_names_use_the_fields_words() -> None:
    found = set()
    for path in source_files():
        private = PRIVATE_NAMES - ({"card", "cards"} if named(path) in MODEL_CARD else set())
        names = ((line, name) for line, name in names_of(path) if name not in STATE_KEYS)
        found |= {f"{named(path)}:{line}: {name}" for line, name in names if parts_of(name) & private}
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("Rows laid end to end on a CUDA card.", 2),
        ("what C is told of a block; nobody asks again", 2),
        ("rows are asked for by turns", 2),
        ("Held-out rows and held out rows are of the field.", 0),
        ("A model card for the hub, on the hardware at hand", 0),
        ("the bytes held at most", 1),
    ],
)
def test_private_phrases_are_found(text: str, private: int) -> None:
    assert len(private_phrases(text)) == private


def test_names_are_split_into_words() -> None:
    assert parts_of("CardRows") == {"card", "rows"} and parts_of("_on_card2") == {"on", "card"}
    assert parts_of("cardinal") == {"cardinal"}


def definitions(kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> dict[str, list[str]]:
    """Where each name at the top of a module is defined, for the definitions of a kind."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in source_files():
        for node in parsed(path).body:
            if isinstance(node, kind):
                found[node.name].append(named(path))  # type: ignore[attr-defined]
    return found


def test_no_class_name_occurs_twice() -> None:
    twice = {name: places for name, places in definitions(ast.ClassDef).items() if len(places) > 1}
    assert not twice, twice


def test_no_public_function_name_occurs_twice() -> None:
    """But for those of a protocol, and for the Python API's, which have the names of the verbs that they call."""
    found = definitions((ast.FunctionDef, ast.AsyncFunctionDef))
    below = {name: [place for place in places if not place.startswith("api/")] for name, places in found.items()}
    twice = {name: places for name, places in below.items() if len(places) > 1 and name[0] != "_" and name not in PROTOCOL}
    assert not twice, twice
    shared = {name for name, places in found.items() if name[0] != "_" and len(places) > 1 and len(below[name]) == 1}
    assert shared <= {*lorakeet.__all__}, shared


def test_no_folder_has_more_than_24_files() -> None:
    folders = [SOURCE, *(path for path in SOURCE.rglob("*") if path.is_dir() and path.name != "__pycache__")]
    full = {named(folder): count for folder in folders if (count := sum(file.is_file() for file in folder.iterdir())) > 24}
    assert not full, full

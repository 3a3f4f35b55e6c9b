"""Where tests stand: a file a concept, beside the code that it tests; and they patch what is public."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from structure.tree import ROOT, SOURCE, called_name, named, nodes_of, source_files

TESTS = ROOT / "tests"
ACROSS = {"structure", "laws", "families", "golden", "gpu", "tiny"}  # folders of tests that belong to no single module
PRIVATE_PATCHES = 20


def test_files() -> list[Path]:
    """The files of tests that belong to a folder of src/lorakeet, below tests/."""
    found = (path.relative_to(TESTS) for path in TESTS.rglob("test_*.py"))
    return sorted(path for path in found if path.parts[0] not in ACROSS)


test_files.__test__ = False  # type: ignore[attr-defined]  # its name follows what it returns


def imports_of(path: Path) -> set[str]:
    """The modules that a file may mean with its imports: of `from a import b` both a and a.b."""
    found: set[str] = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_each_file_of_tests_stands_beside_its_code() -> None:
    """Its folder is one of src/lorakeet; its name is that of a file or of a folder there."""
    strays = [
        f"tests/{path}: src/lorakeet/{path.parent} has neither {name}.py nor {name}/"
        for path in test_files()
        for name in [path.stem.removeprefix("test_")]
        if not (SOURCE / path.parent / f"{name}.py").is_file() and not (SOURCE / path.parent / name / "__init__.py").is_file()
    ]
    assert not strays, "\n".join(strays) + "\nName a file of tests after what it tests; laws across files belong into tests/laws."


@pytest.mark.slow
def test_each_file_of_code_has_its_tests() -> None:
    """A file of tests has its name, or one in the same folder imports it."""
    files = test_files()
    imports = {path: imports_of(TESTS / path) for path in files}
    untested = []
    for source in (path.relative_to(SOURCE) for path in source_files() if not path.name.startswith("__")):
        module = ".".join(("lorakeet", *source.with_suffix("").parts))
        of_folder = source.parent.parent / f"test_{source.parent.name}.py"
        own = [path for path in files if path.parent == source.parent or path == of_folder]
        if source.parent / f"test_{source.name}" not in own and not any(module in imports[path] for path in own):
            untested.append(f"src/lorakeet/{source}: no file of tests/{source.parent} is named after it or imports it")
    assert not untested, "\n".join(untested)


def private_patches(nodes: Iterable[ast.AST]) -> Iterator[ast.Call]:
    """Calls of setattr, delattr and mock's patch on a private name: `patch.setattr(part, "_name", …)` or `("a.b._name", …)`."""
    for node in nodes:
        if isinstance(node, ast.Call) and called_name(node) in ("setattr", "delattr", "patch", "object"):
            words = [part.value for part in node.args[:2] if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            owner = ast.unparse(node.args[0]).split(".") if node.args and not isinstance(node.args[0], ast.Constant) else []
            if any(is_private(name) for word in words for name in word.split(".")) or any(map(is_private, owner)):
                yield node


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_few_private_names_are_patched() -> None:
    """What is patched under a private name breaks with every rewrite; an argument or a public name does not."""
    found = [
        f"{named(path)}:{node.lineno}: {ast.unparse(node)[:90]}"
        for path in sorted(TESTS.rglob("*.py"))
        for node in private_patches(nodes_of(path))
    ]
    shown = "\n".join(found)
    assert len(found) <= PRIVATE_PATCHES, f"{len(found)} patches of private names, at most {PRIVATE_PATCHES}:\n{shown}"


@pytest.mark.parametrize(
    ("call", "counts"),
    [
        ('patch.setattr(module, "_name", 1)', True),
        ('monkeypatch.setattr("a.b._name", 1)', True),
        ('monkeypatch.setattr(a._Kind, "name", 1)', True),
        ('mock.patch.object(a, "_name")', True),
        ('monkeypatch.delattr(a, "_NAME")', True),
        ('patch.setattr(module, "name", _one)', False),
        ('patch.setattr(Kind, "__init__", one)', False),
    ],
)
def test_private_patches_are_recognised(call: str, counts: bool) -> None:
    assert bool([*private_patches(ast.walk(ast.parse(call)))]) is counts

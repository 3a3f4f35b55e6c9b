"""Writes docs/reference/files.md, the map of files, from the first line of each file: `make docs`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
SOURCE = DOCS.parent / "src" / "lorakeet"
PAGE = DOCS / "reference" / "files.md"

HEAD = """# Reference: the files

Made from the code by `make docs`; a test compares it with the code. Paths are below `src/lorakeet/`. How the folders depend on
each other is in [ARCHITECTURE.md](../../ARCHITECTURE.md).
"""


def summary(path: Path) -> str:
    """The first line of a Python file's docstring, or of a C file's opening comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    found = re.match(r"\s*/\*+\s*(.*?)\s*(?:\*/|\n)", text)
    return found.group(1) if found else ""


def listed() -> list[Path]:
    """Every Python and C file that says something."""
    files = sorted(path for path in SOURCE.rglob("*") if path.suffix in {".py", ".c", ".h"})
    return [path for path in files if path.name != "__init__.py" or path.read_text(encoding="utf-8").strip()]


def page() -> str:
    """The whole page as Markdown: one list for each folder."""
    folders: dict[str, list[str]] = {}
    for path in listed():
        relative = path.relative_to(SOURCE)
        folders.setdefault(str(relative.parent), []).append(f"- `{relative}`: {summary(path)}")
    parts = [HEAD]
    for folder in sorted(folders):
        title = "The package" if folder == "." else f"`{folder}/`"
        parts.append("\n".join([f"## {title}", "", *folders[folder], ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")

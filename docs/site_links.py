"""A hook of the site: what pages link to outside of docs/ becomes a part of the site, below `source/`.

In the repository such links lead to files. The site takes these files with it: pages as pages, everything else as it is.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
FENCE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def on_files(files: Files, config: Any) -> Files:
    """Adds every file outside of docs/ that a page links to, and those that such pages link to."""
    waiting = [f"{DOCS}{file.src_uri}" for file in files if file.src_uri.endswith(".md")]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for target in targets(page, (ROOT / page).read_text(encoding="utf-8")):
            if target in seen or target.startswith(DOCS) or not (ROOT / target).is_file():
                continue
            seen.add(target)
            file = File.generated(config, place(target), abs_src_path=str(ROOT / target))
            file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrites links to where their files are in the site. Links to folders are left out, their words stay."""
    uri = page.file.src_uri
    own = uri.removeprefix("source/") if uri.startswith("source/") else f"{DOCS}{uri}"
    return "".join(part if part.startswith("`") else relinked(part, own, uri) for part in FENCE.split(markdown))


def relinked(text: str, own: str, uri: str) -> str:
    """`text` of the repository's page `own`, which is `uri` in the site."""

    def replaced(found: re.Match[str]) -> str:
        path, mark, anchor = found[2].partition("#")
        target = resolved(own, path)
        if not path or "://" in path or not (ROOT / target).is_file():
            return found[0]
        return f"{found[1]}{posixpath.relpath(place(target), posixpath.dirname(uri) or '.')}{mark}{anchor}{found[3]}"

    text = re.sub(r"\[([^\]]+)\]\(([^)#\s]+)\)", lambda found: found[1] if is_folder(own, found[2]) else found[0], text)
    return LINK.sub(replaced, text)


def targets(page: str, text: str) -> list[str]:
    """The paths in the repository that a page links to."""
    parts = [part for part in FENCE.split(text) if not part.startswith("`")]
    paths = [found[2].partition("#")[0] for part in parts for found in LINK.finditer(part)]
    return [resolved(page, path) for path in paths if path and "://" not in path]


def resolved(page: str, path: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path))


def is_folder(page: str, path: str) -> bool:
    return "://" not in path and os.path.isdir(ROOT / resolved(page, path))


def place(target: str) -> str:
    """Where a file of the repository is in the site."""
    return target.removeprefix(DOCS) if target.startswith(DOCS) else f"source/{target}"

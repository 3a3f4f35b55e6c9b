"""The package's page on an index: README.md, whose links into the source tree and to its own headings lead nowhere there.

With an address under `Source` in [project.urls] they lead to it; without one their words stay and pictures are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|mailto:)([^)\s]+)\)")


def page(text: str, source: str = "") -> str:
    """`text` with relative links made absolute below `source`, or taken out where that is empty."""

    def replaced(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if source:
            target = f"README.md{target}" if target.startswith("#") else target
            return f"{picture}[{words}]({source.rstrip('/')}/{'raw' if picture else 'blob'}/main/{target})"
        return "" if picture else words

    return re.sub(r"\n{3,}", "\n\n", LINK.sub(replaced, text))


class PackagePage(MetadataHookInterface):
    """Sets `readme` of the project's metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source", "")
        metadata["readme"] = {"content-type": "text/markdown", "text": page(text, source)}

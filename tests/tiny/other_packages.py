"""Packages other than Lorakeet that register a kind of run, installed in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorakeet.registry import declarations

PACKAGES = Path(__file__).parent  # with line_kind/


def installed(folder: Path, package: str = "line_kind", module: str = "line_kind") -> Path:
    """A folder with the metadata of an installed `package` whose entry point registers the kind `line`."""
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[lorakeet.kinds]\nline = {module}\n")
    return folder


@contextmanager
def registered(folder: Path) -> Iterator[None]:
    """A context in which what is installed in `folder` is importable, as is line_kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PACKAGES)
        patch.syspath_prepend(folder)
        declarations.cache_clear()
        yield
    declarations.cache_clear()

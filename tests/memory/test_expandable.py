"""Expandable segments: set before torch starts, unless the user has said something."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lorakeet.memory.expandable import NAME, OTHER_NAMES, SETTING, use_expandable_segments


@pytest.mark.parametrize("name", [NAME, *OTHER_NAMES])
def test_what_the_user_has_set_stays(name: str) -> None:
    given = {name: "max_split_size_mb:512"}
    use_expandable_segments(given, "linux")
    assert given == {name: "max_split_size_mb:512"}


@pytest.mark.parametrize(("platform", "expected"), [("linux", {NAME: SETTING}), ("win32", {}), ("darwin", {})])
def test_only_where_there_are_some(platform: str, expected: dict[str, str]) -> None:
    found: dict[str, str] = {}
    use_expandable_segments(found, platform)
    assert found == expected


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has them")
@pytest.mark.parametrize("first", ["lorakeet", "lorakeet.cli.main", "lorakeet.memory.cuda"])
def test_it_is_set_before_torch_is_there(first: str) -> None:
    """torch has no CUDA here; its own parser, which every build has, must know the setting."""
    watch = (
        "import os, sys, importlib.abc\n"
        "class Watch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        assert name != 'torch' or os.environ.get({NAME!r}) == {SETTING!r}, 'torch first'\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {first}, torch\n"
        f"torch._C._accelerator_setAllocatorSettings(os.environ[{NAME!r}])\n"
        f"print(os.environ[{NAME!r}])\n"
    )
    clean = {key: value for key, value in os.environ.items() if key not in (NAME, *OTHER_NAMES)}
    found = subprocess.run([sys.executable, "-c", watch], env=clean, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and found.stdout.strip() == SETTING, found.stderr

"""The command that installs packages into the environment that is running: that of pip, pipx or uv."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lorakeet.errors import EnvironmentProblem


def install_command(words: Sequence[str], *flags: str) -> list[str]:
    """Installs the requirements `words` here; `flags` are pip's, which uv has too.

    An environment of `pipx install` or `uvx` may have no pip. Raises EnvironmentProblem where nothing is found that installs.
    """
    prefix = Path(sys.prefix)
    if find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", *flags, *words]
    if prefix.parent.name == "venvs" and (prefix / "pipx_metadata.json").is_file() and (pipx := shutil.which("pipx")):
        return [pipx, "runpip", prefix.name, "install", *flags, *words]  # inject fails where dependencies are left out
    if uv := os.environ.get("UV") or shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable, *flags, *words]
    raise EnvironmentProblem(
        f"Neither pip, pipx nor uv is there to install {', '.join(words)} into {sys.prefix}. Install one of them."
    )

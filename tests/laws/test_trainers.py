"""`lk.attach` within other programs' trainers: the examples of examples/trainers, run with a tiny model."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import lorakeet as lk
from structure.tree import ROOT

EXAMPLES = {  # what each needs beside the test extra
    "plain_loop": (),
    "transformers_trainer": (),
    "trl_sft_trainer": ("trl",),
    "lightning_module": ("lightning",),
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in (ROOT / "examples" / "trainers").glob("*.py")} == set(EXAMPLES)


def checked(said: str, out: Path, base: Path) -> None:
    """The loss fell, and the written adapter has trained pairs where they were put."""
    found = re.search(r"^loss ([\d.]+) → ([\d.]+)$", said, re.MULTILINE)
    assert found and float(found[2]) < float(found[1]), said
    adapter = lk.Adapter.read(out, quiet=True)
    assert [path.rpartition(".")[2] for path in adapter] == ["q_proj", "v_proj"] * 2
    assert all(torch.count_nonzero(adapter[path].B) > 0 for path in adapter) and adapter.named_base == str(base)


@pytest.mark.parametrize("name", [name for name, needs in EXAMPLES.items() if not needs])
def test_without_other_packages(
    name: str, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(tiny_llama_folder), str(tmp_path / "mine")])
    runpy.run_path(str(ROOT / "examples" / "trainers" / f"{name}.py"), run_name="__main__")
    checked(capsys.readouterr().out, tmp_path / "mine", tiny_llama_folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, needs in EXAMPLES.items() if needs])
def test_within_another_package(name: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """In a process of its own: these programs set up logging, warnings and threads for all."""
    for package in EXAMPLES[name]:
        if find_spec(package) is None:
            pytest.skip(f"{package}, of the extra lorakeet[trainers], is not installed: make peers")
    script = [sys.executable, str(ROOT / "examples" / "trainers" / f"{name}.py"), str(tiny_llama_folder), str(tmp_path / "mine")]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(script, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    checked(ended.stdout, tmp_path / "mine", tiny_llama_folder)

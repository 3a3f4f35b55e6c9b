"""The figures that pages give for a command are those that it prints. Plans for a CPU, which count what the process itself holds,
run in a process of their own, as a reader's do."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from lorakeet.cli.main import main
from structure.tree import ROOT

UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "GB": 10**9, "": 1}
LINE = re.compile(r"^lorakeet plan .*$", re.MULTILINE)
NAMELESS = "lorakeet plan my.yaml"  # of a run file of the reader's own: no figure can stand beside it


@dataclass(frozen=True)
class Figure:
    """One number on a page: its place there, and its value in what the command prints as JSON.

    `within`: as a share where the process itself is in it, and as a number of blocks, which follows from that.
    """

    page: str
    command: str  # as it stands in a block of that page, or of another
    place: str  # a pattern of the page with one group
    unit: str
    value: Callable[[dict[str, Any]], float]
    change: tuple[str, str] = ("", "")  # another command that the text describes: what to write in place of what
    within: float = 0.01
    blocks: int = 0


def base_of(found: dict[str, Any]) -> float:
    return float(found["phases"][0]["kinds"]["base"])


LOW, MEMORY, IMAGES = "docs/how-to/low-memory.md", "docs/explain/memory.md", "docs/how-to/images.md"
CPU = "lorakeet plan --model meta-llama/Llama-2-7b-hf --quantize nf4 --rank 16 --tokens 2048 --memory.budget 3GiB"
CUDA = "lorakeet plan --model meta-llama/Llama-2-7b-hf --quantize nf4 --tokens 2048 --model.device cuda --memory.budget 2GiB"
GPU_12 = "lorakeet plan --model meta-llama/Llama-3.1-8B --quantize nf4 --machine gpu-12"
SDXL = (
    "lorakeet plan examples/photos.yaml --model stabilityai/stable-diffusion-xl-base-1.0 --quantize nf4 --diffusion.at_once 1 "
    "--diffusion.checkpointing"
)
NONE = (" --memory.budget 3GiB", "")
FIGURES = (
    Figure(LOW, CPU, r"\| none \| 32 of 32 \| ([\d.]+) GiB", "GiB", lambda found: found["peak"], NONE, within=0.03),
    Figure(LOW, CPU, r"of which the base is ([\d.]+) GiB", "GiB", base_of, NONE),
    Figure(LOW, CPU, r"\| 3 GiB \| (\d+) \|", "", lambda found: found["streamed"]["slots"], blocks=2),
    Figure(LOW, CPU, r"\| 3 GiB \| \d+ \| ([\d.]+) GiB", "GiB", lambda found: found["streamed"]["planned"], within=0.03),
    Figure(LOW, CUDA, r"the peak is ([\d.]+) GiB with all weights", "GiB", lambda found: found["peak"]),
    Figure(LOW, CUDA, r"refused: it needs at least ([\d,]+) MiB", "MiB", lambda found: found["streamed_least"]),
    Figure(MEMORY, CUDA, r"is refused: it needs at least ([\d,]+) MiB", "MiB", lambda found: found["streamed_least"]),
    Figure(LOW, GPU_12, r"line needs ([\d.]+) GiB", "GiB", lambda found: found["peak"]),
    Figure(LOW, GPU_12, r"takes ([\d.]+) of the", "GiB", lambda found: found["streamed"]["planned"]),
    Figure(LOW, GPU_12, r"of the ([\d.]+) GiB free", "GiB", lambda found: found["machine"]["bytes"]),
    Figure(IMAGES, SDXL, r"a peak of ([\d.]+) GB of tensors", "GB", lambda found: found["card_tensors"]),
)  # fmt: skip


@cache
def printed(command: str) -> dict[str, Any]:
    """What a command prints with --json. One that is refused ends with 2 and says why."""
    words = [*shlex.split(command), "--json"]
    if command.startswith(CPU.partition(" --memory")[0]):
        done = subprocess.run([sys.executable, "-m", *words], check=False, capture_output=True, text=True, cwd=ROOT, timeout=600)
        found, code = json.loads(done.stdout), done.returncode
    else:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
            patch.chdir(ROOT)
            code = main(words[1:])
        found = json.loads(said.getvalue())
    assert code == (2 if found["refused"] else 0)
    return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.page}: {figure.place}")
def test_a_figure_on_a_page_is_what_its_command_prints(figure: Figure) -> None:
    [number] = re.findall(figure.place, (ROOT / figure.page).read_text(encoding="utf-8"))
    said = float(number.replace(",", "")) * UNITS[figure.unit]
    value = figure.value(printed(figure.command.replace(*figure.change)))
    _, _, decimals = number.partition(".")
    rounding = 0.5 * UNITS[figure.unit] / 10 ** len(decimals)
    assert abs(said - value) <= (figure.blocks or rounding + figure.within * value), (number, value / UNITS[figure.unit])


@pytest.mark.slow
def test_what_a_page_calls_refused_is_refused_and_nothing_else_is() -> None:
    assert {figure.command for figure in FIGURES if printed(figure.command)["refused"]} == {CUDA}


def test_every_plan_on_a_page_has_its_figures_compared() -> None:
    pages = [ROOT / "README.md", *(path for path in (ROOT / "docs").rglob("*.md") if "log" not in path.parts)]
    lines = {line.partition("#")[0].strip() for page in pages for line in LINE.findall(page.read_text(encoding="utf-8"))}
    assert {line for line in lines if "[OPTIONS]" not in line} == {NAMELESS, *(figure.command for figure in FIGURES)}

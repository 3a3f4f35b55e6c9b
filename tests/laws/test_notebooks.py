"""Every notebook runs from its first cell to its last, with small parameters in place of the real ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from structure.tree import ROOT
from tiny.pictures import album

NOTEBOOKS = ROOT / "notebooks"
NAMES = ("first_adapter", "gpu_proof", "images", "many_adapters_one_base", "merge_export_verify", "own_rows_from_pandas")
CELLS = 25


def read(name: str) -> Any:
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def assigned(source: str) -> list[str]:
    return re.findall(r"^([A-Z_]+) = ", source, re.MULTILINE)


@pytest.fixture
def small(tmp_path: Path, tiny_llama_folder: Path, tiny_sd_folder: Path) -> dict[str, dict[str, Any]]:
    """The parameters of each notebook for a test: tiny models and a few steps."""
    album(tmp_path / "photos", 24)
    rows, model = str(ROOT / "examples" / "data" / "dates.jsonl"), str(tiny_llama_folder)
    text = {"MODEL": model, "ROWS": rows, "OUT": "runs/mine", "STEPS": 3}
    settings = {"model.dtype": "float32", "model.device": "cpu", "train.steps": 2, "diffusion.sample_steps": 2,
                "evaluate.resamples": 200, "lora.rank": 4}  # fmt: skip
    return {
        "first_adapter": {"MODEL": model, "ROWS": rows, "EPOCHS": 1, "OUT": "runs/mine"},
        "own_rows_from_pandas": {"MODEL": model, "COUNT": 120, "STEPS": 4, "OUT": "runs/mine"},
        "many_adapters_one_base": text,
        "merge_export_verify": text,
        "gpu_proof": {**text, "BUDGET": "4GiB", "QUANTIZE": "nf4", "BENCHMARKS": str(ROOT / "benchmarks"), "STAGES": ["a"],
                      "REPORT": "report"},
        "images": {"MODEL": str(tiny_sd_folder), "PHOTOS": str(tmp_path / "photos"), "PROMPT": "red box", "SETTINGS": settings,
                   "SAMPLING_STEPS": 2, "OUT": "runs/mine"},
    }  # fmt: skip


def shown(notebook: Any) -> str:
    """All that the cells printed and showed, as text."""
    parts = []
    for cell in code_of(notebook):
        for output in cell["outputs"]:
            parts += ["".join(text) for text in (output.get("text", ""), *output.get("data", {}).values())]
    return "\n".join(parts)


EXPECTED = {
    "first_adapter": ("Peak of the run: <b>", "exact match of the adapter:", "<iframe", "largest", "adapter: '"),
    "own_rows_from_pandas": ("rows for training", "has no column 'review'", "probability", "adapter: 0."),
    "many_adapters_one_base": ("british: '", "rows of iso: base ", "largest difference from the sum"),
    "merge_export_verify": ("dates.gguf", "the same changes: True", "PeftModel", "does not compute what it should"),
    "gpu_proof": ("the budget was kept", "certificate passed: True", "planned", "done after", "its numbers mean nothing"),
    "images": ("pictures; the first is red box", "weight 0.5", "<iframe"),
}


@pytest.mark.slow
def test_the_notebooks_run(small: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """All in one kernel, which imports torch once."""
    for name in ("nbclient", "ipykernel", "nbformat"):
        pytest.importorskip(name, reason=f"{name}, of the extra lorakeet[notebooks], runs the notebooks")
    jobs = []
    for name in NAMES:
        (tmp_path / name).mkdir()
        jobs.append({"notebook": str(NOTEBOOKS / f"{name}.ipynb"), "parameters": small[name], "folder": str(tmp_path / name),
                     "out": str(tmp_path / f"{name}.ipynb")})  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    worker = [sys.executable, str(Path(__file__).with_name("notebook_worker.py")), str(tmp_path / "jobs.json")]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(worker, env=given, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0 and not ended.stdout, ended.stdout + ended.stderr
    lost = {}
    for name in NAMES:
        text = shown(json.loads((tmp_path / f"{name}.ipynb").read_text(encoding="utf-8")))
        missing = [words for words in EXPECTED[name] if words not in text]
        if missing:
            lost[name] = (missing, text[-2000:])
        assert "MetricWords(" not in text, name
    assert not lost, lost
    first = shown(json.loads((tmp_path / "first_adapter.ipynb").read_text(encoding="utf-8")))
    assert first.count("Targets by kind of module") == 1, "in the page; the text is one line"


def test_notebooks_are_short_have_no_outputs_and_are_all_run() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(NAMES) == set(EXPECTED)
    for name in NAMES:
        notebook = read(name)
        assert len(notebook["cells"]) <= CELLS, name
        assert notebook["nbformat"] == 4 and notebook["cells"][0]["cell_type"] == "markdown"
        for cell in code_of(notebook):
            assert cell["outputs"] == [] and cell["execution_count"] is None, f"{name}: clear the outputs"
            assert max(map(len, "".join(cell["source"]).splitlines())) <= 150, name


def test_every_notebook_has_its_parameters_in_one_cell(small: dict[str, dict[str, Any]]) -> None:
    for name in NAMES:
        tagged = [cell for cell in code_of(read(name)) if "parameters" in cell["metadata"].get("tags", ())]
        assert len(tagged) == 1 and set(assigned("".join(tagged[0]["source"]))) == set(small[name]), name

"""The site: it builds strictly, names all there is, and its tables of other programs' settings are true."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import lorakeet
from lorakeet.cli.main import lorakeet as command
from lorakeet.config import RunConfig, read_run
from lorakeet.settings import fields_of
from structure.tree import ROOT

COMING = ROOT / "docs" / "start" / "coming-from.md"
SPAN = re.compile(r"`([^`]+)`")


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, as lists of cells."""
    below = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in below.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def names_of(rows: list[list[str]], mark: str = "") -> set[str]:
    """The code spans of the first cells: of rows that carry `mark`, or of those without a mark."""
    wanted = [row[0] for row in rows if (f"({mark})" in row[0] if mark else "(" not in row[0].rpartition("`")[2])]
    return {name for cell in wanted for name in SPAN.findall(cell)}


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path: Path) -> None:
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason=f"{name}, of the extra lorakeet[docs], builds the site")
    given = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(build, cwd=ROOT, env=given, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    made = tmp_path / "site"
    python = (made / "reference" / "python.html").read_text(encoding="utf-8")
    assert "its weights are read when they are first needed" in python, "a docstring"
    architecture = (made / "source" / "ARCHITECTURE.html").read_text(encoding="utf-8")
    assert 'href="../reference/files.html"' in architecture and (made / "source" / "examples" / "drug_reviews.yaml").is_file()
    loads = re.compile(r"<(script|link|img)[^>]+(src|href)=\"?https?://")
    outside = [path for path in made.rglob("*.html") if loads.search(path.read_text(encoding="utf-8"))]
    assert not outside, "a page that loads something from elsewhere"


def test_every_page_is_in_the_navigation() -> None:
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert named == pages


def test_the_page_of_commands_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "generate_commands.py"))
    text = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    assert text == made["page"](), "run: make docs"
    assert "## `finetune`" in text and "| `--dry-run / --no-dry-run` |" in text and "--lora.rank N" not in text


def test_the_page_of_the_python_api_has_every_name() -> None:
    text = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (\S+)\n    options: \{heading: lk\.(\w+), toc_label: lk\.(\w+)\}$", text, re.MULTILINE)
    offered = {name: place.replace(":", ".") for name, place in lorakeet._PLACES.items()}
    assert offered == {name: place for place, name, _ in shown}
    assert all(name == label for _, name, label in shown)


def test_links_out_of_the_pages_become_parts_of_the_site() -> None:
    pytest.importorskip("mkdocs", reason="mkdocs, of the extra lorakeet[docs], builds the site")
    hook = runpy.run_path(str(ROOT / "docs" / "site_links.py"))
    page = "[a](../../ARCHITECTURE.md#layers) [b](../explain/lora.md) [c](../../examples) [d](https://a.b) [e](#own)"
    found = "[a](../source/ARCHITECTURE.md#layers) [b](../explain/lora.md) c [d](https://a.b) [e](#own)"
    assert hook["relinked"](page, "docs/start/first-run.md", "start/first-run.md") == found
    assert hook["relinked"]("[a](docs/README.md)", "ARCHITECTURE.md", "source/ARCHITECTURE.md") == "[a](../README.md)"
    assert hook["targets"]("README.md", "[a](b.md#c) `[d](e.md)`\n```\n[f](g.md)\n```\n") == ["b.md"]


def test_every_setting_of_pefts_configuration_is_named_and_no_other() -> None:
    from peft import LoraConfig

    named = names_of(table(COMING.read_text(encoding="utf-8"), "PEFT: `LoraConfig`"))
    assert named == {spec.name for spec in dataclasses.fields(LoraConfig)}


def test_the_defaults_that_differ_from_pefts_are_said_right() -> None:
    from peft import LoraConfig

    rows = {row[0]: row[2] for row in table(COMING.read_text(encoding="utf-8"), "PEFT: `LoraConfig`")}
    theirs, ours = LoraConfig(), lorakeet.Lora()
    assert rows["`r`"] == f"{theirs.r} there, {ours.rank} here"
    assert rows["`lora_alpha`"] == f"{theirs.lora_alpha} there, {ours.alpha:g} here"


def test_the_settings_of_the_trainers_exist() -> None:
    from transformers import TrainingArguments

    rows = table(COMING.read_text(encoding="utf-8"), "`Trainer` and TRL's `SFTTrainer`")
    own = names_of(rows)
    assert len(own) > 20 and own <= {spec.name for spec in dataclasses.fields(TrainingArguments)}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_settings_of_trl_exist() -> None:
    trl = pytest.importorskip("trl", reason="trl, of the extra lorakeet[trainers], is not installed")
    marked = names_of(table(COMING.read_text(encoding="utf-8"), "`Trainer` and TRL's `SFTTrainer`"), "TRL")
    assert len(marked) > 5 and marked <= {spec.name for spec in dataclasses.fields(trl.SFTConfig)}


def problems_of(page: str) -> list[str]:
    """What the page calls Lorakeet's, and is none of its settings, their values, verbs and flags."""
    settings = {leaf.path: leaf for leaf in fields_of(RunConfig)}
    sections = {path.partition(".")[0] for path in settings if "." in path}
    lost = []
    for span in SPAN.findall(page):
        name, mark, value = span.partition(": ")
        if name.partition(".")[0] in sections and "." in name and re.fullmatch(r"[\w.]+", name) and name not in settings:
            lost.append(f"{span}: there is no such setting")
        elif mark and name in settings:
            try:
                read_run(None, {"model": "m", "data.train": "rows.jsonl", name: value})
            except lorakeet.LorakeetError as error:
                lost.append(f"{span}: {error}")
        elif span.startswith("lk.") and not hasattr(lorakeet, re.findall(r"\w+", span)[1]):
            lost.append(f"{span}: not in the Python API")
    return lost


def test_the_names_of_lorakeet_exist() -> None:
    page = COMING.read_text(encoding="utf-8")
    assert problems_of(page) == []
    second = [row[1] for line in ("PEFT: `LoraConfig`", "unsloth", "LLaMA-Factory", "Axolotl") for row in table(page, line)]
    spans = {name for cell in second for name in SPAN.findall(cell)}
    known = {leaf.path for leaf in fields_of(RunConfig)}
    strays = {span for span in spans if span.partition(": ")[0] not in known and not span.startswith("lorakeet ")}
    assert len(spans) > 40 and not strays, "neither a setting nor a command"
    verbs = {span.split()[1] for span in spans if span.startswith("lorakeet ")}
    assert verbs <= set(command.list_commands(None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", ["`lora.rnak`", "`lora.variant: dra`", "`train.epochs: many`", "`lk.finetnue(net)`", "`ranks.score: none`"]
)
def test_wrong_names_of_lorakeet_are_found(wrong: str) -> None:
    assert len(problems_of(f"Use {wrong}.")) == 1

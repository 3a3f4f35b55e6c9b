"""Rows and models that are missing are refused before torch is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.config import read_run
from lorakeet.errors import DataError, LorakeetError
from lorakeet.kinds.text.early import require_text_base, require_text_rows
from tiny.runs import write_rows


def test_rows_are_read_whole_only_where_asked(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "fine", "label": "good"}, {"text": "bad row"}])
    config = read_run(None, {"model.path": "none", "data.train": str(data)})
    require_text_rows(config, whole=False)
    with pytest.raises(DataError, match="label"):
        require_text_rows(config, whole=True)
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        require_text_rows(read_run(None, {"model.path": "none", "data.train": str(tmp_path / "gone.jsonl")}), whole=False)


def test_a_model_by_its_path_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(LorakeetError, match="does not exist"):
        require_text_base(read_run(None, {"model.path": str(tmp_path / "gone"), "data.train": "rows.jsonl"}))

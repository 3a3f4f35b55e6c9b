"""Rows that train on every answer: those of a shape that another objective trains are refused, with its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.errors import DataError
from lorakeet.kinds.text.rows import with_one_answer
from lorakeet.registry import first_objective
from tiny.runs import write_rows


@pytest.mark.parametrize(
    ("record", "instead"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "dpo"), ({"prompt": "p", "completion": "a", "label": True}, "kto"),
        ({"prompt": "p", "completion": "a"}, ""),
    ],
)  # fmt: skip
def test_rows_of_another_shape_name_what_trains_them(record: dict[str, Any], instead: str, tmp_path: Path) -> None:
    rows = read_rows(str(write_rows(tmp_path / "rows.jsonl", [record])), DataSpec(train="x"))
    if not instead:
        assert with_one_answer(rows, first_objective(), "training", trained=True) == tuple(rows)
        return
    with pytest.raises(DataError, match=f"but train.objective is sft, .* Set --train.objective {instead}, or"):
        with_one_answer(rows, first_objective(), "training", trained=True)

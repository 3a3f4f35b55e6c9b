"""`runs.evaluated_rows`: a file whose rows are not of the run's shape is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.errors import DataError
from lorakeet.runs.evaluated_rows import require_shape
from lorakeet.verbs.evaluate import evaluate
from lorakeet.verbs.options import EvaluateOptions
from tiny.runs import chats, quiet, reviews, write_rows


def test_a_file_of_another_shape_is_said_to_be_one(finished: Any, tmp_path: Path) -> None:
    """Its rows were told to be labelled, or to be removed."""
    replies = write_rows(tmp_path / "chats.jsonl", chats(6))
    with pytest.raises(DataError, match=r"chats.jsonl has no labels, but .* trained on labelled texts. .*'text' and 'label'"):
        evaluate(EvaluateOptions(str(finished.path), data=str(replies)), console=quiet())
    labelled, (row, *_) = write_rows(tmp_path / "labelled.jsonl", reviews(6)), read_rows(str(replies), DataSpec())
    rows = read_rows(str(labelled), DataSpec())
    with pytest.raises(DataError, match=r"labelled.jsonl has texts with a label, .* its training rows, chats.jsonl"):
        require_shape(rows, (), DataSpec(train=str(replies)), "labelled.jsonl")
    require_shape([row], (), DataSpec(), "")

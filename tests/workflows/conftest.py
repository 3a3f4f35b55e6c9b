"""One finished run over labelled rows, with a test file, that the tests of this folder look at. Do not write into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from lorakeet.workflows.finetune import FinetuneResult


@dataclass(frozen=True)
class Finished:
    """A run and what went in."""

    result: FinetuneResult
    path: Path
    model: Path
    data: Path
    test: Path


@pytest.fixture(scope="session")
def finished(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    from tiny.runs import reviews, run, write_rows

    folder = tmp_path_factory.mktemp("finished")
    records = reviews(60)
    test = [*reviews(12, seed=1), records[0]]  # the last row stands in both files
    data, judged = write_rows(folder / "rows.jsonl", records), write_rows(folder / "judged.jsonl", test)
    result = run(tiny_llama_folder, data, folder / "run", {"data.test": judged})
    return Finished(result, folder / "run", tiny_llama_folder, data, judged)

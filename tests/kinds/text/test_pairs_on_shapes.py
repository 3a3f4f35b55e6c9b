"""The pairs of a run are planned on shapes alone, as the run itself plans them."""

from __future__ import annotations

from pathlib import Path

from lorakeet.kinds.text.assemble import assemble_text
from lorakeet.kinds.text.pairs_on_shapes import pairs_on_shapes
from tiny.runs import quiet, reviews, settings, write_rows


def test_the_plan_is_that_of_the_run(tiny_llama_folder: Path, tmp_path: Path) -> None:
    config = settings(tiny_llama_folder, write_rows(tmp_path / "rows.jsonl", reviews(30)), tmp_path / "run")
    found, tied = pairs_on_shapes(config, print)
    assert found.to_mapping() == assemble_text(config, quiet()).plan.to_mapping() and tied

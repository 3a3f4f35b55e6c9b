"""`verification.certify`: what the certificate of artefacts says of rows that were left out or could not tell."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorakeet.core.adapter import Adapter
from lorakeet.data.prepare import load_dataset
from lorakeet.exporting.llama_cpp import quantise
from lorakeet.formats.peft import peft
from lorakeet.models.text.load import load_tokenizer, read_config
from lorakeet.planning.check import GREEDY_TOKENS, positions_of_answer, size_of_check
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.runs.residency import Residency, Way
from lorakeet.verification.artefact import live_side
from lorakeet.verification.certify import HowCompared, certify_artefacts
from lorakeet.verification.probes import probes_of
from tiny.exports import loud_run, write_model
from tiny.runs import quiet


@dataclass(frozen=True)
class Loud:
    """A run with a visible adapter, and its base."""

    path: Path
    model: Path
    adapter: Adapter


@pytest.fixture(scope="module")
def loud(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Loud:
    path = loud_run(finished.path, tmp_path_factory.mktemp("loud") / "run")
    return Loud(path, finished.model, peft.read(path / "adapter"))


@pytest.mark.slow
def test_labelled_rows_that_are_left_out_are_counted_and_said(loud: Loud, tmp_path: Path) -> None:
    """Also where others stay; and what their answers take on disk is counted before, whichever stay."""
    opened, target = open_adapter(loud.path), write_model(loud.model, loud.adapter, tmp_path / "x.gguf")
    whole = probes_of(opened, load_dataset(opened.config.data), live_side(opened, quiet()), 4)
    lengths = sorted(len(row.prompt) + max(map(len, row.completions)) for row in whole.labelled)
    most = lengths[-1] - 1
    left = sum(length > most for length in lengths)
    assert 0 < left < len(lengths)
    cut = dataclasses.replace(opened, residency=Residency(way=Way(longest=most)))
    found = certify_artefacts(cut, [str(target)], HowCompared(4), quiet(), of="x")
    assert found.facts["labelled rows left out"] == f"{left} of {len(lengths)}, longer than {most} tokens"
    assert next(check.n for check in found.checks if check.name.endswith(": answers")) == len(lengths) - left
    whole_one = certify_artefacts(opened, [str(target)], HowCompared(1), quiet(), of="x")
    assert "labelled rows left out" not in whole_one.facts
    tokenizer = load_tokenizer(loud.model)
    size = size_of_check(opened.within("8GiB"), [str(target)], loud.model, "a check", rows=4)
    tokens = 5 * (max(map(len, whole.rows)) + GREEDY_TOKENS) + sum(positions_of_answer(row, tokenizer) for row in whole.labelled)
    assert size.waiting == 4 * tokens * read_config(loud.model).vocab_size


def test_few_bits_take_more_rows_within_the_memory_plan_or_say_that_they_cannot_tell(loud: Loud, tmp_path: Path) -> None:
    opened = open_adapter(loud.path)
    dataset, live = load_dataset(opened.config.data), live_side(opened, quiet())
    probes = probes_of(opened, dataset, live, 1)
    others = len(dataset.held_out) - 1
    more = probes.further(10_000)
    assert len(more) == others and {row.key for row in more}.isdisjoint(row.key for row in probes.labelled)
    assert len(probes.further(1)) == 1
    longest = max(map(len, probes.rows))
    planned = dataclasses.replace(opened, config=opened.config.changed(memory={"budget": "8GiB"}))
    kept = probes_of(planned, dataset, live, 1).further(10_000)
    assert len(kept) < others and all(len(row.prompt) + max(map(len, row.completions)) <= longest for row in kept)
    write_model(loud.model, loud.adapter, wide := tmp_path / "wide.gguf")
    quantise(wide, few := tmp_path / "few.gguf", "q4_0")
    found = certify_artefacts(opened, [str(few)], HowCompared(1), quiet(), of="x")
    check = next(check for check in found.checks if check.name.endswith(": answers"))
    [weak] = found.unchecked
    assert check.n == len(dataset.held_out) < 58
    assert f"{check.n} rows cannot tell: 4 bits may change 25 % of the answers" in str(weak)

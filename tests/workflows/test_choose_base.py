"""`workflows.choose_base`: both bases of a quantised run are measured, the better one is merged into, and it is said why."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lorakeet.data.prepare import load_dataset
from lorakeet.errors import ConfigError
from lorakeet.models.modules import original_modules
from lorakeet.quant.packed import PackedLinear
from lorakeet.workflows import choose_base as workflow
from lorakeet.workflows.choose_base import choose_base
from lorakeet.workflows.merge import merge
from lorakeet.workflows.opened import open_adapter
from tiny.dense import folded
from tiny.runs import chats, quiet, reviews, run, write_rows


@pytest.fixture(scope="module")
def on_nf4(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    data = write_rows(folder / "rows.jsonl", reviews(60))
    run(tiny_llama_folder, data, folder / "run", {"model.quantize": "nf4"})
    return folder / "run"


def heard() -> tuple[Console, io.StringIO]:
    said = io.StringIO()
    return Console(file=said, width=200), said


@pytest.mark.parametrize("worse", ["original", "dequantised"])
def test_auto_takes_the_base_that_measures_better(
    on_nf4: Path, worse: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the two is made worse on purpose; the other one is merged into, and both numbers are printed and returned."""
    real = workflow._scores

    def scores(opened: Any, dataset: Any, base: str, console: Any) -> Any:
        found = real(opened, dataset, base, console)
        if base == worse:
            found.log_probs[:] = np.log(1e-9)
            found.log_probs[range(len(found.truth)), (found.truth + 1) % 3] = np.log1p(-2e-9)
        return found

    monkeypatch.setattr(workflow, "_scores", scores)
    console, said = heard()
    merged = merge([str(on_nf4)], out=tmp_path / "merged", console=console)
    choice = merged.choice
    assert choice is not None and choice.base != worse and merged.certificate.passed
    assert {system.name for system in choice.systems} == {"original", "dequantised"}
    assert choice.comparisons[0].metric == "log_loss" and choice.comparisons[0].difference.n == 6
    for words in ("adapter over the original base", "Paired, on the same rows", f"Merged into the {choice.base} base"):
        assert words in said.getvalue()
    assert merged.to_mapping()["into"]["base"] == choice.base


def test_rows_without_labels_are_judged_by_their_loss(tiny_llama_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", chats(40))
    run(tiny_llama_folder, data, tmp_path / "run", {"model.quantize": "int8", "train.steps": 2})
    opened = open_adapter(tmp_path / "run")
    choice = choose_base("auto", [opened], load_dataset(opened.config.data), quiet())
    assert [item.metric for item in choice.comparisons] == ["loss"] and "its loss is" in choice.why
    better = min(choice.systems, key=lambda system: system.metrics["loss"].value)
    assert choice.base == better.name


def test_the_dequantised_base_is_what_the_run_computed_with(on_nf4: Path, tmp_path: Path) -> None:
    merged = merge([str(on_nf4)], out=tmp_path / "merged", into="dequantised", console=quiet())
    assert merged.certificate.passed and "on which the run was trained" in merged.notes[-1]
    logits, weights = merged.certificate.checks
    assert logits.measured["mean_kl"] < 1e-9 and weights.measured["row_difference"] < 1e-5
    opened = open_adapter(on_nf4)
    live = opened.text_model(quiet(), dtype="float32", with_adapter=False)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    packed = {path: module for path, module in original_modules(live.model) if isinstance(module, PackedLinear)}
    assert set(packed) == set(opened.adapter.pairs)
    for path, pair in opened.adapter.pairs.items():
        torch.testing.assert_close(written[f"{path}.weight"].double(), folded(packed[path].base.dense(), pair), atol=1e-6, rtol=0)


def test_the_original_base_is_taken_when_asked_for_and_said(on_nf4: Path) -> None:
    choice = choose_base("original", [open_adapter(on_nf4)], None, quiet())
    assert choice.base == "original" and "trained on a base in nf4" in choice.why and not choice.comparisons


def test_several_adapters_go_into_the_original_unmeasured(on_nf4: Path) -> None:
    opened = open_adapter(on_nf4)
    choice = choose_base("auto", [opened, opened], None, quiet())
    assert choice.base == "original" and "unmeasured" in choice.why


def test_a_dense_run_has_no_dequantised_base(finished: Any) -> None:
    opened = open_adapter(finished.path)
    assert choose_base("auto", [opened], None, quiet()).base == "original"
    with pytest.raises(ConfigError, match=r"the base of .*adapter was not quantised; only a run with model\.quantize"):
        choose_base("dequantised", [opened], None, quiet())

"""`verbs.merges.base_choice`: both bases of a quantised run are measured, the better one is merged into, and it is said why."""

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
from lorakeet.kinds.text.evaluate import TextEvaluator
from lorakeet.models.modules import original_modules
from lorakeet.quant.packed import PackedLinear
from lorakeet.runs.open_adapter import Opened, open_adapter
from lorakeet.verbs.merge import merge
from lorakeet.verbs.merges import base_choice as workflow
from lorakeet.verbs.merges.base_choice import BASES, BaseChoice, both_bases, choose_base
from lorakeet.verbs.options import MergeOptions, QuantizeOptions
from lorakeet.verbs.quantize import quantize
from tiny.dense import folded
from tiny.gguf_file import write_tiny_gguf
from tiny.models import tiny_tokenizer
from tiny.runs import chats, quiet, reviews, run, write_rows

pytestmark = pytest.mark.slow  # they share what takes seconds to make


@pytest.fixture(scope="module")
def on_nf4(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    data = write_rows(folder / "rows.jsonl", reviews(60))
    run(tiny_llama_folder, data, folder / "run", {"model.quantize": "nf4"})
    return folder / "run"


def choose(into: Any, opened: list[Opened], dataset: Any = None) -> BaseChoice:
    return choose_base(into, opened, both_bases(opened[0]), dataset, quiet())


def heard() -> tuple[Console, io.StringIO]:
    said = io.StringIO()
    return Console(file=said, width=200), said


def make_worse(monkeypatch: pytest.MonkeyPatch, worse: str) -> dict[str, str]:
    """Makes every answer over one of the bases wrong; returns the path of each measured base, once it was measured."""
    found: dict[str, str] = {}

    class Evaluator(TextEvaluator):
        def answers(self, rows: Any, system: str) -> Any:
            answers, base = super().answers(rows, system), BASES[len(found)]
            found[base] = self.config.model.path
            if base == worse:
                answers.log_probs[:] = np.log(1e-9)
                answers.log_probs[range(len(answers.truth)), (answers.truth + 1) % 3] = np.log1p(-2e-9)
            return answers

    monkeypatch.setattr(workflow, "TextEvaluator", Evaluator)
    return found


@pytest.mark.parametrize("worse", ["original", "dequantised"])
def test_auto_takes_the_base_that_measures_better(
    on_nf4: Path, worse: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the two is made worse on purpose; the other one is merged into, and both numbers are printed and returned."""
    make_worse(monkeypatch, worse)
    console, said = heard()
    merged = merge(MergeOptions((str(on_nf4),), out=tmp_path / "merged"), console=console)
    choice = merged.choice
    assert choice is not None and choice.base != worse and merged.certificate.passed
    assert {system.name for system in choice.systems} == {"original", "dequantised"}
    assert choice.comparisons[0].metric == "log_loss" and choice.comparisons[0].difference.n == 6
    for words in ("adapter over the original base", "Paired, on the same rows", f"Merged into the {choice.base} base"):
        assert words in said.getvalue()
    assert merged.to_mapping()["into"]["base"] == choice.base


def test_rows_without_labels_are_evaluated_by_their_loss(tiny_llama_folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", chats(40))
    run(tiny_llama_folder, data, tmp_path / "run", {"model.quantize": "int8", "train.steps": 2})
    opened = open_adapter(tmp_path / "run")
    choice = choose("auto", [opened], load_dataset(opened.config.data))
    assert [item.metric for item in choice.comparisons] == ["loss"] and "its loss is" in choice.why
    better = min(choice.systems, key=lambda system: system.metrics["loss"].value)
    assert choice.base == better.name


def test_the_dequantised_base_is_what_the_run_computed_with(on_nf4: Path, tmp_path: Path) -> None:
    merged = merge(MergeOptions((str(on_nf4),), out=tmp_path / "merged", into="dequantised"), console=quiet())
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


def test_the_original_base_is_taken_on_request_and_said(on_nf4: Path) -> None:
    choice = choose("original", [open_adapter(on_nf4)])
    assert choice.base == "original" and "trained on a base in nf4" in choice.why and not choice.comparisons


def test_several_adapters_go_into_the_original_unmeasured(on_nf4: Path) -> None:
    opened = open_adapter(on_nf4)
    choice = choose("auto", [opened, opened])
    assert choice.base == "original" and "unmeasured" in choice.why


def test_a_dense_run_has_no_dequantised_base(finished: Any) -> None:
    opened = open_adapter(finished.path)
    assert choose("auto", [opened]) == BaseChoice("original")
    with pytest.raises(ConfigError, match=r"the base of .*adapter was not quantised, so there is only one"):
        choose("dequantised", [opened])


def dense_gguf(folder: Path) -> Path:
    """A .gguf file in Q4_0, and beside it the folder of the model that it was made from."""
    model, tokenizer = write_tiny_gguf(folder / "tiny.gguf", "Q4_0"), tiny_tokenizer()
    model.config.update({"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id})
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    return folder / "tiny.gguf"


@pytest.fixture(scope="module", params=["nf4", "gptq", "gguf", "gguf, its own blocks"])
def on_disk(request: Any, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(a run on a base that is quantised on disk, the dense model that it was made from, the quantised one)"""
    folder = tmp_path_factory.mktemp("on-disk")
    data = write_rows(folder / "rows.jsonl", reviews(60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKEET_CACHE", str(folder / "cache"))
        if request.param.startswith("gguf"):
            packed, dense = dense_gguf(folder), folder / "dense"
        else:
            packed, dense = folder / "packed", tiny_llama_folder
            layout = {"group_size": 16, "calibration": str(data)} if request.param == "gptq" else {}
            quantize(QuantizeOptions(str(dense), method=request.param, out=packed, **layout), console=quiet())
        blocks = {"model.quantize": "gguf"} if "blocks" in request.param else {}
        run(packed, data, folder / "run", blocks)
        yield folder / "run", dense, packed


def test_both_bases_of_a_run_on_a_quantised_file_are_measured(
    on_disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same base, named by --base or by the folder's own card; worse on purpose in turn, so that both are merged into."""
    path, dense, packed = on_disk
    weights = {}
    for worse in ("original", "dequantised"):
        measured = make_worse(monkeypatch, worse)
        console, said = heard()
        merged = merge(MergeOptions((str(path),), out=tmp_path / worse, base=str(dense), uncertified=True), console=console)
        assert merged.choice is not None and merged.choice.base != worse and merged.certificate.passed
        assert measured == {"original": str(dense), "dequantised": str(packed)}
        assert "Paired, on the same rows" in said.getvalue() and f"Merged into the {merged.choice.base} base" in said.getvalue()
        assert {system.name for system in merged.choice.systems} == {"original", "dequantised"}
        assert "quantization_config" not in (tmp_path / worse / "config.json").read_text()
        weights[merged.choice.base] = load_file(tmp_path / worse / "model.safetensors")
    opened = open_adapter(path)
    live = opened.text_model(quiet(), dtype="float32", with_adapter=False)
    modules = dict(original_modules(live.model))
    plain = load_file(dense / "model.safetensors")
    moved = 0
    for name, pair in opened.adapter.pairs.items():
        module: Any = modules[name]
        stood = module.base.dense() if isinstance(module, PackedLinear) else module.weight
        torch.testing.assert_close(weights["dequantised"][f"{name}.weight"].double(), folded(stood, pair), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            weights["original"][f"{name}.weight"].double(), folded(plain[f"{name}.weight"], pair), atol=1e-6, rtol=0
        )
        moved += bool((stood - plain[f"{name}.weight"]).abs().max() > 1e-4)
    assert moved >= 12, "the quantised base is another one than the original"


def test_without_a_known_original_the_quantised_base_is_taken_and_it_is_said(on_disk: Any, tmp_path: Path) -> None:
    path, dense, packed = on_disk
    opened = open_adapter(path)
    card = packed / "README.md"
    if card.is_file():  # lorakeet quantize leaves its record, which is enough
        asked = both_bases(opened)
        assert asked.original is not None and asked.original.config.model.path == str(dense)
        record = card.read_text()
        card.write_text(record.replace(str(dense), "someone/elsewhere"))
    try:
        merged = merge(MergeOptions((str(path),), out=tmp_path / "merged"), console=quiet())
        assert merged.choice is not None and merged.choice.base == "dequantised" and merged.certificate.passed
        said = merged.notes[-1]
        assert f"No unquantised original of {packed} is known" in said and "name it with --base" in said
        assert "nothing was compared" not in said, "the merged model was, with what was trained"
        assert ("its own record names someone/elsewhere, which is not on this machine" in said) == card.is_file()
        with pytest.raises(ConfigError, match=r"--into original: No unquantised original of .* is known.*--base"):
            choose("original", [opened])
    finally:
        if card.is_file():
            card.write_text(record)
    several = choose("auto", [open_adapter(path, base=str(dense), uncertified=True)] * 2)
    assert several.base == "original" and "unmeasured" in several.why


def test_a_base_that_is_not_at_its_place_is_looked_for_where_base_says(tiny_llama_folder: Path, tmp_path: Path) -> None:
    quantize(QuantizeOptions(str(tiny_llama_folder), method="nf4", out=tmp_path / "packed"), console=quiet())
    data = write_rows(tmp_path / "rows.jsonl", reviews(40))
    run(tmp_path / "packed", data, tmp_path / "run", {"train.steps": 2})
    moved = (tmp_path / "packed").rename(tmp_path / "moved")
    bases = both_bases(open_adapter(tmp_path / "run", base=str(moved)))
    assert bases.kind == "nf4" and bases.of("dequantised").config.model.path == str(moved)
    assert bases.of("original").config.model.path == str(tiny_llama_folder)
    elsewhere = open_adapter(tmp_path / "run", base=str(tiny_llama_folder), uncertified=True)
    choice = choose("auto", [elsewhere])
    assert choice.base == "original" and "packed, is not on this machine" in choice.why and "unmeasured" in choice.why

"""`--ranks prune`: a whole run whose ranks fall, its adapter in PEFT, its report, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakeet.config import read_run
from lorakeet.core.lowrank import LoraPair
from lorakeet.errors import ConfigError, RunStopped
from lorakeet.formats.peft import peft
from lorakeet.kinds.text.assemble import assemble_text, text_task
from lorakeet.ranks.allocate import pair_parameters, rank_cost
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.train import checkpoint
from lorakeet.verbs.compress import compress
from lorakeet.verbs.finetune import finetune
from lorakeet.verbs.options import CompressOptions, FinetuneOptions, TuneOptions
from lorakeet.verbs.tune import tune
from tiny.peft_oracle import into_peft, logits
from tiny.runs import adapter_bytes, quiet, settings

PRUNE = {"ranks": "prune", "train.steps": "12", "train.evaluate_every": "2", "ranks.prune_until": "0.6"}
BUDGET = 1000


@pytest.fixture(scope="module")
def pruned(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("pruned") / "run"
    return finetune(settings(finished.model, finished.data, out, PRUNE), FinetuneOptions(budget=str(BUDGET)), console=quiet())


def test_the_adapter_keeps_the_budget_and_nothing_that_fits_is_missing(pruned: Any) -> None:
    begun, left = pruned.setup.initial_plan, pruned.setup.plan
    adapter = peft.read(pruned.run.adapter)
    assert {path: pair.rank for path, pair in adapter.pairs.items()} == {entry.path: entry.rank for entry in left.entries}
    ranks = {entry.path: adapter.pairs[entry.path].rank if entry.path in adapter.pairs else 0 for entry in begun.entries}
    missing = [rank_cost(entry) for entry in begun.entries if ranks[entry.path] < entry.rank]
    assert adapter.parameters == pair_parameters(left) <= BUDGET < adapter.parameters + min(missing)
    assert len(set(ranks.values())) > 2 and 0 in ranks.values(), "matrices differ, and some have lost their pair"
    assert [pair.scale for pair in adapter.pairs.values()] == pytest.approx([12 / 4] * len(adapter.pairs), rel=1e-12)
    assert pruned.outcome.best_step >= 7 and pruned.report.certificate.passed
    live = {path for path, module in pruned.setup.text.model.named_modules() if isinstance(module, LoraPair)}
    assert len(live) == len(left.entries), "pairs of rank 0 are out of the model"


def test_the_installed_peft_loads_it_and_computes_the_same(pruned: Any, finished: Any) -> None:
    config = json.loads((pruned.run.adapter / "adapter_config.json").read_text())
    assert config["rank_pattern"] and config["alpha_pattern"]
    base = transformers.AutoModelForCausalLM.from_pretrained(finished.model, dtype=torch.float32)
    bare = logits(base)
    theirs = logits(into_peft(base, pruned.run.adapter))
    opened = open_adapter(pruned.run.path, say=lambda _: None)
    ours = peft.read(pruned.run.adapter)
    dense = transformers.AutoModelForCausalLM.from_pretrained(finished.model, dtype=torch.float32)
    with torch.no_grad():
        for path, pair in ours.pairs.items():
            dense.get_parameter(f"{path}.weight").add_(pair.delta())
    assert opened.config.ranks.choose == "prune"
    assert (theirs - bare).abs().max() > 0.01 and (theirs - logits(dense)).abs().max() < 1e-4


def test_the_report_has_the_map_and_the_cuts(pruned: Any) -> None:
    ranks, begun = pruned.report.ranks, pruned.setup.initial_plan
    final = {entry.path: entry.rank for entry in pruned.setup.plan.entries}
    assert {(cell.layer, cell.matrix): cell.rank for cell in ranks.cells} == {
        (e.path.split(".")[2], e.path.split(".", 3)[3]): final.get(e.path, 0) for e in begun.entries
    }
    assert [(cut.step, cut.parameters) for cut in ranks.cuts[:1]] == [(0, pair_parameters(begun))]
    budgets = pruned.setup.cuts
    assert [cut.step for cut in ranks.cuts[1:]] == list(budgets)
    assert ranks.cuts[-1].parameters == pair_parameters(pruned.setup.plan)
    assert all(cut.parameters <= budgets[cut.step] for cut in ranks.cuts[1:]) and ranks.cuts[-1].lowest == 0
    page = pruned.run.page.read_text()
    assert "Rank cuts during training" in page and "pruned in training by AdaLoRA" in page
    assert pruned.to_mapping()["trained_parameters"] == pair_parameters(pruned.setup.plan)


@pytest.mark.slow
@pytest.mark.parametrize("left", [4, 6, 8])
def test_a_resumed_run_ends_in_the_same_bytes(
    pruned: Any, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """Stopped before, between and after the cuts (steps 3 to 7), then gone on with from the saved settings."""
    out = tmp_path / "run"
    config = settings(finished.model, finished.data, out, {**PRUNE, "train.checkpoint_every": "1"})
    real = checkpoint.save

    def save(folder: Path, snapshot: Any, *, keep: int) -> Path:
        path = real(folder, snapshot, keep=keep)
        if snapshot.position.step == left:
            raise RunStopped("stopped by the test")
        return path

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(RunStopped, match="stopped by the test"):
        finetune(config, FinetuneOptions(budget=str(BUDGET)), console=quiet())
    monkeypatch.setattr(checkpoint, "save", real)
    again = finetune(read_run(out / "config.yaml"), FinetuneOptions(resume=out), console=quiet())
    assert adapter_bytes(out) == adapter_bytes(pruned.run.path)
    assert again.setup.plan == pruned.setup.plan and again.report.ranks == pruned.report.ranks


@pytest.mark.slow
def test_a_dry_run_says_the_cuts_and_a_resumed_run_keeps_its_budget(pruned: Any, finished: Any, tmp_path: Path) -> None:
    config = settings(finished.model, finished.data, tmp_path / "dry", {**PRUNE, "ranks.budget": str(BUDGET)})
    dry = finetune(config, FinetuneOptions(dry_run=True), console=quiet())
    assert dry.setup.plan == pruned.setup.initial_plan and not (tmp_path / "dry").exists()
    assert list(dry.to_mapping()["cuts"].values())[-1] == BUDGET and len(dry.to_mapping()["cuts"]) == 4
    out = tmp_path / "copy"
    shutil.copytree(pruned.run.path, out)
    saved = read_run(out / "config.yaml")
    other = replace(saved, ranks=replace(saved.ranks, budget="900"))
    with pytest.raises(ConfigError, match="The cuts of the ranks changed since"):
        finetune(other, FinetuneOptions(resume=out), console=quiet())
    same = replace(saved, ranks=replace(saved.ranks, budget="1k", rows=8, max_rank=3, score="activation"))
    assert finetune(same, FinetuneOptions(resume=out), console=quiet()).report.ranks == pruned.report.ranks, (
        "none of these touches its cuts"
    )


@pytest.mark.slow
def test_a_compressed_run_that_trains_again_has_the_pairs_of_its_adapter_alone(pruned: Any, tmp_path: Path) -> None:
    """A matrix that lost its pair does not get one of lora.rank from the saved settings."""
    compress(CompressOptions(str(pruned.run.path), out=tmp_path / "cut", to="700"), console=quiet())
    adapter = peft.read(tmp_path / "cut" / "adapter")
    setup = assemble_text(read_run(tmp_path / "cut" / "config.yaml"), quiet())
    assert {entry.path: entry.rank for entry in setup.plan.entries} == {path: pair.rank for path, pair in adapter.pairs.items()}
    assert len(adapter.pairs) < len(pruned.setup.initial_plan.entries) and setup.cuts == {}


def test_the_budget_is_two_thirds_where_none_is_given(finished: Any, tmp_path: Path) -> None:
    setup = assemble_text(settings(finished.model, finished.data, tmp_path / "run", PRUNE), quiet())
    assert list(setup.cuts.values())[-1] == int(pair_parameters(setup.plan) / 1.5)
    task = text_task(setup)
    assert task.pruning is not None and task.pruning.cuts == setup.cuts
    plain = assemble_text(settings(finished.model, finished.data, tmp_path / "run"), quiet())
    assert plain.cuts == {} and text_task(plain).pruning is None


@pytest.mark.parametrize(
    ("changes", "budget", "words"),
    [
        ({"train.steps": "5"}, "1000", ["A run of 5 steps would be pruned after step 1", "--ranks auto"]),
        ({}, "20", ["budget of 20 parameters is below one rank of the smallest target"]),
        ({}, "9M", ["9,000,000 parameters is not below the initial", "raise the initial lora.rank"]),
        ({"lora.variant": "dora"}, "1000", ["lora.variant is dora", "Use lora"]),
        ({"lora.start": "pissa"}, "1000", ["lora.start is pissa", "kaiming"]),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_anything_is_written(
    finished: Any, tmp_path: Path, changes: dict[str, Any], budget: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        config = settings(finished.model, finished.data, tmp_path / "run", {**PRUNE, **changes})
        finetune(config, FinetuneOptions(budget=budget), console=quiet())
    assert all(word in str(caught.value) for word in words) and not (tmp_path / "run").exists()


def test_a_search_keeps_its_ranks(finished: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trials keep their ranks"):
        tune(settings(finished.model, finished.data, tmp_path / "run", PRUNE), TuneOptions(try_rates=True), console=quiet())

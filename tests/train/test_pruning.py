"""Ranks that fall in the loop: what is cut goes for good, a resumed run ends in the same bytes, and the best keeps the budget."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lorakeet.core.plan import Plan, PlanEntry
from lorakeet.errors import ConfigError, RunStopped
from lorakeet.formats.peft import peft
from lorakeet.train import checkpoint
from lorakeet.train.interrupt import Interrupt
from lorakeet.train.log import read_metrics
from lorakeet.train.loop import Outcome, train
from lorakeet.train.progress import Record, Reporter
from lorakeet.train.pruning import Pruning, cut_text
from lorakeet.train.run import RunFolder
from lorakeet.train.spec import TrainSpec
from lorakeet.train.task import HeldOut
from train.tiny_task import HIDDEN, TinyTask

SPEC = TrainSpec(steps=12, batch_size=8, micro_tokens=48, learning_rate=0.02, evaluate_every=2, checkpoint_every=1, patience=0)
PLAN = Plan(tuple(PlanEntry(name, "linear", (HIDDEN, HIDDEN), 4, 12.0) for name in ("first", "second")))
A_TERM = 2 * HIDDEN
CUTS = {4: 7 * A_TERM - 1, 7: 3 * A_TERM}  # of 8 terms at first: 6, then 3
TIMES = {"tokens_per_second", "seconds", "memory_bytes"}


class Steps(Reporter):
    """Asks for a stop in one step, and keeps what was said."""

    def __init__(self, stop: int = 0) -> None:
        self.stop, self.interrupt, self.said = stop, Interrupt(), list[str]()

    def step(self, record: Record) -> None:
        if record["step"] == self.stop:
            self.interrupt.request("Ctrl-C")

    def say(self, text: str) -> None:
        self.said.append(text)


def task_of(spec: TrainSpec, cuts: Mapping[int, int] = CUTS) -> TinyTask:
    task = TinyTask(spec)
    pairs = task.text.pairs()
    task.pruning = Pruning(PLAN, cuts, lambda path, terms: pairs[path].keep(terms))
    return task


def go(path: Path, spec: TrainSpec = SPEC, *, stop: int = 0, cuts: Mapping[int, int] = CUTS) -> tuple[Outcome, TinyTask, Steps]:
    task, report, resume = task_of(spec, cuts), Steps(stop), path.exists()
    run = RunFolder.open(path) if resume else RunFolder.create(path)
    return train(task, spec, run=run, resume=resume, report=report, interrupt=report.interrupt), task, report


def ranks_of(task: TinyTask) -> dict[str, int]:
    return {name: pair.rank for name, pair in task.text.pairs().items()}


def everything(path: Path) -> dict[str, Any]:
    """Each byte that must be equal: the adapter, the newest checkpoint's tensors, the metrics without times."""
    newest = checkpoint.found(path / "checkpoints")[-1]
    files = {file.name: file.read_bytes() for folder in (path / "adapter", newest) for file in sorted(folder.iterdir())}
    files = {name: data for name, data in files.items() if name not in ("state.json", "manifest.json")}
    metrics = [{key: value for key, value in r.items() if key not in TIMES} for r in read_metrics(path / "metrics.jsonl")]
    return {"files": files, "metrics": metrics}


def test_rows_columns_and_moments_go_and_the_budget_is_kept(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, keep_checkpoints=12)
    _, task, report = go(tmp_path / "run", spec)
    assert sum(ranks_of(task).values()) == 3
    shapes = {}
    for step in (3, 4, 6, 7, 12):
        folder = tmp_path / "run" / "checkpoints" / checkpoint.step_name(step)
        tensors, moments = load_file(folder / "trained.safetensors"), load_file(folder / "moments.safetensors")
        ranks = {name: tensors[f"{name}.A"].shape[0] for name in ("first", "second")}
        for name, rank in ranks.items():
            assert tensors[f"{name}.A"].shape == (rank, HIDDEN) and tensors[f"{name}.B"].shape == (HIDDEN, rank)
            for moment in ("exp_avg", "exp_avg_sq"):
                assert moments[f"{name}.A|{moment}"].shape == (rank, HIDDEN)
                assert moments[f"{name}.B|{moment}"].shape == (HIDDEN, rank)
        assert (folder / "importance.safetensors").exists() == (step < 7), "nothing is kept of what will not be asked again"
        shapes[step] = sum(ranks.values())
    assert shapes == {3: 8, 4: 6, 6: 6, 7: 3, 12: 3}
    cuts = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "rank_budget" in record]
    assert [(c["step"], c["rank_budget"], c["pair_parameters"]) for c in cuts] == [(4, 7 * 32 - 1, 6 * 32), (7, 3 * 32, 3 * 32)]
    assert [words for words in report.said if "ranks cut" in words] == [cut_text(cut) for cut in cuts]
    assert "Step 4: ranks cut to 192 of at most 223 parameters: 2 pairs" in report.said[0]


def test_what_a_cut_takes_are_the_least_important_terms(tmp_path: Path) -> None:
    """The kept rows of A are the rows that were there before the cut, of the highest importance over both matrices."""
    task = task_of(SPEC)
    pruning, before = task.pruning, {}
    assert pruning is not None
    plain = pruning.after

    def after(step: int, optimizer: Any) -> Any:
        if step in CUTS:
            before[step] = {n: (p.A.detach().clone(), p.B.detach().clone()) for n, p in task.text.pairs().items()}
            before[step, "importance"] = {path: scores.clone() for path, scores in pruning.importance.of_terms().items()}
        found = plain(step, optimizer)
        if step in CUTS:
            before[step, "left"] = {n: (p.A.detach().clone(), p.B.detach().clone()) for n, p in task.text.pairs().items()}
        return found

    pruning.after = after  # type: ignore[method-assign]
    train(task, SPEC, run=RunFolder.create(tmp_path / "run"), report=Steps())
    for step, count in ((4, 6), (7, 3)):
        scores = before[step, "importance"]
        ranked = sorted(((s, name, i) for name in scores for i, s in enumerate(scores[name].tolist())), reverse=True)[:count]
        for name, (A, B) in before[step].items():
            kept = sorted(i for _, which, i in ranked if which == name)
            left_a, left_b = before[step, "left"][name]
            assert torch.equal(left_a, A[kept]) and torch.equal(left_b, B[:, kept])


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("stop", [2, 4, 5, 7, 9])
def test_a_resumed_run_ends_in_the_same_bytes_before_at_and_after_a_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, moments: Any
) -> None:
    monkeypatch.setattr("lorakeet.train.optimizer.SMALLEST", 1)  # no tensor of the tiny task is large
    spec = dataclasses.replace(SPEC, moments=moments)
    go(tmp_path / "whole", spec)
    with pytest.raises(RunStopped, match=f"stopped after step {stop} of 12"):
        go(tmp_path / "run", spec, stop=stop)
    assert moments_in(tmp_path / "run") == moments
    go(tmp_path / "run", spec)
    assert everything(tmp_path / "run") == everything(tmp_path / "whole")


def moments_in(path: Path) -> str:
    """How the newest checkpoint keeps the moments of every pair."""
    names = load_file(checkpoint.found(path / "checkpoints")[-1] / "moments.safetensors").keys()
    kept = {name: f"{name.rpartition('|')[0]}|first_codes" in names for name in names}
    (coded,) = set(kept.values())
    return "8bit" if coded else "float32"


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_a_pair_that_loses_all_of_its_terms_is_no_part_of_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: Any
) -> None:
    monkeypatch.setattr("lorakeet.train.optimizer.SMALLEST", 1)
    spec, cuts = dataclasses.replace(SPEC, moments=moments), {4: 2 * A_TERM, 6: A_TERM}
    _, task, _ = go(tmp_path / "run", spec, cuts=cuts)
    assert sorted(ranks_of(task).values()) == [0, 1]
    with pytest.raises(RunStopped):
        go(tmp_path / "again", spec, cuts=cuts, stop=8)
    assert moments_in(tmp_path / "again") == moments
    go(tmp_path / "again", spec, cuts=cuts)
    assert everything(tmp_path / "run") == everything(tmp_path / "again")


def scripted(path: Path, losses: list[float], **changes: Any) -> tuple[Outcome, TinyTask]:
    """A run whose held-out losses, from step 0 on, are these."""
    spec = dataclasses.replace(SPEC, **changes)
    task, left = task_of(spec), list(losses)
    task.held_out = lambda: HeldOut(np.full(3, left.pop(0)), np.ones(3))  # type: ignore[method-assign]
    return train(task, spec, run=RunFolder.create(path), report=Steps()), task


def test_the_best_adapter_keeps_the_budget_however_good_an_earlier_one_was(tmp_path: Path) -> None:
    outcome, _ = scripted(tmp_path / "run", [5.0, 1.0, 1.1, 1.2, 3.0, 2.5, 2.8])  # of steps 0, 2, …, 12; the last cut is in 7
    assert (outcome.base_loss, outcome.best_step, outcome.best_loss) == (5.0, 10, 2.5)
    assert peft.read(tmp_path / "run" / "adapter").parameters == 3 * A_TERM


def test_patience_begins_with_the_last_cut(tmp_path: Path) -> None:
    outcome, task = scripted(tmp_path / "run", [5.0, 1.0, 1.1, 1.2, 3.0, 3.1, 3.2], patience=2)
    assert (outcome.steps, outcome.best_step, sum(ranks_of(task).values())) == (12, 8, 3)
    outcome, _ = scripted(tmp_path / "short", [5.0, 1.0, 1.1, 1.2, 3.0, 3.1], patience=1)
    assert (outcome.steps, outcome.best_step) == (10, 8)
    assert outcome.reason.startswith("no improvement in 1 evaluations after step 8")


def test_before_the_last_cut_there_is_no_adapter_and_that_is_said(tmp_path: Path) -> None:
    awaited = "There is no adapter yet: the first follows a held-out evaluation after the last cut, in step 7."
    with pytest.raises(RunStopped, match="stopped after step 5 of 12") as stopped:
        go(tmp_path / "run", stop=5)
    assert awaited in str(stopped.value) and not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(RunStopped, match="stopped after step 8 of 12") as stopped:
        go(tmp_path / "run", stop=8)
    assert "no adapter" not in str(stopped.value) and (tmp_path / "run" / "adapter").is_dir()
    with pytest.raises(RunStopped, match="training diverged") as stopped:
        scripted(tmp_path / "diverged", [5.0, 1.0, 99.0])
    assert awaited in str(stopped.value) and not (tmp_path / "diverged" / "adapter").exists()


@pytest.mark.parametrize("left", [5, 0])
def test_an_adapter_of_a_later_state_is_not_left_as_that_of_an_earlier_one(tmp_path: Path, left: int) -> None:
    """Newer checkpoints are gone, and the run stops again before its last cut; the same where none is left."""
    with pytest.raises(RunStopped):
        go(tmp_path / "run", dataclasses.replace(SPEC, keep_checkpoints=12), stop=9)
    assert (tmp_path / "run" / "adapter").is_dir()
    for path in checkpoint.found(tmp_path / "run" / "checkpoints"):
        if path.name > checkpoint.step_name(left):
            shutil.rmtree(path)
    if left:
        with pytest.raises(ConfigError, match=r"train\.weight_decay was 0\.0"):
            go(tmp_path / "run", dataclasses.replace(SPEC, weight_decay=0.5))
        assert (tmp_path / "run" / "adapter").is_dir(), "a refused run is as it was"
    with pytest.raises(RunStopped, match=f"stopped after step {left + 1} of 12"):
        go(tmp_path / "run", stop=left + 1)
    assert not (tmp_path / "run" / "adapter").exists()
    go(tmp_path / "run")
    go(tmp_path / "whole")
    assert everything(tmp_path / "run") == everything(tmp_path / "whole")


def test_a_resumed_run_reads_each_trained_tensor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunStopped):
        go(tmp_path / "run", stop=5)
    read, plain = list[str](), checkpoint.StoredTensors.__getitem__

    def counted(self: checkpoint.StoredTensors, name: str) -> torch.Tensor:
        read.append(name)
        return plain(self, name)

    monkeypatch.setattr(checkpoint.StoredTensors, "__getitem__", counted)
    go(tmp_path / "run")
    assert [read.count(f"{name}.{factor}") for name in ("first", "second") for factor in "AB"] == [1, 1, 1, 1]

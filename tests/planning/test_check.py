"""`planning.check`: what a check holds is counted by its parts, and a budget decides on the number of blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from lorakeet.config import RunConfig, read_run
from lorakeet.core.plan import ExtraEntry, Plan, PlanEntry
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.memory.budget import Budget, enough_for
from lorakeet.models.families import family_of
from lorakeet.models.streaming.load import empty_model
from lorakeet.models.targets import plan_for
from lorakeet.models.text.from_config import config_from_settings
from lorakeet.planning import check as check_planning
from lorakeet.planning.check import (
    FP32,
    CheckSize,
    ModelCheck,
    adapted_bytes,
    fit_check,
    later_phases,
)
from lorakeet.planning.rehearse_text import EvaluationSize, NotPlanned, RowShape
from lorakeet.runs.open_adapter import Opened, open_adapter
from lorakeet.runs.residency import ALONE, Way, temporary_stores
from tiny.memory_plans import same_runtime
from tiny.models import save_tiny_llama
from tiny.peft_oracle import by_peft
from tiny.runs import quiet

SIZE = CheckSize("a check", EvaluationSize(RowShape(32, 2), 0))
BLOCK = 4 * 512 * 512 - 2 * 512 * 256 + 3 * 512 * 2048 + 2 * 512  # numbers: q, k, v, o, the mlp, and two norms
BASE = 8 * BLOCK


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    import transformers

    folder = tmp_path_factory.mktemp("wide")
    base = save_tiny_llama(folder / "base", num_hidden_layers=8, hidden_size=512, intermediate_size=2048)
    by_peft(folder / "adapter", transformers.AutoModelForCausalLM.from_pretrained(base), target_modules=["q_proj"])
    return open_adapter(folder / "adapter")


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process of the tests holds is another thing."""
    same_runtime(monkeypatch, 300 << 20)


def planner(opened: Opened, check: CheckSize = SIZE) -> ModelCheck:
    return ModelCheck(lambda longest: check, opened, Path("out"), print)


def peak(opened: Opened, streamed: bool, **changes: Any) -> int:
    return planner(opened, replace(SIZE, **changes)).plan(Way(streamed)).peak


@pytest.mark.slow
def test_models_in_memory_count_whole_and_streamed_ones_by_two_blocks(opened: Opened) -> None:
    one, two = (peak(opened, False, models=models) for models in (1, 2))
    assert FP32 * BASE < two - one < 1.1 * FP32 * BASE
    one, two = (peak(opened, True, models=models) for models in (1, 2))
    assert two - one < FP32 * BLOCK, "only norms, and a second tokenizer: one model after the other"
    assert peak(opened, True) < peak(opened, False) - FP32 * BASE


def test_llama_cpp_is_beside_models_in_memory_and_before_streamed_ones(opened: Opened) -> None:
    size = 256 << 20
    for streamed in (False, True):
        assert peak(opened, streamed, beside=2 * size) == peak(opened, streamed, beside=size) + size
    assert peak(opened, False, beside=size) > 300 * (1 << 20) + size + FP32 * BASE
    assert peak(opened, True, beside=size) < 300 * (1 << 20) + size + FP32 * BLOCK * 3, "no block in memory beside it"


@pytest.mark.slow
def test_keys_and_values_of_a_long_text_count_by_one_block(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all blocks' have no room they go to disk, in the rehearsal as in the run; a few blocks stand for all eight."""
    long = EvaluationSize(RowShape(32, 2), 1, 3000)
    held = 2 * FP32 * 3000 * 256  # of one block: keys and values of two heads of 128
    whole = peak(opened, True, evaluation=long)
    monkeypatch.setattr("lorakeet.models.generate.sample.STREAMED_CACHE", 4 * held)
    assert 7 * held <= whole - peak(opened, True, evaluation=long) <= 8 * held


def test_of_a_stack_of_experts_one_is_held_at_a_time() -> None:
    pairs = [PlanEntry("a", "linear", (30, 20), 2, 2.0), PlanEntry("b", "experts", (8, 40, 10), 2, 2.0)]
    assert adapted_bytes(Plan(tuple(pairs), (), 1), 1000) == FP32 * 600
    assert adapted_bytes(Plan(tuple(pairs[1:]), (), 1), 1000) == FP32 * 400
    rows = ExtraEntry("embed", "rows", (3, 10))
    assert adapted_bytes(Plan(tuple(pairs), (rows,), 1), 1000) == FP32 * 1000


def test_more_budget_keeps_more_blocks_up_to_all(opened: Opened, tmp_path: Path) -> None:
    made = planner(opened)
    found, whole = made.plan(Way(True)), made.plan(Way())
    slots = []
    for extra in (12, 76):
        asked = fit_check(opened.within(f"{(found.peak + (extra << 20)) // 1000}KB"), SIZE, tmp_path / "out", quiet())
        residency = asked.residency
        assert residency.planned is not None and residency.planned <= residency.budget.bytes < whole.peak
        assert residency.store == tmp_path / ".out.blocks"
        slots.append(residency.way.slots)
    assert 2 <= slots[0] < slots[1] <= 8
    assert fit_check(opened, SIZE, tmp_path / "out", quiet()) is opened


def test_the_cpu_computes_what_is_too_large_for_the_gpu(opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models in fp32 take four times what one took in bf16."""
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(check_planning, "device_for", lambda name: torch.device("cuda", 0))

    def full(size: int, device: torch.device) -> bool:
        asked.append((size, str(device)))
        return False

    monkeypatch.setattr(check_planning, "fits_now", full)
    console = Console(record=True, width=200)
    there = fit_check(opened, SIZE, tmp_path / "out", console)
    assert there.config.model.device == "cpu" and there.config.model.path == opened.config.model.path
    assert asked[0][1] == "cuda:0" and 2 * FP32 * BASE < asked[0][0] < 3 * FP32 * BASE
    said = console.export_text()
    assert "The CPU computes a check" in said and "more than is free on cuda:0" in said
    monkeypatch.setattr(check_planning, "fits_now", lambda size, device: True)
    assert fit_check(opened, SIZE, tmp_path / "out", quiet()) is opened


def test_where_two_blocks_do_not_fit_one_may(opened: Opened, tmp_path: Path) -> None:
    """The least that is named is that of one block, and it is enough."""
    made = planner(opened)
    two, one = made.plan(Way(True)), made.plan(Way(True, ALONE))
    assert FP32 * BLOCK * 0.9 < two.peak - one.peak <= FP32 * BLOCK * 1.1
    with pytest.raises(ConfigError, match="but a check takes at least") as caught:
        fit_check(opened.within("64MiB"), SIZE, tmp_path / "out", quiet())
    least = int(str(caught.value).partition("at least ")[2].partition(" MiB")[0])
    assert f"{least} MiB" == enough_for(one.peak)
    asked = fit_check(opened.within(f"{least}MiB"), SIZE, tmp_path / "out", quiet())
    assert asked.residency.way.slots == 1 and asked.residency.planned == one.peak


def test_the_store_goes_where_the_run_keeps_its_own_and_is_gone_afterwards(opened: Opened, tmp_path: Path) -> None:
    budget = f"{planner(opened).plan(Way(True)).peak // 1000 + 20_000}KB"
    memory = replace(opened.config.memory, budget=budget, store=str(tmp_path / "there"))
    asked = fit_check(replace(opened, config=replace(opened.config, memory=memory)), SIZE, tmp_path / "out", quiet())
    with pytest.raises(KeyboardInterrupt), temporary_stores(asked.residency):
        assert [path.suffix for path in (tmp_path / "there").iterdir()] == [".blocks"]
        raise KeyboardInterrupt
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", ["waiting", "artefact", "spilled"])
def test_a_full_disk_is_refused_before_the_work(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Stores count, what waits, and keys and values that do not fit into memory."""
    size = replace(SIZE, evaluation=EvaluationSize(RowShape(32, 2), 1, 300))
    budget = opened.within(f"{planner(opened, size).plan(Way(True)).peak // 1000 + 20_000}KB")
    numbers = sum(parameter.numel() for parameter in planner(opened, size).empty.parameters())
    free = SimpleNamespace(free=2 * FP32 * numbers)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    fit_check(budget, size, tmp_path / "out", quiet())
    if part == "spilled":
        monkeypatch.setattr("lorakeet.models.generate.sample.STREAMED_CACHE", 1)
        assert planner(opened, size).spilled(size, 8) == 8 * 2 * FP32 * 301 * 256
    else:
        size = replace(size, **{part: 1 << 20})
    with pytest.raises(EnvironmentProblem, match="are free"):
        fit_check(budget, size, tmp_path / "out", quiet())


def test_a_model_that_cannot_be_planned_keeps_no_budget(opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise NotPlanned("This model cannot be planned.")

    monkeypatch.setattr(check_planning, "rehearse_evaluation", refused)
    with pytest.raises(ConfigError, match=r"cannot be kept without a plan .* cannot be planned\. Leave --memory out\."):
        fit_check(opened.within("64GiB"), SIZE, tmp_path / "out", quiet())


def test_rows_are_cut_where_longer_ones_do_not_fit(opened: Opened) -> None:
    """To half, again and again, down to the fewest tokens that a check is worth."""

    def size(longest: int | None) -> CheckSize:
        return replace(SIZE, evaluation=EvaluationSize(RowShape(64 + (longest or 1000)), 0))

    def lengths(*, cut: bool) -> list[int | None]:
        check = ModelCheck(size, opened, Path("out"), print, cut=cut)
        return list(dict.fromkeys(way.longest for way in check.ways(Budget().bytes)))

    assert lengths(cut=True) == [None, 500, 250, 128] and lengths(cut=False) == [None]


SHAPE = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def planned(**changes: Any) -> tuple[RunConfig, Any, Plan]:
    given = {"model.path": "made-up", "data.train": "none", "lora.rank": "4", "lora.alpha": "12", "data.max_tokens": "64"}
    config = config_from_settings({**SHAPE, **changes})
    model = empty_model(config, torch.float32)
    return read_run(None, given), config, plan_for(model, LoraSpec(rank=4), family_of(config))


@pytest.mark.slow
def test_what_fits_stays_in_memory_and_what_does_not_is_streamed() -> None:
    config, model, plan = planned()
    roomy, tight = later_phases(config, model, plan, Budget()), later_phases(config, model, plan, Budget(1, "1"))
    assert [phase.name for phase in roomy] == [phase.name for phase in tight] == ["merge", "export"]
    weights = 4 * plan.frozen_parameters
    for whole, streamed, models in zip(roomy, tight, (2, 1), strict=True):
        assert whole.kinds["base"] >= models * weights, "each model whole, in fp32"
        assert streamed.kinds.get("base", 0) < models * weights / 2 and streamed.bytes < whole.bytes

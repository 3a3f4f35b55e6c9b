"""memory.budget: what is decided for which budget, and whole runs that are the same with it and without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakeet.config import RunConfig
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.memory.budget import Budget
from lorakeet.memory.cuda import CONTEXT
from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.memory.spill import HostSpill
from lorakeet.models.spec import ModelSpec
from lorakeet.planning import fit
from lorakeet.planning.fit import BudgetedWork, WayChoice, choose, host_memory
from lorakeet.planning.forecast_text_run import FINAL, TextRunPlan, Workload
from lorakeet.planning.rehearse_text import STEP, RowShape
from lorakeet.planning.text_run import (
    LEAST,
    STATES_ON_THE_WAY,
    Batches,
    TextRun,
    bytes_moved,
    streaming_ways,
)
from lorakeet.planning.unbound_text_run import fit_text_run
from lorakeet.runs.residency import RESIDENT, Residency, Way, with_more
from lorakeet.verbs.finetune import finetune
from tiny.memory_plans import same_runtime
from tiny.models import save_tiny_llama
from tiny.runs import adapter_bytes, chats, quiet, run, settings, write_rows

WIDE = {"num_hidden_layers": 6, "hidden_size": 512, "intermediate_size": 2048}  # blocks of 16 MB, few, since each is rehearsed
NO_LABELS = Workload(labelled=False, characters=10_000)
CHANGES = {"train.steps": "2", "train.micro_tokens": "128", "evaluate.drift_texts": "0"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("wide") / "model", **WIDE)


def least(config: RunConfig) -> int:
    return TextRun(config, NO_LABELS, print).plan(LEAST).peak


def test_without_a_budget_nothing_is_planned(model: Path, tmp_path: Path) -> None:
    assert fit_text_run(settings(model, tmp_path / "rows", tmp_path / "run"), print) == Residency()


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process itself holds, which goes up and down from plan to plan, is the same for all."""
    same_runtime(monkeypatch, 1 << 29)


@pytest.mark.slow
@pytest.mark.usefixtures("steady")
def test_a_large_budget_streams_nothing_and_a_middling_one_does(model: Path, tmp_path: Path) -> None:
    config = settings(model, tmp_path / "rows", tmp_path / "run", CHANGES)
    assert TextRun(config, NO_LABELS, print).batches.count > 1
    said: list[str] = []
    large = settings(model, tmp_path / "rows", tmp_path / "run", {**CHANGES, "memory.budget": "8GiB"})
    whole = fit_text_run(large, said.append, NO_LABELS)
    assert whole.way == RESIDENT and "all weights stay in memory" in said[-1] and whole.plan is not None
    middle = (least(large) + whole.plan.peak) // 2
    smaller = settings(
        model, tmp_path / "rows", tmp_path / "run", {**CHANGES, "memory.budget": f"{middle // 1000}KB", "memory.store": "there"}
    )
    found = fit_text_run(smaller, said.append, NO_LABELS)
    assert found.store == Path("there") and found.way.together >= 1 and found.way.slots > 2
    assert "streamed from disk" in said[-1] or "computed again" in said[-1]
    assert found.plan is not None and found.plan.training_peak <= found.plan.peak <= found.budget.bytes


@pytest.mark.slow
@pytest.mark.usefixtures("steady")
def test_a_mixture_of_experts_keeps_a_budget_too(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", family="mixtral", **WIDE)
    large = settings(folder, tmp_path / "rows", tmp_path / "run", {**CHANGES, "memory.budget": "8GiB"})
    whole = fit_text_run(large, print, NO_LABELS).plan
    assert whole is not None
    middle = (least(large) + whole.peak) // 2
    budget = {**CHANGES, "memory.budget": f"{middle // 1000}KB", "memory.store": "there"}
    found = fit_text_run(settings(folder, tmp_path / "rows", tmp_path / "run", budget), print, NO_LABELS)
    assert found.store == Path("there") and found.plan is not None and found.plan.peak <= middle


@pytest.mark.slow
def test_a_budget_below_the_floor_is_refused_with_the_least_that_works(model: Path, tmp_path: Path) -> None:
    small = settings(model, write_rows(tmp_path / "rows.jsonl", chats(30)), tmp_path / "run", {"memory.budget": "64MiB"})
    with pytest.raises(ConfigError, match=r"memory budget is 64MiB, but this run takes at least \d+ MiB"):
        finetune(small, console=quiet())
    assert not (tmp_path / "run").exists()


def test_a_device_that_cannot_stream_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakeet.planning.text_run.device_for", lambda _: torch.device("mps"))
    with pytest.raises(EnvironmentProblem, match="on the CPU and on CUDA devices, but the model would be on mps"):
        fit_text_run(settings(model, tmp_path / "rows", tmp_path / "run", {"memory.budget": "8GiB"}), print)


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.device, int]]:
    """As if there were a CUDA device; the limits that torch is held to."""
    found: list[tuple[torch.device, int]] = []
    monkeypatch.setattr("lorakeet.planning.text_run.device_for", torch.device)
    monkeypatch.setattr("lorakeet.planning.fit.gpu_warning", lambda device, budget: "")
    monkeypatch.setattr("lorakeet.planning.fit.limit_gpu_memory", lambda device, budget: found.append((device, budget)))
    return found


@pytest.mark.slow
def test_on_a_cuda_device_the_budget_is_that_of_its_memory(
    model: Path, tmp_path: Path, limited: list[tuple[torch.device, int]]
) -> None:
    on_gpu = {**CHANGES, "model.device": "cuda:0"}
    said: list[str] = []
    large = settings(model, tmp_path / "rows", tmp_path / "run", {**on_gpu, "memory.budget": "8GiB"})
    whole = fit_text_run(large, said.append, NO_LABELS)
    card = torch.device("cuda", 0)
    assert "all weights stay on cuda:0" in said[-1]
    assert whole.way == RESIDENT and whole.gpu == card and limited.pop() == (card, 8 << 30) and whole.plan is not None
    assert all(phase.kinds["runtime"] == CONTEXT for phase in whole.plan.forecast.phases)
    budget = f"{(least(large) + (20 << 20)) // 1000}KB"  # room for one more block than two
    for keep in ("disk", "host"):
        change = {**on_gpu, "memory.budget": budget, "memory.store": "there", "memory.keep": keep}
        found = fit_text_run(settings(model, tmp_path / "rows", tmp_path / "run", change), said.append, NO_LABELS)
        assert found.store == Path("there") and found.gpu == card and limited.pop()[1] == found.budget.bytes
        assert found.pinned == (keep == "host") and isinstance(found.spilled_states(streaming()), HostSpill) == found.way.spilled
        assert "Pinned host memory" in said[-1] and "on cuda:0" in said[-2]
    with pytest.raises(ConfigError, match=r"this run takes at least \d+ MiB"):
        little = settings(model, tmp_path / "rows", tmp_path / "run", {**on_gpu, "memory.budget": "600MiB"})
        fit_text_run(little, print, NO_LABELS)
    assert limited == []


def streaming() -> Any:
    """What a streamed model on a GPU is to storage for its states."""
    return SimpleNamespace(streamed=SimpleNamespace(stream=SimpleNamespace(transfer=object())))


@pytest.mark.slow
@pytest.mark.usefixtures("limited")
def test_blocks_are_kept_by_the_host_where_its_free_memory_allows_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default: planned with the head's tiles and the inputs of blocks, and said in one line."""
    on_gpu = {**CHANGES, "model.device": "cuda:0"}
    large = settings(model, tmp_path / "rows", tmp_path / "run", {**on_gpu, "memory.budget": "8GiB"})
    changes = {**on_gpu, "memory.budget": f"{(least(large) + (20 << 20)) // 1000}KB", "memory.store": "there"}
    config, said = settings(model, tmp_path / "rows", tmp_path / "run", changes), list[str]()
    assert config.memory.keep == "auto"
    found = fit_text_run(config, said.append, NO_LABELS)
    assert found.plan is not None and found.pinned and "streamed from pinned host memory" in said[-2]
    work = TextRun(config, NO_LABELS, print)
    needed = host_memory(work, found.way, found.plan)[0]
    blocks, (tiles, tile) = WIDE["num_hidden_layers"], work.head_tiles(found.way)
    assert tiles == (0 if found.way.ends else 1) and (found.way.ends or tile == 320 * WIDE["hidden_size"] * 4)
    assert needed >= blocks * found.plan.block_bytes + tiles * tile
    for free, pinned in ((-(-needed * 4 // 3), True), (needed * 4 // 3 - 8, False)):
        monkeypatch.setattr(fit, "available_memory", lambda free=free: (free, "free"))
        said.clear()
        again = fit_text_run(config, said.append, NO_LABELS)
        assert again.pinned == pinned and again.way == found.way, "where they come from is no other way on the device"
        assert ("streamed from disk" in said[-2]) != pinned and len(said) == 2
        assert (f"To keep the {blocks} frozen blocks" in said[-1]) != pinned
        assert ("2 buffers of a block" in said[-1]) != pinned
    disk = fit_text_run(config.changed(memory={"keep": "disk"}), said.append, NO_LABELS)
    assert not disk.pinned and "would take" not in said[-1], "as it was asked for"


@pytest.mark.slow
def test_a_run_within_a_budget_ends_in_the_same_bytes(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", chats(40))
    plain = run(model, data, tmp_path / "plain", CHANGES)
    large = settings(model, data, tmp_path / "kept", {**CHANGES, "memory.budget": "8GiB"})
    whole, lowest = fit_text_run(large, print, NO_LABELS).plan, least(large)
    assert whole is not None and whole.peak > lowest
    budget = f"{(lowest + whole.peak) // 2000}KB"
    kept = run(model, data, tmp_path / "kept", {**CHANGES, "memory.budget": budget, "memory.store": str(tmp_path / "store")})
    assert kept.setup.text.streamed is not None and plain.outcome is not None and kept.outcome is not None
    assert kept.outcome.best_loss == plain.outcome.best_loss
    assert adapter_bytes(tmp_path / "kept") == adapter_bytes(tmp_path / "plain")
    assert kept.report is not None
    training, _, against = kept.report.memory
    assert training.planned is not None and training.used is not None and against.planned == kept.setup.residency.budget.limit
    assert plain.report is not None and all(use.planned and use.used for use in plain.report.memory)


BLOCKS, BLOCK, STATE = 10, 1000, 30
BATCHES = Batches(4, STATE)


def plan(way: Way) -> TextRunPlan:
    """A made-up run as it is estimated: 5,000 bytes, of which two blocks, and what micro-batches on their way hold."""
    return made_up(1000 + states(way, STATES_ON_THE_WAY) - STATES_ON_THE_WAY * STATE)


def states(way: Way, held: int) -> int:
    """Bytes of hidden states: `held` of each micro-batch, and one more for each block whose input stays in memory."""
    return way.together * STATE * (held if way.spilled else held + BLOCKS)


def made_up(activations: int) -> TextRunPlan:
    phases = (Phase(STEP, {"runtime": 2000, "base": 2000, "saved activations": activations}), Phase(FINAL, {"runtime": 4000}))
    unknown: Any = None
    return TextRunPlan(Forecast(phases), unknown, RowShape(1), unknown, 2000, blocks=BLOCKS, block_bytes=BLOCK)


class Streamed(BudgetedWork[TextRunPlan]):
    """A made-up run that has to stream."""

    what, spec = "this run", ModelSpec()

    def __init__(self, plan: Callable[[Way], TextRunPlan] = plan) -> None:
        self.plan = plan  # type: ignore[method-assign]

    def ways(self, budget: int) -> Any:
        return streaming_ways(self.plan, BATCHES, budget)


def chosen(budget: int, plan: Callable[[Way], TextRunPlan] = plan) -> WayChoice[TextRunPlan]:
    return choose(Streamed(plan), Budget(budget, str(budget)))


def moved(found: WayChoice[TextRunPlan]) -> int:
    return bytes_moved(found.way, found.plan, BATCHES)


def test_with_space_for_every_block_nothing_moves() -> None:
    found = chosen(10**6)
    assert (found.way.slots, moved(found), found.way.spilled) == (BLOCKS, 0, False)
    assert found.plan.forecast.phase(STEP).kinds["base"] == BLOCKS * BLOCK


def test_the_least_spills_inputs_and_has_two_blocks_in_memory() -> None:
    least = plan(LEAST).peak
    assert least == 5000 and not chosen(least - 1).fits and chosen(least - 1).least.peak == least
    found = chosen(least)
    assert found.fits and found.way == Way(True, slots=2, together=1, spilled=True)
    assert moved(found) == 4 * 2 * 8 * BLOCK + 4 * 2 * BLOCKS * STATE


def test_more_batches_together_are_worth_more_than_more_blocks_where_they_move_less() -> None:
    found = chosen(5000 + 3 * STATES_ON_THE_WAY * STATE)  # of all four, with their inputs spilled
    assert found.way == Way(True, slots=2, together=4, spilled=True)
    assert found.plan.forecast.phase(STEP).kinds["saved activations"] == 1000 + 3 * STATES_ON_THE_WAY * STATE


@pytest.mark.parametrize("states_on_the_way", [1, 9])
def test_what_is_taken_has_been_rehearsed_whatever_was_estimated(states_on_the_way: int) -> None:
    rehearsed: list[Way] = []

    def otherwise(way: Way) -> TextRunPlan:
        rehearsed.append(way)
        return made_up(1000 + states(way, states_on_the_way))

    for budget in range(otherwise(LEAST).peak, 16000, 211):
        found = chosen(budget, otherwise)
        assert found.fits and found.plan.peak <= budget
        step = found.plan.forecast.phase(STEP)
        assert replace(found.way, slots=2) in rehearsed
        assert step.kinds["saved activations"] == 1000 + states(found.way, states_on_the_way)
        assert step.kinds["base"] == found.way.slots * BLOCK


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 97, 500])
def test_more_budget_never_moves_more_and_every_plan_is_kept(step: int) -> None:
    before = None
    for budget in range(5000, 16000, step):
        found = chosen(budget)
        assert found.fits and found.plan.peak <= budget and 2 <= found.way.slots <= BLOCKS
        assert before is None or moved(found) <= before
        before = moved(found)
    assert before == 0


def test_embedding_and_head_stay_where_that_moves_less() -> None:
    """On a card the loss reads the head once for all micro-batches that go together: more than a few blocks are."""
    ends, head = 1500, 6 * 1000
    batches = Batches(4, STATE, ends_bytes=ends, head_read=head)

    def with_ends(way: Way) -> TextRunPlan:
        return with_more(plan(way), ends if way.ends else 0, "base", None)

    def found_within(budget: int) -> WayChoice[TextRunPlan]:
        work = Streamed(with_ends)
        work.ways = lambda budget: streaming_ways(with_ends, batches, budget)  # type: ignore[method-assign]
        return choose(work, Budget(budget, str(budget)))

    assert found_within(10**6).way.ends and bytes_moved(found_within(10**6).way, with_ends(LEAST), batches) == 0
    least = with_ends(LEAST).peak
    assert not found_within(least).way.ends, "where they do not fit, they are read"
    within = found_within(plan(Way(True, together=4)).peak + ends)
    assert within.way.ends and within.fits and within.way.slots < BLOCKS
    reading = bytes_moved(replace(within.way, ends=False, slots=3), within.plan, batches)
    assert bytes_moved(within.way, within.plan, batches) < reading

"""Measuring and cutting a finished adapter under a budget: in memory, streamed, or refused with the least that works."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from lorakeet.config import RunConfig
from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.memory.cuda import CONTEXT
from lorakeet.memory.forecast import Forecast, Phase
from lorakeet.memory.free import MARGIN
from lorakeet.planning import evaluation, fit
from lorakeet.planning.evaluation import Evaluation, fit_evaluation
from lorakeet.planning.forecast_text_run import Workload
from lorakeet.runs.residency import ALONE, FEWEST, RESIDENT, MemoryPlan, Residency, Way
from tiny.made_up_card import card
from tiny.memory_plans import same_runtime
from tiny.models import save_tiny_llama
from tiny.runs import settings

WIDE = {"num_hidden_layers": 6, "hidden_size": 512, "intermediate_size": 2048}  # blocks of 16 MB
NO_LABELS = Workload(labelled=False, characters=10_000)
CHANGES = {"train.micro_tokens": "128", "data.max_tokens": "32", "evaluate.drift_texts": "4", "memory.store": "there"}
ADAPTER = Adapter(
    {f"model.layers.{n}.self_attn.q_proj": Pair(torch.ones(4, 512), torch.ones(512, 4), 12.0, "linear") for n in range(6)}
)
WIDER = Adapter({path: Pair(torch.ones(256, 512), torch.ones(512, 256), 256.0, "linear") for path in ADAPTER.pairs})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("wide") / "model", **WIDE)


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process itself holds, which goes up and down from plan to plan, is the same for all."""
    same_runtime(monkeypatch, 1 << 29)


@pytest.fixture
def within(model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def config(budget: str, **changes: str) -> RunConfig:
        given = {**CHANGES, "memory.budget": budget, **{key.replace("__", "."): value for key, value in changes.items()}}
        return settings(model, tmp_path / "rows", tmp_path / "run", given)

    return config


def least(refused: Callable[[], object], words: str) -> int:
    """MiB that the refusal names."""
    with pytest.raises(ConfigError, match=words) as caught:
        refused()
    return int(re.findall(r"(?:at least|takes) (\d+) MiB", str(caught.value))[0])


@pytest.mark.slow
def test_the_base_stays_in_memory_streams_or_is_refused(within: Callable[..., RunConfig]) -> None:
    said: list[str] = []
    judged = partial(fit_evaluation, adapter=ADAPTER, say=said.append, workload=NO_LABELS)
    assert judged(within("")) == Residency() and said == []
    whole = judged(within("8GiB"))
    assert whole.way == RESIDENT and whole.planned is not None and "all weights stay in memory" in said[-1]
    lowest = least(lambda: judged(within("64MiB")), r"is 64MiB, but measuring this adapter takes .* Give that with --memory, or")
    assert lowest << 20 < whole.planned
    kept = judged(within(f"{lowest}MiB"))
    assert kept.store == Path("there") and kept.way.slots == 1 and "are streamed from disk, 1 of 6 in memory" in said[-1]
    assert kept.planned is not None and kept.planned <= lowest << 20
    more = judged(within(f"{lowest + 40}MiB"))
    assert 3 <= more.way.slots <= 4 and more.planned is not None and lowest << 20 < more.planned <= lowest + 40 << 20
    step = fit_evaluation(within("8GiB"), ADAPTER, said.append, NO_LABELS, weigh=lambda _: torch.zeros(1 << 26), copies=1.0)
    assert step.planned is not None and step.planned > whole.planned, "what weighing holds is in the plan"


def test_where_two_blocks_do_not_fit_one_stays_whatever_is_left(
    within: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = {RESIDENT: 900, Way(True, FEWEST): 300, Way(True, ALONE): 100}  # MiB: what reads ahead takes more than its block

    def plan(self: Evaluation, way: Way) -> MemoryPlan:
        phases = (Phase("final eval", {"base": peaks[way] << 20}),)
        return replace(real(self, way), forecast=Forecast(phases), block_bytes=50 << 20)

    real = Evaluation.plan
    monkeypatch.setattr(Evaluation, "plan", plan)
    found = fit_evaluation(within("200MiB"), ADAPTER, print, NO_LABELS)
    assert found.way.slots == 1 and found.planned == 100 << 20


@pytest.mark.parametrize(("objective", "reference", "copies"), [("dpo", "start", 2), ("kto", "runs/sft", 2), ("dpo", "base", 0)])
def test_the_reference_of_a_preference_run_is_on_the_model_too(
    within: Callable[..., RunConfig], objective: str, reference: str, copies: int
) -> None:
    judged = partial(fit_evaluation, adapter=WIDER, say=print, workload=NO_LABELS)
    without, compared = (
        judged(within("8GiB", train__objective=name, **more)).planned
        for name, more in (("orpo", {}), (objective, {"train__reference": reference}))
    )
    assert without is not None and compared is not None and compared - without == copies * 4 * WIDER.parameters


@pytest.mark.slow
def test_compression_is_refused_where_the_base_does_not_fit(within: Callable[..., RunConfig]) -> None:
    def cut(budget: str, copies: float = 6.0) -> Residency[MemoryPlan]:
        return fit_evaluation(within(budget), ADAPTER, print, NO_LABELS, weigh=lambda _: torch.zeros(8), copies=copies)

    words = r"is 600MiB, but compressing this adapter takes at least \d+ MiB.* is not streamed\. Give"
    enough = least(lambda: cut("600MiB"), words)
    found = cut(f"{enough}MiB")
    assert found.way == RESIDENT and found.planned is not None and found.planned <= enough << 20
    more = cut("8GiB", copies=16.0).planned
    assert more is not None and more - found.planned == 10 * 4 * ADAPTER.parameters


@pytest.mark.slow
def test_a_device_without_budgets_is_refused_and_a_cuda_device_is_held_to_its_own(
    within: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "device_for", torch.device)
    with pytest.raises(EnvironmentProblem, match="on the CPU and on CUDA devices, but the model would be on mps"):
        fit_evaluation(within("8GiB", model__device="mps"), ADAPTER, print, NO_LABELS)
    limits: list[tuple[torch.device, int]] = []
    monkeypatch.setattr(fit, "gpu_warning", lambda device, budget: "")
    monkeypatch.setattr(fit, "limit_gpu_memory", lambda device, budget: limits.append((device, budget)))
    same_runtime(monkeypatch, CONTEXT)
    said: list[str] = []
    found = fit_evaluation(within("8GiB", model__device="cuda:0"), ADAPTER, said.append, NO_LABELS)
    assert found.gpu == torch.device("cuda", 0) and limits == [(found.gpu, 8 << 30)] and "stay on cuda:0" in said[-1]
    cut = fit_evaluation(
        within("8GiB", model__device="cuda:0"), WIDER, said.append, NO_LABELS, weigh=lambda _: torch.zeros(8), copies=9.0
    )
    alone = fit_evaluation(within("8GiB", model__device="cuda:0"), WIDER, said.append, NO_LABELS)
    assert cut.planned is not None and alone.planned is not None
    assert cut.planned - alone.planned >= 4 * WIDER.parameters, "a cut that is measured is there beside the whole adapter"


@pytest.mark.slow
def test_without_a_budget_an_evaluation_fits_into_what_is_free_on_a_card(
    within: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "device_for", torch.device)
    same_runtime(monkeypatch, CONTEXT)
    said: list[str] = []
    config = within("", model__device="cuda:0")
    with card(8 << 30):
        whole = fit_evaluation(config, ADAPTER, said.append, NO_LABELS)
    assert whole.way == RESIDENT and whole.gpu == torch.device("cuda", 0) and "free on cuda:0" in said[-1] and whole.planned
    with card(whole.planned - 1 - CONTEXT + MARGIN, taken=0):
        less = fit_evaluation(config, ADAPTER, said.append, NO_LABELS)
    assert less.way.streamed and less.planned is not None and less.planned < whole.planned
    assert fit_evaluation(within("", model__device="cpu"), ADAPTER, said.append, NO_LABELS).plan is None, "as before"

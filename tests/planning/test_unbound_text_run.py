"""Runs without memory.budget: what is decided for so much free memory, and whole runs that end in the same bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.config import RunConfig, read_run
from lorakeet.errors import ConfigError
from lorakeet.evaluate.certificate import read_certificate
from lorakeet.kinds.text import assemble as assemble_text
from lorakeet.kinds.text import kind as text_kind
from lorakeet.kinds.text import plan as text_plan
from lorakeet.memory.budget import Budget
from lorakeet.memory.cuda import CONTEXT
from lorakeet.memory.free import MARGIN
from lorakeet.models.recomputed import RecomputedBlock
from lorakeet.planning import rehearse_text, text_run, unbound_text_run
from lorakeet.planning.fit import choose
from lorakeet.planning.forecast_text_run import CERTIFY, RowLengths, Workload
from lorakeet.planning.rehearse_text import STEP
from lorakeet.planning.unbound_text_run import UnboundTextRun, fit_text_run
from lorakeet.runs.residency import ALONE, RESIDENT, Residency, Way
from lorakeet.train.processes import Processes
from tiny.made_up_card import card
from tiny.memory_plans import same_runtime
from tiny.models import save_tiny_llama
from tiny.runs import adapter_bytes, chats, run, settings, write_rows

WIDE = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 2048}
ROWS = Workload(labelled=False, lengths=lambda: RowLengths(1024, 4096, 40, 40_000))
CHANGES = {
    "data.max_tokens": "1024", "train.micro_tokens": "2048", "evaluate.drift_texts": "0", "evaluate.answers": "0",
    "evaluate.examples": "0", "model.device": "cuda:0",
}  # fmt: skip
CARD = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("wide") / "model", **WIDE)


@pytest.fixture(autouse=True)
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card is there, by name; what a process itself holds is the same for all plans."""
    monkeypatch.setattr(text_run, "device_for", lambda name: torch.device("cpu" if name == "auto" else name))
    same_runtime(monkeypatch, CONTEXT)


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    return lambda **changes: settings(model, tmp_path / "rows", tmp_path / "run", {**CHANGES, **changes})


def fitted(config: RunConfig, size: int, processes: Any = unbound_text_run.ONE_PROCESS) -> tuple[Any, list[str]]:
    """The way in which a run fits into a card with `size` bytes for it, and what was said."""
    said: list[str] = []
    with card(size - CONTEXT + MARGIN, taken=0):
        return fit_text_run(config, said.append, ROWS, processes), said


def peak(config: RunConfig, way: Way) -> int:
    return UnboundTextRun(config, ROWS, print).plan(way).peak


@pytest.mark.slow
def test_less_and_less_memory_takes_one_way_after_the_other(config: Callable[..., RunConfig]) -> None:
    mine = config()
    fewer, again = Way(micro_tokens=1024, one_base=True), Way(recomputed=True, slots=ALONE, micro_tokens=1024, one_base=True)
    alone = Way(one_base=True)
    sizes = [peak(mine, way) for way in (RESIDENT, alone, fewer, again)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes[1:])) == 3
    whole, said = fitted(mine, sizes[0])
    assert whole.way == RESIDENT and whole.unrestricted and not whole.one_base and whole.gpu == CARD
    assert said == [said[0]] and "all weights stay on cuda:0." in said[0] and "free on cuda:0" in said[0], "nothing else is said"
    less, said = fitted(mine, sizes[2])
    assert less.way in (fewer, Way(micro_tokens=1024)) and not less.unrestricted and not less.given
    assert "micro-batches have 1,024 tokens in place of 2,048" in said[0]
    assert "With nothing saved it would be" in said[0], "and why"
    some, said = fitted(mine, (sizes[2] + sizes[3]) // 2)
    assert some.way.recomputed and ALONE < some.way.slots < WIDE["num_hidden_layers"] and some.plan.peak <= some.budget.bytes
    assert f"{WIDE['num_hidden_layers'] - some.way.slots} of 6 blocks are computed again" in said[0]
    assert some.store is None
    least, said = fitted(mine, sizes[3])
    assert least.way.recomputed and least.way.slots == ALONE
    streamed, said = fitted(mine, sizes[3] - (1 << 20))
    assert streamed.way.streamed and streamed.one_base and "frozen block" in said[0] and streamed.store is not None
    with pytest.raises(ConfigError, match=r"free on cuda:0, but this run takes at least \d+ MiB .*Close other") as no:
        fitted(mine, CONTEXT)
    assert "--" not in str(no.value) and len(re.findall(r"with all weights in memory", str(no.value))) == 1


def test_one_base_in_the_certificate_where_two_do_not_fit(config: Callable[..., RunConfig]) -> None:
    """With short micro-batches a second base is what holds most."""
    mine = config(**{"model.dtype": "float32", "data.max_tokens": "64", "train.micro_tokens": "64"})
    two, one = peak(mine, RESIDENT), peak(mine, Way(one_base=True))
    planned = UnboundTextRun(mine, ROWS, print).plan(RESIDENT)
    assert planned.highest.name == CERTIFY and one < two - (planned.base // 2)
    assert fitted(mine, two)[0].way == RESIDENT
    found, said = fitted(mine, two - 1)
    assert found.way == Way(one_base=True) and found.one_base
    assert "the certificate uses the base that was trained on" in said[0]


@pytest.mark.slow
def test_a_block_more_that_keeps_everything_is_planned_with_no_less_than_it_takes(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line between all and none, against rehearsals of all blocks with each number of them."""
    mine = config()
    work = UnboundTextRun(mine, ROWS, print)
    least = work.plan(Way(recomputed=True, slots=ALONE))
    assert least.blocks == least.alike == 6 and least.block_bytes > 0 and least.growing == (STEP,)
    monkeypatch.setattr(rehearse_text, "FEW", 6)
    for slots in (2, 4, 5):
        exact = text_run.TextRun.plan(work, Way(recomputed=True, slots=slots)).forecast.phase(STEP).bytes
        bound = least.forecast.phase(STEP).bytes + (slots - ALONE) * least.block_bytes
        assert exact <= bound <= 1.1 * exact


@pytest.mark.parametrize("change", [{"train.keep_prefix_states": "true"}, {"lora.start": "gradient"}, {"ranks": "auto"}])
def test_what_does_not_go_with_blocks_that_are_computed_again_keeps_them(
    change: dict[str, str], config: Callable[..., RunConfig]
) -> None:
    work = UnboundTextRun(config(**change), ROWS, print)
    ways = []
    try:
        for way in work.ways(1 << 40):
            ways.append(way)
    except ConfigError:
        assert "train.keep_prefix_states" not in change
    assert RESIDENT in ways and not any(way.recomputed for way in ways)


def test_several_cards_choose_by_the_smallest_which_is_named(config: Callable[..., RunConfig]) -> None:
    mine = config()

    class Two(Processes):
        def total(self, *numbers: int) -> tuple[int, ...]:
            assert numbers[1:] == (0,)
            return numbers[0], smallest

    smallest = peak(mine, Way(micro_tokens=1024, one_base=True))
    together = Two()
    together.count = 2
    found, said = fitted(mine, 1 << 40, together)
    assert found.way.micro_tokens == 1024 and not found.budget
    differ, planned = said
    assert differ.startswith("The GPUs differ: ") and differ.endswith("choose them with CUDA_VISIBLE_DEVICES.")
    assert "MiB are free on the GPU of process 1, 1024.00 GiB on the GPU of process 0. Every process" in differ
    assert "free on the GPU of process 1 for this run" in planned
    smallest = 1 << 40
    assert len(fitted(mine, 1 << 40, together)[1]) == 1, "nothing is said of two alike"
    smallest = CONTEXT
    with pytest.raises(ConfigError, match=r"2 processes train together\. Start one, or set train\.shard"):
        fitted(mine, 1 << 40, together)


FEW = {"train.steps": "2", "train.micro_tokens": "128", "evaluate.drift_texts": "0", "evaluate.answers": "0"}
CHOSEN = {
    "one base": Way(one_base=True),
    "computed again": Way(recomputed=True, slots=ALONE, one_base=True),
    "fewer tokens": Way(micro_tokens=64, one_base=True),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The model and the rows of a run that has room, and its folder."""
    folder = tmp_path_factory.mktemp("plain")
    small, data = save_tiny_llama(folder / "model", num_hidden_layers=3), write_rows(folder / "rows.jsonl", chats(30))
    run(small, data, folder / "run", FEW)
    return small, data, folder / "run"


@pytest.mark.parametrize("name", CHOSEN)
def test_a_whole_run_with_little_free_ends_in_the_same_bytes(
    name: str, plain: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, data, whole = plain
    kept: Any = Residency(Budget(1 << 40, "1 TiB", "this machine"), CHOSEN[name], folder=tmp_path / "store")
    monkeypatch.setattr(assemble_text, "fit_text_run", lambda *_: kept)
    found = run(small, data, tmp_path / "run", FEW)
    text, config = found.setup.text, read_run(tmp_path / "run" / "config.yaml")
    again = [module for module in text.model.modules() if isinstance(module, RecomputedBlock)]
    assert len(again) == (2 if name == "computed again" else 0)
    assert config.train.micro_tokens == (64 if name == "fewer tokens" else 128) and not config.memory.budget
    assert name == "fewer tokens" or adapter_bytes(tmp_path / "run") == adapter_bytes(whole)
    checks, of_whole = ({check.name for check in read_certificate(folder / "certificate.json").checks} for folder in
                        (tmp_path / "run", whole))  # fmt: skip
    assert "adapter on disk" in checks and "base untouched" in of_whole - checks, "one base"
    assert found.report is not None and any("against what was free" in use.what for use in found.report.memory)


def test_a_base_that_would_not_fit_now_is_not_loaded_again(
    plain: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program has taken some since, or the run could not be planned."""
    sizes: list[int] = []
    monkeypatch.setattr(text_kind, "fits_now", lambda size, _: bool(sizes.append(size)))
    small, data, _ = plain
    found = run(small, data, tmp_path / "run", FEW)
    checks = {check.name for check in read_certificate(tmp_path / "run" / "certificate.json").checks}
    assert "adapter on disk" in checks and "base untouched" not in checks
    assert sizes == [sum(each.nbytes for each in found.setup.text.model.parameters()) + sum(
        each.nbytes for each in found.setup.text.model.buffers()
    )]  # fmt: skip


def test_a_plan_says_how_a_run_fits_the_card_that_is_here_or_that_it_is_refused(config: Callable[..., RunConfig]) -> None:
    settings = config()
    work, said = UnboundTextRun(settings, ROWS, print), list[str]()
    precision, planned = text_run.precision_of(settings), work.plan(RESIDENT)
    result = text_plan.TextPlanResult(config=settings, device=precision.device, planned=planned, precision=precision, speed=None)
    sizes = Budget(1 << 40, "1 TiB", "cuda:0"), Budget(CONTEXT, "512 MiB", "cuda:0")
    fitting, [refused] = (list(text_plan._refusals(result, work, free, said.append)) for free in sizes)
    assert "planned of 1 TiB free on cuda:0 for this run" in said[0] and fitting == []
    assert refused.startswith("512 MiB of memory are free on cuda:0, but this run takes at least")


def test_a_later_way_that_cannot_be_planned_leaves_what_is_known(config: Callable[..., RunConfig]) -> None:
    """A run that is known not to fit is refused, whatever becomes of the ways that would follow."""

    class TwoWays(text_run.TextRun):
        def ways(self, budget: int) -> Any:
            yield RESIDENT
            yield Way(streamed=True, slots=ALONE)

        def plan(self, way: Way) -> Any:
            if way.streamed:
                raise rehearse_text.NotPlanned("its code does not run on shapes alone.")
            return super().plan(way)

    work = TwoWays(config(), ROWS, lambda _: None)
    whole = work.plan(RESIDENT).peak
    found = choose(work, Budget(whole - 1, "less"))
    assert not found.fits and found.way == RESIDENT and found.why_no_more == "its code does not run on shapes alone."
    assert choose(work, Budget(whole + 1, "enough")).fits

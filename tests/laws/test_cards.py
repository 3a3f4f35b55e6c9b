"""The default run of 1B and 8B fits the cards that people have, by its plan: training, judging and certificate; or it is refused
before it starts. Nothing here runs on a card: models are shapes, and what is free is made up.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from lorakeet.config import read_run
from lorakeet.errors import ConfigError
from lorakeet.kernels import flash_varlen
from lorakeet.kernels.choose import CANDIDATES
from lorakeet.memory.cuda import CONTEXT
from lorakeet.memory.free import free_memory
from lorakeet.models.text.from_config import config_of
from lorakeet.planning import text_run
from lorakeet.planning.fit import choose, fit_free
from lorakeet.planning.forecast_text_run import CERTIFY, LOAD, Workload
from lorakeet.planning.rehearse_text import EVALUATE, FINAL, STEP
from lorakeet.planning.unbound_text_run import UnboundTextRun
from lorakeet.runs.residency import RESIDENT
from tiny.made_up_card import card

CARDS = {8: 8188, 12: 12044, 16: 15102, 24: 22731, 80: 81038}  # GB as sold; MiB of the smallest: RTX 3070, 3060, T4, A10G, H100
DEVICE = torch.device("cuda", 0)
EXPECTED = {  # the kind of way on each card
    ("meta-llama/Llama-3.2-1B", "nf4"): ["whole"] * 5,
    ("meta-llama/Llama-3.1-8B", "nf4"): ["again", "fewer", "whole", "whole", "whole"],
}


@cache
def default_run(model: str, method: str) -> UnboundTextRun:
    """A run with nothing set but its model and how it is packed, with rows of data.max_tokens."""
    given = {"model.path": model, "data.train": "none", "model.device": "cuda:0", "model.quantize": method}
    config = read_run(None, given)
    return UnboundTextRun(config, Workload(), print, (config_of(config.model, print), None))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method"), EXPECTED)
def test_the_default_run_fits_every_card(model: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_run, "MOST_TOGETHER", 1)  # rehearses less
    work, kinds, alone = default_run(model, method), [], []
    for size in CARDS.values():
        with card(size << 20):
            free = free_memory(DEVICE)
        assert free.bytes < size << 20
        choice = choose(work, free)
        phases = {phase.name: phase for phase in choice.plan.forecast.phases}
        assert {LOAD, STEP, EVALUATE, FINAL, CERTIFY} <= set(phases)
        assert choice.fits and all(phase.bytes <= free.bytes for phase in phases.values())
        assert all(phase.kinds["runtime"] == CONTEXT and phase.kinds["allocator"] > 0 for phase in phases.values())
        way = choice.way
        fewer = "whole" if way.micro_tokens is None else "fewer"
        kinds.append("streamed" if way.streamed else "again" if way.recomputed else fewer)
        alone.append(way.one_base)
    assert kinds == EXPECTED[model, method]
    assert alone == sorted(alone, reverse=True) and not alone[-1], "two bases wherever they fit"


@pytest.mark.slow
def test_on_a_t4_no_probabilities_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no flash kernel: in float16 the memory-efficient one takes no more than keys and values for every head."""
    whole = default_run("meta-llama/Llama-3.2-1B", "none").plan(RESIDENT)
    monkeypatch.setattr(flash_varlen, "DTYPES", ())
    CANDIDATES.clear()
    given = {"model.path": "meta-llama/Llama-3.2-1B", "data.train": "none", "model.device": "cuda:0", "model.dtype": "float16"}
    config = read_run(None, given)
    found = UnboundTextRun(config, Workload(), print, (config_of(config.model, print), None)).plan(RESIDENT)
    CANDIDATES.clear()
    more = found.forecast.phase(STEP).bytes - whole.forecast.phase(STEP).bytes
    assert more < 256 << 20 < 32 * 1024**2 * 2 * 2 * 16, "which probabilities of two rows of 1,024 tokens in 16 blocks exceed"


@pytest.mark.slow
def test_a_card_that_is_too_small_is_refused_with_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_run, "MOST_TOGETHER", 1)
    work = default_run("meta-llama/Llama-3.1-8B", "none")
    with card(2048 << 20):
        free = free_memory(DEVICE)
    words = r"^1\.66 GiB of memory are free on cuda:0, but this run takes at least \d+ MiB in phase '.+', with blocks streamed"
    with pytest.raises(ConfigError, match=words) as no:
        fit_free(work, free, print)
    assert str(no.value).endswith("memory.budget sets another bound.")

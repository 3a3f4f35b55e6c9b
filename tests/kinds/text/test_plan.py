"""The plan of a run on text: its table, what keeps a budget, and what would help."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from lorakeet.config import read_run
from lorakeet.errors import ConfigError
from lorakeet.kinds.text import plan as text_plan
from lorakeet.kinds.text.plan import TextPlanResult
from lorakeet.planning.planned_model import Precision
from lorakeet.planning.rehearse_text import RowShape
from lorakeet.quant.spec import QuantSpec
from lorakeet.verbs.options import PlanOptions
from lorakeet.verbs.plan import plan
from tiny.configs import SMALL
from tiny.gguf_file import write_tiny_gguf


def planned(
    config_folder: Path,
    budget: str = "",
    ranks: str = "",
    tokens: int = 32,
    choose: str = "auto",
    settings: Mapping[str, str] | None = None,
    **options: object,
) -> tuple[TextPlanResult, str]:
    given = {"model.path": str(config_folder), "data.train": "none", "lora.alpha": "12", "model.dtype": "float32"}
    given |= {"memory.budget": budget} if budget else {}
    given |= settings or {}
    config = read_run(None, {**given, **({"ranks": choose, "ranks.budget": ranks} if ranks else {})})
    text = io.StringIO()
    result = plan(config, PlanOptions(rank=4, tokens=tokens, **options), console=Console(file=text, width=200))  # type: ignore[arg-type]
    return result, text.getvalue()


@pytest.mark.slow
def test_the_table_says_phases_kinds_and_peak(config_folder: Path) -> None:
    result, text = planned(config_folder)
    for word in ("train step", "merge", "saved: activations kept", "runtime", "Peak of the run", "tokens a second"):
        assert word in text
    assert "Not part of the run: merge and export, which are commands of their own." in text
    assert result.config.lora.rank == 4 and result.planned.rows.tokens == 32
    assert result.peak == max(phase.bytes for phase in result.planned.forecast.phases if phase.name not in ("merge", "export"))
    assert result.advice == () and result.to_mapping()["fits"] is None


@pytest.mark.slow
def test_ranks_that_will_be_chosen_are_planned_by_their_budget(config_folder: Path) -> None:
    given, _ = planned(config_folder)
    auto, text = planned(config_folder, ranks="20k")
    assert 19_800 < auto.planned.plan.parameters <= 20_000 and auto.planned.plan.parameters > 1.5 * given.planned.plan.parameters
    assert "At most " in text and "that ranks.choose auto may choose" in text and "measure ranks" in text
    with pytest.raises(ConfigError, match="below rank 1 for each of the 14 targets"):
        planned(config_folder, ranks="100")


@pytest.mark.slow
def test_ranks_that_will_fall_are_planned_as_they_begin(config_folder: Path) -> None:
    given, _ = planned(config_folder)
    pruned, text = planned(config_folder, ranks="2k", choose="prune")
    assert pruned.planned.plan == given.planned.plan and pruned.peak >= given.peak
    assert f"{given.planned.plan.parameters:,} trained parameters at first, 2,000 in pairs once ranks.choose prune" in text
    assert "(before that, no adapter is saved)" in text
    with pytest.raises(ConfigError, match="has nothing to cut"):
        planned(config_folder, ranks="9M", choose="prune")
    with pytest.raises(ConfigError, match=r"A run of 6 steps would be pruned after step 1.*needs 3 steps"):
        planned(config_folder, ranks="2k", choose="prune", settings={"train.steps": "6"})
    again, _ = planned(config_folder, ranks="2k", choose="prune", settings={"train.steps": "40"})
    assert again.planned.plan == pruned.planned.plan
    refused, text = planned(config_folder, ranks="2k", choose="prune", budget="64MB")
    assert refused.streamed is None and "finetune refuses: The memory budget is 64MB" in text and "finetune keeps" not in text


@pytest.mark.slow
def test_a_budget_that_is_too_small_brings_advice_with_numbers(config_folder: Path) -> None:
    result, text = planned(config_folder, budget="64MB")
    assert result.to_mapping()["fits"] is False and "more than the budget" in text
    assert result.exit_code == 2 and result.to_mapping()["refused"] == list(result.refused) != []
    assert result.streamed is None and result.least is not None and "finetune refuses: it needs at least" in text
    changes = {item.change for item in result.advice}
    assert {"--model.dtype bfloat16", "--model.quantize.method nf4", "--lora.target_modules attention"} <= changes
    assert all(item.peak < result.peak for item in result.advice if "bfloat16" in item.change or "nf4" in item.change)
    enough, text = planned(config_folder, budget="100TB")
    assert enough.exit_code == 0 and enough.to_mapping()["refused"] == []
    assert enough.to_mapping()["fits"] is True and "less than the budget" in text and "this machine has" in text


def advised(tokens: int, rows: RowShape, **changes: str) -> set[str]:
    given = {"model.path": "none", "data.train": "none", "memory.budget": "1MB", "train.objective": "dpo"}
    config = read_run(None, {**given, "data.max_tokens": str(rows.length), "train.micro_tokens": str(tokens), **changes})
    precision, plan = Precision(torch.float32, torch.float32, QuantSpec()), SimpleNamespace(peak=2_000_000)
    planned: Any = SimpleNamespace(base=1000, rows=rows)
    limit = config.memory.limit
    found = text_plan.text_advice(config, precision, planned, lambda *_, **__: plan, lambda _: 0, limit)  # type: ignore[arg-type,return-value]
    return {item.change for item in found if "tokens" in item.change}


def test_two_answers_that_are_never_apart_are_advised_to_be_shorter() -> None:
    """A micro-batch of one pair has two rows whatever train.micro_tokens is."""
    assert advised(512, RowShape(512, 2)) == {"--data.max_tokens 256"}
    assert advised(1024, RowShape(512, 2)) == {"--data.max_tokens 256 --train.micro_tokens 512"}
    assert advised(1536, RowShape(512, 3)) == {"--train.micro_tokens 1024"}
    assert advised(4096, RowShape(512, 8)) == {"--train.micro_tokens 2048"}


@pytest.mark.slow
def test_a_budget_that_streaming_keeps_shows_the_table_of_that_run(config_folder: Path) -> None:
    wide = {**SMALL, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}  # 67 million numbers
    (config_folder / "config.json").write_text(json.dumps(wide))
    refused, _ = planned(config_folder, budget="64MB")
    assert refused.least is not None and refused.peak - refused.least > 80 * 10**6
    kept, text = planned(config_folder, budget=f"{(refused.least + refused.peak) // 2000}KB")
    assert kept.streamed is not None and kept.least is None and kept.advice == ()
    assert "finetune keeps the budget" in text and text.count("train step") == 2
    assert (kept.to_mapping()["streamed"] or {})["planned"] <= kept.budget.bytes < kept.peak


def test_a_cuda_device_that_is_not_here_is_planned_for(config_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = read_run(None, {
        "model.path": str(config_folder), "data.train": "none", "model.device": "cuda", "memory.budget": "4GiB",
        "memory.keep": "host",
    })  # fmt: skip
    text = io.StringIO()
    result = plan(config, PlanOptions(rank=4, tokens=32), console=Console(file=text, width=200))
    assert isinstance(result, TextPlanResult)
    assert result.to_mapping()["device"] == "cuda" and result.speed is None and result.precision.dtype == torch.bfloat16
    names = [phase.name for phase in result.planned.forecast.phases]
    assert "train step" in names and "merge" not in names and 512 << 20 < result.peak < 1 << 30
    assert "Memory on cuda at the peak" in text.getvalue() and "not measured on one" in text.getvalue()
    json.dumps(result.to_mapping(), allow_nan=False)


@pytest.fixture
def packed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A .gguf file that was not unpacked yet."""
    monkeypatch.setenv("LORAKEET_CACHE", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.mark.slow
def test_the_host_memory_of_unpacking_is_no_gpu_memory(packed_file: Path) -> None:
    config = read_run(None, {"model.path": str(packed_file), "data.train": "none", "model.device": "cuda"})
    for device, unpacks in (("cuda", False), ("cpu", True)):
        there = dataclasses.replace(config, model=dataclasses.replace(config.model, device=device))
        result = plan(there, PlanOptions(rank=4, tokens=32), console=Console(file=io.StringIO()))
        assert isinstance(result, TextPlanResult)
        assert (text_plan.UNPACK in [phase.name for phase in result.planned.forecast.phases]) == unpacks


@pytest.mark.slow
def test_a_budget_on_a_cuda_device_that_streaming_keeps_says_what_the_host_holds(config_folder: Path) -> None:
    wide = {**SMALL, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 4096}
    (config_folder / "config.json").write_text(json.dumps(wide))
    given = {"model.path": str(config_folder), "data.train": "none", "model.device": "cuda:0", "model.dtype": "float32"}
    budget, found = 8 << 30, []
    for keep, less in (("disk", 12 << 20), ("disk", 40 << 20), ("disk", 0), ("host", 0)):
        config = read_run(None, {**given, "memory.budget": f"{budget // 1000}KB", "memory.keep": keep})
        text = io.StringIO()
        result = plan(config, PlanOptions(rank=4, tokens=32), console=Console(file=text, width=300))
        assert isinstance(result, TextPlanResult)
        found.append(result)
        kept = result.peak if result.streamed is None else result.streamed.choice.plan.peak
        budget = kept - less if less else budget
    whole, stay, disk, host = found
    assert whole.streamed is None and stay.streamed is not None
    way = stay.streamed.choice.way
    assert way.slots == 6 and not way.ends, "a head that is read once a pass moves less than a block that leaves and comes back"
    assert disk.streamed is not None and host.streamed is not None and disk.streamed.choice.way.slots < 5
    assert "2 buffers of a block" in disk.host_memory and "the 6 frozen blocks" in host.host_memory
    assert "streamed from pinned host memory" in text.getvalue() and "on cuda:0" in text.getvalue()

"""`lorakeet plan` for runs on pictures, from configurations alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from lorakeet.cli.main import lorakeet
from lorakeet.errors import ConfigError
from lorakeet.memory.cuda import CONTEXT
from lorakeet.workflows.finetuning.plan_image import ImagePlanResult, plan_images
from lorakeet.workflows.planning import image_run
from tiny.image_runs import image_config


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process holds beside tensors is a number, and not measured by running a small model."""
    monkeypatch.setattr(image_run, "image_runtime_bytes", lambda config, dtype: 10**9)


@pytest.fixture
def configurations(tiny_sdxl_folder: Path, tmp_path: Path) -> Path:
    """A pipeline without any weights."""
    for file in tiny_sdxl_folder.rglob("*.json"):
        copy = tmp_path / "shapes" / file.relative_to(tiny_sdxl_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return tmp_path / "shapes"


def planned(folder: Path, room: Path, budget: str = "", device: str = "cpu", **changes: Any) -> tuple[ImagePlanResult, str]:
    text = io.StringIO()
    changes = {"lora__target_modules": "all-linear", **changes}
    config = image_config(folder, room, memory__budget=budget, model__device=device, **changes)
    return plan_images(config, Console(file=text, width=200)), text.getvalue()


def test_neither_weights_nor_pictures_are_needed(configurations: Path, tmp_path: Path) -> None:
    result, text = planned(configurations, tmp_path, diffusion__scorer="some/clip")
    assert "Not counted: diffusion.scorer some/clip" in text
    assert "Peak of the run" in text and "train step" in text and result.advice == ()
    mapping = result.to_mapping()
    assert mapping["fits"] is None and mapping["micro_batch"] == {"pictures": 4, "size": [16, 16]}
    assert mapping["peak"] == max(phase["bytes"] for phase in mapping["phases"]) > mapping["card_tensors"] > 0


@pytest.mark.usefixtures("no_probe")
def test_gpu_memory_is_planned_without_a_gpu(configurations: Path, tmp_path: Path) -> None:
    result, text = planned(configurations, tmp_path, device="cuda:1")
    assert "Memory on cuda:1" in text and result.to_mapping()["device"] == "cuda:1"
    phases = {phase.name: phase for phase in result.planned.forecast.phases}
    assert "load" not in phases and all(phase.kinds["runtime"] == CONTEXT for phase in phases.values())
    beside = result.peak - result.planned.tensors
    assert CONTEXT < beside < CONTEXT + (256 << 20), "the context, and what torch's allocator keeps around the tensors"
    on_cpu, _ = planned(configurations, tmp_path)
    assert on_cpu.planned.tensors == result.planned.tensors
    assert phases["certify"].kinds["base"] == phases["judge"].kinds["base"], "one base is away before another comes"
    small, text = planned(
        configurations, tmp_path, "600MiB", "cuda:1", diffusion__at_once=1, diffusion__checkpointing=True, model__quantize="nf4",
        lora__target_modules="attention",
    )  # fmt: skip
    assert "more than the budget" in text and "this machine has" not in text and small.advice


def test_what_finetune_refuses_is_not_planned(configurations: Path, tmp_path: Path) -> None:
    config = image_config(configurations, tmp_path, ranks__choose="prune")
    with pytest.raises(ConfigError, match=r"ranks\.choose is prune, which is for text models"):
        plan_images(config, Console(file=io.StringIO()))


@pytest.mark.usefixtures("no_probe")
def test_a_budget_is_answered_with_what_helps(configurations: Path, tmp_path: Path) -> None:
    result, text = planned(configurations, tmp_path, budget="64MB")
    assert "more than the budget" in text and "is still too much" in text
    changes = [item.change for item in result.advice]
    assert changes == ["diffusion.at_once 1", "diffusion.at_once 1 and diffusion.checkpointing", "model.dtype bfloat16",
                       "model.quantize nf4", "lora.target_modules attention"]  # fmt: skip
    enough, text = planned(configurations, tmp_path, budget="100TB")
    assert enough.to_mapping()["fits"] and "less than the budget" in text and "this machine has" in text


@pytest.mark.usefixtures("no_probe")
def test_the_verb_knows_published_shapes() -> None:
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    given = ["plan", "--kind", "image", "--model", name, "--data", "none", "--json", "--diffusion.at_once", "1",
             "--model.dtype", "bfloat16", "--quantize", "nf4", "--rank", "4"]  # fmt: skip
    found = CliRunner().invoke(lorakeet, given, catch_exceptions=False)
    mapping = json.loads(found.stdout)
    base = {phase["phase"]: phase["kinds"]["base"] for phase in mapping["phases"]}["train step"]
    assert 1.8e9 < base < 2.0e9 and mapping["micro_batch"]["size"] == [512, 512]


@pytest.mark.slow
def test_stable_diffusion_xl_fits_a_gpu_of_eight_gigabytes_by_plan() -> None:
    given = ["plan", "--kind", "image", "--model", "stabilityai/stable-diffusion-xl-base-1.0", "--data", "none", "--json",
             "--model.dtype", "bfloat16", "--diffusion.at_once", "1", "--diffusion.checkpointing", "true",
             "--model.device", "cuda", "--memory", "8GiB", "--quantize", "nf4"]  # fmt: skip
    found = CliRunner().invoke(lorakeet, given, catch_exceptions=False)
    mapping = json.loads(found.stdout)
    assert mapping["fits"] and mapping["device"].startswith("cuda") and mapping["micro_batch"]["size"] == [1024, 1024]

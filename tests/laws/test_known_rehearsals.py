"""Whole rehearsals with what operators make remembered (memory/operator_cache), and with torch's rules asked for every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakeet.core.spec import LoraSpec
from lorakeet.kinds.images.model.from_config import image_model_from_config, shapes_of_images
from lorakeet.kinds.images.plan import Pictures, rehearse_images
from lorakeet.kinds.images.spec import DiffusionSpec
from lorakeet.memory import ledger
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.from_config import model_from_config, streamed_model_from_config
from lorakeet.models.text.repeated_blocks import ModelBuilder
from lorakeet.planning.rehearse_text import EvaluationSize, RowShape, rehearse
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.residency import RESIDENT, Way
from lorakeet.train.spec import TrainSpec
from tiny.models import FAMILIES

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}


def text(family: str, way: Way = RESIDENT, *, method: str = "none", stored: Any = None, **lora: Any) -> Any:
    """The rehearsal of a run on a tiny model with all of its phases."""
    name, _, settings = FAMILIES[family]
    config = getattr(transformers, name)(**{**settings, **({} if stored is None else {"quantization_config": stored})})
    make = partial(
        streamed_model_from_config if way.streamed else model_from_config, name="made-up", dtype=torch.bfloat16,
        products=torch.float32,
        quantize=QuantSpec(method=method),  # type: ignore[arg-type]
    )  # fmt: skip
    return rehearse(
        ModelBuilder(make, config), LoraSpec(**{"rank": 2, "alpha": 4, **lora}), TrainSpec(), rows=RowShape(16, 2),
        evaluation=EvaluationSize(RowShape(24, 1), 2, 4), way=way,
    )  # fmt: skip


TEXTS: dict[str, Callable[[], Any]] = {
    "llama in NF4, DoRA, PiSSA": lambda: text("llama", method="nf4", variant="dora", start="pissa"),
    "llama in GPTQ, streamed": lambda: text("llama", Way(True, together=2, spilled=True), stored=GPTQ),
    "experts, dropout": lambda: text("qwen3_moe", dropout=0.1),
}


def require_equal(rehearsed: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is asked for every call, then for those alone that have not been met before."""
    known: dict[Any, Any] = {}
    monkeypatch.setattr(ledger, "_KNOWN", known)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "call_of", lambda *_: None)
        asked = rehearsed()
        assert not known
    assert rehearsed() == asked and len(known) > 100


@pytest.mark.slow
@pytest.mark.parametrize("rehearsed", TEXTS.values(), ids=TEXTS.keys())
def test_a_run_on_text_holds_what_torchs_rules_say(rehearsed: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    require_equal(rehearsed, monkeypatch)


@pytest.mark.slow
def test_a_run_on_pictures_holds_what_torchs_rules_say(tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = shapes_of_images(ModelSpec(path=str(tiny_sd_folder)), print)
    build = partial(image_model_from_config, shapes, name="tiny", dtype=torch.float32, quantize=QuantSpec())
    lora, diffusion = LoraSpec(rank=4, target_modules=("attention",)), DiffusionSpec(at_once=1)
    require_equal(
        lambda: rehearse_images(build, lora, TrainSpec(), diffusion, Pictures((16, 16), 1, 1, (16, 16), 1)), monkeypatch
    )

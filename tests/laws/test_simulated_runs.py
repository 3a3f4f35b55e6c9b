"""Whole runs on the simulated card: they train, are evaluated, reply and are certified there, with the numbers of the CPU.

The usual tests try the families of OFTEN; `make families` tries those of LATER too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lorakeet.train.loop import Training
from lorakeet.verbs.finetune import FinetuneResult
from tiny.family_columns import saved
from tiny.gptq_folder import save_mixed_gptq
from tiny.models import FAMILIES, save_tiny_llama
from tiny.runs import chats, run, write_rows
from tiny.simulated_card import Card, Wait, simulated_card

MOST = 3  # waits of an optimizer step (test_host_waits)
FIRST = 2  # steps in which gradients are checked tensor by tensor
LATER_NORMS = 2e-3  # of gradients after them: AdamW makes of a rounding, 3e-7, up to 5e-4 in four steps, by the processor
OFTEN = ("qwen3", "gemma2", "gpt_oss", "qwen3_next")
LATER = (
    "gemma3", "phi3", "mistral", "qwen2", "qwen3_moe", "qwen3_5_text", "granite", "smollm3", "mixtral", "gpt2", "deepseek_v3",
)  # fmt: skip
ALSO = {  # further waits in a micro-batch, by their place
    "core/layers/experts.py": "numbers are read",  # of tokens for each expert, unless products are grouped
    "models/text/model.py": "a number is read",  # by transformers: whether a mask of padded rows hides something
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"lora.variant": "dora"},
    "olora, rslora": {"lora.start": "olora", "lora.scale_rule": "alpha/sqrt(rank)"},
    "nf4, trained tokens": {"model.quantize": "nf4", "lora.new_tokens": "<note>"},
    "int8, moments of 8 bits": {"train.moments": "8bit", "model.quantize": "int8"},
}
VARIANTS_LATER: dict[str, dict[str, Any]] = {
    "pissa": {"lora.start": "pissa"},
    "embedding and head": {"lora.target_modules": "embed_tokens,lm_head,q_proj"},
    "nf4, dora": {"model.quantize": "nf4", "lora.variant": "dora"},
    "gptq": {},
    "own tokens and norms": {"lora.new_tokens": "<note>", "lora.extra_modules": "norm"},
    "graded starts": {"lora.start": "gradient"},
}
ALL = os.environ.get("LORAKEET_FAMILIES", "") not in ("", "0")
HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
QUICK = {
    "train.steps": 4, "train.batch_size": 4, "evaluate.answers": 1, "evaluate.drift_texts": 2, "evaluate.resamples": 100,
    "evaluate.answer_tokens": 4, "train.evaluate_every": 4, "evaluate.examples": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", chats(24))


def folder_of(family: str, folder: Path) -> Path:
    if family in (*FAMILIES, "gpt_oss", "deepseek_v3"):
        return save_tiny_llama(folder / "model", family=family)
    return saved(family, folder, **(HYBRID if family.startswith("qwen3_") else {}))


def on_card(card: Card, monkeypatch: pytest.MonkeyPatch, *given: Any) -> tuple[FinetuneResult, list[list[Wait]]]:
    """A run on the card, and what the host waited for in each step."""
    steps: list[list[Wait]] = []
    taken = Training.step

    def counted(training: Training[Any]) -> None:
        before = len(card.waits)
        taken(training)
        steps.append(card.waits[before:])

    monkeypatch.setattr(Training, "step", counted)
    found = run(*given)
    monkeypatch.setattr(Training, "step", taken)
    return found, steps


def require_the_same(model: Path, rows: Path, out: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of these settings gives the losses, replies, drift and certificate of the CPU, and waits as seldom as it should."""
    expected = run(model, rows, out / "cpu", {**QUICK, **changes, "model.device": "cpu"})
    with simulated_card() as card:
        found, steps = on_card(card, monkeypatch, model, rows, out / "card", {**QUICK, **changes, "model.device": "cuda"})
    assert card.launches["mm"] > 0 and found.outcome is not None and expected.outcome is not None
    for one, other in zip(records(out / "card"), records(out / "cpu"), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() & {"loss", "grad_norm", "held_out_loss"}:
            close = LATER_NORMS if name == "grad_norm" and one["step"] > FIRST else 2e-4
            assert one.get(name) == pytest.approx(other.get(name), rel=close, abs=1e-6), (one["step"], name)
    mine, theirs = found.report, expected.report
    assert mine is not None and theirs is not None and mine.certificate is not None and mine.certificate.passed
    assert [each.name for each in mine.certificate.checks] == [each.name for each in theirs.certificate.checks]  # type: ignore[union-attr]
    for one, other in zip(mine.rows, theirs.rows, strict=True):
        assert [one.base.text, one.adapter.text] == [other.base.text, other.adapter.text]
        for reply, expected_reply in ((one.base, other.base), (one.adapter, other.adapter)):
            assert reply.loss == pytest.approx(expected_reply.loss, rel=2e-4)
    assert mine.rows and mine.drift is not None and theirs.drift is not None
    assert mine.drift.mean_kl.value == pytest.approx(theirs.drift.mean_kl.value, rel=1e-2)
    waits = [[wait for wait in step if ALSO.get(wait.place.partition(":")[0]) != wait.kind] for step in steps]
    if found.setup.text.attention == "varlen":
        assert not any("models/text/model.py" in wait.place for step in steps for wait in step)
    found_waits = waits[FIRST - int(str(QUICK["train.steps"])) :]  # the first step of all is that on shapes
    assert len(found_waits) == 2 and all(0 < len(step) <= MOST for step in found_waits), found_waits


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("family", OFTEN)
def test_a_family_s_run_is_that_of_the_cpu(family: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_the_same(folder_of(family, tmp_path), rows, tmp_path, {}, monkeypatch)


@pytest.mark.families
@pytest.mark.parametrize("family", LATER if ALL else ())
def test_a_further_family_s_run_is_that_of_the_cpu(
    family: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_the_same(folder_of(family, tmp_path), rows, tmp_path, {}, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_kind_of_adapter_s_run_is_that_of_the_cpu(
    variant: str, tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_the_same(tiny_llama_folder, rows, tmp_path, VARIANTS[variant], monkeypatch)


@pytest.mark.families
@pytest.mark.parametrize("variant", VARIANTS_LATER if ALL else ())
def test_a_further_kind_of_adapter_s_run_is_that_of_the_cpu(
    variant: str, tiny_llama_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama_folder
    if variant == "gptq":
        model = tmp_path / "model"
        save_mixed_gptq(model, "gptq")
    require_the_same(model, rows, tmp_path, VARIANTS_LATER[variant], monkeypatch)

"""The live adapter computed again in a number format, in several orders."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lorakeet.errors import VerificationFailed
from lorakeet.evaluate.served.rounding_noise import rounding_limits
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.serving import ServingModel
from lorakeet.runs.open_adapter import NAME, open_adapter
from lorakeet.serve.engine import Engine
from lorakeet.serve.registry import Registry
from lorakeet.serve.service import Service
from lorakeet.verbs.options import VerifyOptions
from lorakeet.verbs.verify import verify
from lorakeet.verification.artefact import InTorch, live_side
from lorakeet.verification.diagnose import changed_pairs
from lorakeet.verification.rounding import Reading, SplitSums, in_groups, replicas, replicas_of_few_bits, seen_by
from tiny.exports import certified_anew
from tiny.runs import quiet
from tiny.site import Site


def test_sums_in_parts_are_the_same_sums() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(5, 96), nn.Linear(96, 24)
    heads = torch.randn(3, 7, 64), torch.randn(3, 64, 9)
    expected = layer(x), heads[0] @ heads[1]
    with torch.no_grad(), SplitSums(3):
        found = layer(x), heads[0] @ heads[1]
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)
    with torch.no_grad():
        narrow = layer.to(torch.bfloat16)
        whole = narrow(x.to(torch.bfloat16))
        with SplitSums(3):
            parts = narrow(x.to(torch.bfloat16))
    assert not torch.equal(whole, parts) and (whole - parts).abs().max() < 0.05


def readings(live: InTorch, count: int = 4) -> list[Reading]:
    chance, found = np.random.default_rng(0), []
    for _ in range(count):
        ids = [int(number) for number in chance.integers(10, 200, 24)]
        tops = live.logits(ids).topk(5).indices.tolist()
        found.append(Reading.of(live, ids, {place: tops[place] for place in range(len(ids) - 1)}))
    return found


def test_each_order_is_within_the_limits_of_the_others(loud: Path) -> None:
    """Of ten computations in bfloat16 none is further from fp32 than the others explain; a scale 20 % off is."""
    opened = open_adapter(loud)
    live = live_side(opened, quiet())
    seen = readings(live)
    found = replicas(lambda: InTorch(opened.text_model(quiet(), dtype="bfloat16"), NAME, "bf16"), seen, [], [])
    assert len(found) == 10 == len({one.kl.mean() for one in found}) and all(0 < one.kl.mean() < 0.01 for one in found)
    places = len(found[0].kl)
    for number, one in enumerate(found):
        limits = rounding_limits(found[:number] + found[number + 1 :], places=places, rows=0)
        assert one.kl.mean() <= limits.mean_kl and one.differences.max() <= limits.difference
        assert 1 - one.other_tokens / places >= limits.top1_agreement
    limits = rounding_limits(found, places=places, rows=0)
    with changed_pairs(live, lambda _, pair: pair.B.mul_(0.8)):
        wrong = [place.against(theirs)[0] for place, theirs, _ in seen_by(live, seen)]
    assert np.mean(wrong) > limits.mean_kl


def test_in_fp32_every_order_is_the_live_adapter(loud: Path) -> None:
    opened = open_adapter(loud)
    live = live_side(opened, quiet())
    found = replicas(lambda: InTorch(opened.text_model(quiet(), dtype="float32"), NAME, "fp32"), readings(live), [], [])
    assert len(found) == 10 and all(one.kl.mean() < 1e-8 for one in found)


@pytest.mark.slow
def test_a_server_in_bfloat16_is_measured_and_no_false_alarm(finished: Any, loud: Path, tmp_path: Path) -> None:
    """Real rounding passes and says by which format; the adapter with 0.8 of its scale does not."""
    run = shutil.copytree(loud, tmp_path / "run")
    weak = shutil.copytree(run, tmp_path / "weak")
    config = weak / "adapter" / "adapter_config.json"
    held = open_adapter(run).adapter
    shown = f'"lora_alpha": {next(iter(held.pairs.values())).alpha:g}'
    alpha = next(iter(held.pairs.values())).alpha
    config.write_text(config.read_text().replace(shown, f'"lora_alpha": {0.8 * alpha:g}'))
    assert shown not in config.read_text()
    certified_anew(weak)
    text = load_text_model(ModelSpec(path=str(finished.model), dtype="bfloat16"))
    live = ServingModel(text)
    engine = Engine(text, live.selection, slots=2, context=256, chunk=64)
    engine.start()
    registry = Registry(live, engine, base="base", budget=None, changed=lambda: None)
    registry.register("mine", run)
    registry.register("weak", weak)
    site = Site(Service(text, engine, registry))
    options = VerifyOptions(str(run), against=(f"{site.url}#mine",), rows=8)
    try:
        found: Any = verify(options, console=quiet())
        told = next(check for check in found.certificate.checks if check.name.endswith("log-probabilities"))
        with pytest.raises(VerificationFailed, match="log-probabilities"):
            verify(dataclasses.replace(options, against=(f"{site.url}#weak",)), console=quiet())
    finally:
        site.stop()
        engine.drain(timeout=0.0)
    assert "The limits are what rounding in bfloat16 does, measured in 10 computations" in told.detail
    assert "The adapter of step-00000" in told.detail and " times the limit." in told.detail
    assert "of itself off would exceed them" in told.detail and told.measured["mean_kl"] > 1e-6


def test_few_bits_are_levels_between_the_ends_of_each_group() -> None:
    values = torch.randn(5, 80, generator=torch.Generator().manual_seed(0))
    for bits in (5, 4):
        for start in (0, 12):
            found = in_groups(values, bits, start)
            turned, rounded = values.roll(-start, -1), found.roll(-start, -1)
            for begin, end in ((0, 32), (32, 64)):
                part, there = turned[:, begin:end], rounded[:, begin:end]
                step = (part.amax(1, keepdim=True) - part.amin(1, keepdim=True)) / (2**bits - 1)
                assert ((part - there).abs() <= 0.5001 * step).all() and all(len(row.unique()) <= 2**bits for row in there)
    assert not torch.equal(in_groups(values, 4), in_groups(values, 4, 12))


def test_a_small_change_of_a_base_of_4_bits_is_not_rounded_away_in_8() -> None:
    """SmolLM2 from q4_1: levels between least and largest contain the base's; the change was gone (KL 0.57, q8_0's 0.0035)."""
    chance = torch.Generator().manual_seed(0)
    base = in_groups(torch.randn(64, 128, generator=chance), 4)
    change = 0.004 * torch.randn(64, 128, generator=chance)
    kept = in_groups(base + change, 8) - in_groups(base, 8)
    assert float((kept * change).sum() / (change * change).sum()) == pytest.approx(1, abs=0.15)


@pytest.mark.slow
def test_of_few_bits_the_limits_are_measured_too(loud: Path) -> None:
    """Computations in 4 bits differ more than in 8, each lies within the limits of the others, and the base beyond them."""
    opened = open_adapter(loud)
    live = live_side(opened, quiet())
    seen = readings(live)
    sizes = {}
    for bits in (8, 4):
        found = replicas_of_few_bits(lambda: live_side(opened, quiet()), bits, seen, [], [])
        assert len(found) == 8
        places = sum(len(reading.places) for reading in seen)
        limits = rounding_limits(found[1:], places=places, rows=0)
        assert found[0].kl.mean() <= limits.mean_kl and found[0].differences.max() <= limits.difference
        sizes[bits] = limits.mean_kl
    base = InTorch(live.text, None, "base")
    wrong = np.mean([place.against(theirs)[0] for place, theirs, _ in seen_by(base, seen)])
    assert sizes[8] < 0.1 * sizes[4] and wrong > sizes[4]

"""The certificate of a run on pictures: it passes for what was trained and fails for anything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.core.spec import LoraSpec
from lorakeet.evaluate.certificate import Certificate
from lorakeet.formats.components import with_components, without_component
from lorakeet.formats.peft import peft
from lorakeet.kinds.certify_pairs import PAIRS
from lorakeet.kinds.images import certify as certify_image
from lorakeet.kinds.images.certify import certify_images, frozen_image_digests, latent_check
from lorakeet.kinds.images.model.model import ImageModel, image_plan, load_image_model
from lorakeet.kinds.images.model.sample import Sampler, draw_latents
from lorakeet.models.inject import adapter_of, inject
from lorakeet.models.spec import ModelSpec
from lorakeet.verbs.finetune import FinetuneResult
from tiny.image_runs import image_run

pytestmark = pytest.mark.slow  # they share what takes seconds to make


@pytest.fixture(scope="module")
def weak(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """A run in bf16 at a low rate."""
    changes = {"model__dtype": "bfloat16", "train__learning_rate": "1e-4", "train__steps": 60, "lora__alpha": 4}
    return image_run(tiny_sd_folder, tmp_path_factory.mktemp("weak"), diffusion__seeds=0, **changes)


def test_a_run_passes_and_what_was_changed_fails(tiny_sd_folder: Path, tmp_path: Path) -> None:
    result = image_run(tiny_sd_folder, tmp_path, diffusion__seeds=0)
    setup, run = result.setup, result.run
    model, spec = setup.model, setup.config.model
    before = frozen_image_digests(model)

    def names(**changes: object) -> list[str]:
        given = {"before": before, "spec": spec, "sampler": Sampler(guidance=3.0), **changes}
        return [check.name for check in certify_images(model, run.adapter, ["red box"], **given).checks if not check.passed]  # type: ignore[arg-type]

    assert names() == [] and names(spec=None) == []
    held = peft.read(run.adapter)
    path = next(path for path, pair in held.pairs.items() if pair.B.abs().max() > 0)
    other = replace(held, pairs={**held.pairs, path: replace(held.pairs[path], B=held.pairs[path].B * 1.5)})
    for file in run.adapter.iterdir():
        file.unlink()
    peft.write(without_component(other), run.adapter)
    assert names() == ["adapter on disk", PAIRS] and names(spec=None) == ["adapter on disk", PAIRS]
    with torch.no_grad():
        model.denoiser.conv_in.weight.add_(0.01)
    assert names() == ["adapter on disk", "base untouched", "frozen weights", PAIRS]


@pytest.mark.parametrize("change", ["zeros", "double"])
def test_in_bf16_a_weak_adapter_cannot_be_exchanged(change: str, weak: FinetuneResult, tmp_path: Path) -> None:
    """Its whole effect is about 1 % of the largest latent, below what bf16 would round away of two different computations."""
    setup, factor = weak.setup, {"zeros": 0.0, "double": 2.0}[change]
    held = peft.read(weak.run.adapter)
    other = replace(held, pairs={path: replace(pair, B=pair.B * factor) for path, pair in held.pairs.items()})
    (tmp_path / "adapter").mkdir()
    peft.write(without_component(other), tmp_path / "adapter")
    for spec in (setup.config.model, None):
        found = certify_images(
            setup.model, tmp_path / "adapter", ["red box"], before=frozen_image_digests(setup.model), spec=spec,
            sampler=Sampler(guidance=3.0),
        )  # fmt: skip
        assert [check.name for check in found.checks if not check.passed] == ["adapter on disk", PAIRS]
        assert found.checks[0].measured["latent"] < 0.03 and found.checks[0].measured["of_effect"] > 0.5


def _rounds(monkeypatch: pytest.MonkeyPatch, share: float, *, but: ImageModel | None = None) -> None:
    """Every drawing, but those of one model, ends in other digits: by `share` of the largest latent, as on a card."""
    generator = torch.Generator().manual_seed(0)

    def noisy(model: ImageModel, *args: Any, **options: Any) -> torch.Tensor:
        drawn = draw_latents(model, *args, **options)
        if model is but:
            return drawn
        sign = torch.randint(0, 2, drawn.shape, generator=generator) * 2 - 1
        return drawn + 0.5 * share * drawn.abs().max() * sign

    monkeypatch.setattr(certify_image, "draw_latents", noisy)


@pytest.fixture(scope="module")
def strong(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    return image_run(tiny_sd_folder, tmp_path_factory.mktemp("strong"), diffusion__seeds=0)


def _certified(result: FinetuneResult, adapter: Path, *, alone: bool = False) -> Certificate:
    model, spec = result.setup.model, None if alone else result.setup.config.model
    return certify_images(
        model, adapter, ["red box"], before=frozen_image_digests(model), spec=spec, sampler=Sampler(guidance=3.0)
    )  # fmt: skip


@pytest.mark.parametrize("only_fresh", [False, True])
def test_a_machine_that_rounds_otherwise_each_time_fails_no_correct_run(
    only_fresh: bool, strong: FinetuneResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Either from one drawing to the next, or of one base and the other; an exchanged adapter is refused all the same."""
    _rounds(monkeypatch, 5e-4, but=strong.setup.model if only_fresh else None)
    found = _certified(strong, strong.run.adapter)
    assert found.passed and not found.unchecked and "none" not in found.facts["rounding"]
    assert all(1e-4 < check.measured["latent"] <= check.tolerance["latent"] <= 2.1e-3 for check in found.checks[:2])
    assert found.checks[0].measured["of_effect"] < found.checks[0].tolerance["of_effect"] <= 0.04
    held = peft.read(strong.run.adapter)
    for factor in (0.0, -1.0, 2.0):
        folder = tmp_path / str(factor)
        folder.mkdir()
        pairs = {path: replace(pair, B=pair.B * factor) for path, pair in held.pairs.items()}
        peft.write(without_component(replace(held, pairs=pairs)), folder)
        for alone in (False, True):
            found = _certified(strong, folder, alone=alone)
            assert [check.name for check in found.checks if not check.passed] == ["adapter on disk", PAIRS]


def test_an_effect_below_rounding_is_not_claimed_to_be_checked(weak: FinetuneResult, monkeypatch: pytest.MonkeyPatch) -> None:
    _rounds(monkeypatch, 1e-3)
    found = _certified(weak, weak.run.adapter)
    assert found.passed and set(found.checks[0].measured) == set(found.checks[0].tolerance) == {"latent"}
    assert "too little to distinguish" in found.checks[0].detail
    assert [one.what for one in found.unchecked] == ["the adapter's effect"]


def test_a_changed_base_is_not_taken_for_rounding(weak: FinetuneResult) -> None:
    weight = weak.setup.model.denoiser.conv_in.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0, 0, 0] += 0.02
        found = _certified(weak, weak.run.adapter)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    untouched = found.checks[1]
    assert not untouched.passed and untouched.measured["latent"] < 2e-2 and untouched.tolerance == {"latent": 1e-4}


def test_the_weak_adapter_itself_passes(weak: FinetuneResult) -> None:
    assert weak.report is not None and weak.report.certificate is not None and weak.report.certificate.passed
    assert weak.report.certificate.checks[0].measured == {"latent": 0.0, "of_effect": 0.0}


def test_an_adapter_without_effect_is_named(tiny_sd_folder: Path, tmp_path: Path) -> None:
    model = load_image_model(ModelSpec(path=str(tiny_sd_folder), dtype="float32", device="cpu"), say=lambda _: None)
    before = frozen_image_digests(model)
    inject(model.parts, image_plan(model, LoraSpec(rank=4, target_modules=("attention",)), text_encoder=False))  # B is 0
    adapter = with_components(adapter_of(model.parts))
    for factor, passes in ((0.0, True), (1.0, False)):
        pairs = {path: replace(pair, B=pair.B + 0.05 * factor) for path, pair in adapter.pairs.items()}
        folder = tmp_path / str(factor)
        folder.mkdir()
        peft.write(without_component(replace(adapter, pairs=pairs)), folder)
        found = certify_images(model, folder, ["red box"], before=before, spec=None, sampler=Sampler(guidance=3.0))
        assert found.checks[0].passed == passes and "none" in found.facts["adapter's effect"]
        assert found.checks[0].detail == "The live adapter changes no latent of these prompts."


def test_latents_that_differ_or_are_no_numbers_fail() -> None:
    same = torch.ones(2, 4, 8, 8)
    sides = ("a", "b")
    assert latent_check("x", same, same * (1 + 5e-5), between=sides).passed
    assert not latent_check("x", same, same * 1.001, between=sides).passed
    assert not latent_check("x", same * float("nan"), same * float("nan"), between=sides).passed
    assert latent_check("x", same, same * (1 + 5e-5), between=sides, base=same * 1.01).passed
    assert not latent_check("x", same, same * (1 + 5e-5), between=sides, base=same * 1.001).passed
    assert latent_check("x", same, same, between=sides, base=same).passed
    assert not latent_check("x", same, same * (1 + 5e-5), between=sides, base=same).passed
    assert latent_check("x", same, same * 1.001, between=sides, floor=3e-4).passed
    assert not latent_check("x", same, same * 1.001, between=sides, floor=2e-4).passed
    assert not latent_check("x", same, same * 1.03, between=sides, floor=1.0).passed
    assert not latent_check("x", same, same * 1.001, between=sides, floor=float("nan")).passed

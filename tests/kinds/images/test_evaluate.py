"""Samples at equal seeds, scaled adapters, and features of latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lorakeet.kinds.images.assemble import assemble_images, image_task
from lorakeet.kinds.images.data.split import evaluation_groups
from lorakeet.kinds.images.evaluate import Drawn, ImageEvaluator, features_of, pooled_side, scaled_adapter
from lorakeet.kinds.images.model.clip_scorer import load_scorer
from lorakeet.kinds.images.model.sample import Sampler, draw_latents
from lorakeet.kinds.images.report import denoising_report
from lorakeet.models.inject import activate, adapter_names, adapter_of, attach, trained_parameters
from tiny.image_runs import image_config
from tiny.pipelines import save_tiny_scorer


@pytest.fixture
def evaluator(tiny_sd_folder: Path, tmp_path: Path) -> ImageEvaluator:
    config = image_config(tiny_sd_folder, tmp_path, lora__target_modules="attention,conv", diffusion__seeds=2)
    setup = assemble_images(config, Console(quiet=True))
    image_task(setup)
    with torch.no_grad():
        for name, parameter in trained_parameters(setup.model.parts).items():
            if name.endswith(".B"):
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    return ImageEvaluator(setup.config, setup.model, setup.captions, setup.held_out, setup.train, Console(quiet=True))


def test_columns_are_the_base_and_the_weights_from_the_same_noise(evaluator: ImageEvaluator) -> None:
    drawn = evaluator.samples()
    assert [one.column for one in drawn] == ["base", "adapter × 0.5", "adapter × 1", "adapter × 1.5"]
    assert evaluator.requests == [("red box", 0), ("red box", 1)] and drawn[0].latents.shape == (2, 4, 8, 8)
    sampler = Sampler(2, 7.5, at_once=4)
    activate(evaluator.model.parts, "default")
    assert torch.allclose(drawn[2].latents, draw_latents(evaluator.model, ["red box"] * 2, [0, 1], sampler), atol=1e-4)
    activate(evaluator.model.parts, None)
    assert torch.equal(drawn[0].latents, draw_latents(evaluator.model, ["red box"] * 2, [0, 1], sampler))
    apart = [float((one.latents - drawn[0].latents).abs().mean()) for one in drawn]
    assert apart == sorted(apart) and apart[1] > 0 and adapter_names(evaluator.model.parts) == ["default"]


def test_the_report_has_the_grid_the_files_and_the_nearest_pictures(evaluator: ImageEvaluator, tmp_path: Path) -> None:
    report = evaluator.report("Title", tmp_path / "samples")
    assert report.samples is not None and len(report.samples.rows) == 2 and len(report.samples.rows[0].samples) == 4
    assert len(list((tmp_path / "samples").glob("*.png"))) == 8
    assert report.memorisation is not None and len(report.memorisation.nearest) == 8
    assert {near.source for near in report.memorisation.nearest} <= {picture.row.source for picture in evaluator.train}


@pytest.mark.slow
def test_samples_are_scored_by_clip_where_there_is_one(evaluator: ImageEvaluator, tmp_path: Path) -> None:
    scorer = load_scorer(str(save_tiny_scorer(tmp_path / "clip")))
    report = replace(evaluator, scorer=scorer).report("Title", tmp_path / "samples")
    drawn = evaluator.model.decode(evaluator.samples()[2].latents).numpy()  # the adapter at its own weight
    cosines = scorer.pictures(list(drawn)) @ scorer.prompts(["red box"]).T
    adapter, base = report.systems
    assert adapter.metrics["prompt_distance"].value == pytest.approx(1 - cosines.mean(), abs=1e-3)
    assert base.metrics["style_distance"].n == 2 and report.comparisons[1].metric == "prompt_distance"
    assert report.comparisons[1].verdict == "no difference shown"  # two seeds of one prompt show nothing


def test_a_training_picture_drawn_again_is_suspicious(evaluator: ImageEvaluator) -> None:
    copies = torch.stack([evaluator.train[3].latents[0], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))])
    found = evaluator.memorisation([Drawn("adapter × 1", copies)])
    assert [near.suspicious for near in found.nearest] == [True, False]
    assert found.nearest[0].source == evaluator.train[3].row.source and found.nearest[0].distance < 1e-9 < found.floor


def test_scaling_an_adapter_scales_its_change(evaluator: ImageEvaluator) -> None:
    adapter = adapter_of(evaluator.model.parts)
    half = scaled_adapter(adapter, 0.5)
    path = next(iter(adapter.pairs))
    assert torch.allclose(half.pairs[path].delta(), adapter.pairs[path].delta() / 2)
    attach(evaluator.model.parts, half, "at-half")
    assert adapter_names(evaluator.model.parts) == ["default", "at-half"]


def test_features_have_one_size_for_latents_of_any() -> None:
    large, small = [torch.randn(4, 20, 40), torch.randn(4, 64, 16)], [torch.randn(4, 8, 10), torch.randn(4, 40, 40)]
    assert pooled_side(large) == 16 and pooled_side([*large, *small]) == 8
    assert features_of(large, 16).shape == (2, 4 * 16 * 16) and features_of(large, 8).shape == features_of(small, 8).shape


def test_pictures_of_several_shapes_are_compared_at_one_size(evaluator: ImageEvaluator) -> None:
    wide = [replace(picture, latents=torch.randn(1, 4, 6, 10)) for picture in evaluator.train[:2]]
    found = replace(evaluator, train=[*wide, *evaluator.train]).memorisation(
        [Drawn("adapter × 1", evaluator.train[3].latents[:1].repeat(2, 1, 1, 1))]
    )
    assert [near.source for near in found.nearest] == [evaluator.train[3].row.source] * 2


def test_every_cut_out_and_the_album_of_the_kind_were_trained(evaluator: ImageEvaluator) -> None:
    generator = torch.Generator().manual_seed(1)
    flipped, kind = torch.randn(2, 1, 4, 8, 8, generator=generator)
    train = [replace(evaluator.train[0], latents=torch.cat([evaluator.train[0].latents, flipped])), *evaluator.train[1:]]
    prior = [replace(evaluator.train[1], row=replace(evaluator.train[1].row, source="kind.png"), latents=kind)]
    found = replace(evaluator, train=train, prior=prior).memorisation([Drawn("adapter × 1", torch.cat([flipped, kind]))])
    assert [near.suspicious for near in found.nearest] == [True, True]
    assert [near.source for near in found.nearest] == [evaluator.train[0].row.source, "kind.png"]


def test_copies_among_the_evaluated_pictures_count_once(evaluator: ImageEvaluator) -> None:
    rows = [replace(evaluator.pictures[0].row, pixels_key=f"copy {number}", source=f"{number}.png") for number in range(8)]
    groups = evaluation_groups(rows, evaluator.config.images)
    copied = replace(evaluator, pictures=[replace(evaluator.pictures[0], row=row) for row in rows], groups=groups)
    losses = copied.losses("base")
    assert losses.groups is not None and len(set(losses.groups)) == 1 and evaluator.losses("base").groups is None
    report = denoising_report(
        "T", adapter=replace(losses, system="adapter", losses=losses.losses * 0.5), base=losses, captions=["x"] * 8,
        sources=["x"] * 8, spec=evaluator.config.evaluate,
    )  # fmt: skip
    assert report.comparisons[0].verdict == "no difference shown"
    assert "The 8 held-out pictures are 1 and copies of these" in report.warnings[0]

"""`lorakeet generate`: pictures by adapters, weights and mixes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from lorakeet.cli.main import main
from lorakeet.config import dump_yaml, read_run
from lorakeet.core.adapter import Adapter
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.components import with_components, without_component
from lorakeet.formats.diffusion import diffusers
from lorakeet.formats.peft import peft
from lorakeet.kinds.images.data.folder import open_pixels
from lorakeet.kinds.images.drawing_options import GenerateOptions
from lorakeet.kinds.images.generate import _base_of, generate
from lorakeet.kinds.images.model.model import image_plan, load_image_model
from lorakeet.models.inject import adapter_of, inject, trained_parameters
from lorakeet.models.spec import ModelSpec
from tiny.image_runs import image_config, image_run
from tiny.pipelines import save_tiny_sd


@pytest.fixture(scope="module")
def adapters(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """linear (a PEFT folder that names its base) and conv (a diffusers file), both strong enough to be seen."""
    folder = tmp_path_factory.mktemp("adapters")
    model = load_image_model(ModelSpec(path=str(tiny_sd_folder), dtype="float32", device="cpu"), say=lambda _: None)
    for seed, (name, targets) in enumerate((("linear", ("all-linear",)), ("conv", ("conv", "attention")))):
        inject(model.parts, image_plan(model, LoraSpec(rank=4, alpha=12.0, target_modules=targets), text_encoder=False), name)
        with torch.no_grad():
            for key, parameter in trained_parameters(model.parts, name).items():
                if key.endswith(".B"):
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    (folder / "linear").mkdir()
    peft.write(without_component(with_components(adapter_of(model.parts, "linear", base=str(tiny_sd_folder)))), folder / "linear")
    diffusers.write(with_components(adapter_of(model.parts, "conv")), folder / "conv.safetensors")
    return {"linear": folder / "linear", "conv": folder / "conv.safetensors"}


def drawn(out: Path, **options: Any) -> list[np.ndarray]:
    given = {"prompt": ("red box, wide",), "steps": 3, "guidance": 3.0, "dtype": "float32", "device": "cpu", **options}
    result = generate(GenerateOptions(out=out, **given), console=Console(quiet=True))
    return [open_pixels(out / picture.file)[0].astype(int) for picture in result.pictures]


@pytest.mark.slow
def test_one_adapter_its_weight_and_none(tiny_sd_folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    [base] = drawn(tmp_path / "base", model=str(tiny_sd_folder))
    [off] = drawn(tmp_path / "off", adapter=(str(adapters["linear"]),), each=("base",))
    [whole] = drawn(tmp_path / "whole", adapter=(f"a={adapters['linear']}",))
    [half] = drawn(tmp_path / "half", adapter=(f"a={adapters['linear']}",), weights={"a": 0.5})
    assert np.array_equal(base, off) and base.shape == (16, 16, 3)
    assert abs(whole - base).mean() > abs(half - base).mean() > 0
    record = json.loads((tmp_path / "half" / "pictures.json").read_text())
    assert record == [{"file": "000.png", "prompt": "red box, wide", "seed": 0, "mix": {"a": 0.5}}]


@pytest.mark.slow
def test_a_mix_for_each_picture_is_what_it_is_alone(tiny_sd_folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    named = tuple(f"{name}={path}" for name, path in adapters.items())
    prompts = ("a", "b", "c", "d")
    each = ("linear", "conv=0.5", "linear=0.5+conv=0.5", "base")
    together = drawn(tmp_path / "all", prompt=prompts, adapter=named, each=each, count=2, model=str(tiny_sd_folder))
    assert len(together) == 8
    for place, (prompt, mix) in enumerate(zip(prompts, each, strict=True)):
        alone = drawn(tmp_path / str(place), prompt=(prompt,), adapter=named, each=(mix,), count=2, model=str(tiny_sd_folder))
        for one, other in zip(alone, together[2 * place : 2 * place + 2], strict=True):
            assert abs(one - other).max() <= 1  # of 255: rounding of a batch of another size


def test_the_command_line_keeps_commas_and_takes_flags_several_times(
    adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--prompt", "red, box", "--prompt", "x", "--adapter", f"a={adapters['linear']}", "--weights", "a=0.5"]
    rest = ["--steps", "2", "--size", "24x16", "--out", str(tmp_path / "out"), "--dtype", "float32", "--json"]
    code = main([*command, *rest])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and [picture["prompt"] for picture in found["pictures"]] == ["red, box", "x"]
    assert open_pixels(tmp_path / "out" / "001.png")[0].shape == (16, 24, 3)
    assert main(["generate", "--prompt", "x", "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line_says_the_prediction_and_leaves_guidance_to_the_kind(
    tiny_sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--model", str(tiny_sdxl_folder), "--prompt", "x", "--steps", "2", "--dtype", "float32"]
    pictures = []
    for number, more in enumerate(([], ["--guidance", "5"], ["--guidance", "7.5"], ["--prediction", "v_prediction"])):
        assert main([*command, *more, "--out", str(tmp_path / str(number))]) == 0
        pictures.append(open_pixels(tmp_path / str(number) / "000.png")[0])
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2]) and not np.array_equal(pictures[0], pictures[3])
    assert "is used as predicting v_prediction" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": ()}, "No prompt is given"),
        ({"adapter": ("a=x", "b=y")}, "give their weights"),
        ({"adapter": ("a=x",), "weights": {"aa": 1.0}}, "No adapter is called 'aa'"),
        ({"adapter": ("a=x",), "each": ("a", "a", "a")}, "3 mixes for 1 prompts"),
        ({"adapter": ("a=x",), "each": ("a",), "weights": {"a": 1.0}}, "give one of them"),
        ({"adapter": ("a=x", "a=y")}, "is given twice"),
        ({}, "Give --model"),
        ({"count": 0, "steps": 0}, r"2 problems[\s\S]*--count is 0; expected 1 or more[\s\S]*--steps is 0; expected 1 or more"),
        ({"count": -1}, "--count is -1"),
        ({"seed": 2**64}, r"--seed is 18446744073709551616.*up to 18446744073709551615"),
        ({"seed": 2**64 - 2, "count": 3}, "--seed is 18446744073709551614 and --count 3"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is_loaded(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        drawn(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_overrode_the_prediction_is_drawn_as_it_was_trained(tiny_sd_folder: Path, tmp_path: Path) -> None:
    """The tiny model's scheduler says epsilon; the same numbers with a scheduler that says v are what it has to equal."""
    result = image_run(tiny_sd_folder, tmp_path, diffusion__prediction="v_prediction", diffusion__seeds=1, train__steps=2)
    model, report = result.setup.model, result.report
    assert model.prediction == model.pipeline.scheduler.config.prediction_type == "v_prediction"
    assert report is not None and report.certificate is not None and report.certificate.passed
    right = save_tiny_sd(tmp_path / "v", prediction="v_prediction")
    adapter = (f"a={result.run.path}",)
    [wanted] = drawn(tmp_path / "0", model=str(right), adapter=adapter)
    [found] = drawn(tmp_path / "1", adapter=adapter)
    [named] = drawn(tmp_path / "2", adapter=adapter, model=str(tiny_sd_folder))
    [plain] = drawn(tmp_path / "3", model=str(tiny_sd_folder), prediction="v_prediction", each=("base",), adapter=adapter)
    [base] = drawn(tmp_path / "4", model=str(right))
    assert np.array_equal(found, wanted) and np.array_equal(named, wanted) and np.array_equal(plain, base)
    [other] = drawn(tmp_path / "5", adapter=adapter, prediction="epsilon")
    assert abs(other - wanted).mean() > 1
    apart = image_run(tiny_sd_folder, tmp_path, out=str(tmp_path / "epsilon"), diffusion__seeds=0, train__steps=1)
    with pytest.raises(ConfigError, match=r"different predictions .*: a v_prediction, b epsilon. Choose one, as in --prediction"):
        drawn(tmp_path / "6", adapter=(*adapter, f"b={apart.run.path}"), weights={"a": 1.0, "b": 1.0})


def test_pictures_that_hold_no_numbers_are_not_written(
    tiny_sd_folder: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """A weight of an adapter that float16 cannot multiply by: infinity where a picture should be."""
    pipe = {"model": str(tiny_sd_folder), "adapter": (f"a={adapters['linear']}",)}
    with pytest.raises(DataError, match=r"1 of 2 images .* in float16 are not finite. .* \(--dtype\) bfloat16 or float32"):
        drawn(tmp_path / "out", **pipe, dtype="float16", each=("base", "a=60000"), prompt=("red box", "red box"))
    assert not (tmp_path / "out").exists()


def test_more_steps_than_the_scheduler_has(tiny_sd_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"1001 steps are requested, .* has 1000"):
        drawn(tmp_path / "out", model=str(tiny_sd_folder), steps=1001)


def test_sizes_that_do_not_fit(tiny_sd_folder: Path, tmp_path: Path) -> None:
    for size, said in (("16", "expected width x height"), ("18x16", "multiples of 4")):
        with pytest.raises(ConfigError, match=said):
            drawn(tmp_path / "out", model=str(tiny_sd_folder), size=size)


@pytest.mark.parametrize(("name", "value"), [("revision", "v1.1"), ("quantize", "nf4"), ("config", "configurations")])
def test_the_base_of_a_run_is_the_one_that_it_was_trained_on(tmp_path: Path, name: str, value: str) -> None:
    config = image_config(tmp_path / "base", tmp_path, **{f"model__{name}": value})
    runs, adapters = {"adapter": config}, {"adapter": Adapter({}, base="another")}
    found = _base_of(runs, adapters, None)
    assert found.path == str(tmp_path / "base") and getattr(found, name) == getattr(config.model, name)
    assert getattr(found, name) != getattr(ModelSpec(), name)
    assert _base_of(runs, adapters, "other").config == "other"


@pytest.mark.parametrize("inside", ["", "adapter", "adapter/adapter_model.safetensors"])
def test_pictures_are_drawn_with_the_base_of_the_run(
    inside: str, adapters: dict[str, Path], tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside config.yaml and the adapter nothing need be there but, unless that is allowed, the certificate."""
    run, asked = tmp_path / "run", []
    shutil.copytree(adapters["linear"], run / "adapter")
    (run / "config.yaml").write_text(dump_yaml(image_config(tiny_sd_folder, tmp_path, model__quantize="int8")))

    def load(spec: ModelSpec, **options: Any) -> Any:
        asked.append(spec)
        return load_image_model(spec, **options)

    monkeypatch.setattr("lorakeet.kinds.images.generate.load_image_model", load)
    drawn(tmp_path / "out", adapter=(str(run / inside),), steps=1, uncertified=True)
    assert [(spec.path, spec.quantize.method, spec.dtype) for spec in asked] == [(str(tiny_sd_folder), "int8", "float32")]


def test_what_is_missing_is_said_of_all_adapters_at_once(tmp_path: Path) -> None:
    """A run that was killed before its first evaluation, one on texts, and a folder that is not there."""
    begun, texts = tmp_path / "begun", tmp_path / "texts"
    on_texts = read_run(None, {"model.path": "x", "data.train": "x"})
    for run, config in ((begun, image_config(tmp_path / "base", tmp_path)), (texts, on_texts)):
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.yaml").write_text(dump_yaml(config))
    with pytest.raises(DataError) as error:
        drawn(tmp_path / "out", adapter=(f"a={begun}", f"b={texts}", f"c={tmp_path / 'gone'}"), each=("a",))
    lines = str(error.value).splitlines()
    assert lines[0] == "These adapters cannot be drawn with (3 problems):" and len(lines) == 4
    assert f"{begun} is a run that has no adapter yet: {begun / 'adapter'} is written at its first held-out" in lines[1]
    assert lines[1].endswith(f"lorakeet finetune --resume {begun}")
    assert f"{texts} is a run of kind text" in lines[2] and f"{tmp_path / 'gone'} does not exist" in lines[3]
    with pytest.raises(DataError, match=rf"^{begun} is a run that has no adapter yet"):
        drawn(tmp_path / "out", adapter=(str(begun),))

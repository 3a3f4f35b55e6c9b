"""`lorakeet generate`: draws pictures with an image model and adapters, one adapter or a weighted mix for each picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lorakeet.config import RunConfig, read_run
from lorakeet.core.adapter import Adapter
from lorakeet.disk import write_new
from lorakeet.errors import ConfigError, DataError, LorakeetError, Problems, VerificationFailed
from lorakeet.formats.detect import read_certified
from lorakeet.formats.identity import require_base
from lorakeet.kinds.images.data.folder import png_of
from lorakeet.kinds.images.drawing_options import GenerateOptions, adapters_and_mixes
from lorakeet.kinds.images.evaluate import scaled_adapter
from lorakeet.kinds.images.model.model import ImageModel, load_image_model, put_image_adapter
from lorakeet.kinds.images.model.sample import Mix, Sampler, draw_latents, require_finite_latents, why_not_mixed
from lorakeet.kinds.images.spec import diffusion_of
from lorakeet.merging.combine import CombineSpec, combination
from lorakeet.models.inject import activate, adapter_names, eject
from lorakeet.models.spec import ModelSpec
from lorakeet.runs.certified import base_identity
from lorakeet.runs.output_paths import require_empty, writing
from lorakeet.train import durable
from lorakeet.train.progress import counted
from lorakeet.train.run import RunFolder


@dataclass(frozen=True)
class Picture:
    """The prompt, seed and mix of one picture."""

    file: str
    prompt: str
    seed: int
    mix: dict[str, float]


@dataclass(frozen=True)
class GenerateResult:
    """The pictures in order, and their folder."""

    folder: Path
    model: str
    pictures: tuple[Picture, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {"folder": str(self.folder), "model": self.model, "pictures": [asdict(picture) for picture in self.pictures]}


def generate(options: GenerateOptions, *, console: Console) -> GenerateResult:
    """Draws `count` pictures of each prompt into the new folder `out`; the noise depends on the seed only, not on adapters.

    `adapter` are NAME=PATH (or one PATH) of adapters, runs, or the adapter/ of a run; `weights` is the mix of all pictures, and
    `each` has a mix for each prompt: a name, base, or a=0.7+b=0.3. Without `model`, the base of the first adapter is used.
    `prediction` auto is that of the adapters' runs on this model, else that of its scheduler. Without `guidance`, the default of
    the model's type is used. Raises ConfigError and DataError with every problem; writes all pictures or none.
    """
    out, prompt, count = options.out, options.prompt, options.count
    require_empty(out)
    paths, mixes = adapters_and_mixes(options)
    say = partial(console.print, markup=False, soft_wrap=True)
    runs, adapters = _opened(paths, say, options.uncertified)
    for name, run in runs.items():
        if run.memory.budget:
            say(f"memory.budget {run.memory.budget} of {name} was for its training; it does not apply to drawing.")
    named = ModelSpec(path=options.model, config=options.config) if options.model else None
    base = named or _base_of(runs, adapters, options.config)
    spec = replace(base, dtype=options.dtype, device=options.device)
    for name, path in paths.items():
        otherwise = name not in runs or named is not None
        require_base(path, partial(base_identity, spec), quantised=otherwise, uncertified=options.uncertified, say=say)
    predicted = _predicted(runs, base.path) if options.prediction == "auto" else options.prediction
    image_model = load_image_model(spec, prediction=predicted, say=say)
    for name, value in adapters.items():
        put_image_adapter(image_model, value, name)
    activate(image_model.parts, None)
    requests = [(text, options.seed + number, mix) for text, mix in zip(prompt, mixes, strict=True) for number in range(count)]
    sampler = Sampler(options.steps, options.guidance, options.negative, _size(options.size, image_model))
    with counted(console, f"{len(requests)} pictures", len(requests)) as advance:
        drawn = _drawn(image_model, adapters, requests, sampler, say=say, progress=advance)
        latents = require_finite_latents(image_model, drawn)
    pictures = tuple(Picture(f"{number:03}.png", *one[:2], dict(one[2])) for number, one in enumerate(requests))
    with writing(f"The pictures in {out}", "Free some space, or choose another --out."), durable.new_folder(out) as folder:
        for picture, one in zip(pictures, latents, strict=True):
            write_new(folder / picture.file, png_of(image_model.decode(one[None])[0].numpy()))
        record = json.dumps([asdict(picture) for picture in pictures], indent=1, ensure_ascii=False)
        write_new(folder / "pictures.json", f"{record}\n".encode())
    say(f"{len(pictures)} pictures in {out}")
    return GenerateResult(out, image_model.name, pictures)


def _opened(
    paths: Mapping[str, Path], say: Callable[[str], None], uncertified: bool
) -> tuple[dict[str, RunConfig], dict[str, Adapter]]:
    """The settings of the runs among these paths, and every adapter. Raises DataError that names all that cannot be read."""
    problems = Problems("These adapters cannot be drawn with", DataError)
    runs: dict[str, RunConfig] = {}
    adapters: dict[str, Adapter] = {}
    for name, path in paths.items():
        try:
            if (run := RunFolder.around(path)) is not None:
                runs[name] = read_run(run.config)
                if runs[name].kind != "image":
                    problems.add(
                        f"{path} is a run of kind {runs[name].kind}; give one of kind image. lorakeet serve serves text."
                    )
                    continue
            adapters[name], _ = read_certified(path, uncertified=uncertified, say=say)
        except VerificationFailed:
            raise
        except LorakeetError as error:
            problems.add(str(error))
    problems.raise_if_any()
    return runs, adapters


def _base_of(runs: Mapping[str, RunConfig], adapters: Mapping[str, Adapter], config: str | None) -> ModelSpec:
    """The model that the first adapter was trained on, with its revision, quantisation and configs."""
    for name, adapter in adapters.items():
        if name in runs:
            spec = runs[name].model
            return ModelSpec(path=spec.path, config=config or spec.config, revision=spec.revision, quantize=spec.quantize)
        if adapter.base:
            return ModelSpec(path=adapter.base, config=config)
    raise ConfigError(
        "No model is given, and the adapters name none. Give --model: a folder saved by diffusers, a single file, or a hub id."
    )


def _predicted(runs: Mapping[str, RunConfig], model: str) -> str:
    """The prediction of the adapters' runs on `model`; auto if there are none. Raises ConfigError if they differ."""
    found = {diffusion_of(run).prediction: name for name, run in runs.items() if _same(run.model.path, model)}
    if len(found) > 1:
        each = ", ".join(f"{name} {prediction}" for prediction, name in found.items())
        raise ConfigError(
            f"The adapters were trained on different predictions of {model}: {each}. Choose one, as in --prediction epsilon."
        )
    return next(iter(found), "auto")


def _same(left: str, right: str) -> bool:
    """True if two models are the same hub id or the same path."""
    return left == right or Path(left).expanduser().resolve() == Path(right).expanduser().resolve()


def _size(text: str | None, model: ImageModel) -> tuple[int, int] | None:
    if text is None:
        return None
    step = model.multiple
    try:
        width, height = (int(part) for part in text.lower().replace("×", "x").split("x"))
    except ValueError:
        raise ConfigError(f"--size is '{text}'; expected width x height in pixels, such as 512x768.") from None
    if width % step or height % step or width < step or height < step:
        raise ConfigError(f"--size is '{text}'; this model needs multiples of {step} pixels.")
    return height, width


def _drawn(
    model: ImageModel,
    adapters: Mapping[str, Adapter],
    requests: Sequence[tuple[str, int, Mix]],
    sampler: Sampler,
    *,
    say: Callable[[str], None],
    progress: Callable[[int], None],
) -> Tensor:
    """The latents of all pictures: in shared batches if the mixes can be batched, else one mix after the other."""
    prompts, seeds, mixes = [one[0] for one in requests], [one[1] for one in requests], [one[2] for one in requests]
    why = why_not_mixed(model, mixes)
    if not why:
        return draw_latents(model, prompts, seeds, sampler, mixes=mixes, progress=progress)
    distinct = list({tuple(mix.items()): mix for mix in mixes}.values())
    if len(distinct) > 1:
        say(f"The pictures are drawn one mix after the other, since {why}.")
    found: dict[int, Tensor] = {}
    for mix in distinct:
        numbers = [number for number, other in enumerate(mixes) if other == mix]
        _use(model, adapters, mix)
        try:
            drawn = draw_latents(
                model, [prompts[number] for number in numbers], [seeds[number] for number in numbers], sampler, progress=progress
            )
        finally:
            if _MIXED in adapter_names(model.parts):
                eject(model.parts, _MIXED)
            activate(model.parts, None)
        found |= dict(zip(numbers, drawn, strict=True))
    return torch.stack([found[number] for number in range(len(requests))])


_MIXED = "mixed-for-these-pictures"


def _use(model: ImageModel, adapters: Mapping[str, Adapter], mix: Mix) -> None:
    """Activates the mix: no adapter, one, one with another scale, or the exact sum of several (concatenated factors)."""
    if not mix:
        activate(model.parts, None)
    elif list(mix.values()) == [1.0]:
        activate(model.parts, next(iter(mix)))
    elif len(mix) == 1:
        [(name, weight)] = mix.items()
        put_image_adapter(model, scaled_adapter(adapters[name], weight), _MIXED)
    else:
        spec = CombineSpec(method="cat", weights=tuple(mix.values()))
        summed = combination({name: adapters[name] for name in mix}, spec).combined()
        put_image_adapter(model, summed.adapter, _MIXED)

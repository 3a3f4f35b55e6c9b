"""A frozen latent diffusion model in diffusers' parts: UNet or transformer, autoencoder, text encoders; its Plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter
from lorakeet.core.plan import Plan
from lorakeet.core.spec import LoraSpec
from lorakeet.data.template import tokenised
from lorakeet.errors import ConfigError, DataError, EnvironmentProblem, one_message
from lorakeet.formats.components import with_components
from lorakeet.kinds.images.model.denoiser import METHODS, denoiser_files, load_denoiser, variant_in
from lorakeet.kinds.images.model.diffusers_import import diffusers, new_denoiser, quiet_diffusers
from lorakeet.kinds.images.model.kinds import (
    ENCODERS,
    FLUX_SIDE,
    NOT_LOADED,
    PIPELINES,
    TOKENIZERS,
    Conditioning,
    ImageKind,
    predicted,
)
from lorakeet.kinds.images.model.noise import Noising, noising_of
from lorakeet.kinds.images.model.schedule import scheduler_for
from lorakeet.kinds.images.model.single_file import load_single, open_single, single_denoiser_files
from lorakeet.models.every_weight import every_weight
from lorakeet.models.families import Family
from lorakeet.models.files.foreign_code import read_native, require_native_parts
from lorakeet.models.inject import attach
from lorakeet.models.modules import find
from lorakeet.models.placement import device_for, dtype_for
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.digests import frozen_digests

# The UNet and the CLIP encoders of Stable Diffusion, and the transformers of SD3 and FLUX, in diffusers' and transformers' names.
DIFFUSION = Family(
    "diffusion",
    (),
    attention=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
               "q_proj", "k_proj", "v_proj", "out_proj"),
    mlp=("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "fc1", "fc2"),
    blocks="",
)  # fmt: skip



def stack(parts: Sequence[Conditioning]) -> Conditioning:
    """Returns several conditionings as one, in order."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Conditioning(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


@dataclass(frozen=True)
class ImageModel:
    """The parts of a pipeline. `parts` holds those that adapters can be put on: the denoiser and the text encoders.

    The autoencoder stays in fp32 whatever `dtype` is: SDXL's overflows in fp16, and it runs once for each picture only.
    With `idle_device`, a part is on `device` only while it computes and on `idle_device` otherwise: a GPU then needs memory for
    the largest part only.
    """

    name: str
    kind: ImageKind
    pipeline: Any
    parts: nn.ModuleDict
    device: torch.device
    dtype: torch.dtype
    idle_device: torch.device | None = None

    def stage(self, *names: str) -> None:
        """Moves the named parts ("vae" or a name in `parts`) to the device and all others to `idle_device`, if there is one."""
        if self.idle_device is None:
            return
        every = {**dict(self.parts.items()), "vae": self.vae}
        for name in sorted(every, key=lambda name: name in names):  # free memory first
            move_part(every[name], self.device if name in names else self.idle_device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def stage_to_predict(self) -> None:
        """Moves the denoiser to the device, and the text encoders that are trained with it."""
        self.stage(self.kind.denoiser, *self._trained_encoders())

    def stage_to_describe(self) -> None:
        """Moves the text encoders to the device, and the denoiser if they are trained with it."""
        self.stage(*ENCODERS, *([self.kind.denoiser] if self._trained_encoders() else []))

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """A context with denoiser and autoencoder on the device; the pipeline lacks idle encoders, whose device it would use."""
        self.stage(self.kind.denoiser, "vae")
        away = [] if self.idle_device is None else [name for name in ENCODERS if name in self.parts]
        for name in away:
            object.__setattr__(self.pipeline, name, None)  # diffusers' own setter would write it into the configuration
        try:
            yield
        finally:
            for name in away:
                object.__setattr__(self.pipeline, name, self.parts[name])

    def _trained_encoders(self) -> list[str]:
        if self.idle_device is None:
            return []
        return [name for name in ENCODERS if name in self.parts and any(p.requires_grad for p in self.parts[name].parameters())]

    @property
    def denoiser(self) -> Any:
        """The UNet or the transformer."""
        return self.parts[self.kind.denoiser]

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def prediction(self) -> str:
        """What the denoiser predicts: flow, epsilon or v_prediction, by the scheduler's configuration."""
        return "flow" if self.kind.flow else str(self.pipeline.scheduler.config.prediction_type)

    @cached_property
    def noising(self) -> Noising:
        """How latents are noised at each step of training."""
        return noising_of(self.pipeline.scheduler.config, flow=self.kind.flow)

    @property
    def resolution(self) -> int:
        """Side in pixels of the denoiser's training images. ConfigError if its configuration has none."""
        side = FLUX_SIDE if self.kind.name == "flux" else self.denoiser.config.sample_size
        if not isinstance(side, int):
            raise ConfigError(
                f"sample_size in {self.kind.denoiser}/config.json of {self.name} is {side}, so the size of its images is not "
                "known; set images.resolution (generate: --size 512x512)."
            )
        return int(side) * self.factor

    @property
    def factor(self) -> int:
        """Pixels per side of a latent position."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def multiple(self) -> int:
        """Pixels that an image's sides must be multiples of: a UNet halves its latents, a transformer cuts them into patches."""
        config = self.denoiser.config
        if self.kind.denoiser == "unet":
            return int(self.factor * 2 ** (len(config.block_out_channels) - 1))
        return self.factor * (2 if self.kind.name == "flux" else int(config.patch_size))

    @cached_property
    def autoencoder_digest(self) -> str:
        """SHA-256 of the autoencoder's weights and scaling, on which latents depend."""
        return _digest(self.vae, scaling_note(self.vae.config, self.kind))

    @cached_property
    def encoders_digest(self) -> str:
        """SHA-256 of everything that embeddings depend on: text encoders, tokenizers, treatment of the empty caption."""
        vocabularies = [sorted(tokenizer.get_vocab().items()) for tokenizer in self._tokenizers()]
        encoders = nn.ModuleDict({name: part for name, part in self.parts.items() if name in ENCODERS})
        return _digest(encoders, f"{vocabularies!r} {self._empty_is_zeros}")

    @cached_property
    def denoiser_digest(self) -> str:
        """SHA-256 of the denoiser's frozen weights, on which samples of the base depend."""
        return _digest(self.denoiser, self.prediction)

    def encode(self, pixels: Tensor) -> Tensor:
        """Returns latents (n, channels, height/factor, width/factor), fp32, of pixels (n, 3, height, width) in [−1, 1].

        They are the mean of the autoencoder's distribution, so that an image always has the same latent. It encodes one image at
        a time, as `decode` does: at 1024² the autoencoder needs gigabytes for each.
        """
        self.stage("vae")
        with torch.no_grad():
            wide = pixels.to(self.device, torch.float32)
            mean = torch.cat([self.vae.encode(wide[number : number + 1]).latent_dist.mean for number in range(len(wide))])
        return scaled_latents(mean, self.vae.config, self.kind)

    def decode(self, latents: Tensor) -> Tensor:
        """Returns images (n, height, width, 3), uint8 on the CPU, of latents."""
        self.stage("vae")
        wide = unscaled(latents.to(self.device, torch.float32), self.vae.config, self.kind)
        found = []
        with torch.no_grad():
            for number in range(len(wide)):
                pixels = self.vae.decode(wide[number : number + 1], return_dict=False)[0]
                found.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        return torch.cat(found).permute(0, 2, 3, 1).cpu()

    def describe(self, captions: Sequence[str]) -> Conditioning:
        """Returns the conditioning of `captions`, with gradient if enabled; captions are cut to the encoders' length.

        SDXL was trained with zeros for the empty caption, as its pipeline's configuration says.
        """
        self.stage_to_describe()
        with quiet_diffusers():
            found = self.pipeline.encode_prompt(list(captions), device=self.device, num_images_per_prompt=1, **self.kind.prompts)
        states, pooled = found[0], None if self.kind.pooled is None else found[self.kind.pooled]
        if pooled is not None and self._empty_is_zeros and "" in captions:
            given = torch.tensor([float(caption != "") for caption in captions], device=states.device, dtype=states.dtype)
            states, pooled = states * given.view(-1, 1, 1), pooled * given.view(-1, 1)
        return Conditioning(states, pooled)

    def cut_off(self, captions: Sequence[str]) -> list[str]:
        """Returns the captions that are longer than every encoder reads."""
        tokenizers = self._tokenizers()
        if self.kind.reads and not type(tokenizers[-1]).__name__.startswith("CLIP"):
            limits = [(tokenizers[-1], self.kind.reads)]
        else:
            limits = [(tokenizer, int(tokenizer.model_max_length)) for tokenizer in tokenizers]
        with quiet_diffusers():
            return [text for text in captions if any(len(tokenised(one, text).input_ids) > limit for one, limit in limits)]

    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning, sizes: Tensor) -> Tensor:
        """Returns the denoiser's prediction (n, channels, h, w), fp32, for `noisy` latents at `times` (n,) of `noising`.

        sizes (n, 6): original height and width, top and left of the crop, target height and width, for SDXL.
        """
        self.stage_to_predict()
        conditioning, wide = conditioning.to(self.device, self.dtype), (self.device, self.dtype)
        found = predicted(self.kind, self.denoiser, noisy.to(*wide), times.to(self.device), conditioning, sizes.to(*wide))
        return found.float()

    @property
    def _empty_is_zeros(self) -> bool:
        return self.kind.name == "sdxl" and bool(self.pipeline.config.force_zeros_for_empty_prompt)

    def _tokenizers(self) -> list[Any]:
        return [tokenizer for name in TOKENIZERS if (tokenizer := getattr(self.pipeline, name, None)) is not None]


def load_image_model(spec: ModelSpec, *, prediction: str = "auto", say: Callable[[str], None] = print) -> ImageModel:
    """Loads the pipeline of the file, folder or hub id `spec.path`, frozen, on its device.

    `prediction` overrides what the denoiser predicts by the scheduler's configuration. Raises ConfigError for other kinds of
    models and unsupported settings, EnvironmentProblem if diffusers or files are missing.
    """
    for message in spec.validate():
        raise ConfigError(message)
    if spec.quantize.method not in ("none", *METHODS):
        raise ConfigError(f"model.quantize is {spec.quantize.method}; the layers of an image model can be {', '.join(METHODS)}.")
    if spec.quantize.int8_products:
        raise ConfigError("model.quantize.int8_products is for text models; leave it out for image models.")
    device = device_for(spec.device)
    dtype = dtype_for(spec.dtype, device)
    kind, pipeline = _pipeline_of(spec, dtype, say)
    pipeline.scheduler = scheduler_for(pipeline.scheduler, kind, prediction, spec.path, say)
    idle_device = torch.device("cpu") if device.type == "cuda" else None
    if idle_device is None:
        with quiet_diffusers():  # which warns that float16 fails on a CPU; it is only slow there
            pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.float()
    names = [name for name in (kind.denoiser, *ENCODERS) if getattr(pipeline, name, None) is not None]
    parts = nn.ModuleDict({name: getattr(pipeline, name) for name in names})
    for part in (pipeline.vae, parts):
        part.requires_grad_(False).eval()
    return ImageModel(spec.path, kind, pipeline, parts, device, dtype, idle_device)


def move_part(part: nn.Module, device: torch.device) -> None:
    """Moves `part` to the device. From and to `meta`, as in a rehearsal, it allocates new tensors."""
    current = next(part.parameters()).device
    if current.type == device.type:
        return
    if "meta" not in (current.type, device.type):
        part.to(device)
        return
    made: dict[int, Tensor] = {}
    for module in part.modules():
        for name, tensor in list(module._parameters.items()):
            if tensor is not None:
                new = made.setdefault(id(tensor), torch.zeros_like(tensor, device=device))
                module._parameters[name] = nn.Parameter(new, requires_grad=tensor.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device=device)


def image_plan(model: ImageModel, spec: LoraSpec, *, text_encoder: bool) -> Plan:
    """Returns the Plan of `spec` for the denoiser and, with `text_encoder`, for the CLIP text encoders.

    Besides module names: attention, mlp (the feed-forward layers), all-linear, and conv (all convolutions but a UNet's first and
    last one). Modules whose output is unused are left out (`_unused`). Raises ConfigError with every problem.
    """
    if spec.layers != "all":
        raise ConfigError(
            f"lora.layers is '{spec.layers}', but a denoiser has no single list of blocks; use lora.exclude_modules."
        )
    chosen = {
        name: part
        for name, part in model.parts.items()
        if name == model.kind.denoiser or (text_encoder and type(part).__name__.startswith("CLIP"))
    }
    plan = plan_for(nn.ModuleDict(chosen), spec, DIFFUSION)
    weights = [
        replace(weight, why_not="its output is not used") if not weight.why_not and _unused(model, weight.path) else weight
        for weight in plan.weights
    ]
    for name, part in model.parts.items():
        if name not in chosen:
            why = "only CLIP encoders are trained" if text_encoder else "diffusion.text_encoder is false"
            weights += [replace(weight, why_not=why) for weight in every_weight(nn.ModuleDict({name: part}), {})]
    entries = tuple(entry for entry in plan.entries if not _unused(model, entry.path))
    return replace(plan, entries=entries, weights=tuple(weights))


def _unused(model: ImageModel, path: str) -> bool:
    """True if the output of the module at `path` is unused, so that a pair on it has no gradient.

    These are the last block of SDXL's first text encoder, whose states are taken before it, and the text's queries in SD3's last
    block, which outputs images only.
    """
    if model.kind.name == "sd3":
        return path == f"transformer.transformer_blocks.{int(model.denoiser.config.num_layers) - 1}.attn.add_q_proj"
    if model.kind.name != "sdxl" or not path.startswith("text_encoder."):
        return False
    blocks = int(cast(Any, model.parts["text_encoder"]).config.num_hidden_layers)
    return f".layers.{blocks - 1}." in path


def put_image_adapter(model: ImageModel, adapter: Adapter, name: str = "default") -> None:
    """Adds a finished adapter of any format under `name` and activates it; ConfigError if it does not fit."""
    attach(model.parts, with_model_paths(model, adapter), name)


def with_model_paths(model: ImageModel, adapter: Adapter) -> Adapter:
    """Returns the adapter with the module paths of `model`: newer text encoders have no part `text_model`."""

    def own(path: str) -> str:
        shorter = path.replace(".text_model.", ".", 1)
        return shorter if find(model.parts, path) is None and find(model.parts, shorter) is not None else path

    full = with_components(adapter)
    return replace(full, pairs={own(path): pair for path, pair in full.pairs.items()})


def _folder_of(spec: ModelSpec, given: Mapping[str, Any]) -> Path:
    """Returns the folder of the pipeline, downloaded for a hub id, without the parts in `given`."""
    path = Path(spec.path).expanduser()
    if path.is_dir():
        return path
    fetch = partial(diffusers().DiffusionPipeline.download, trust_remote_code=False)
    return Path(fetch(spec.path, revision=spec.revision, use_safetensors=True, **given))


def _pipeline_of(spec: ModelSpec, dtype: torch.dtype, say: Callable[[str], None]) -> tuple[ImageKind, Any]:
    """(kind, diffusers' pipeline on the CPU) of a single file, a folder or a hub id."""
    single = open_single(spec, say)
    if single is not None:
        name = single.shapes["_class_name"]
        say(f"Loading {spec.path} ({name}, {str(dtype).removeprefix('torch.')}) with diffusers.")
        with _as_problem(spec):
            unet = partial(load_denoiser, single_denoiser_files(single), new_denoiser, dtype, spec.quantize, say=say)
            return PIPELINES[name], load_single(single, dtype, unet, say)
    kind, extra = _kind_of(spec)
    say(f"Loading {spec.path} ({kind.pipeline}, {str(dtype).removeprefix('torch.')}) with diffusers.")
    with quiet_diffusers(), _as_problem(spec):
        folder = _folder_of(spec, extra)
        variant = variant_in(folder, (kind.denoiser, "vae", *ENCODERS))
        if variant is not None:
            say(f"{folder} has weights of the variant {variant} alone; they are read.")
        files = denoiser_files(folder / kind.denoiser, variant)
        extra[kind.denoiser] = load_denoiser(files, new_denoiser, dtype, spec.quantize, say=say)
        return kind, read_native(
            getattr(diffusers(), kind.pipeline), folder, torch_dtype={"default": dtype, "vae": torch.float32},
            use_safetensors=True, variant=variant, **extra,
        )  # fmt: skip


def _kind_of(spec: ModelSpec) -> tuple[ImageKind, dict[str, Any]]:
    """Returns the kind of a folder or a hub id, and further arguments of diffusers' loader."""
    path = Path(spec.path).expanduser()
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise DataError(
            f"{path} has no model_index.json, so it is no pipeline of diffusers'; expected unet/ or transformer/, vae/, … in it."
        )
    with quiet_diffusers(), _as_problem(spec):
        index = diffusers().DiffusionPipeline.load_config(spec.path, revision=spec.revision)
    require_native_parts(spec.path, index, NOT_LOADED)
    name = index.get("_class_name", "")
    if name not in PIPELINES:
        raise ConfigError(f"{spec.path} is a {name or 'pipeline without a name'}; expected {', '.join(PIPELINES)}.")
    checker = {**dict.fromkeys(NOT_LOADED), "requires_safety_checker": False}
    return PIPELINES[name], checker if PIPELINES[name].name == "sd" else {}


@contextmanager
def _as_problem(spec: ModelSpec) -> Iterator[None]:
    advice = (
        "Expected a folder that diffusers saved, a single file, or a hub id that this machine can reach; pickled weights are not "
        "opened."
    )
    with one_message(f"model.path '{spec.path}' cannot be loaded", advice, EnvironmentProblem):
        yield


def _digest(module: nn.Module, note: str) -> str:
    found = hashlib.sha256(note.encode())
    for name, digest in sorted(frozen_digests(module).items()):
        found.update(f"\n{name} {digest}".encode())
    return found.hexdigest()


def scaled_latents(latents: Tensor, config: Any, kind: ImageKind) -> Tensor:
    """Returns the denoiser's latents x of the autoencoder's output z (n, channels, h, w), as diffusers' pipelines do.

    SD, SD3, FLUX    x = s·(z − shift)                  s and shift: scaling_factor, shift_factor
    SDXL             x = s·(z − mean) / std             if the configuration has latents_mean and latents_std, by channel
    """
    shift, factor = _terms(latents, config, kind)
    return (latents - shift) * factor


def unscaled(latents: Tensor, config: Any, kind: ImageKind) -> Tensor:
    """Returns the inverse of `scaled_latents`."""
    shift, factor = _terms(latents, config, kind)
    return latents / factor + shift


def scaling_note(config: Any, kind: ImageKind) -> str:
    """Returns a text of everything that `scaled_latents` depends on, for a digest."""
    note = f"{config.scaling_factor} {getattr(config, 'shift_factor', None)}"
    return f"{note} {list(config.latents_mean)} {list(config.latents_std)}" if _standardised(config, kind) else note


def _terms(latents: Tensor, config: Any, kind: ImageKind) -> tuple[Tensor | float, Tensor | float]:
    """Returns the shift and the factor."""
    if not _standardised(config, kind):
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return mean, config.scaling_factor / std


def _standardised(config: Any, kind: ImageKind) -> bool:
    """True if means and deviations are used: diffusers' pipelines of other kinds ignore them."""
    means, deviations = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    return kind.name == "sdxl" and means is not None and deviations is not None

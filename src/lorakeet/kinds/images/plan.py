"""How much memory a run on pictures will take, phase by phase, from its settings and the model's configurations alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.core.scratch import SCRATCH
from lorakeet.core.spec import LoraSpec
from lorakeet.evaluate.wording import bytes_text
from lorakeet.formats.files.safetensors_file import TensorEntry, open_safetensors
from lorakeet.kernels.device import standing_for
from lorakeet.kinds.images.data.folder import ImageRow
from lorakeet.kinds.images.model.from_config import image_model_from_config, shapes_of_images
from lorakeet.kinds.images.model.kinds import ENCODERS, Conditioning, predicted
from lorakeet.kinds.images.model.latent_cache import Captions, EncodedImage, Sizes
from lorakeet.kinds.images.model.model import ImageModel, image_plan
from lorakeet.kinds.images.model.shapes import Shapes
from lorakeet.kinds.images.model.single_file import open_single, single_denoiser_files
from lorakeet.kinds.images.spec import DiffusionSpec, ImageSpec, diffusion_of, images_of
from lorakeet.kinds.images.task import ImageBatch, ImageTask, errors_at
from lorakeet.memory.allocator import return_freed_memory
from lorakeet.memory.cuda import CONTEXT, phases_on_gpu
from lorakeet.memory.forecast import Forecast, phases_of
from lorakeet.memory.free import free_memory
from lorakeet.memory.ledger import Ledger, Work
from lorakeet.memory.measure import resident_bytes
from lorakeet.memory.usage import Usage, add_usage, larger_usage
from lorakeet.models.inject import inject
from lorakeet.models.placement import DTYPES, device_for, dtype_for, narrow_for, planned_on
from lorakeet.models.spec import ModelSpec
from lorakeet.planning.fit import BudgetedWork, fit_budget, fit_free
from lorakeet.planning.forecast_text_run import INTERVALS, VALUE, decompose, decomposes, finished_plan, reads_weights
from lorakeet.planning.rehearse_text import (
    BEGIN,
    CHECKPOINT,
    EVALUATE,
    FINAL,
    STEP,
    copy_for_checkpoint,
    matrix_sizes,
    on_shapes,
    silent_training,
    step_in_account,
)
from lorakeet.quant.construct import weights_in
from lorakeet.quant.packed import PackedBase
from lorakeet.runs.residency import RESIDENT, MemoryPlan, Residency, Way
from lorakeet.train.loop import Training
from lorakeet.train.spec import TrainSpec

LOAD, CERTIFY = "load", "certify"
PROMPTS = 3  # whose samples are drawn where the settings name none
_SMALL: Shapes = {
    "_class_name": "StableDiffusionPipeline",
    "unet": {"_class_name": "UNet2DConditionModel", "sample_size": 8, "block_out_channels": [32, 64], "layers_per_block": 1,
             "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
             "cross_attention_dim": 32, "attention_head_dim": 4},
    "vae": {"block_out_channels": [32, 64], "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1},
    "text_encoder": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1,
                     "pad_token_id": 1},
    "scheduler": {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000},
}  # fmt: skip


ENCODE = "encode"  # pictures to latents, captions to embeddings


@dataclass(frozen=True)
class Pictures:
    """The largest pictures of a run: (height, width) in pixels of an example, and of what is drawn at once with guidance."""

    example: tuple[int, int]
    micro_batch: int
    micro_batches: int
    drawn: tuple[int, int]
    drawn_at_once: int


@dataclass(frozen=True)
class ImageRehearsal:
    """The memory and the work of a rehearsed run. `peaks` in bytes by phase, `base` the frozen pipeline, `work` that of one
    micro-batch of a step.
    """

    plan: Plan
    base: int
    peaks: Mapping[str, Usage]
    work: Work
    other_part: int  # numbers in the largest part beside the denoiser
    largest: int  # numbers in the denoiser's largest tensor, packed ones counted one by one


def rehearse_images(
    build: Callable[[], ImageModel], lora: LoraSpec, train: TrainSpec, diffusion: DiffusionSpec, pictures: Pictures
) -> ImageRehearsal:
    """Runs `build`, then encodes, trains, evaluates, saves and draws, on shapes alone.

    Raises ConfigError if `lora` does not fit, NotPlanned for a model whose arithmetic cannot be followed.
    """
    with on_shapes() as ledger:
        model = build()
        ledger.name("base", [*model.parts.parameters(), *model.parts.buffers(), *model.vae.parameters()])
        base = ledger.in_use["base"]
        others = [model.vae, *(part for name, part in model.parts.items() if name != model.kind.denoiser)]
        other_part, largest = max(map(weights_in, others)), matrix_sizes(model.denoiser)[0]
        plan = image_plan(model, lora, text_encoder=diffusion.text_encoder)
        go_through(model, plan, train, diffusion, pictures, ledger)
        ledger.close()
        step = ledger.work[STEP]
        work = Work(step.flops // pictures.micro_batches, step.written // pictures.micro_batches)
        return ImageRehearsal(plan, base, ledger.peaks, work, other_part, largest)


def go_through(
    model: ImageModel, plan: Plan, train: TrainSpec, diffusion: DiffusionSpec, pictures: Pictures, ledger: Ledger | None = None
) -> None:
    """Everything that a run does with `model`, once, on made-up pictures; entered in `ledger`, or really computed without one."""
    account = ledger or _NoLedger()
    height, width = pictures.example
    model.stage()
    with account.phase(ENCODE):
        latents = model.encode(torch.zeros(1, 3, height, width)).cpu()
        with torch.no_grad():
            embeddings = model.describe(["a picture"]).to(torch.device("cpu"), torch.float32)
    model.stage(model.kind.denoiser, *(ENCODERS if diffusion.text_encoder else ()))
    account.name("base", _on_device(model))
    with account.phase(BEGIN):
        inject(model.parts, plan, on_pair=lambda pair: account.name("adapter", [*pair.parameters(), *pair.buffers()]))
    training = _training(model, latents, embeddings, train, diffusion, pictures)
    best = step_in_account(training, account)
    task = cast(_MadeUp, training.task)
    with account.phase(EVALUATE):
        task.evaluate(diffusion.at_once)
    with account.phase(CHECKPOINT):
        copy_for_checkpoint(training)
    with account.phase(FINAL), torch.no_grad():
        model.parts.eval()
        count, place = 2 * pictures.drawn_at_once, tuple(side // model.factor for side in pictures.drawn)
        model.stage(model.kind.denoiser, "vae")  # as ImageModel.drawing does
        account.name("base", _on_device(model))
        noisy, times = torch.zeros(count, *latents.shape[1:2], *place), torch.ones(count)
        wide = (model.device, model.dtype)
        sizes = task.train[0].sizes.expand(count, 6).to(*wide)
        pooled = None if embeddings.pooled is None else embeddings.pooled.expand(count, *embeddings.pooled.shape[1:])
        repeated = Conditioning(embeddings.states.expand(count, *embeddings.states.shape[1:]), pooled)
        predicted(model.kind, model.denoiser, noisy.to(*wide), times, repeated.to(*wide), sizes)
        model.decode(noisy[:1])
    del best


def _on_device(model: ImageModel) -> list[Tensor]:
    """The frozen tensors of the parts that are where the model computes; on a GPU they are others after each `stage`."""
    every = (*model.parts.parameters(), *model.parts.buffers(), *model.vae.parameters())
    return [tensor for tensor in every if tensor.device == model.device and not tensor.requires_grad]


def _training(
    model: ImageModel, latents: Tensor, embeddings: Conditioning, train: TrainSpec, diffusion: DiffusionSpec, pictures: Pictures
) -> Training[Any]:
    """A Training on made-up pictures, ready to `step`, that writes nothing."""
    height, width = pictures.example
    row = ImageRow(Path(), "a picture", width, height, "0", 0, "made up")
    picture = EncodedImage(row, latents, torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32))
    spec = replace(train, batch_size=pictures.micro_batch * pictures.micro_batches)
    captions = cast(Captions, _Embeddings(embeddings))
    task = _MadeUp(model, [picture], held_out=[], captions=captions, spec=spec, images=ImageSpec(), diffusion=diffusion)
    task.cut = pictures
    return silent_training(task, spec)


class _MadeUp(ImageTask):
    """Batches whose draws need no numbers."""

    cut: Pictures

    def batches(self, step: int) -> list[ImageBatch]:
        return [self._batch(self.cut.micro_batch) for _ in range(self.cut.micro_batches)]

    def evaluate(self, count: int) -> None:
        """The errors of `count` timesteps of a picture, as held-out evaluation computes them."""
        self.model.parts.eval()
        with torch.no_grad():
            batch = self._batch(count)
            errors_at(self.model, batch, self.model.noising.at(batch.timesteps), self.captions, self.diffusion)

    def _batch(self, count: int) -> ImageBatch:
        [picture] = self.train
        latents = picture.latents.expand(count, *picture.latents.shape[1:])
        timesteps, captions = torch.full((count,), 500), (picture.row.caption,) * count
        return ImageBatch(latents, torch.randn_like(latents), timesteps, captions, picture.sizes.expand(count, 6))


class _Embeddings:
    """The embeddings of every caption."""

    def __init__(self, embeddings: Conditioning) -> None:
        self.embeddings = embeddings

    def of(self, caption: str) -> Conditioning:
        return self.embeddings


class _NoLedger(Ledger):  # type: ignore[no-untyped-call]
    """Keeps no account: what is named and bracketed is really computed."""

    def watch_gradients(self, parameters: Any) -> None:
        return None


@dataclass(frozen=True)
class ImageRunPlan(MemoryPlan):
    """The memory of a run, with what the forecast is made of."""

    plan: Plan
    pictures: Pictures
    work: Work  # of one micro-batch in training
    on_gpu: Callable[[], int]
    gpu: torch.device | None = None  # what the forecast is of; None for the process

    @cached_property
    def tensors(self) -> int:
        """The most bytes of tensors on a GPU at once, on which parts are only while they compute."""
        return self.on_gpu()

    @property
    def training_peak(self) -> int:
        """The most bytes until training ends."""
        training = (LOAD, ENCODE, BEGIN, STEP, EVALUATE, CHECKPOINT)
        return max(phase.bytes for phase in self.forecast.phases if phase.name in training)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        phases = [phase.to_mapping() for phase in self.forecast.phases]
        return {"peak": self.peak, "card_tensors": self.tensors, "phases": phases}


@dataclass(frozen=True)
class Machine:
    """What of this machine and of the model's files a forecast needs."""

    dtype: torch.dtype
    runtime: int  # bytes beside the tensors: of the process, or of the context on a GPU
    mapped: int = 0  # bytes of files in memory while other parts than the denoiser are rounded; -1: unknown, taken to be fp32
    returning: bool = False  # whether freed memory goes back to the system at once, as in runs under a budget
    gpu: torch.device | None = None  # the CUDA device whose memory is planned, this machine's or not; None for that of a process


def fit_images(
    config: RunConfig, say: Callable[[str], None], *, forecast: bool = False
) -> tuple[RunConfig, Residency[ImageRunPlan]]:
    """The settings that keep memory.budget, and how they do. Without a budget the run is planned within what is free on a CUDA
    device, and with `forecast` on others.

    Raises as `fit_budget`.
    """
    run = ImageRun(config, say)
    if not config.memory.limit and run.device.type == "cuda":
        found = fit_free(run, free_memory(run.device), say)
        return run.settings[found.way.change], found
    if not config.memory.limit:
        return config, Residency(plan=run.plan(RESIDENT)) if forecast else Residency()
    return_freed_memory()  # also for a GPU: parts of the model wait in host memory
    found = fit_budget(run, config.memory.limit, say)
    return run.settings[found.way.change], found


class ImageRun(BudgetedWork[ImageRunPlan]):
    """A run on pictures, with the settings as they are or with others that take less memory."""

    what, option = "this run", "memory.budget"

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        self.config, self.say, self.spec = config, say, config.model
        self.device = device_for(config.model.device)
        self.settings = {_words(change): other for change, other in ways(config)}
        self._plans: dict[str, ImageRunPlan] = {}

    @cached_property
    def shapes(self) -> Shapes:
        """The configurations of the model's parts."""
        return shapes_of_images(self.spec, self.say)

    @cached_property
    def machine(self) -> Machine:
        """This machine's part of the forecasts."""
        return machine_of(self.config, returning=bool(self.config.memory.limit))

    def ways(self, budget: int) -> Iterator[Way]:
        yield from (Way(change=change) for change in self.settings)

    def plan(self, way: Way) -> ImageRunPlan:
        if way.change not in self._plans:
            self._plans[way.change] = forecast_images(self.settings[way.change], self.shapes, self.machine)
        return self._plans[way.change]

    def words(self, way: Way, plan: ImageRunPlan) -> str:
        return super().words(way, plan) + (f", with {way.change}" if way.change else "")

    def size_words(self) -> str:
        return ", one picture at a time and with checkpointing"

    def advice(self) -> str:
        change, least = min(self._plans.items(), key=lambda one: one[1].peak)
        changes = changes_that_help(self.settings[change], self.shapes, self.machine)
        helping = [f"{_words(change)}: {bytes_text(found.peak)}" for change, found in changes if found.peak < least.peak]
        first = "Raise the budget" if self.config.memory.limit else "Set a memory.budget for another bound"
        return first + (f", or set {', '.join(helping)}." if helping else ".")


def _words(change: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {value}" for name, value in change.items())


def ways(config: RunConfig) -> Iterator[tuple[dict[str, str], RunConfig]]:
    """The settings as they are, then with what takes less memory for the same result up to rounding; the settings of each."""
    yield {}, config
    if diffusion_of(config).at_once > 1:
        yield {"diffusion.at_once": "1"}, config.changed(diffusion={"at_once": 1})
    if not diffusion_of(config).checkpointing:
        both = {"diffusion.at_once": "1", "diffusion.checkpointing": "true"}
        yield both, config.changed(diffusion={"at_once": 1, "checkpointing": True})


def changes_that_help(config: RunConfig, shapes: Shapes, machine: Machine) -> Iterator[tuple[dict[str, str], ImageRunPlan]]:
    """Changes of the result that take less memory, and the run with each."""
    if machine.dtype == torch.float32:
        name = narrow_for(machine.gpu)
        yield {"model.dtype": name}, forecast_images(config, shapes, dataclasses.replace(machine, dtype=DTYPES[name]))
    if (quantize := config.model.quantize).method == "none":
        packed = config.changed(model={"quantize": dataclasses.replace(quantize, method="nf4")})
        yield {"model.quantize.method": "nf4"}, forecast_images(packed, shapes, machine)
    half = pictures_of(config, shapes).drawn[0] // 2
    if half >= 256:
        yield {"images.resolution": str(half)}, forecast_images(config.changed(images={"resolution": half}), shapes, machine)
    if config.lora.target_modules != ("attention",):
        fewer = config.changed(lora={"target_modules": ("attention",)})
        yield {"lora.target_modules": "attention"}, forecast_images(fewer, shapes, machine)


def machine_of(config: RunConfig, *, returning: bool = False) -> Machine:
    """This machine's part of a forecast of `config`."""
    device = planned_on(config.model.device)
    dtype = dtype_for(config.model.dtype, device)
    if device.type == "cuda":
        return Machine(dtype, CONTEXT, returning=returning, gpu=device)
    return Machine(dtype, image_runtime_bytes(config, dtype), _mapped_bytes(config.model, dtype), returning)


def forecast_images(config: RunConfig, shapes: Shapes, machine: Machine) -> ImageRunPlan:
    """The memory of a run of `config` on the model of `shapes`, in the process or on a GPU.

    A model is read in the host's memory, from where its parts come to a GPU while they compute. Raises ConfigError if the
    settings do not fit the model.
    """
    pictures, quantize = pictures_of(config, shapes), config.model.quantize
    initialised = (BEGIN,) if reads_weights(config) else ()
    build = partial(image_model_from_config, shapes, name=config.model.path, dtype=machine.dtype, quantize=quantize)

    def on_gpu() -> ImageRehearsal:
        with standing_for(machine.gpu or torch.device("cuda")):
            return rehearse_images(partial(build, gpu=True), config.lora, config.train, diffusion_of(config), pictures)

    if machine.gpu is not None:
        found = on_gpu()
        held = {name: found.peaks[name] for name in (ENCODE, *initialised, STEP, EVALUATE, CHECKPOINT, FINAL)}
        # The adapter from disk, and that of before; one base is staged away before another comes.
        held[CERTIFY] = add_usage(held[FINAL], adapter=2 * VALUE * finished_plan(config, found.plan).parameters)
        phases = phases_on_gpu(held, machine.runtime)
        return ImageRunPlan(Forecast(phases), found.plan, pictures, found.work, partial(_most, found), machine.gpu)
    found = rehearse_images(build, config.lora, config.train, diffusion_of(config), pictures)
    peaks, adapter = found.peaks, VALUE * finished_plan(config, found.plan).parameters
    mapped = machine.mapped  # while the base is read: a tensor of the denoiser, or the file of another part
    if mapped < 0:
        mapped = found.other_part * torch.float32.itemsize if machine.dtype != torch.float32 else 0
    load = add_usage(Usage(), base=found.base, scratch=max(mapped, found.largest * torch.float32.itemsize))
    kept = add_usage(Usage(), base=found.base, adapter=2 * adapter)
    evaluation = add_usage(peaks[FINAL], scratch=INTERVALS)
    certify = add_usage(evaluation, adapter=2 * adapter)  # the adapter from disk on the live model
    if not machine.returning:  # or on a second one
        loading = add_usage(kept, **load.kinds)
        certify = larger_usage(loading, add_usage(certify, base=found.base))
    traced = {name: peaks[name] for name in (ENCODE, *initialised, STEP, EVALUATE, CHECKPOINT)}
    held = {LOAD: load, **traced, FINAL: evaluation, CERTIFY: certify}
    phases = phases_of(held, machine.runtime, returning=machine.returning)
    return ImageRunPlan(Forecast(phases), found.plan, pictures, found.work, lambda: _most(on_gpu()))


def pictures_of(config: RunConfig, shapes: Shapes) -> Pictures:
    """The largest pictures that a run with these settings can meet. ConfigError where the UNet cannot halve their sides."""
    with torch.device("meta"):
        model = image_model_from_config(shapes, name=config.model.path, dtype=torch.float32)
    example = max(Sizes.of(model, images_of(config)).allowed, key=lambda size: (size[0] * size[1], min(size)))
    side = images_of(config).resolution or model.resolution
    spec = diffusion_of(config)
    micro_batch = min(spec.at_once, config.train.batch_size)
    drawn = max(2, (len(spec.prompts) or PROMPTS) * spec.seeds)
    several = 2 if config.train.batch_size > micro_batch else 1
    return Pictures(example, micro_batch, several, (side, side), min(spec.at_once, drawn))


def image_runtime_bytes(config: RunConfig, dtype: torch.dtype) -> int:
    """What this process holds beside the tensors of a model, once it has done everything that a run does, on a very small one."""
    with torch.random.fork_rng(devices=[]):
        model = image_model_from_config(_SMALL, name="probe", dtype=dtype, quantize=config.model.quantize)
        plan = image_plan(model, LoraSpec(target_modules=("attention",)), text_encoder=False)
        for base in (module for module in model.parts.modules() if isinstance(module, PackedBase)):
            base.store(0.1 * torch.randn(base.shape))
        small = Pictures((32, 32), 2, 1, (32, 32), 1)
        go_through(model, plan, TrainSpec(), DiffusionSpec(at_once=2, checkpointing=diffusion_of(config).checkpointing), small)
    if decomposes(config):
        decompose()
    SCRATCH.clear()
    return resident_bytes()


def _mapped_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of files that lie in memory while the text encoders or the autoencoder are rounded from them; -1: no files yet.

    The denoiser's are not among them, which is read a tensor at a time (kinds/images/model/denoiser).
    """
    if (single := open_single(spec, lambda _: None)) is not None:
        own = {name for _, name in single_denoiser_files(single).tensors.values()}
        others = [one for name, one in single.file.tensors.items() if name not in own]
        wide = sum(math.prod(one.shape) for one in others) * torch.float32.itemsize  # through which the encoders go
        return _rounded(others, torch.float32) + (wide if dtype != torch.float32 else 0)
    folder = Path(spec.path).expanduser()
    if not folder.is_dir():
        return -1
    parts = {name: [open_safetensors(path) for path in (folder / name).glob("*.safetensors")] for name in (*ENCODERS, "vae")}
    return max(
        _rounded([one for file in files for one in file.tensors.values()], torch.float32 if name == "vae" else dtype)
        for name, files in parts.items()
    )


def _rounded(tensors: Sequence[TensorEntry], dtype: torch.dtype) -> int:
    return sum(one.end - one.begin for one in tensors if one.dtype != dtype)


def _most(found: ImageRehearsal) -> int:
    return max(peak.bytes for peak in found.peaks.values())

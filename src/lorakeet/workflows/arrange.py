"""What stays in memory under `memory.budget`: decided before anything is loaded, or refused with the least that works."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakeet.config import RunConfig
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.memory.allocator import return_freed_memory
from lorakeet.memory.bound import Shapes, Step, choose, least
from lorakeet.memory.budget import larger_than_machine
from lorakeet.memory.measure import resident_bytes
from lorakeet.models import modules
from lorakeet.models.families import family_of
from lorakeet.models.gguf_copy import cache_folder
from lorakeet.models.load import read_config
from lorakeet.models.placement import device_for, dtype_for, products_for
from lorakeet.models.source import find_source
from lorakeet.models.streamed_load import empty_packed, records_of
from lorakeet.models.targets import plan_for
from lorakeet.quant.packed import PackedBase
from lorakeet.train.rehearsal import NotPlanned
from lorakeet.workflows.forecast_run import ROW_BYTES, Planned, Precision, forecast_run, runtime_bytes


@dataclass(frozen=True)
class Arrangement:
    """How a run keeps its budget, and what it is planned to hold. Without a budget nothing streams."""

    budget: int | None = None
    planned: int | None = None  # bytes until training ends
    store: Path | None = None  # the folder of the store, where blocks are streamed
    scratch: Path | None = None  # the folder for block inputs, where they are not kept in memory
    together: int = 0  # micro-batches that pass through a block while it is in; 0 for all
    forecast: Planned | None = None  # of a run whose weights stay in memory


@dataclass(frozen=True)
class Loaded:
    """What the process holds before the model: whether rows may have labels, and how many characters they have."""

    labelled: bool = True
    characters: int = 0


def arrange(config: RunConfig, say: Callable[[str], None], loaded: Loaded | None = None) -> Arrangement:
    """Decides, says what was decided, and under a budget has freed memory given back from now on.

    With `loaded`, which a run has, what it will hold is forecast whether there is a budget or not. Raises ConfigError where the
    budget cannot be kept, and EnvironmentProblem for a device on which nothing is streamed yet.
    """
    budget, device = config.memory.bytes, device_for(config.model.device)
    if budget is None and (loaded is None or device.type != "cpu"):
        return Arrangement()
    if device.type != "cpu":
        raise EnvironmentProblem(
            f"memory.budget is kept on the CPU only, but the model would be on {device}. Set model.device to cpu, or leave the "
            "budget out."
        )
    if budget is not None:
        if warning := larger_than_machine(budget):
            say(warning)
        return_freed_memory()
    source = find_source(config.model, say)
    model_config = read_config(source)
    planned = _forecast(config, model_config, source, loaded or Loaded(), say)
    if budget is None:
        return Arrangement(planned=None if planned is None else planned.training_peak, forecast=planned)
    if planned is not None and planned.peak <= budget:
        say(f"Memory: {_size(planned.peak)} planned of {_size(budget)}; everything stays in memory.")
        return Arrangement(budget, planned.training_peak, forecast=planned)
    return _streamed(config, model_config, source, planned, say)


def _forecast(
    config: RunConfig, model_config: Any, source: Path, loaded: Loaded, say: Callable[[str], None]
) -> Planned | None:
    """What the run holds with every weight in memory; None, which is said, where the model cannot be planned so."""
    precision = precision_of(config)
    try:
        return forecast_run(
            config, model_config, precision, runtime=runtime_bytes(precision) + ROW_BYTES * loaded.characters, files=source,
            returning=config.memory.bytes is not None, labelled=loaded.labelled,
        )  # fmt: skip
    except NotPlanned as error:
        say(f"{error} How much memory the run takes with its weights in memory is not known before it has run.")
        return None


def precision_of(config: RunConfig) -> Precision:
    """How the weights will be kept and multiplied on this machine's CPU."""
    device = torch.device("cpu")
    dtype = dtype_for(config.model.dtype, device)
    return Precision(dtype, products_for(config.model, dtype, device), config.model.quantize)


def _streamed(
    config: RunConfig, model_config: Any, source: Path, planned: Planned | None, say: Callable[[str], None]
) -> Arrangement:
    budget = config.memory.bytes or 0
    shapes, step = shapes_of(config, model_config, source)
    runtime = resident_bytes()
    choice = choose(shapes, step, runtime, budget)
    if choice is None:
        lowest = least(shapes, step, runtime)
        if planned is not None:
            lowest = min(lowest, planned.peak)
        raise ConfigError(
            f"memory.budget is {budget >> 20} MiB, but this run takes at least {-(-lowest >> 20)} MiB "
            f"({step.trained:,} trained parameters, micro-batches of {step.tokens:,} tokens), streamed or not. "
            "Raise the budget, or lower lora.rank, data.max_tokens or train.micro_tokens."
        )
    inputs = "on disk" if choice.aside else "in memory"
    say(
        f"Memory: {_size(choice.planned)} planned of {_size(budget)}; frozen blocks are streamed from disk, {choice.together} of "
        f"{step.batches} micro-batches at once, their inputs kept {inputs}."
    )
    folder = Path(config.memory.store).expanduser() if config.memory.store else cache_folder() / "stores"
    return Arrangement(budget, choice.planned, folder, folder if choice.aside else None, choice.together)


def shapes_of(config: RunConfig, model_config: Any, files: Path | None = None) -> tuple[Shapes, Step]:
    """The numbers that decide, from the settings, the model's configuration and its `files`, where there are any: their headers
    say how weights are packed, and no weight is read.
    """
    device = device_for(config.model.device)
    dtype = dtype_for(config.model.dtype, device)
    products = products_for(config.model, dtype, device)
    text, family = model_config.get_text_config(), family_of(model_config.get_text_config())
    model = empty_packed(model_config, dtype, config.model.quantize, files)
    sizes = dict.fromkeys(records_of(model, family), 0)
    prefix = next(iter(sizes)).rpartition(".")[0]
    ends = {f"{modules.path_of(model, end)}.weight" for end in (modules.input_layer(model), modules.output_layer(model))}
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    end_bytes = rest_bytes = 0
    for name, tensor in model.state_dict().items():
        if name.startswith(f"{prefix}."):
            sizes[".".join(name.split(".")[: prefix.count(".") + 2])] += tensor.nbytes
        elif name in ends:
            end_bytes += 0 if name in tied else tensor.nbytes
        else:
            rest_bytes += tensor.nbytes
    packed = [math.prod(base.shape) for base in model.modules() if isinstance(base, PackedBase)]
    hidden = int(text.hidden_size)
    shapes = Shapes(
        blocks=len(sizes), block_bytes=max(sizes.values()), block_total=sum(sizes.values()), end_bytes=end_bytes,
        rest_bytes=rest_bytes, largest=max(packed, default=0), hidden=hidden,
        inner=int(getattr(text, "intermediate_size", None) or 4 * hidden), heads=int(text.num_attention_heads),
        vocabulary=int(text.vocab_size), state=dtype.itemsize, product=products.itemsize,
    )  # fmt: skip
    return shapes, _step(config, plan_for(model, config.lora, family).parameters)


def _step(config: RunConfig, trained: int) -> Step:
    length, at_once = config.data.max_tokens, config.train.micro_tokens
    rows = max(1, at_once // length)
    batches = math.ceil(config.train.batch_size / rows)
    return Step(trained, max(length, at_once), batches, config.train.head_chunk)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"

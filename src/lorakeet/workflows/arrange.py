"""What stays in memory under `memory.budget`: decided before anything is loaded, or refused with the least that works."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakeet.config import RunConfig
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.memory.allocator import return_freed_memory
from lorakeet.memory.bound import Choice, Shapes, Step, choose, least
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


@dataclass(frozen=True)
class Arrangement:
    """How a run keeps its budget. Without a budget `planned` is None and nothing streams."""

    budget: int | None = None
    planned: int | None = None
    store: Path | None = None  # the folder of the store, where blocks are streamed
    scratch: Path | None = None  # the folder for block inputs, where they are not kept in memory
    together: int = 0  # micro-batches that pass through a block while it is in; 0 for all


def arrange(config: RunConfig, say: Callable[[str], None]) -> Arrangement:
    """Decides, says what was decided, and has freed memory given back from now on.

    Raises ConfigError where the budget cannot be kept, and EnvironmentProblem for a device on which nothing is streamed yet.
    """
    budget = config.memory.bytes
    if budget is None:
        return Arrangement()
    device = device_for(config.model.device)
    if device.type != "cpu":
        raise EnvironmentProblem(
            f"memory.budget is kept on the CPU only, but the model would be on {device}. Set model.device to cpu, or leave the "
            "budget out."
        )
    if warning := larger_than_machine(budget):
        say(warning)
    return_freed_memory()
    source = find_source(config.model, say)
    files = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    shapes, step = shapes_of(config, read_config(source), files)
    runtime = resident_bytes()
    choice = choose(shapes, step, runtime, budget)
    if choice is None:
        raise ConfigError(
            f"memory.budget is {_size(budget)}, but this run takes at least {_size(least(shapes, step, runtime))} with its "
            f"frozen weights streamed ({step.trained:,} trained parameters, micro-batches of {step.tokens:,} tokens). "
            "Raise the budget, or lower lora.rank, data.max_tokens or train.micro_tokens."
        )
    say(_said(choice, step, budget))
    if not choice.streams:
        return Arrangement(budget, choice.planned)
    folder = Path(config.memory.store).expanduser() if config.memory.store else cache_folder() / "stores"
    return Arrangement(budget, choice.planned, folder, folder if choice.aside else None, choice.together)


def shapes_of(config: RunConfig, model_config: Any, files: int) -> tuple[Shapes, Step]:
    """The numbers that decide, from the settings, the model's configuration and the bytes of its files; no weight is read."""
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


def _said(choice: Choice, step: Step, budget: int) -> str:
    planned = f"Memory: {_size(choice.planned)} planned of {_size(budget)}"
    if not choice.streams:
        return f"{planned}; everything stays in memory."
    inputs = "on disk" if choice.aside else "in memory"
    return (
        f"{planned}; frozen blocks are streamed from disk, {choice.together} of {step.batches} micro-batches at once, "
        f"their inputs kept {inputs}."
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"

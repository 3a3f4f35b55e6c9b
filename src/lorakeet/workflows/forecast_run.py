"""How much memory a run will take, phase by phase, from its settings and the model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError
from lorakeet.memory.forecast import Forecast, phases_of
from lorakeet.memory.ledger import Held, Work
from lorakeet.memory.measure import resident_bytes
from lorakeet.models.adapt import begin_adapter
from lorakeet.models.outline import config_from, outline
from lorakeet.models.targets import plan_for
from lorakeet.models.text import token_logprobs
from lorakeet.quant.packed import SCRATCH
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.rehearsal import CHECKPOINT, EVALUATE, STEP, Rehearsal, Rows, made_up_batch, rehearse, training_on
from lorakeet.train.spec import TrainSpec

LOAD, MERGE = "load", "merge"
TOKENIZER_ENTRY = 1024  # bytes for each word of a vocabulary; measured: 45.8 MiB for SmolLM2's 49,152
_SMALL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Precision:
    """How the weights are kept and multiplied."""

    dtype: torch.dtype
    products: torch.dtype
    quantize: QuantSpec


@dataclass(frozen=True)
class Planned:
    """The forecast of a run, with what it is made of."""

    forecast: Forecast
    plan: Plan
    rows: Rows
    work: Work  # of one micro-batch in training
    base: int  # bytes


def runtime_bytes(precision: Precision) -> int:
    """What this process holds beside the tensors of a model, once it has done everything that a run does.

    Found by doing it on a very small model, so that the code of every kernel and the libraries' own buffers are there.
    """
    text = outline(
        config_from(_SMALL), name="probe", dtype=precision.dtype, products=precision.products, quantize=precision.quantize
    )
    begin_adapter(text, plan_for(text.model, LoraSpec(), text.family), seed=0)
    rows = Rows(64, 2)
    training = training_on(text, TrainSpec(), rows)
    token_logprobs(text, made_up_batch(rows))
    for parameter in training.parameters.values():  # made-up weights: what counts is that every kernel runs
        parameter.grad = torch.ones_like(parameter)
    training.optimizer.step(1e-3)
    training.step()
    SCRATCH.clear()
    return resident_bytes()


def rows_of(config: RunConfig) -> Rows:
    """The largest micro-batch that a run with these settings can meet: rows of data.max_tokens, every token of them learnt."""
    length = config.data.max_tokens
    return Rows(length, max(1, min(config.train.micro_tokens // length, config.train.batch_size)))


def forecast_run(
    config: RunConfig,
    model_config: Any,
    precision: Precision,
    *,
    runtime: int,
    returning: bool = False,
    tokenizer: bool = True,
) -> Planned:
    """What a run of `config` on the model of `model_config` will hold; `returning` as in memory/forecast.

    `runtime` is what the process holds beside tensors and tokenizer. Raises ConfigError where the settings do not fit the
    model, or where its kind of packing cannot be planned.
    """
    if precision.quantize.method not in ("none", "nf4", "int8"):
        raise ConfigError(
            f"model.quantize {precision.quantize.method} cannot be planned from a configuration: each of its matrices is packed "
            "in its own way. Plan with nf4, which takes about as much as a 4-bit file."
        )
    if tokenizer:
        runtime += TOKENIZER_ENTRY * int(model_config.get_text_config().vocab_size)
    rows = rows_of(config)
    build = partial(
        outline, model_config, name=config.model.path, dtype=precision.dtype, products=precision.products,
        attention=config.model.attention, quantize=precision.quantize,
    )  # fmt: skip
    micro_batches = 2 if config.train.batch_size > rows.count else 1
    found = rehearse(build, config.lora, config.train, rows=rows, micro_batches=micro_batches)
    training = {LOAD: _load(model_config, found, precision), **{name: found.peaks[name] for name in (EVALUATE, STEP, CHECKPOINT)}}
    phases = phases_of(training, runtime, returning=returning)
    merge = phases_of({MERGE: _merge(found)}, runtime, returning=returning)  # a process of its own
    return Planned(Forecast((*phases, *merge)), found.plan, rows, found.work, found.base)


def _load(model_config: Any, found: Rehearsal, precision: Precision) -> Held:
    """The base, and while it is read: the file's own pages where the dtype changes, a matrix as stored where it is packed."""
    stored = getattr(model_config, "dtype", None) or torch.float32
    if precision.quantize.method != "none":
        return Held(kinds={"base": found.base, "scratch": found.largest * stored.itemsize})
    pages = found.parameters * stored.itemsize if stored != precision.dtype else 0
    return Held(kinds={"base": found.base, "scratch": pages})


def _merge(found: Rehearsal) -> Held:
    """The merged model is compared with base + adapter, both in fp32, weight by weight; the writing takes less."""
    weight = found.largest * torch.float32.itemsize
    return Held(kinds={
        "base": 2 * found.parameters * torch.float32.itemsize, "adapter": 2 * found.plan.parameters * 4, "scratch": 4 * weight,
    })  # fmt: skip

"""How much memory a run will take, phase by phase, from its settings and the model's configuration alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.core.scratch import SCRATCH
from lorakeet.core.spec import LoraSpec
from lorakeet.kernels.device import standing_for
from lorakeet.memory.cuda import CONTEXT, allocated_bytes, phases_on_gpu
from lorakeet.memory.forecast import Forecast, Phase, phases_of
from lorakeet.memory.ledger import Work
from lorakeet.memory.measure import resident_bytes
from lorakeet.memory.store import CPU
from lorakeet.memory.usage import Usage, add_usage, larger_usage
from lorakeet.models.files.stored_tensors import stored_dtype
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.from_config import config_from_settings, model_from_config, streamed_model_from_config
from lorakeet.models.text.model import COUNTS, TextModel, token_logprobs
from lorakeet.models.text.repeated_blocks import ModelBuilder
from lorakeet.quant.spec import QuantSpec
from lorakeet.train.spec import TrainSpec
from lorakeet.workflows.planning.forecast_choices import (
    VALUE,
    finished_plan,
    reads_weights,
    while_measuring,
    while_trying,
    with_importance,
    with_largest_ranks,
)
from lorakeet.workflows.planning.rehearse_text import (
    BEGIN,
    CHECKPOINT,
    EVALUATE,
    FINAL,
    STEP,
    EvaluationSize,
    Rehearsal,
    RowShape,
    made_up_batch,
    rehearse,
    training_on,
)
from lorakeet.workflows.runs.residency import RESIDENT, MemoryPlan, Way
from lorakeet.workflows.runs.search_space import QUICK_FACTORS

LOAD, SCORE, CERTIFY, MERGE, EXPORT, SEARCH = "load", "measure ranks", "certify", "merge", "export", "search"
LATER = (MERGE, EXPORT)  # processes of their own
TOKENIZER_ENTRY = 1024  # bytes for each word of a vocabulary; measured: 45.8 MiB for SmolLM2's 49,152
ROW_BYTES = 9  # for each character of a row: at most a token, with its id and whether it is a target
INTERVALS = 64 << 20  # bytes: numpy's copies of the weights of resamples (evaluate/intervals), whatever the number of rows
FLOORS = 128 << 20  # bytes: scikit-learn (63 MiB when imported) and its tables of words
NARROW = 40 << 20  # bytes: oneDNN's code for shapes of narrow products that the probe does not meet, and what one lays out anew
COUNT_BYTES = 15 << 19  # what stays of the code for each further number of tokens (memory/onednn_code), about 25 products
CHECK_TOKENS = 1024  # of a micro-batch of the certificate (workflows/finetuning/certify_text)
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
    device: torch.device = CPU

    @property
    def on_gpu(self) -> bool:
        """Whether on a CUDA device, whose memory is then what is forecast."""
        return self.device.type == "cuda"


@dataclass(frozen=True)
class TextRunPlan(MemoryPlan):
    """The memory of a run, with what the forecast is made of."""

    plan: Plan
    rows: RowShape
    work: Work  # of one micro-batch in training
    base: int  # bytes
    rate_trial: int = 0  # bytes of three adapters in training (tuning/learning_rate), tried only where that is not the peak
    together: Callable[[int], Phase] | None = None  # a search with so many adapters in training (workflows/tune)

    def searching(self, members: int) -> TextRunPlan:
        """The same with the phase in which `members` adapters are trained together; as it is for one."""
        if members == 1 or self.together is None:
            return self
        return replace(self, forecast=Forecast((*self.forecast.phases, self.together(members))))

    @property
    def highest(self) -> Phase:
        """The phase of `lorakeet finetune` with the most bytes: of training, evaluating and certifying."""
        return max((phase for phase in self.forecast.phases if phase.name not in LATER), key=lambda phase: phase.bytes)

    @property
    def training_peak(self) -> int:
        """The most bytes until training ends."""
        training = (LOAD, SCORE, BEGIN, STEP, EVALUATE, CHECKPOINT, SEARCH)
        return max(phase.bytes for phase in self.forecast.phases if phase.name in training)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {"peak": self.peak, "phases": [phase.to_mapping() for phase in self.forecast.phases]}


def text_runtime_bytes(precision: Precision, counts: int = COUNTS, *, decomposing: bool = False) -> int:
    """What this process holds beside the tensors of a model, once it has done everything that a run does; with `decomposing`
    also what pairs begin with that are no random numbers, and what ranks are measured by.

    Found by doing it on a very small model, so that the code of every kernel and the libraries' own buffers are there; for
    narrow products, whose library keeps code for every shape, with an allowance for those of the real model in micro-batches of
    `counts` numbers of tokens. What stays of it stays, so a process does it once for each precision. On a CUDA device it is what
    memory/cuda allows for the context.
    """
    if precision.on_gpu:
        return CONTEXT
    _do_everything(precision)
    if decomposing:
        decompose()
    narrow = NARROW + (counts - 1) * COUNT_BYTES if precision.products.itemsize < torch.float32.itemsize else 0
    return resident_bytes() + narrow


@cache
def _do_everything(precision: Precision) -> None:
    """Everything that a run does, on a very small model."""
    quantize = precision.quantize if precision.quantize.method in ("nf4", "int8") else QuantSpec()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        text = model_from_config(
            config_from_settings(_SMALL), name="probe", dtype=precision.dtype, products=precision.products, quantize=quantize
        )
        text = initialise_adapter(text, plan_for(text.model, LoraSpec(), text.family), seed=0)
        rows = RowShape(64, 2)
        training = training_on(text, TrainSpec(), rows)
        token_logprobs(text, made_up_batch(rows))
        for parameter in training.parameters.values():  # made-up weights: what counts is that every kernel runs
            parameter.grad = torch.ones_like(parameter)
        training.optimizer.step(1e-3)
        training.step()
    SCRATCH.clear()


@cache
def decompose() -> None:
    """Each of LAPACK's routines that core/initialise and ranks/score call, on matrices of some hundred rows."""
    for dtype in (torch.float32, torch.float64):
        matrix = torch.eye(384, dtype=dtype) + torch.arange(384, dtype=dtype)
        torch.linalg.svd(matrix[:96], full_matrices=False)
        torch.linalg.svdvals(matrix[:96].t())
        torch.linalg.qr(matrix[:, :96])
        torch.linalg.eigh(matrix @ matrix.t())


def largest_rows(config: RunConfig) -> RowShape:
    """The largest micro-batch that a run with these settings can meet, every token of it a target."""
    length, train = config.data.max_tokens, config.train
    return filling_rows(length, min(max(length, train.micro_tokens), length * train.batch_size))


def evaluation_of(config: RunConfig) -> EvaluationSize:
    """The largest micro-batch of held-out rows, of those of the final evaluation and of the certificate, and the texts of the
    drift.
    """
    length, spec = config.data.max_tokens, config.evaluate
    at_once = max(config.train.micro_tokens, CHECK_TOKENS, length)
    return EvaluationSize(filling_rows(length, at_once), spec.drift_texts, spec.drift_tokens)


def filling_rows(length: int, tokens: int) -> RowShape:
    """Equal rows of at most `length` tokens that fill `tokens`, as few as there can be."""
    count = math.ceil(tokens / length)
    return RowShape(math.ceil(tokens / count), count)


def forecast_run(
    config: RunConfig,
    model_config: Any,
    precision: Precision,
    *,
    runtime: int,
    files: Path | None = None,
    returning: bool = False,
    labelled: bool = True,
    way: Way = RESIDENT,
) -> TextRunPlan:
    """What a run of `config` on the model of `model_config` will hold; `returning` (a run under a budget) as in memory/forecast.

    `runtime` is what the process holds beside tensors and tokenizer, `files` the model's folder or .gguf file where there is one,
    `labelled` whether rows may have labels, `way` how blocks are streamed, if they are. Raises
    ConfigError where the settings do not fit the model, NotPlanned where its arithmetic cannot be followed.
    """
    on_gpu = precision.on_gpu
    words = 0 if on_gpu else TOKENIZER_ENTRY * int(model_config.get_text_config().vocab_size)
    rows = largest_rows(config)
    make = partial(streamed_model_from_config, slots=way.slots) if way.streamed else model_from_config
    build = build_of(make, config, model_config, precision, files)
    micro_batches = max(2 if config.train.batch_size > rows.count else 1, way.together)
    rehearsed = _standing_for(precision.device, partial(
        rehearse, build, spec=config.train, rows=rows, micro_batches=micro_batches,
        evaluation=evaluation_of(config), way=way, best_in_memory=not returning and not on_gpu,
    ))  # fmt: skip
    found, before = _before_steps(config, rehearsed)
    training = with_importance(config, found)
    load, final = load_peak(model_config, found, precision), found.peaks[FINAL]
    floors = FLOORS if labelled and config.evaluate.baselines and not on_gpu else 0
    adapter = VALUE * finished_plan(config, found.plan).parameters
    kept = add_usage(Usage(), base=found.base, adapter=adapter)
    evaluated = add_usage(larger_usage(final, add_usage(kept, scratch=0 if on_gpu else INTERVALS)), runtime=floors)
    again = Again(found, load, final, words, adapter, second=not returning)
    held = {
        LOAD: load,
        **before,
        STEP: training[STEP],
        EVALUATE: training[EVALUATE],
        CHECKPOINT: training[CHECKPOINT],
        FINAL: evaluated,
        CERTIFY: add_usage(again.peak(kept), runtime=floors),
    }
    phases = phases_on_gpu if on_gpu else phases_of
    run = phases(held, runtime + words, returning=returning, trimmed_before=(STEP, FINAL) if before else (FINAL,))

    def together(members: int, *, searching: bool = True) -> Phase:
        held = while_trying(config, found, rows, members, searching=searching)
        return phases({SEARCH: held}, runtime + words, returning=returning)[0]

    if way.streamed:
        size = allocated_bytes(found.block_bytes) if on_gpu else found.block_bytes
        return TextRunPlan(
            Forecast(run), found.plan, rows, found.work, found.base, together=together, blocks=found.blocks, block_bytes=size
        )
    models = {} if on_gpu else {MERGE: _merge(found, adapter), EXPORT: _export(found, adapter)}  # which are compared on the CPU
    later = [phases_of({name: peak}, runtime + words)[0] for name, peak in models.items()]
    trial = together(len(QUICK_FACTORS), searching=False).bytes
    return TextRunPlan(Forecast((*run, *later)), found.plan, rows, found.work, found.base, trial, together=together)


def build_of(
    make: Callable[..., TextModel], config: RunConfig, model_config: Any, precision: Precision, files: Path | None
) -> ModelBuilder:
    """Makes the model of a run on shapes, with all of its blocks or a few."""
    settings = {"products": precision.products, "attention": config.model.attention, "quantize": precision.quantize}
    return ModelBuilder(partial(make, name=config.model.path, dtype=precision.dtype, files=files, **settings), model_config)


def _before_steps(config: RunConfig, rehearsed: Callable[[LoraSpec], Rehearsal]) -> tuple[Rehearsal, dict[str, Usage]]:
    """The rehearsal of a run, and what it holds while rows are measured and while pairs begin from the weights, where it does."""
    found = rehearsed(config.lora)
    measuring = while_measuring(config, found, rehearsed)
    before = {} if measuring is None else {SCORE: measuring}
    if config.ranks.choose == "auto":
        found = with_largest_ranks(config, found, rehearsed)
    if reads_weights(config):
        before[BEGIN] = found.peaks[BEGIN]
    return found, before


def _standing_for(device: torch.device, rehearsed: Callable[[LoraSpec], Rehearsal]) -> Callable[[LoraSpec], Rehearsal]:
    """`rehearsed`, going the way that tensors go on `device`."""

    def on_device(lora: LoraSpec) -> Rehearsal:
        with standing_for(device):
            return rehearsed(lora)

    return on_device


@dataclass(frozen=True)
class Again:
    """The certificate's part: the base with the adapter from disk, beside the live one (`second`) or within it."""

    found: Rehearsal
    load: Usage
    final: Usage
    words: int  # bytes of a second tokenizer
    adapter: int  # bytes of the adapter from disk
    second: bool

    def peak(self, kept: Usage) -> Usage:
        """The peak while the second base is loaded, or while the two are compared."""
        adapter = self.adapter
        if not self.second:  # what is read has gone when anything computes: until then it stands beside the pairs it becomes
            unpacked = torch.float32.itemsize * self.found.largest if self.found.packed else 0  # the buffer of all packed weights
            reading = add_usage(kept, adapter=2 * adapter, scratch=unpacked)
            return larger_usage(reading, add_usage(self.final, adapter=adapter))
        loading = add_usage(kept, **self.load.kinds, runtime=self.words)
        return larger_usage(loading, add_usage(self.final, base=self.found.base, adapter=2 * adapter, runtime=self.words))


def load_peak(model_config: Any, found: Rehearsal, precision: Precision) -> Usage:
    """The base, and while it is read: some tensors as stored where the dtype changes (models/files/dense), a matrix as stored
    where it is packed or goes into a store, there with its cast."""
    if precision.on_gpu:  # where only what is whole arrives
        return add_usage(Usage(), base=found.base)
    stored = stored_dtype(model_config)
    if found.packed or found.blocks:
        cast = precision.dtype.itemsize if found.blocks and stored != precision.dtype else 0
        return add_usage(Usage(), base=found.base, scratch=found.largest * (stored.itemsize + cast))
    return add_usage(Usage(), base=found.base, scratch=found.being_cast(stored, precision.dtype))


def _merge(found: Rehearsal, adapter: int) -> Usage:
    """The merged model is compared with base + adapter, both in fp32, weight by weight; the writing takes less."""
    weight = found.largest * torch.float32.itemsize
    both = 2 * found.parameters * torch.float32.itemsize
    return add_usage(Usage(), base=both, adapter=2 * adapter, scratch=4 * weight)


def _export(found: Rehearsal, adapter: int) -> Usage:
    """The GGUF file in llama.cpp is compared with base + adapter in fp32; in f16 it takes half as much beside it."""
    whole = found.parameters * torch.float32.itemsize
    return add_usage(Usage(), base=whole + whole // 2, adapter=2 * adapter, scratch=4 * 4 * found.largest)

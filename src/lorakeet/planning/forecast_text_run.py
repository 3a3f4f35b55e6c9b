"""How much memory a run will take, phase by phase, from its settings and the model's configuration alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.core.scratch import SCRATCH
from lorakeet.core.spec import FACTORED, MEASURED, LoraSpec
from lorakeet.data.few_shot import widest
from lorakeet.evaluate.baselines import CHARACTER_BYTES, CHARACTERS
from lorakeet.kernels.cpu.operators import LANES
from lorakeet.kernels.device import standing_for
from lorakeet.memory.cuda import CONTEXT, allocated_bytes, phases_on_gpu
from lorakeet.memory.forecast import Forecast, Phase, phases_of
from lorakeet.memory.lapack import eigh_bytes, svd_bytes
from lorakeet.memory.ledger import Work
from lorakeet.memory.measure import resident_bytes
from lorakeet.memory.remembered import remembered
from lorakeet.memory.usage import Usage, add_usage, larger_usage
from lorakeet.models.files.stored_tensors import stored_dtype, stored_quantisation
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.by_peft import bytes_with_peft
from lorakeet.models.text.from_config import config_from_settings, model_from_config
from lorakeet.models.text.model import COUNTS, context_of, padded_count, token_logprobs
from lorakeet.planning.attention_choice import with_any_attention
from lorakeet.planning.planned_model import Precision, builder_of
from lorakeet.planning.reference import with_reference
from lorakeet.planning.rehearsal_key import rehearsal_key
from lorakeet.planning.rehearse_text import (
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
from lorakeet.quant.spec import QuantSpec
from lorakeet.ranks.allocate import allocate, pair_parameters, rank_cost, rank_pattern
from lorakeet.ranks.prune import final_budget
from lorakeet.ranks.score import OVERSAMPLING, sketch_plan
from lorakeet.ranks.spec import parameter_count
from lorakeet.runs.pruning import cuts_of
from lorakeet.runs.residency import RESIDENT, MemoryPlan, Way
from lorakeet.runs.search_space import QUICK_FACTORS
from lorakeet.train.spec import TrainSpec

LOAD, SCORE, CERTIFY, MERGE, EXPORT, SEARCH = "load", "measure ranks", "certify", "merge", "export", "search"
VALUE = 4  # bytes of a trained number, of its gradient, and at most of each of its two moments
WIDE = 8  # bytes of a number in fp64
LATER = (MERGE, EXPORT)  # processes of their own
TOKENIZER_ENTRY = 1024  # bytes for each word of a vocabulary; measured: 45.8 MiB for SmolLM2's 49,152
ROW_BYTES = 9  # for each character of a row: at most a token, with its id and whether it is a target
INTERVALS = 64 << 20  # bytes: numpy's copies of the weights of resamples (evaluate/intervals), whatever the number of rows
SCIPY = 64 << 20  # bytes when its optimizer and its sparse matrices are imported, at most
FLOORS = 128 << 20  # bytes: SciPy and its terms, at least
NARROW = 40 << 20  # bytes: oneDNN's code for shapes of narrow products that the probe does not meet, and what one lays out anew
COUNT_BYTES = 15 << 19  # what stays of the code for each further number of tokens (memory/onednn_code), about 25 products
CHECK_TOKENS = 1024  # of a micro-batch of the certificate (kinds/text/certify)
REPLY_TOKENS = 1024  # of prompts and replies that are in the model together, unless train.micro_tokens is more
_SMALL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@dataclass(frozen=True)
class TextRunPlan(MemoryPlan):
    """The memory of a run, with what the forecast is made of."""

    plan: Plan
    rows: RowShape
    work: Work  # of one micro-batch in training
    base: int  # bytes
    rate_trial: Phase | None = None  # three adapters in training (tuning/learning_rate), tried only where memory allows it
    together: Callable[[int], Phase] | None = None  # a search with so many adapters in training (verbs/tune)
    alone: Phase | None = None  # the certificate on the base that was trained on, where `forecast` has that of two bases
    alike: int = 0  # blocks, if all are equal

    def with_one_base(self) -> TextRunPlan:
        """The same with the certificate of one base."""
        if self.alone is None:
            return self
        phases = tuple(self.alone if phase.name == CERTIFY else phase for phase in self.forecast.phases)
        return replace(self, forecast=Forecast(phases), alone=None)

    def searching(self, members: int) -> TextRunPlan:
        """The same with the phase in which `members` adapters are trained together; as it is for one."""
        if members == 1 or self.together is None:
            return self
        return replace(self, forecast=Forecast((*self.forecast.phases, self.together(members))))

    def trying_rates(self) -> TextRunPlan:
        """The same with the trial of learning rates, if that takes more than the run; else as it is."""
        if self.rate_trial is None or self.rate_trial.bytes <= self.peak:
            return self
        return replace(self, forecast=Forecast((*self.forecast.phases, self.rate_trial)))

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


@dataclass(frozen=True)
class RowLengths:
    """Tokens of a run's rows: of the longest, with any answer, and of the longest step; the training rows, and their tokens.

    `exact`: copies of measured rows, which the run leaves out, were searched and are not counted.
    """

    longest: int
    step: int
    rows: int = 0
    tokens: int = 0
    exact: bool = True

    def within(self, config: RunConfig) -> RowLengths:
        """The same with rows of at most data.max_tokens."""
        most = config.data.max_tokens
        return replace(self, longest=min(self.longest, most), step=min(self.step, most * config.train.sequences))


def largest_rows(config: RunConfig, lengths: RowLengths | None = None, window: int | None = None) -> RowShape:
    """The micro-batch that holds no less than any that a run with these settings can meet, every token of it a target.

    Without `lengths` each row may have data.max_tokens. `window` is that of the model's attention, if it has one.
    """
    lengths = _known(config, lengths)
    tokens = max(lengths.longest * config.train.answers, config.train.micro_tokens)  # a micro-batch has all answers of a row
    return _filling(config, lengths.longest, min(tokens, lengths.step), window)


def _known(config: RunConfig, lengths: RowLengths | None) -> RowLengths:
    """The lengths of the rows, or the most that they can have. Padded rows are all as long as the longest."""
    most, batch = config.data.max_tokens, config.train.sequences
    lengths = RowLengths(most, most * batch) if lengths is None else lengths.within(config)
    return replace(lengths, step=lengths.longest * batch) if _padded(config) else lengths


def _padded(config: RunConfig) -> bool:
    """Whether rows are padded to the longest of their batch: by any attention but Lorakeet's own."""
    return config.model.attention in ("sdpa", "eager")


def _filling(config: RunConfig, length: int, tokens: int, window: int | None) -> RowShape:
    rows = filling_rows(length, tokens, window)
    return replace(rows, last=None) if _padded(config) else rows


def window_of(model_config: Any) -> int | None:
    """The tokens that attention sees of a row, where the model of this configuration has such a limit."""
    limit = getattr(model_config.get_text_config(), "sliding_window", None)
    return limit if isinstance(limit, int) else None


@dataclass(frozen=True)
class Workload:
    """What is in memory before the model: whether rows have labels (None: not known yet), and how many characters they have.

    Rows without labels are answered in words. `lengths` encodes the rows, in memory from then on; `absent`: an earlier process
    has. For a search also how many adapters are in training at once, and the pairs of the largest, if they are not the run's.
    `refused`: why no run starts with these rows.
    """

    labelled: bool | None = None
    characters: int = 0
    members: int = 1
    lora: LoraSpec | None = None
    lengths: Callable[[], RowLengths] | None = None
    absent: bool = False
    refused: str = ""

    def floors(self, config: RunConfig, *, on_gpu: bool) -> int:
        """Bytes of the simple baselines: SciPy, and the terms of the rows' characters. Nothing on a GPU."""
        if on_gpu or not config.evaluate.baselines or (self.labelled is False and not config.evaluate.answers):
            return 0
        return max(FLOORS, SCIPY + CHARACTER_BYTES * min(self.characters, CHARACTERS))


def evaluation_of(
    config: RunConfig, lengths: RowLengths | None = None, *, answered: bool = True, model_config: Any = None
) -> EvaluationSize:
    """The largest micro-batch of held-out rows, of those of the final evaluation and of the certificate; the texts of the drift;
    and, where rows may end in answers (`answered`), the most replies that are written together.

    Whatever the `lengths` of rows, the few-shot base sees evaluate.examples before them: up to data.max_tokens under a budget,
    else up to `widest` in the model of `model_config`.
    """
    spec, most = config.evaluate, config.data.max_tokens
    window, context = (None, None) if model_config is None else (window_of(model_config), context_of(model_config))
    length = most if lengths is None or spec.examples else lengths.within(config).longest
    if spec.examples and not config.memory.limit:
        length = widest(most, context)
    at_once = max(config.train.micro_tokens, CHECK_TOKENS, length)
    replies = None
    if answered and spec.answers:
        longest = min(filter(None, (length + spec.answer_tokens, context)))  # no prompt is answered that leaves too few tokens
        replies = filling_rows(longest, max(config.train.micro_tokens, REPLY_TOKENS, longest), window)
    return EvaluationSize(_filling(config, length, at_once, window), spec.drift_texts, spec.drift_tokens, replies)


def filling_rows(length: int, tokens: int, window: int | None = None) -> RowShape:
    """Rows of `length` tokens that fill `tokens`, the last one with what is left.

    No other rows of at most `length` hold more, whatever grows with the square of a row (soft caps, dropout of attention). Where
    only rows longer than the attention's `window` hold that, the last one counts as such a row if another could be one.
    """
    count = math.ceil(tokens / length)
    last = tokens - (count - 1) * length
    if window is not None and last <= window < length and count * (window + 1) <= tokens:
        last = window + 1
    return RowShape(length, count, last=None if last == length else last)


@with_any_attention
def forecast_run(
    config: RunConfig,
    model_config: Any,
    precision: Precision,
    *,
    runtime: int,
    files: Path | None = None,
    returning: bool = False,
    workload: Workload | None = None,
    way: Way = RESIDENT,
) -> TextRunPlan:
    """What a run of `config` on the model of `model_config` will hold; `returning` (a run under a budget) as in memory/forecast.

    `runtime` is what the process holds beside tensors and tokenizer, `files` the model's folder or .gguf file where there is one,
    `workload` what is known of the rows, `way` how blocks are streamed. ConfigError for settings that do not fit, NotPlanned.
    """
    workload, on_gpu = workload or Workload(), precision.on_gpu
    lengths = None if workload.lengths is None else workload.lengths()
    words = 0 if on_gpu else TOKENIZER_ENTRY * int(model_config.get_text_config().vocab_size)
    read = words if lengths is None else 0  # what is encoded is counted in `runtime`, with its tokenizer
    rows, full, several = _step_of(config, lengths, window_of(model_config))
    evaluation = evaluation_of(config, lengths, answered=not workload.labelled, model_config=model_config)
    build, count, best = builder_of(config.model, way, model_config, precision, files), max(several, way.together), not returning
    step: dict[str, Any] = {"micro_batches": count, "way": way, "evaluation": evaluation, "best_in_memory": best and not on_gpu}

    def rehearsed(lora: LoraSpec, rows: RowShape = rows) -> Rehearsal:
        parts = partial(rehearsal_key, config, model_config, files, precision, way, lora, rows, step)
        with standing_for(precision.device):
            return remembered(parts, partial(rehearse, build, lora, config.train, rows=rows, **step))
    found, before = _before_steps(config, rehearsed, partial(rehearsed, rows=full))
    load, final = load_peak(model_config, found, precision), found.peaks[FINAL]
    floors = workload.floors(config, on_gpu=on_gpu)
    adapter = VALUE * finished_plan(config, found.plan).parameters
    kept = add_usage(Usage(), base=found.base, adapter=adapter)
    evaluated = add_usage(larger_usage(final, add_usage(kept, scratch=0 if on_gpu else INTERVALS)), runtime=floors)
    alone, beside = certified_within(found, kept, adapter), certified_beside(found, kept, adapter, load=load, words=words)
    again = alone if returning else larger_usage(beside, _by_peft(config, model_config, found, kept, adapter, words))
    steps = {name: peak for name, peak in with_importance(config, found).items() if name in (STEP, EVALUATE, CHECKPOINT)}
    held = {LOAD: load, **before, **steps, FINAL: evaluated}
    phases = phases_on_gpu if on_gpu else phases_of

    def run_with(certified: Usage) -> tuple[Phase, ...]:
        whole = with_reference(config, held | {CERTIFY: add_usage(certified, runtime=floors)}, adapter, on_gpu=on_gpu)
        return phases(whole, runtime + read, returning=returning, trimmed_before=(STEP, FINAL) if before else (FINAL,))

    def together(members: int, *, searching: bool = True) -> Phase:
        held = while_trying(config, found, rows, members, searching=searching)
        return phases({SEARCH: held}, runtime + read, returning=returning)[0]

    run = run_with(again)
    about: dict[str, Any] = {"together": together, "alone": run_with(alone)[-1], "alike": found.alike}
    if way.streamed:
        about |= {"blocks": found.blocks, "block_bytes": allocated_bytes(found.block_bytes) if on_gpu else found.block_bytes}
        return TextRunPlan(Forecast(run), found.plan, rows, found.work, found.base, **about)
    later = () if on_gpu else _later(found, adapter, runtime + words)  # whose models are compared on the CPU
    trial = together(len(QUICK_FACTORS), searching=False)
    return TextRunPlan(Forecast((*run, *later)), found.plan, rows, found.work, found.base, trial, **about)


def _by_peft(config: RunConfig, model_config: Any, found: Rehearsal, kept: Usage, adapter: int, words: int) -> Usage:
    """What is in memory beside the model while PEFT's logits are compared, where they are; `words` are of a tokenizer."""
    more = {}
    if config.model.quantize.method == "none":
        more = bytes_with_peft(found.plan.frozen_parameters, int(model_config.get_text_config().vocab_size))
    return add_usage(add_usage(kept, **more), adapter=2 * adapter, runtime=words)


def _step_of(config: RunConfig, lengths: RowLengths | None, window: int | None) -> tuple[RowShape, RowShape, int]:
    """The largest micro-batch of a step, one that more rows than a step's fill, and 2 where a step may have several, else 1."""
    rows = largest_rows(config, lengths, window)
    full = _filling(config, rows.length, max(rows.length * config.train.answers, config.train.micro_tokens), window)
    several = config.train.sequences > rows.count or _known(config, lengths).step > rows.tokens
    return rows, full, 2 if several else 1


def _before_steps(
    config: RunConfig, rehearsed: Callable[[LoraSpec], Rehearsal], measured: Callable[[LoraSpec], Rehearsal]
) -> tuple[Rehearsal, dict[str, Usage]]:
    """The rehearsal of a run, and what it holds while rows are measured and while pairs begin from the weights, where it does.

    Rows are `measured` in full micro-batches, of more rows than a step has.
    """
    found = rehearsed(config.lora)
    measuring = while_measuring(config, found, measured)
    before = {} if measuring is None else {SCORE: measuring}
    if config.ranks.choose == "auto":
        found = with_largest_ranks(config, found, rehearsed)
    if reads_weights(config):
        before[BEGIN] = found.peaks[BEGIN]
    return found, before


def certified_within(found: Rehearsal, kept: Usage, adapter: int) -> Usage:
    """The peak of a certificate on the live base: what is read has gone when anything computes, until then it stands beside
    the pairs that it becomes.
    """
    unpacked = torch.float32.itemsize * found.packed  # the buffer of all packed weights
    reading = add_usage(kept, adapter=2 * adapter, scratch=unpacked)
    return larger_usage(reading, add_usage(found.peaks[FINAL], adapter=adapter))


def certified_beside(found: Rehearsal, kept: Usage, adapter: int, *, load: Usage, words: int) -> Usage:
    """The peak of a certificate with a second base and tokenizer (`words`) beside the first: loaded, or compared with it."""
    loading = add_usage(kept, **load.kinds, runtime=words)
    return larger_usage(loading, add_usage(found.peaks[FINAL], base=found.base, adapter=2 * adapter, runtime=words))


def load_peak(model_config: Any, found: Rehearsal, precision: Precision) -> Usage:
    """The base, and while it is read: tensors as stored where the dtype changes (models/files/dense), or what is being packed."""
    if precision.on_gpu:  # where only what is whole arrives
        return add_usage(Usage(), base=found.base)
    stored = stored_dtype(model_config)
    if found.packed or found.blocks:
        cast = precision.dtype.itemsize if found.blocks and stored != precision.dtype else 0
        at_load = not stored_quantisation(model_config)
        return add_usage(Usage(), base=found.base, scratch=found.being_packed(stored.itemsize, cast, at_load=at_load))
    return add_usage(Usage(), base=found.base, scratch=found.being_cast(stored, precision.dtype))


def _later(found: Rehearsal, adapter: int, runtime: int) -> tuple[Phase, ...]:
    """The merged model, in fp32, and the GGUF file in llama.cpp, in f16, compared with base + adapter in fp32, weight by weight;
    writing them takes less. Each is a process of its own.
    """
    whole = found.parameters * torch.float32.itemsize
    sizes, scratch = {MERGE: 2 * whole, EXPORT: whole + whole // 2}, 4 * torch.float32.itemsize * found.largest
    peaks = {name: add_usage(Usage(), base=base, adapter=2 * adapter, scratch=scratch) for name, base in sizes.items()}
    return tuple(phases_of({name: peak}, runtime)[0] for name, peak in peaks.items())


def budget_of(config: RunConfig, plan: Plan) -> int:
    """Parameters of all pairs that --ranks auto may spend: ranks.budget, or as many as lora.rank takes. Raises ConfigError."""
    return pair_parameters(plan) if config.ranks.budget is None else parameter_count(config.ranks.budget, "ranks.budget")


def largest_ranks(config: RunConfig, plan: Plan) -> LoraSpec:
    """Of all ways to spend the budget of --ranks auto, the one with the most rank, which holds the most memory.

    Adapter, gradients and moments follow the parameters, which are the budget's whatever is chosen; what is saved of a token for
    the backward pass follows the sum of all ranks, which is largest where the cheapest matrices get them. Raises ConfigError
    for a budget that cannot be spent.
    """
    step = 2 if config.lora.start == "orthogonal" else 1
    alike = {entry.path: [1.0] * min(config.ranks.max_rank, entry.largest_rank) for entry in plan.entries}
    most = allocate(plan, alike, budget_of(config, plan), largest=config.ranks.max_rank, step=step)
    return replace(config.lora, rank_pattern=rank_pattern(most, config.lora))


def with_largest_ranks(config: RunConfig, found: Rehearsal, rehearsed: Callable[[LoraSpec], Rehearsal]) -> Rehearsal:
    """The rehearsal of a run with `largest_ranks`, and beside it what another choice may hold: what was left of the budget, and
    the largest product of one pair. `found` is that of the run with lora.rank.
    """
    most = rehearsed(largest_ranks(config, found.plan))
    left = max(0, budget_of(config, found.plan) - pair_parameters(most.plan))
    widest = VALUE * config.ranks.max_rank * max((rank_cost(entry) for entry in found.plan.entries), default=0)
    kept = {"adapter": 2 * VALUE * left, "moments": 2 * VALUE * left}
    peaks = {
        name: add_usage(peak, scratch=widest, **(kept if "moments" in peak.kinds else {})) for name, peak in most.peaks.items()
    }
    peaks[STEP] = add_usage(peaks[STEP], gradients=VALUE * left)
    return replace(most, peaks=peaks)


def with_importance(config: RunConfig, found: Rehearsal) -> Mapping[str, Usage]:
    """The peaks of a run; under ranks.choose prune with the two means that it keeps of each number, beside the moments.

    These are of the first ranks. They only fall, and what is kept of them with them, so that this bounds every later step.
    Raises ConfigError for a budget that leaves nothing, or nothing to cut, and for train.steps that are too few to prune in; how
    many steps a number of epochs takes is known with the rows only.
    """
    if config.ranks.choose != "prune":
        return found.peaks
    if config.train.steps is None:
        final_budget(config.ranks, found.plan)
    else:
        cuts_of(config, found.plan, config.train.steps)
    kept = 2 * VALUE * pair_parameters(found.plan)
    return {name: add_usage(peak, moments=kept) if "moments" in peak.kinds else peak for name, peak in found.peaks.items()}


def while_measuring(config: RunConfig, run: Rehearsal, rehearsed: Callable[[LoraSpec], Rehearsal]) -> Usage | None:
    """The peak while training rows are measured, for --ranks auto or for lora.start; None if neither needs it.

    `run` is the rehearsal of the run, `rehearsed` rehearses one with other pairs.
    """
    wanted: list[tuple[str, int]] = []
    if config.ranks.choose == "auto":
        wanted.append((config.ranks.score, config.ranks.max_rank))
    if config.lora.start in MEASURED:
        wanted.append((config.lora.start, max(entry.rank for entry in run.plan.entries)))
    if not wanted:
        return None
    if gradients := [largest for what, largest in wanted if what == "gradient"]:
        return _with_gradients(config, run, rehearsed, max(gradients))
    sides = {"activation": 1, "sensitivity": 0}  # of (out, in)
    sizes = [[(largest + OVERSAMPLING, entry.shape[sides[what]]) for entry in run.plan.entries] for what, largest in wanted]
    sketches = max(sum(math.prod(size) for size in each) for each in sizes)
    decomposed = max(_decomposing(*size) for each in sizes for size in each)
    found = add_usage(Usage(), base=run.base, scratch=3 * VALUE * sketches + decomposed)  # the directions of each beside both
    return larger_usage(add_usage(run.peaks[EVALUATE], scratch=2 * VALUE * sketches), found)


def _decomposing(directions: int, width: int) -> int:
    """Bytes while one matrix (directions, width) of what was measured is taken apart in fp64: as it is, scaled, its vectors, the
    other half of the rows or a product with these, and what LAPACK works in: no less where it stands upright, as sketches do."""
    own = WIDE * directions * width
    values = [svd_bytes(width, directions, WIDE, vectors=vectors) for vectors in (True, False)]
    return 5 * own + max(*values, eigh_bytes(directions, WIDE)) + 4 * WIDE * directions**2


def _with_gradients(config: RunConfig, run: Rehearsal, rehearsed: Callable[[LoraSpec], Rehearsal], largest: int) -> Usage:
    """Of temporary pairs with their gradients, and what both halves of the rows have shown; then of taking that apart."""
    sketch = sketch_plan(run.plan, largest)
    plain = replace(config.lora, alpha=1.0, variant="lora", start="kaiming", dropout=0.0, extra_modules=(), new_tokens=())
    found = rehearsed(replace(plain, rank_pattern=rank_pattern(sketch, plain)))
    step = found.peaks[STEP]
    kinds = {**step.kinds}
    if found.best_in_memory:  # of which there are none yet
        kinds["adapter"] = kinds.get("adapter", 0) - VALUE * sketch.parameters
    kinds.pop("moments", None)
    half = sum(math.prod(entry.shape_a) for entry in sketch.entries)
    decomposed = max(_decomposing(entry.rank, math.prod(entry.shape_a) // entry.rank) for entry in sketch.entries)
    kinds["scratch"] = kinds.get("scratch", 0) + VALUE * 2 * half
    scoring = Usage(sum(kinds.values()), kinds, step.heap)
    return larger_usage(scoring, add_usage(Usage(), base=run.base, scratch=VALUE * 3 * half + decomposed))


def measures_rows(config: RunConfig) -> str:
    """The setting by which training rows are measured before the first step; empty where none does."""
    if config.ranks.choose == "auto":
        return "ranks.choose auto"
    return f"lora.start {config.lora.start}" if config.lora.start in MEASURED else ""


def reads_weights(config: RunConfig) -> bool:
    """Whether pairs begin from the weights, one matrix in fp32 at a time; all others begin with less than a step takes."""
    return config.lora.start in FACTORED or config.lora.variant == "dora"


def decomposes(config: RunConfig) -> bool:
    """Whether a run takes matrices apart before its first step: those of the model, or what it measured on training rows."""
    return config.lora.start in ("orthogonal", *FACTORED) or bool(measures_rows(config))


def finished_plan(config: RunConfig, plan: Plan) -> Plan:
    """The Plan of the adapter that a run with `plan` writes: a pair with initial values of its own is written with twice the
    rank.
    """
    if config.lora.start not in FACTORED:
        return plan
    doubled = (replace(entry, rank=2 * entry.rank, alpha=2 * entry.alpha, start="kaiming") for entry in plan.entries)
    return replace(plan, entries=tuple(doubled))


def while_trying(
    config: RunConfig, found: Rehearsal, rows: RowShape, members: int = len(QUICK_FACTORS), *, searching: bool = False
) -> Usage:
    """The peak while `members` adapters are trained together, each with gradients and moments, in passes of micro_tokens or
    one row. `searching` (verbs/tune) their best values are kept too, as where no disk takes them, and those of two others.
    """
    step = found.peaks[STEP]
    own = VALUE * found.plan.parameters
    copies = 2 if found.best_in_memory else 1  # a run keeps its best values too, a trial none
    tokens = max(rows.tokens, min(config.train.micro_tokens, members * rows.tokens))
    moments = step.kinds.get("moments", 2 * own)  # a quarter of that in 8 bits
    more = max(0.0, padded_count(tokens, few_counts=True) / padded_count(rows.tokens, few_counts=False) - 1)
    passing = {kind: round(more * step.kinds.get(kind, 0)) for kind in ("saved activations", "logits", "scratch")}
    passing["scratch"] += (members - 1) * _laid_out(found.plan)
    anchors = VALUE * (finished_plan(config, found.plan).parameters - found.plan.parameters)
    kept = members + 2 if searching else 0
    adapters = (members - copies + kept) * own + (members - 1 + kept) * anchors
    training = add_usage(step, adapter=adapters, moments=(members - 1) * moments, gradients=(members - 1) * own, **passing)
    return larger_usage(training, add_usage(found.peaks[BEGIN], adapter=(members - 1 + kept) * (own + anchors)))


def _laid_out(plan: Plan) -> int:
    """Bytes in which kernels/cpu/trained_pairs lays one member's pairs out for a call, at most: in bf16, ranks in whole LANES.

    At most three pairs see the same x.
    """
    sizes = sorted(2 * sum(entry.shape) * -(-entry.rank // LANES) * LANES for entry in plan.entries if entry.kind == "linear")
    return sum(sizes[-3:])

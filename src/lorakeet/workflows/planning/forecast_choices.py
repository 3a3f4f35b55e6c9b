"""The memory of a run before its first step, while ranks are measured and rates tried, and the largest run of a rank budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from lorakeet.config import RunConfig
from lorakeet.core.plan import Plan
from lorakeet.core.spec import FACTORED, MEASURED, LoraSpec
from lorakeet.kernels.cpu.operators import LANES
from lorakeet.memory.lapack import eigh_bytes, svd_bytes
from lorakeet.memory.usage import Usage, add_usage, larger_usage
from lorakeet.models.text.model import padded_count
from lorakeet.ranks.allocate import allocate, pair_parameters, rank_cost, rank_pattern
from lorakeet.ranks.prune import final_budget
from lorakeet.ranks.score import OVERSAMPLING, sketch_plan
from lorakeet.ranks.spec import parameter_count
from lorakeet.workflows.planning.rehearse_text import BEGIN, EVALUATE, STEP, Rehearsal, RowShape
from lorakeet.workflows.runs.pruning import cuts_of
from lorakeet.workflows.runs.search_space import QUICK_FACTORS

WIDE = 8  # bytes of a number in fp64
VALUE = 4  # bytes of a trained number, of its gradient, and at most of each of its two moments


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
    gradients = [largest for what, largest in wanted if what == "gradient"]
    if gradients:
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
    one row. `searching` (workflows/tune) their best values are kept too, as where no disk takes them, and those of two others.
    """
    step = found.peaks[STEP]
    own = VALUE * found.plan.parameters
    copies = 2 if found.best_in_memory else 1  # a run keeps its best values too, a trial none
    tokens = max(config.data.max_tokens, min(config.train.micro_tokens, members * rows.tokens))
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

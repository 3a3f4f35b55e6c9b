"""How the check of a merged or exported model fits into a memory budget: its models whole in fp32, or streamed.

A check compares what base + adapter compute with what the artefact computes. Its phases, each with a peak of its own:

    load       a model is read, or goes block by block into its store
    weights    every stored tensor against the one it should be
    ask        if models are streamed: llama.cpp computes, and its outputs wait on disk
    compare    both compute; streamed models one after the other, the outputs of the first or the batches waiting on disk
    intervals  of what was found, once no model computes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from lorakeet.config import RunConfig
from lorakeet.core.adapter import Adapter
from lorakeet.core.plan import Plan
from lorakeet.data.chat import Candidates, Encoder, Example, Ids
from lorakeet.data.prepare import Dataset
from lorakeet.data.rows import Row
from lorakeet.errors import DataError
from lorakeet.evaluate.parity import CELLS
from lorakeet.evaluate.wording import bytes_text
from lorakeet.exporting.gguf_model import DIRECT, GgufTensors, wide_type
from lorakeet.exporting.llama_cpp import PASS, context_bytes
from lorakeet.exporting.merged_tensors import PART_BYTES
from lorakeet.memory.budget import Budget
from lorakeet.memory.forecast import Forecast, Phase, phases_of
from lorakeet.memory.free import fits_now
from lorakeet.memory.usage import Usage, add_usage
from lorakeet.merging.merged_folder import FP32_COPIES
from lorakeet.models.families import family_of_model
from lorakeet.models.files.quantized import plain_config
from lorakeet.models.files.source import find_source
from lorakeet.models.files.stored_tensors import stored_dtype
from lorakeet.models.fits import plan_of
from lorakeet.models.generate.sample import spilled_bytes
from lorakeet.models.generate.score import distinguishing
from lorakeet.models.placement import device_for
from lorakeet.models.streaming.load import bytes_of_storing, empty_model
from lorakeet.models.text.load import load_tokenizer, read_config
from lorakeet.planning.fit import BudgetedWork, Say, choose, fit_budget
from lorakeet.planning.forecast_text_run import (
    EXPORT,
    INTERVALS,
    MERGE,
    TOKENIZER_ENTRY,
    filling_rows,
    finished_plan,
    text_runtime_bytes,
)
from lorakeet.planning.planned_model import Precision, builder_of
from lorakeet.planning.rehearse_text import FINAL, EvaluationSize, NotPlanned, Rehearsal, RowShape, rehearse_evaluation
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.open_adapter import Opened
from lorakeet.runs.residency import ALONE, RESIDENT, STREAMED_WAYS, MemoryPlan, Way

COPIES = 4  # of a matrix in fp32: as it is, its change, their sum, and one as it was stored or is compared
FP32 = 4  # bytes
UNCHANGED, CHANGED = 3, 6  # of a stored matrix, as it is read and compared or written: without a change, and with one
ROW_LOGITS = 3  # tables of logits (tokens, vocabulary) at once: live, base and the artefact's
COMPARED = 10 * 8  # bytes for each of the CELLS logits that are compared at once, in fp64 (evaluate/parity)
ROWS_TOGETHER = 1024  # tokens of rows that are computed at once, unless the budget needs rows cut
MERGE_TOKENS = 2048  # of a micro-batch in the check of a merged model
GREEDY_TOKENS = 64  # of a greedy continuation
SAMPLED_TEXTS, SAMPLED_TOKENS = 16, 64  # that the base writes, where there are no held-out rows
FEWEST_TOKENS = 128  # of a row: a check of fewer says little
STATES = 0.125  # of the weights: the states of a pass, and what torch's allocator keeps on a GPU
MARGIN = 16  # positions of llama.cpp's context beyond the longest row and its continuation
SERVERS = ("http://", "https://")


@dataclass(frozen=True)
class CheckSize:
    """What is compared with base + adapter, and how much of it is in memory at once, beside the models."""

    what: str  # such as "the check of a merged model"
    evaluation: EvaluationSize  # the largest batch, and the texts that the base writes
    models: int = 2  # in torch, base + adapter among them; the other side may be llama.cpp or a server
    row: int = 0  # positions of a row whose logits are in memory at once
    tensors: bool = False  # whether stored tensors are compared whole, also those that the adapter does not change
    writing: int = 0  # bytes in memory while the artefact is written
    beside: int = 0  # bytes that another program uses in this process
    waiting: int = 0  # bytes of the artefact's outputs, which wait on disk if models are streamed
    artefact: int = 0  # bytes of it on disk, if it is still to be written
    more_stores: int = 0  # beside one for each model, if they are streamed


CheckSizes = Callable[[int | None], CheckSize]  # of the check of each row's first tokens; None: all


def size_of_merge(longest: int, writing: int, texts: tuple[int, int] = (0, 0)) -> CheckSize:
    """What the check of a merged model takes, with rows of `longest` tokens or `texts` (count, tokens) that the base writes.

    `writing` is what writing the model takes, in bytes.
    """
    evaluation = EvaluationSize(filling_rows(longest, max(longest, MERGE_TOKENS)), *texts)
    return CheckSize("the check of a merged model", evaluation, writing=writing)


def size_of_check(
    opened: Opened, targets: Sequence[str], source: Path, what: str, longest: int | None = None, *, rows: int, memory: int = 0,
    disk: int = 0,
) -> CheckSize:  # fmt: skip
    """What comparing `rows` rows with `targets` takes: a second model in torch for a merged folder, llama.cpp's for a GGUF file.

    `memory` and `disk` are the bytes that writing them takes, if they are still to be written; of each row the first `longest`
    tokens are compared.
    """
    length, answers = _measured(opened, source, rows) if opened.run else (SAMPLED_TOKENS + 1, 0)
    length = (length if longest is None else min(length, longest)) + GREEDY_TOKENS
    together = max(length, ROWS_TOGETHER) if opened.run and longest is None else length
    files = [Path(target) for target in targets if not target.startswith(SERVERS)]
    folders = [file for file in files if not maps_a_file([str(file)])]
    llama, text = len(files) > len(folders), read_config(source).get_text_config()
    texts = (1, length) if opened.run else (SAMPLED_TEXTS, SAMPLED_TOKENS)
    return CheckSize(
        what,
        EvaluationSize(filling_rows(length, together), *texts),
        models=2 if folders else 1,
        row=min(length, PASS) if len(files) == len(targets) else length,
        tensors=bool(files),
        beside=context_bytes(text, length + MARGIN) if llama else 0,
        waiting=FP32 * ((rows + 1) * length + answers) * int(text.vocab_size) if files else 0,
        writing=memory,
        artefact=disk,
    )


def maps_a_file(targets: Sequence[str]) -> bool:
    """True if llama.cpp maps a file of one of these."""
    files = [Path(target) for target in targets if not target.startswith(SERVERS)]
    return any(not file.is_dir() or (file / "model.gguf").is_file() for file in files)


def compared_rows(dataset: Dataset, encoder: Encoder, rows: int) -> tuple[list[tuple[Row, Example]], list[Candidates]]:
    """The first `rows` held-out rows that are short enough, and the prompts and labels of those that have a label.

    Raises DataError if none is short enough.
    """
    chosen: list[tuple[Row, Example]] = []
    for row in dataset.held_out:
        example = encoder.encode(row)
        if example is not None and not example.truncated and len(chosen) < rows:
            chosen.append((row, example))
    if not chosen:
        raise DataError("Every held-out row is longer than data.max_tokens; raise --data.max_tokens or hold out other rows.")
    return chosen, [found for row, _ in chosen if dataset.labels and (found := encoder.candidates(row)) is not None]


def _measured(opened: Opened, source: Path, rows: int) -> tuple[int, int]:
    """Tokens of the longest held-out row that will be compared, and after how many positions the answers of labelled rows need
    logits; data.max_tokens and none without a budget.
    """
    if not opened.config.memory.limit:
        return opened.config.data.max_tokens, 0
    dataset, tokenizer = opened.dataset, load_tokenizer(opened.tokenizer or source)
    chosen, labelled = compared_rows(dataset, Encoder(tokenizer, opened.config.data, dataset.labels), rows)
    return max(len(example.ids) for _, example in chosen), sum(positions_of_answer(row, tokenizer) for row in labelled)


def positions_of_answer(row: Candidates, tokenizer: Any) -> int:
    """After how many tokens choosing a label needs logits."""
    endings = distinguishing_endings(row, tokenizer)
    return 1 if all(len(ending) == 1 for ending in endings) else sum(len(ending) + 1 for ending in endings)


def distinguishing_endings(row: Candidates, tokenizer: Any) -> list[Ids]:
    """The tokens that tell each label from the others."""
    return distinguishing(row.completions, frozenset(int(number) for number in tokenizer.all_special_ids))


def adapted_bytes(plan: Plan, largest: int) -> int:
    """Bytes in fp32 of the largest matrix that the adapter changes; of a stack of experts, one of them.

    What is trained whole or in rows counts as the `largest` of the model, in numbers.
    """
    sizes = [math.prod(entry.shape[1:] if entry.kind == "experts" else entry.shape) for entry in plan.entries]
    return FP32 * max([*sizes, *(largest for _ in plan.extras)], default=0)


def tensor_peak(changed: int, largest: int) -> int:
    """Bytes of one stored tensor while it is made and written, or read and compared: in fp32 the largest that an adapter
    changes has `changed` bytes, and the largest of all `largest` numbers, of which a part is read at a time."""
    return max(CHANGED * changed, min(UNCHANGED * FP32 * largest, PART_BYTES))


def logits_bytes(row: int, vocabulary: int) -> int:
    """Bytes of logits while those after `row` tokens are compared: a table of each side, and copies of a part of two of
    them, or while the last side computes the tiles that its table is put together from."""
    table = row * vocabulary
    return FP32 * ROW_LOGITS * table + max(COMPARED * min(CELLS, table), FP32 * table)


def fit_check(opened: Opened, size_of: CheckSize | CheckSizes, out: Path, console: Console) -> Opened:
    """`opened` with how its models keep its budget in a check; without a budget on the CPU where a GPU has too little
    memory for them. Raises as `fit_budget`.

    With a function, which gives the size of the check of each row's first tokens, rows are cut if longer ones do not fit: keys
    and values of 2,048 tokens of Llama-2-7B take 2 GiB in fp32, in llama.cpp at once. The folder of the stores is beside `out`
    unless memory.store names one (runs/residency.temporary_stores).
    """
    budget = opened.config.memory.limit
    sizes = (lambda _: size_of) if isinstance(size_of, CheckSize) else size_of
    say = partial(console.print, markup=False, soft_wrap=True)
    on_cpu = opened.over(replace(opened.config.model, device="cpu"))
    if not budget:
        why = _why_not_on_its_gpu(opened, ModelCheck(sizes, opened, out, say))
        if why:
            say(why)
        return on_cpu if why else opened
    opened = on_cpu  # the budget bounds the process
    cut = opened.run is not None and not isinstance(size_of, CheckSize)
    return replace(opened, residency=fit_budget(ModelCheck(sizes, opened, out, say, cut=cut), budget, say))


def _why_not_on_its_gpu(opened: Opened, work: ModelCheck) -> str:
    """Why a check without a budget does not compute on the GPU that its models would be on; empty if it does, or has none."""
    size, device = work.sizes(None), opened.config.model.device
    vocabulary = int(work.model[0].get_text_config().vocab_size)
    logits = logits_bytes(size.row or ROWS_TOGETHER, vocabulary)
    why = why_not_on_gpu(work.what, device, work.empty, copies=size.models, beside=logits)
    return f"{why} --memory bounds what it takes." if why else ""


def why_not_on_gpu(
    what: str, name: str, model: nn.Module, *, dtype: torch.dtype = torch.float32, copies: int = 1, beside: int = 0
) -> str:
    """Why `what` is computed on the CPU, though the device `name` is a GPU: `copies` of the `model`, with weights in `dtype`, and
    `beside` bytes take more than is free on it. Empty where they fit, or where there is no GPU."""
    device = device_for(name)
    if device.type != "cuda":
        return ""
    weights = dtype.itemsize * copies * sum(parameter.numel() for parameter in model.parameters())
    needed = int(weights * (1 + STATES)) + beside
    if fits_now(needed, device):
        return ""
    said = "fp32" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    return (
        f"The CPU computes {what}: it takes about {bytes_text(needed)} with its weights in {said}, more than is free on {device}."
    )


class ModelCheck(BudgetedWork[MemoryPlan]):
    """A check of a model with a finished adapter."""

    out: Path
    remedy = "Free some space, or name a folder on another disk with memory.store in the run's config.yaml."

    def __init__(self, sizes: CheckSizes, opened: Opened, out: Path, say: Say, *, cut: bool = False) -> None:
        self.sizes, self.adapter, self.say, self.cut = cache(sizes), opened.adapter, say, cut
        self.spec, self.ids = opened.config.model, opened.adapter.token_ids
        self.out, self.named_store, self.what = out, opened.config.memory.store, sizes(None).what

    @cached_property
    def model(self) -> tuple[Any, Path | None]:
        """The configuration of the model, and its files if they are here."""
        source = find_source(self.spec, self.say)
        return read_config(source), source

    @cached_property
    def empty(self) -> Any:
        """The model without numbers."""
        return empty_model(self.model[0], torch.float32)

    @cached_property
    def pairs(self) -> Plan:
        """The adapter's pairs."""
        return plan_of(self.empty, self.adapter)

    @property
    def precision(self) -> Precision:
        """How the weights are stored and multiplied."""
        return Precision(torch.float32, torch.float32, self.spec.quantize)

    @cached_property
    def runtime(self) -> int:
        """Bytes of the process beside the tensors."""
        return text_runtime_bytes(self.precision)

    def ways(self, budget: int) -> Iterator[Way]:
        """In memory, with two blocks of each model, with one; then the same of rows cut in half, again and again."""
        longest: int | None = None
        while True:
            size = self.sizes(longest)
            length = size.evaluation.rows.length - GREEDY_TOKENS
            shortest = not self.cut or length <= FEWEST_TOKENS
            if shortest or self.runtime + size.beside <= budget:  # else llama.cpp alone takes more
                for way in (RESIDENT, *STREAMED_WAYS):
                    yield replace(way, longest=longest)
            if shortest:
                return
            longest = max(FEWEST_TOKENS, length // 2)

    def plan(self, way: Way) -> MemoryPlan:
        runtime = self.runtime  # measured before the rehearsal, which leaves some memory behind
        size, (config, source) = self.sizes(way.longest), self.model
        build = builder_of(self.spec, way, config, self.precision, source)
        found = rehearse_evaluation(build, self.pairs, size.evaluation, token_ids=self.ids)
        there = way.slots * found.block_bytes
        own = (found.base - there) * size.models  # what models have in memory all along: all of it, if they are not streamed
        text, adapter = config.get_text_config(), FP32 * self.pairs.parameters
        changed = adapted_bytes(self.pairs, found.largest)  # compared once blocks have left, before llama.cpp starts
        comparing = tensor_peak(changed, found.largest) if size.tensors else COPIES * changed
        held = {
            "load": add_usage(Usage(), base=own, adapter=adapter, scratch=bytes_of_reading(found, config, self.empty)),
            "weights": add_usage(Usage(), base=own, adapter=adapter, scratch=comparing),
            "ask": add_usage(Usage(), base=own, adapter=adapter, runtime=size.beside),
            "compare": add_usage(
                found.peaks[FINAL], base=own + there - found.base, runtime=0 if way.streamed else size.beside,
                logits=logits_bytes(size.row, int(text.vocab_size)),
            ),
            "intervals": add_usage(Usage(), base=own + there, adapter=adapter, scratch=INTERVALS),
            "write": add_usage(Usage(), scratch=size.writing),
        }  # fmt: skip
        words = TOKENIZER_ENTRY * int(text.vocab_size) * size.models
        phases = phases_of(held, runtime + words, returning=True)
        growing = () if way.slots == ALONE else None  # two blocks did not fit
        return MemoryPlan(Forecast(phases), blocks=found.blocks, block_bytes=found.block_bytes, growing=growing)

    def words(self, way: Way, plan: MemoryPlan) -> str:
        mapped = "; the pages of the file that llama.cpp maps are not counted" if self.sizes(way.longest).beside else ""
        return super().words(way, plan) + mapped

    def disk(self, way: Way, plan: MemoryPlan) -> Mapping[Path, int]:
        size = self.sizes(way.longest)
        numbers = sum(parameter.numel() for parameter in self.empty.parameters())
        stored = FP32 * numbers * (size.models + size.more_stores)
        return {self.folder: stored + size.waiting + self.spilled(size, plan.blocks), self.out: size.artefact}

    def spilled(self, size: CheckSize, blocks: int) -> int:
        """Bytes on disk of the keys and values of a text that a streamed model writes, of which one at a time may be there."""
        evaluation = size.evaluation
        longest = max(evaluation.text_tokens + 1, evaluation.rows.length)
        return spilled_bytes(self.model[0].get_text_config(), longest, blocks) if evaluation.texts else 0


class _LaterCheck(ModelCheck):
    """The same before there is an adapter, of its `pairs` and the model's configuration alone."""

    def __init__(self, sizes: CheckSizes, config: RunConfig, dense: Any, pairs: Plan, *, cut: bool) -> None:
        self.sizes, self.model, self.pairs, self.cut = cache(sizes), (dense, None), pairs, cut
        self.spec, self.ids = replace(config.model, quantize=QuantSpec()), tuple(range(len(config.lora.new_tokens)))


def bytes_of_reading(found: Rehearsal, config: Any, empty: nn.Module) -> int:
    """Bytes beside a model in fp32 while it is read: a block on its way into the store, or tensors in a file's other dtype."""
    stored = stored_dtype(config)
    if found.blocks:
        return bytes_of_storing(empty, family_of_model(config), found.block_bytes, stored.itemsize + FP32)
    return found.being_cast(stored, torch.float32)


def later_phases(config: RunConfig, model_config: Any, plan: Plan, budget: Budget) -> tuple[Phase, ...]:
    """Merging and exporting an adapter of `plan` as they keep `budget`, or at the least that they take if they cannot.

    A run under a budget merges and exports under it too: the sizes are those of the same checks, before there is an adapter.
    Empty for a model whose arithmetic cannot be followed on shapes.
    """
    dense, pairs, most = plain_config(model_config), finished_plan(config, plan), config.data.max_tokens
    text = dense.get_text_config()
    table = int(text.vocab_size) * int(text.hidden_size)
    changed = adapted_bytes(pairs, table)
    merging = size_of_merge(most, max((1 + FP32_COPIES) * changed, 2 * FP32 * table))

    def exporting(longest: int | None) -> CheckSize:
        """With rows of `longest` tokens; tensors count as stored in the widest dtype."""
        length = min(most, longest or most) + GREEDY_TOKENS
        return CheckSize(
            "the check of an export", EvaluationSize(RowShape(length), 1, length), models=1, row=min(length, PASS),
            tensors=True, beside=context_bytes(text, length + MARGIN), writing=tensor_peak(changed, table),
        )  # fmt: skip

    def phase(name: str, sizes: CheckSizes) -> Phase:
        check = _LaterCheck(sizes, config, dense, pairs, cut=name == EXPORT)
        return Phase(name, choose(check, budget).least.highest.kinds)

    try:
        return phase(MERGE, lambda _: merging), phase(EXPORT, exporting)
    except NotPlanned:
        return ()


def with_later(forecast: Forecast, later: tuple[Phase, ...]) -> Forecast:
    """`forecast` with these phases in place of those of the same name."""
    names = {phase.name for phase in later}
    return Forecast((*(phase for phase in forecast.phases if phase.name not in names), *later))


def export_sizes(source: Path, adapter: Adapter, quant: str) -> tuple[int, int]:
    """Bytes of memory while the file is written, a tensor at a time, and about those of the file and of a wide one beside it."""
    folded = GgufTensors(source, adapter)
    sizes = {name: math.prod(folded.shape(name)) for name in folded.names}
    changed = max((folded.whole(name) for name in folded.names), default=0)
    wide = FP32 if quant == "f32" or (quant not in DIRECT and wide_type(source) == "f32") else FP32 // 2
    numbers = sum(sizes.values())
    return tensor_peak(FP32 * changed, max(sizes.values())), numbers * (wide + (0 if quant in DIRECT else 1))

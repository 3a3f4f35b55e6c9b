"""How a merge into a quantised model fits into a memory budget.

load       the base is read, or goes block by block into a store; at the end what was written
compare    it computes with the adapter and without, and after that what was made of it, whose packed layers may be larger
round      beside it one block in fp32, what the rounding of its largest layer takes, and the calibration rows' states
finish     the layers' numbers before rounding without the pairs, their grids and the rounded ones, while pairs are trained

If the base does not fit it is streamed, two blocks in memory or one, and what is rounded goes block by block into a store of
its own (models/text/packed_store); the rows' states go to disk if need be. A finish needs all layers at once, so it never
streams.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorakeet.core.plan import Plan
from lorakeet.data.chat import Encoder, Example, encode_rows
from lorakeet.data.prepare import Dataset
from lorakeet.memory.forecast import Forecast, phases_of
from lorakeet.memory.shape_only import ShapeSpill
from lorakeet.memory.spill import Spill
from lorakeet.memory.usage import Usage, add_usage
from lorakeet.models.families import family_of
from lorakeet.models.files.gguf_dense import bytes_of_header, bytes_of_unpacking
from lorakeet.models.files.gguf_validate import require_gguf
from lorakeet.models.files.packing import packing_of
from lorakeet.models.files.source import bytes_to_unpack, find_source
from lorakeet.models.files.stored_tensors import stored_dtype
from lorakeet.models.fits import plan_of
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.load import bytes_of_storing, empty_model, empty_packed
from lorakeet.models.text.from_config import model_from_config, streamed_model_from_config
from lorakeet.models.text.load import load_text_model, load_tokenizer, read_config
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.packed_layout import PackedLayout
from lorakeet.models.text.repeated_blocks import ModelBuilder
from lorakeet.quant.spec import QuantSpec
from lorakeet.workflows.planning.check_sizes import FP32
from lorakeet.workflows.planning.fit import BudgetedWork, fit_budget, require_space_to_unpack
from lorakeet.workflows.planning.forecast_text_run import INTERVALS, TOKENIZER_ENTRY, Precision, filling_rows, text_runtime_bytes
from lorakeet.workflows.planning.rehearse_packed_merge import rehearse_finish, rehearse_rounding
from lorakeet.workflows.planning.rehearse_text import FINAL, EvaluationSize, Rehearsal, rehearse_evaluation
from lorakeet.workflows.runs.open_adapter import Opened
from lorakeet.workflows.runs.residency import ALONE, RESIDENT, MemoryPlan, Way, stream_closed

BLOCK_COPIES = 3  # of a layer's blocks, as they are put into a file: as they are, in the file's order, as bytes
STREAMED, SPILLED = Way(streamed=True), Way(streamed=True, spilled=True)
LEAST = replace(SPILLED, slots=ALONE)
COMPARE, COMPARE_MADE = "compare", "compare what was made"


@dataclass(frozen=True)
class PackedMergeJob:
    """What is merged, as far as it decides the memory."""

    opened: Opened
    dataset: Dataset
    layout: PackedLayout
    calibration_rows: int
    finishes: bool
    micro_tokens: int  # through the model at once, where it is measured

    @cached_property
    def source(self) -> Path:
        """The folder of the base."""
        return find_source(self.opened.config.model, lambda line: None)

    @cached_property
    def rows(self) -> Sequence[Example]:
        """The calibration rows."""
        tokenizer = load_tokenizer(self.opened.tokenizer or self.source)
        return calibration(self.opened, self.dataset, tokenizer, self.calibration_rows, self.finishes)[0]


def calibration(
    opened: Opened, dataset: Dataset, tokenizer: Any, count: int, finishes: bool
) -> tuple[list[Example], list[Example]]:
    """`count` calibration rows, spread over the training rows, and the others; for a finish at most half of them."""
    examples = list(encode_rows(dataset.train, Encoder(tokenizer, opened.config.data, dataset.labels)).examples)
    count = min(count, (len(examples) + 1) // 2 if finishes else len(examples))
    chosen = set(range(0, len(examples), max(1, len(examples) // count))[:count])
    others = [example for number, example in enumerate(examples) if number not in chosen]
    return [examples[number] for number in sorted(chosen)], others


def fit_packed_merge(job: PackedMergeJob, out: Path, console: Console) -> Opened:
    """The adapter of `job` with how its models keep the run's memory.budget; as it was without one. Raises as `fit_budget`."""
    opened, budget = job.opened, job.opened.config.memory.limit
    if not budget:
        return opened
    opened = opened.over(replace(opened.config.model, device="cpu"))  # the budget bounds the process
    merge = PackedMerging(job, out)
    return replace(opened, residency=fit_budget(merge, budget, partial(console.print, markup=False, soft_wrap=True)))


@contextmanager
def reloaded(out: Path, layout: PackedLayout, opened: Opened, console: Console) -> Iterator[TextModel]:
    """What was written, loaded again with its packed layers and closed at the end of the context.

    A .gguf file is laid out for it in the cache folder, and that copy does not outlast the context either.
    """
    quantize = QuantSpec(method="gguf") if layout.file is not None else QuantSpec()
    spec = ModelSpec(
        path=str(out), dtype="float32", products="float32", device=opened.config.model.device, quantize=quantize
    )
    residency, unpacked = opened.residency, bytes_to_unpack(spec) > 0
    text = load_text_model(spec, say=console.print, store=residency.store, slots=residency.way.slots)
    try:
        with stream_closed(text):
            yield text
    finally:
        if unpacked:
            shutil.rmtree(text.source, ignore_errors=True)


def require_space_for_layout(opened: Opened, like: str | None) -> None:
    """Raises ConfigError if a .gguf file whose layout is kept has still to be unpacked, and that takes more than the budget."""
    spec = ModelSpec(path=like or opened.config.model.path, quantize=QuantSpec(method="gguf"))
    require_space_to_unpack(spec, opened.config.memory.limit, "--memory")


class PackedMerging(BudgetedWork[MemoryPlan]):
    """One merge into packed weights."""

    out: Path
    what = "a merge into packed weights"

    def __init__(self, job: PackedMergeJob, out: Path) -> None:
        self.job, self.spec, self.out = job, job.opened.config.model, out
        self.named_store = job.opened.config.memory.store
        self.remedy = (
            f"Remove {out} if it exists, free some space, or name a folder on another disk with memory.store or --out, and merge "
            "again."
        )
        self._evaluated: dict[tuple[bool, int], tuple[Rehearsal, Rehearsal]] = {}

    @cached_property
    def config(self) -> Any:
        """The configuration of the base."""
        return read_config(self.job.source)

    @cached_property
    def made(self) -> Any:
        """The configuration of the model in the layout that it is packed into."""
        return read_config(self.job.layout.folder)

    @cached_property
    def empty(self) -> Any:
        """The base without numbers."""
        return empty_model(self.config, torch.float32)

    @cached_property
    def pairs(self) -> Plan:
        """The adapter's pairs."""
        return plan_of(self.empty, self.job.opened.adapter)

    @cached_property
    def packing(self) -> Mapping[str, Mapping[str, Any]]:
        """How each layer will be packed."""
        return packing_of(empty_model(self.made, torch.float32), self.made, QuantSpec(), self.job.layout.folder)

    @cached_property
    def same_layout(self) -> bool:
        """True if the base is packed so already."""
        return bool(self.packing == packing_of(self.empty, self.config, self.spec.quantize, self.job.source))

    @cached_property
    def evaluation(self) -> EvaluationSize:
        """The largest batch that is evaluated."""
        longest = self.job.opened.config.data.max_tokens
        return EvaluationSize(filling_rows(longest, max(longest, self.job.micro_tokens)), 0, 0)

    @cached_property
    def products(self) -> torch.dtype:
        """The dtype of matrix products."""
        named = self.spec.products
        return torch.float32 if named == "auto" else getattr(torch, named)

    @cached_property
    def runtime(self) -> int:
        """Bytes of the process beside the tensors."""
        words = TOKENIZER_ENTRY * int(self.config.get_text_config().vocab_size)
        return text_runtime_bytes(Precision(torch.float32, self.products, self.spec.quantize)) + words

    def ways(self, budget: int) -> Iterator[Way]:
        yield from (RESIDENT,) if self.job.finishes else (RESIDENT, STREAMED, SPILLED, LEAST)

    def plan(self, way: Way) -> MemoryPlan:
        runtime = self.runtime  # measured before the rehearsals, which leave some memory behind
        base, made = self._evaluating(way)
        adapter = FP32 * self.pairs.parameters
        held = {
            "load the base": add_usage(Usage(), base=base.base, adapter=adapter, scratch=self._reading(base)),
            COMPARE: add_usage(base.peaks[FINAL], scratch=INTERVALS),
            "round": add_usage(self._rounding(way), base=0 if way.streamed or self.same_layout else self._growth()),
            COMPARE_MADE: add_usage(made.peaks[FINAL], scratch=INTERVALS),
            "load what was written": add_usage(Usage(), base=made.base, adapter=adapter, scratch=self._reading(made)),
            **self._file(made, adapter),
        }
        if self.job.finishes:
            held["finish"] = self._finishing()
        forecast = Forecast(phases_of(held, runtime, returning=True))
        block_bytes = max(base.block_bytes, made.block_bytes)
        return MemoryPlan(forecast, blocks=base.blocks, block_bytes=block_bytes, growing=(COMPARE, COMPARE_MADE))

    def words(self, way: Way, plan: MemoryPlan) -> str:
        states = f", the calibration rows' states {'on disk' if way.spilled else 'in memory'}" if way.streamed else ""
        return super().words(way, plan) + states

    def advice(self) -> str:
        if self.job.finishes:
            return (
                "--finish-steps trains through every layer's numbers before rounding, all of which are in memory. Leave it out, "
                "so that blocks may be streamed from disk, give that with --memory, or use a larger machine."
            )
        return f"Fewer --calibration-rows, or shorter ones, may take less. {super().advice()}"

    def disk(self, way: Way, plan: MemoryPlan) -> Mapping[Path, int]:
        packed = _stored_bytes(self.made, QuantSpec(), self.job.layout.folder)
        hidden = int(self.config.get_text_config().hidden_size)
        states = 2 * FP32 * hidden * sum(len(row.ids) for row in self.job.rows) if way.spilled else 0
        stored = _stored_bytes(self.config, self.spec.quantize, self.job.source) + 2 * packed + states
        return {self.folder: stored, self.out: packed}

    def _evaluating(self, way: Way) -> tuple[Rehearsal, Rehearsal]:
        """The base as it computes, and what is made of it; ways that differ only in where the rows' states are share these."""
        key = way.streamed, way.slots
        if key not in self._evaluated:
            base = rehearse_evaluation(self._build(way), self.pairs, self.evaluation, token_ids=())
            made = base
            if not self.same_layout:
                made = rehearse_evaluation(self._build_made(way), self.pairs, self.evaluation, token_ids=())
            self._evaluated[key] = base, made
        return self._evaluated[key]

    def _file(self, made: Rehearsal, adapter: int) -> dict[str, Usage]:
        """Bytes while blocks are put into a .gguf file, and while that file is unpacked to be loaded."""
        if self.job.layout.file is None:
            return {}
        header = require_gguf(self.job.layout.file)
        after = empty_packed(self.made, torch.float32, QuantSpec(), self.job.layout.folder)
        blocks = BLOCK_COPIES * max(_layer_bytes(after, path) for path in self.packing) + bytes_of_header(header)
        unpacking = bytes_of_unpacking(header, packed=True)
        return {
            "write the file": add_usage(Usage(), base=made.base, adapter=adapter, scratch=blocks),
            "unpack what was written": add_usage(Usage(), adapter=adapter, scratch=unpacking),
        }

    def _growth(self) -> int:
        """Bytes by which packed layers are larger than those of the base, which they replace one after the other."""
        before = empty_packed(self.config, torch.float32, self.spec.quantize, self.job.source)
        after = empty_packed(self.made, torch.float32, QuantSpec(), self.job.layout.folder)
        return sum(max(0, _layer_bytes(after, path) - _layer_bytes(before, path)) for path in self.packing)

    def _rounding(self, way: Way) -> Usage:
        """The first blocks of each kind, as they are folded and rounded on the calibration rows."""
        build = self._build(way, torch.float32)
        return rehearse_rounding(build, self.pairs, self.job.rows, self.packing, ShapeSpill if way.spilled else Spill)

    def _finishing(self) -> Usage:
        """Two steps on the longest rows that there are to train on."""
        opened, job = self.job.opened, self.job
        tokenizer = load_tokenizer(opened.tokenizer or job.source)
        others = calibration(opened, job.dataset, tokenizer, job.calibration_rows, finishes=True)[1]
        spec = opened.config.train
        rows = sorted(others, key=lambda row: -len(row.ids))[: spec.batch_size]
        build = self._build(RESIDENT, torch.float32)
        return rehearse_finish(build, opened.adapter, self.packing, rows, spec, self.products)

    def _build(self, way: Way, products: torch.dtype | None = None) -> ModelBuilder:
        return self._outline(way, self.config, self.spec.quantize, self.job.source, products or self.products)

    def _build_made(self, way: Way) -> ModelBuilder:
        """Builds the model in the layout that it is packed into."""
        return self._outline(way, self.made, QuantSpec(), self.job.layout.folder, self.products)

    def _outline(self, way: Way, config: Any, quantize: QuantSpec, files: Path, products: torch.dtype) -> ModelBuilder:
        make = partial(
            partial(streamed_model_from_config, slots=way.slots) if way.streamed else model_from_config, name=self.spec.path,
            dtype=torch.float32,
            products=products, attention=self.spec.attention, quantize=quantize, files=files,
        )  # fmt: skip
        return ModelBuilder(make, config)

    def _reading(self, found: Rehearsal) -> int:
        """Bytes beside the base while it is read: a block on its way into the store, a weight, or tensors in a file's dtype."""
        stored = stored_dtype(self.config)
        if found.blocks:
            family = family_of(self.config.get_text_config())
            return bytes_of_storing(self.empty, family, found.block_bytes, stored.itemsize + FP32)
        if found.packed:
            return found.largest * (stored.itemsize + FP32)
        return found.being_cast(stored, torch.float32)


def _stored_bytes(config: Any, quantize: QuantSpec, files: Path) -> int:
    """Bytes of all tensors of a model, in fp32 but for its packed layers."""
    return sum(tensor.nbytes for tensor in empty_packed(config, torch.float32, quantize, files).state_dict().values())


def _layer_bytes(model: Any, path: str) -> int:
    """Bytes of the tensors of one layer."""
    return sum(tensor.nbytes for tensor in model.get_submodule(path).state_dict().values())

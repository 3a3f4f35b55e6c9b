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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from lorakeet.core.plan import Plan
from lorakeet.data.chat import Encoder, Example, encode_rows
from lorakeet.data.prepare import Dataset
from lorakeet.memory.forecast import Forecast, phases_of
from lorakeet.memory.shape_only import ShapeSpill
from lorakeet.memory.spill import Spill
from lorakeet.memory.usage import Usage, add_usage
from lorakeet.merging.requantise import Latent, Requantised, bytes_of_rounding
from lorakeet.models.files.gguf_dense import bytes_of_header, bytes_of_unpacking
from lorakeet.models.files.gguf_validate import require_gguf
from lorakeet.models.files.packing import packing_of
from lorakeet.models.files.source import bytes_to_unpack, find_source
from lorakeet.models.files.stored_tensors import stored_dtype
from lorakeet.models.fits import plan_of
from lorakeet.models.fuse import unfuse
from lorakeet.models.modules import find, kind_of
from lorakeet.models.modules import replace as put
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.load import empty_model, empty_packed
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.folded_weights import fold_layers
from lorakeet.models.text.from_config import ShapeBase
from lorakeet.models.text.gptq_blocks import LayerSource, pack_blocks
from lorakeet.models.text.load import load_text_model, load_tokenizer, read_config
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.packed_layout import PackedLayout
from lorakeet.models.text.repeated_blocks import ModelBuilder, run_each_kind
from lorakeet.planning.check import FP32, bytes_of_reading
from lorakeet.planning.fit import BudgetedWork, fit_budget
from lorakeet.planning.forecast_text_run import INTERVALS, TOKENIZER_ENTRY, filling_rows, text_runtime_bytes
from lorakeet.planning.planned_model import Precision, builder_of
from lorakeet.planning.rehearse_text import FINAL, Build, EvaluationSize, Rehearsal, on_shapes, rehearse_evaluation
from lorakeet.quant.construct import empty_base
from lorakeet.quant.grids import FixedGrid, Nf4Grid, UniformGrid
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.open_adapter import NAME, Opened
from lorakeet.runs.residency import ALONE, RESIDENT, MemoryPlan, Way, stream_closed
from lorakeet.train.text.quantisation_aware import quantisation_aware_finish

BLOCK_COPIES = 3  # of a layer's blocks, as they are put into a file: as they are, in the file's order, as bytes
STREAMED, SPILLED = Way(streamed=True), Way(streamed=True, spilled=True)
LEAST = replace(SPILLED, slots=ALONE)
Packing = Mapping[str, Mapping[str, Any]]  # settings of packed layers by path
COMPARE, ROUND, COMPARE_MADE, FINISH = "compare", "round", "compare what was made", "finish"


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

    @property
    def parts(self) -> tuple[list[Example], list[Example]]:
        """The calibration rows and the others."""
        tokenizer = load_tokenizer(self.opened.tokenizer or self.source)
        return calibration(self.opened, self.dataset, tokenizer, self.calibration_rows, self.finishes)

    @cached_property
    def rows(self) -> Sequence[Example]:
        """The calibration rows."""
        return self.parts[0]


def products_of(spec: ModelSpec) -> torch.dtype:
    """In which dtype the run's matrix products were fastest."""
    return torch.float32 if spec.products == "auto" else getattr(torch, spec.products)


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
    say = partial(console.print, markup=False, soft_wrap=True)
    return replace(opened, residency=fit_budget(PackedMerging(job, out), budget, say))


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
    def packing(self) -> Packing:
        """How each layer will be packed."""
        return packing_of(empty_model(self.made, torch.float32), self.made, QuantSpec(), self.job.layout.folder)

    @cached_property
    def evaluation(self) -> EvaluationSize:
        """The largest batch that is evaluated."""
        longest = self.job.opened.config.data.max_tokens
        return EvaluationSize(filling_rows(longest, max(longest, self.job.micro_tokens)), 0, 0)

    @cached_property
    def before(self) -> Any:
        """The base without numbers, with its packed layers."""
        return empty_packed(self.config, torch.float32, self.spec.quantize, self.job.source)

    @cached_property
    def after(self) -> Any:
        """What is made of it."""
        return empty_packed(self.made, torch.float32, QuantSpec(), self.job.layout.folder)

    @cached_property
    def runtime(self) -> int:
        """Bytes of the process beside the tensors."""
        words = TOKENIZER_ENTRY * int(self.config.get_text_config().vocab_size)
        return text_runtime_bytes(Precision(torch.float32, products_of(self.spec), self.spec.quantize)) + words

    def ways(self, budget: int) -> Iterator[Way]:
        yield from (RESIDENT,) if self.job.finishes else (RESIDENT, STREAMED, SPILLED, LEAST)

    def plan(self, way: Way) -> MemoryPlan:
        runtime = self.runtime  # measured before the rehearsals, which leave some memory behind
        base, made = self._evaluating(way)
        adapter, growth = FP32 * self.pairs.parameters, 0
        if not way.streamed:  # packed layers replace those of the base one after the other, and may be larger
            growth = sum(max(0, _bytes_of(self.after, path) - _bytes_of(self.before, path)) for path in self.packing)
        held = {
            "load the base": add_usage(Usage(), base=base.base, adapter=adapter, scratch=self._reading(base)),
            COMPARE: add_usage(base.peaks[FINAL], scratch=INTERVALS),
            ROUND: add_usage(self._rounding(way), base=growth),
            COMPARE_MADE: add_usage(made.peaks[FINAL], scratch=INTERVALS),
            "load what was written": add_usage(Usage(), base=made.base, adapter=adapter, scratch=self._reading(made)),
            **self._file(made, adapter),
        }
        if self.job.finishes:
            held[FINISH] = self._finishing()
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
        packed, hidden = _bytes_of(self.after), int(self.config.get_text_config().hidden_size)
        states = 2 * FP32 * hidden * sum(len(row.ids) for row in self.job.rows) if way.spilled else 0
        return {self.folder: _bytes_of(self.before) + 2 * packed + states, self.out: packed}

    def _evaluating(self, way: Way) -> tuple[Rehearsal, Rehearsal]:
        """The base as it computes, and what is made of it; ways that differ only in where the rows' states are share these."""
        key = way.streamed, way.slots
        if key not in self._evaluated:
            base = made = rehearse_evaluation(self._build(way), self.pairs, self.evaluation, token_ids=())
            if self.packing != packing_of(self.empty, self.config, self.spec.quantize, self.job.source):
                precision = Precision(torch.float32, products_of(self.spec), QuantSpec())
                build = builder_of(self.spec, way, self.made, precision, self.job.layout.folder)
                made = rehearse_evaluation(build, self.pairs, self.evaluation, token_ids=())
            self._evaluated[key] = base, made
        return self._evaluated[key]

    def _file(self, made: Rehearsal, adapter: int) -> dict[str, Usage]:
        """Bytes while blocks are put into a .gguf file, and while that file is unpacked to be loaded."""
        if self.job.layout.file is None:
            return {}
        header = require_gguf(self.job.layout.file)
        blocks = BLOCK_COPIES * max(_bytes_of(self.after, path) for path in self.packing) + bytes_of_header(header)
        unpacking = bytes_of_unpacking(header, packed=True)
        return {
            "write the file": add_usage(Usage(), base=made.base, adapter=adapter, scratch=blocks),
            "unpack what was written": add_usage(Usage(), adapter=adapter, scratch=unpacking),
        }

    def _rounding(self, way: Way) -> Usage:
        """The first blocks of each kind, as they are folded and rounded on the calibration rows."""
        build = self._build(way, torch.float32)
        return rehearse_rounding(build, self.pairs, self.job.rows, self.packing, ShapeSpill if way.spilled else Spill)

    def _finishing(self) -> Usage:
        """The peak of two steps on the longest rows to train on, through the grids of layers packed as they will be."""
        adapter, spec = self.job.opened.adapter, self.job.opened.config.train
        rows = sorted(self.job.parts[1], key=lambda row: -len(row.ids))[: spec.batch_size]
        with on_shapes() as ledger:
            text = self._build(RESIDENT, torch.float32)()
            unfuse(text.model)
            solved: dict[str, Requantised] = {}
            for path, settings in self.packing.items():
                base = ShapeBase(empty_base(settings))
                standing = cast(Any, find(text.model, path))
                put(text.model, path, PackedLinear(base, standing.bias, transposed=kind_of(standing) == "conv1d"))
                latent = Latent(outlined_grid(base), torch.empty(base.shape)) if path in adapter.pairs else None
                solved[path] = Requantised(base, latent, "kept", 0.0)
                del standing
            pairs = {
                path: replace(pair, A=torch.empty(pair.A.shape), B=torch.empty(pair.B.shape))
                for path, pair in adapter.pairs.items()
            }
            ledger.name("base", [*text.model.parameters(), *text.model.buffers()])
            with ledger.phase(FINISH):
                quantisation_aware_finish(
                    text, solved, replace(adapter, pairs=pairs), rows, steps=2, spec=spec, products=products_of(self.spec),
                    on_step=lambda step, loss: None,
                )  # fmt: skip
            ledger.close()
            return ledger.peaks[FINISH]

    def _build(self, way: Way, products: torch.dtype | None = None) -> ModelBuilder:
        precision = Precision(torch.float32, products or products_of(self.spec), self.spec.quantize)
        return builder_of(self.spec, way, self.config, precision, self.job.source)

    def _reading(self, found: Rehearsal) -> int:
        """Bytes beside the base while it is read: of a packed one in memory, a weight as stored and in fp32."""
        if found.packed and not found.blocks:
            return found.largest * (stored_dtype(self.config).itemsize + FP32)
        return bytes_of_reading(found, self.config, self.empty)


def _bytes_of(model: Any, path: str = "") -> int:
    """Bytes of the tensors of a model, or of the layer at `path`."""
    return sum(tensor.nbytes for tensor in model.get_submodule(path).state_dict().values())


def rehearse_rounding(
    build: Build, plan: Plan, rows: Sequence[Example], packing: Packing, spill: Callable[[], Spill] = Spill
) -> Usage:
    """The peak while the first blocks of each kind are folded and rounded on calibration rows.

    `packing` tells how each layer will be packed, `spill` where the rows' states are.
    """
    with on_shapes() as ledger:
        text = build()
        text = initialise_adapter(text, plan, seed=0)
        unfuse(text.model)
        ledger.name("base", [*text.model.parameters(), *text.model.buffers()])
        stays = [] if text.streamed is not None else [*text.model.parameters(), *text.model.buffers()]
        text.release()

        def layers_of(block: str) -> dict[str, nn.Module]:
            return {path: cast(nn.Module, find(text.model, path)) for path in packing if path.startswith(f"{block}.")}

        def fold(path: str) -> nn.Module:
            fold_layers(text.model, NAME, [path])
            return cast(nn.Module, find(text.model, path))

        def pack(path: str, weight: Tensor, *_: object) -> PackedBase:
            base = ShapeBase(empty_base(packing[path]))
            torch.empty(bytes_of_rounding(weight.numel(), packing[path]["method"], base.bytes), dtype=torch.uint8)
            return base

        blocks = pack_blocks(text, rows, pack, LayerSource(layers_of, fold), keep=True, spill=spill)
        with ledger.phase(ROUND):
            run_each_kind(blocks, text.model, text.family)
        ledger.close()
        stays.clear()
        return ledger.peaks[ROUND]


def outlined_grid(base: PackedBase) -> FixedGrid:
    """The grid of a base that has shapes alone, as large as `quant/grids.grid_of` makes it."""
    settings, (out, width) = base.settings, base.shape
    if settings["method"] == "nf4":
        return Nf4Grid(torch.empty(base.shape), False, lambda codes: base)
    finest = 16 if settings.get("type") == "Q6_K" else 32  # numbers under a scale of GGUF's types
    groups = int(settings["groups"]) if settings["method"] == "gptq" else width // finest
    step, inverse, offset = (torch.empty(groups, out) for _ in range(3))
    return UniformGrid(step, inverse, offset, [column * groups // width for column in range(width)], 15, lambda codes: base)

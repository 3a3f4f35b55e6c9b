"""How `lorakeet quantize` fits into a memory budget.

store    the dense blocks go into a store on disk, one after the other      only if they are streamed
check    two blocks, and the head on a few tokens                           or the whole model
blocks   gptq: one block, what a stage of its layers and the rounding of one take, and the rows' states;
         or the whole model till the end, since its weights are pages of its files, and beside it all that is packed
write    one tensor of the file
written  the packed model, checked in the same way; if it is streamed, its store is written before
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lorakeet.data.chat import Example
from lorakeet.exporting.model_folder import SHARD_BYTES
from lorakeet.memory.budget import Budget
from lorakeet.memory.forecast import Forecast, phases_of
from lorakeet.memory.shape_only import ShapeSpill
from lorakeet.memory.spill import Spill
from lorakeet.memory.usage import Usage, add_usage
from lorakeet.models.files.stored_tensors import stored_dtype
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.load import empty_packed
from lorakeet.models.text.from_config import ShapeBase, model_from_config, streamed_model_from_config
from lorakeet.models.text.gptq_blocks import layers_in_blocks, pack_blocks, taken_by_block
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.repeated_blocks import run_each_kind
from lorakeet.planning.fit import BudgetedWork, fit_budget
from lorakeet.planning.forecast_text_run import COUNT_BYTES, TOKENIZER_ENTRY, text_runtime_bytes
from lorakeet.planning.planned_model import Precision
from lorakeet.planning.rehearse_text import RowShape, made_up_batch, matrix_sizes, on_shapes
from lorakeet.quant.construct import empty_base
from lorakeet.quant.gptq_solve import GptqLayout, bytes_of_solving
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.residency import RESIDENT, MemoryPlan, Residency, Way, stream_closed

CHECK, BLOCKS = "check", "blocks"
CHECKED = RowShape(8)  # tokens of the check of a model that is loaded (models/text/load)
PRODUCTS = 3  # the forward pass has one in so many of the shapes of products of a training step
TOKEN_BYTES = 128  # of a calibration token: its id and mask as they were read, encoded, and in a batch


@dataclass(frozen=True)
class QuantizeJob:
    """What is to be quantised, by its configuration: `config` as it is, `packed` as it will be written."""

    name: str  # as the user named it
    config: Any
    packed: Any
    dtype: torch.dtype
    packing: int = 0  # bytes in memory while one weight is packed by itself
    layout: GptqLayout | None = None  # of gptq, which rows are for
    rows: Sequence[Example] = ()
    micro_tokens: int = 1

    @property
    def state_bytes(self) -> int:
        """Bytes of all rows' states between two blocks."""
        hidden = int(self.config.get_text_config().hidden_size)
        return sum(len(row.ids) for row in self.rows) * hidden * self.dtype.itemsize

    @property
    def beside(self) -> int:
        """The tokenizer, the rows as they were read, and the code of narrow products of their micro-batches."""
        words = TOKENIZER_ENTRY * int(self.config.get_text_config().vocab_size)
        lengths = [len(row.ids) for row in self.rows]
        batches = math.ceil(sum(lengths) / max([self.micro_tokens, *lengths]))
        code = batches * COUNT_BYTES // PRODUCTS if self.dtype != torch.float32 else 0
        return words + TOKEN_BYTES * sum(lengths) + code


def fit_quantizing(budget: Budget, job: QuantizeJob, out: Path, console: Console) -> Residency[MemoryPlan]:
    """How `job` keeps the budget. Raises as `fit_budget`."""
    return fit_budget(Quantizing(job, out), budget, partial(console.print, markup=False, soft_wrap=True))


def check_written(
    out: Path, job: QuantizeJob, residency: Residency[MemoryPlan], say: Callable[[str], None], device: str = "auto"
) -> None:
    """Loads what was written as a check, on `device`; under a budget on the CPU, in the dtype that was planned."""
    spec = ModelSpec(path=str(out), device=device)
    if residency.budget:
        name = str(job.dtype).removeprefix("torch.")
        spec = ModelSpec(path=str(out), dtype=name, products=name, device="cpu")  # type: ignore[arg-type]
    with stream_closed(load_text_model(spec, say=say, store=residency.store)):
        pass


class Quantizing(BudgetedWork[MemoryPlan]):
    """A model that is quantised and loaded again."""

    out: Path
    remedy = "Free some space, or choose an --out on another disk."

    def __init__(self, job: QuantizeJob, out: Path) -> None:
        self.job, self.out, self.what, self.spec = job, out, f"quantising {job.name}", ModelSpec(path=job.name)

    def ways(self, budget: int) -> Iterator[Way]:
        yield RESIDENT
        yield Way(streamed=True)
        if self.job.layout is not None:
            yield Way(streamed=True, spilled=True)

    def plan(self, way: Way) -> MemoryPlan:
        job, stored = self.job, stored_dtype(self.job.config)
        written = _rehearsed(replace(job, config=job.packed, layout=None), way)
        one = written.largest * stored.itemsize + job.packing
        phases = {"written": add_usage(written.peaks[CHECK], scratch=one if not way.streamed else 0)}
        if way.streamed:
            phases["its store"] = add_usage(Usage(), base=written.base, scratch=_storing(written, stored, job.dtype))
        if job.layout is None:
            waiting = 0 if way.streamed else min(SHARD_BYTES, _stored_bytes(job.packed, job.dtype))
            phases["write"] = add_usage(Usage(), scratch=one + waiting)
        else:
            dense = _rehearsed(job, way)
            reading = _storing(dense, stored, job.dtype) if way.streamed else dense.base * (stored != job.dtype)
            states = 0 if way.spilled else job.state_bytes
            packed = 0 if way.streamed else _stored_bytes(job.packed, job.dtype)  # of which all waits for its place in the files
            phases |= {
                "store": add_usage(Usage(), base=dense.base, scratch=reading),
                CHECK: dense.peaks[CHECK],
                BLOCKS: add_usage(dense.peaks[BLOCKS], scratch=packed),
                "write": add_usage(Usage(), base=dense.base, scratch=states + packed + one),
            }
        runtime = text_runtime_bytes(Precision(job.dtype, job.dtype, QuantSpec())) + job.beside
        return MemoryPlan(Forecast(phases_of(phases, runtime, returning=True)), growing=())

    def words(self, way: Way, plan: MemoryPlan) -> str:
        if self.job.layout is None:
            return "one weight in memory, what is packed on disk" if way.streamed else "what is packed stays in memory"
        if not way.streamed:
            return super().words(way, plan)
        return f"one block in memory, the others in a store on disk, the rows' states {'there' if way.spilled else 'in memory'}"

    def disk(self, way: Way, plan: MemoryPlan) -> Mapping[Path, int]:
        dense, packed = (_stored_bytes(config, self.job.dtype) for config in (self.job.config, self.job.packed))
        waiting = 2 * packed + (dense + 2 * self.job.state_bytes if self.job.layout is not None else 0)
        return {self.folder: waiting, self.out: packed}


def _storing(found: _Rehearsed, stored: torch.dtype, dtype: torch.dtype) -> int:
    """Bytes in memory while a store is written: a block until it is whole, and a matrix as it was read with its cast."""
    cast = dtype.itemsize if stored != dtype else 0
    return found.block + found.largest * (stored.itemsize + cast)


@dataclass(frozen=True)
class _Rehearsed:
    """The peaks by phase, bytes all along, numbers of the largest matrix, bytes of a streamed block."""

    peaks: Mapping[str, Usage]
    base: int
    largest: int
    block: int


def _rehearsed(job: QuantizeJob, way: Way) -> _Rehearsed:
    """The check of the model of `job.config`, and where it is quantised, the first blocks of each kind."""
    make = streamed_model_from_config if way.streamed else model_from_config
    with on_shapes() as ledger:
        text = make(job.config, name=job.name, dtype=job.dtype, products=job.dtype)
        ledger.name("base", [*text.model.parameters(), *text.model.buffers()])
        base, largest = ledger.in_use["base"], matrix_sizes(text.model)[0]
        with ledger.phase(CHECK), torch.no_grad():
            if text.streamed is not None:
                text.streamed.stream.fill()
            text.head(text.hidden(made_up_batch(CHECKED)))
        text.release()
        if job.layout is not None:
            with ledger.phase(BLOCKS):
                _rehearse_blocks(job, job.layout, text, ShapeSpill if way.spilled else Spill)
        ledger.close()
        return _Rehearsed(ledger.peaks, base, largest, 0 if text.streamed is None else text.streamed.stream.slot_bytes)


def _rehearse_blocks(job: QuantizeJob, layout: GptqLayout, text: TextModel, spill: Callable[[], Spill]) -> None:
    """The real passes through blocks, with what stands for the rounding of a layer; of a model in memory nothing leaves."""
    stays = [] if text.streamed is not None else [*text.model.parameters()]
    layers = layers_in_blocks(text.model, text.name)

    def pack(path: str, weight: Tensor, *_: Any) -> PackedBase:
        shape = (weight.shape[0], weight.shape[1])
        torch.empty(bytes_of_solving(shape, layout, weight.dtype), dtype=torch.uint8)
        groups = 1 if layout.group_size == -1 else shape[1] // layout.group_size
        settings = {"bits": layout.bits, "groups": groups, "sym": layout.sym, "zero_format": layout.zero_format}
        return ShapeBase(empty_base({"method": "gptq", "shape": shape, **settings}))

    blocks = pack_blocks(text, job.rows, pack, taken_by_block(layers), micro_tokens=job.micro_tokens, spill=spill)
    run_each_kind(blocks, text.model, text.family)
    stays.clear()


def _stored_bytes(config: Any, dtype: torch.dtype) -> int:
    """Of all tensors of a model, tied ones counted twice."""
    return sum(tensor.nbytes for tensor in empty_packed(config, dtype, QuantSpec()).state_dict().values())

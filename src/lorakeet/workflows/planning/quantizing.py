"""How `lorakeet quantize` keeps a memory budget: rehearsed on shapes, decided before anything is read, or refused.

store    the dense blocks go into a store on disk, one after the other      only where they are streamed
check    two blocks, and the head on a few tokens                           or the whole model
blocks   gptq: one block, what a stage of its layers and the rounding of one hold, and the rows' states;
         or the whole model till the end, since its weights are pages of its files, and beside it all that is packed
write    one tensor of the file
written  the packed model, checked in the same way; where it is streamed, its store is written before
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lorakeet.data.chat import Example
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.evaluate.wording import bytes_text
from lorakeet.export.model_folder import SHARD_BYTES
from lorakeet.memory.allocator import return_freed_memory
from lorakeet.memory.budget import enough_for, larger_than_machine
from lorakeet.memory.forecast import Phase, phases_of
from lorakeet.memory.measure import PeakMemory
from lorakeet.memory.shape_only import ShapeSpill
from lorakeet.memory.spill import Spill
from lorakeet.memory.usage import Usage, add_usage
from lorakeet.models.files.stored_tensors import stored_dtype
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.load import empty_packed
from lorakeet.models.streaming.model import NotStreamed
from lorakeet.models.text.from_config import ShapeBase, model_from_config
from lorakeet.models.text.gptq_blocks import layers_in_blocks, pack_blocks, taken_by_block
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.repeated_blocks import run_each_kind
from lorakeet.models.text.streamed_from_config import streamed_model_from_config
from lorakeet.quant.construct import empty_base
from lorakeet.quant.gptq_solve import GptqLayout, bytes_of_solving
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.spec import QuantSpec
from lorakeet.workflows.planning.forecast_text_run import COUNT_BYTES, TOKENIZER_ENTRY, Precision, text_runtime_bytes
from lorakeet.workflows.planning.rehearse_text import NotPlanned, RowShape, made_up_batch, matrix_sizes, on_shapes
from lorakeet.workflows.runs.output_paths import folder_above, temporary_folder
from lorakeet.workflows.runs.peak_memory import say_peak

CHECK, BLOCKS = "check", "blocks"
CHECKED = RowShape(8)  # tokens of the check of a model that is loaded (models/text/load)
PLANNED = "varlen"  # the attention of an outline
PRODUCTS = 3  # the forward pass has one in so many of the shapes of products of a training step
TOKEN_BYTES = 128  # of a calibration token: its id and mask as they were read, encoded, and in a batch
REMEDY = "Free some space, or choose an --out on another disk."


@dataclass(frozen=True)
class Way:
    """Where things are: the model or one block of it in memory, and the states of calibration rows."""

    streamed: bool = False
    on_disk: bool = False  # the states
    slots: int = 2  # blocks in memory where one computes while the next is read; 1 where it waits


RESIDENT, STREAMED, SPILLED = Way(), Way(streamed=True), Way(streamed=True, on_disk=True)


@dataclass(frozen=True)
class QuantizeJob:
    """What is to be quantised, by its configuration: `config` as it is, `packed` as it will be written."""

    name: str  # as the user named it
    config: Any
    packed: Any
    dtype: torch.dtype
    packing: int = 0  # bytes held while one weight is packed by itself
    layout: GptqLayout | None = None  # of gptq, which rows are for
    rows: Sequence[Example] = ()
    micro_tokens: int = 1

    @property
    def state_bytes(self) -> int:
        """Of all rows' states between two blocks."""
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

    def words(self, way: Way) -> str:
        """The way, as a person reads it."""
        if self.layout is None:
            return "one weight in memory, what is packed on disk" if way.streamed else "what is packed stays in memory"
        if not way.streamed:
            return "the model in memory"
        return f"one block in memory, the others in a store on disk, the rows' states {'there' if way.on_disk else 'in memory'}"


@dataclass(frozen=True)
class Kept:
    """A budget and how it is kept; without one, everything is in memory."""

    budget: int | None = None
    planned: int = 0
    way: Way = RESIDENT
    folder: Path | None = None  # of the store and of scratch files, while the work lasts

    @property
    def store(self) -> Path | None:
        """Where the blocks of models lie; None where they are in memory."""
        return self.folder if self.way.streamed else None

    def spill(self) -> Spill:
        """A place for the states of calibration rows."""
        return Spill(self.folder if self.way.on_disk else None, REMEDY)

    def waiting(self) -> Spill:
        """A place for packed tensors until they are written."""
        return Spill(self.store, REMEDY)

    def require_planned(self, text: TextModel) -> None:
        """Raises ConfigError where the model cannot attend as it was planned, which shows when it is loaded."""
        if self.budget is not None and text.attention != PLANNED:
            raise ConfigError(
                f"{text.name} attends with {text.attention}, row by row, but --memory is planned for attention "
                f"{PLANNED}, over rows laid end to end. Leave --memory out."
            )

    def check(self, out: Path, job: QuantizeJob, say: Callable[[str], None]) -> None:
        """Loads what was written as a check: under a budget in the dtype that was planned."""
        spec = ModelSpec(path=str(out))
        if self.budget is not None:
            name = str(job.dtype).removeprefix("torch.")
            spec = ModelSpec(path=str(out), dtype=name, products=name, device="cpu")  # type: ignore[arg-type]
        with stream_closed(load_text_model(spec, say=say, store=self.store)):
            pass

    @contextmanager
    def measured(self, console: Console) -> Iterator[None]:
        """A context for the whole work, with the folder; at its end what the process held at most is said beside the budget."""
        if self.budget is None:
            yield
            return
        with temporary_folder(self.folder, f"The folder {self.folder} of blocks on their way", REMEDY), PeakMemory() as memory:
            try:
                yield
            except NotStreamed as error:  # whose message is about a run's budget
                raise ConfigError(f"{error.reason} Leave --memory out.") from error
        say_peak(memory, self.budget, self.planned, console)


@contextmanager
def stream_closed(text: TextModel) -> Iterator[None]:
    """A context at whose end the store of a streamed model is closed, whatever happened: before its folder goes."""
    try:
        yield
    finally:
        if text.streamed is not None:
            text.streamed.stream.close()


def keep_budget(budget: int | None, job: QuantizeJob, out: Path, console: Console) -> Kept:
    """How `job` keeps the budget, which is said; Kept() where there is none.

    Raises ConfigError with the least that works, EnvironmentProblem where the disk of `out` lacks room for what lies there
    meanwhile.
    """
    if budget is None:
        return Kept()
    say = partial(console.print, markup=False, soft_wrap=True)
    if warning := larger_than_machine(budget):
        say(warning)
    return_freed_memory()
    found, why_no_more = _ways(job, budget)
    way = min(found, key=lambda tried: found[tried])
    planned = found[way]
    if planned > budget:
        raise ConfigError(
            f"The budget is {budget >> 20} MiB, but quantising {job.name} takes at least {enough_for(planned)}: "
            f"{job.words(way)}.{why_no_more} Give that with --memory, or do it on a larger machine."
        )
    say(f"Memory: {bytes_text(planned)} planned of {bytes_text(budget)}: {job.words(way)}.")
    if not way.streamed:
        return Kept(budget, planned)
    folder = out.absolute().parent / f".{out.name}.blocks"
    _require_disk(folder, job)
    return Kept(budget, planned, way, folder)


def _ways(job: QuantizeJob, budget: int) -> tuple[dict[Way, int], str]:
    """What each way holds, up to the first that keeps the budget; and why the model cannot be streamed, where it cannot."""
    found: dict[Way, int] = {}
    try:
        for way in (RESIDENT, STREAMED) if job.layout is None else (RESIDENT, STREAMED, SPILLED):
            found[way] = forecast(job, way).bytes
            if found[way] <= budget:
                break
    except NotStreamed as error:
        return found, f" {error.reason}"
    except NotPlanned as error:
        raise ConfigError(
            f"--memory cannot be kept without a plan: {error} It is so with every --method, since what is written is loaded as a "
            "check. Leave --memory out."
        ) from error
    return found, ""


def forecast(job: QuantizeJob, way: Way) -> Phase:
    """The phase of the work that holds most, that way. Raises NotPlanned where the model's arithmetic cannot be followed."""
    stored = stored_dtype(job.config)
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
        states = 0 if way.on_disk else job.state_bytes
        packed = 0 if way.streamed else _stored_bytes(job.packed, job.dtype)  # of which all waits for its place in the files
        phases |= {
            "store": add_usage(Usage(), base=dense.base, scratch=reading),
            CHECK: dense.peaks[CHECK],
            BLOCKS: add_usage(dense.peaks[BLOCKS], scratch=packed),
            "write": add_usage(Usage(), base=dense.base, scratch=states + packed + one),
        }
    runtime = text_runtime_bytes(Precision(job.dtype, job.dtype, QuantSpec())) + job.beside
    return max(phases_of(phases, runtime, returning=True), key=lambda phase: phase.bytes)


def _storing(found: _Rehearsed, stored: torch.dtype, dtype: torch.dtype) -> int:
    """Bytes held while a store is written: a block until it is whole, and a matrix as it was read with its cast."""
    cast = dtype.itemsize if stored != dtype else 0
    return found.block + found.largest * (stored.itemsize + cast)


@dataclass(frozen=True)
class _Rehearsed:
    """What was held: the peaks by phase, bytes all along, numbers of the largest matrix, bytes of a streamed block."""

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
                _rehearse_blocks(job, job.layout, text, ShapeSpill if way.on_disk else Spill)
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


def _require_disk(folder: Path, job: QuantizeJob) -> None:
    """Raises EnvironmentProblem where the disk has no room for stores, waiting tensors and states, and the result."""
    dense, packed = (_stored_bytes(config, job.dtype) for config in (job.config, job.packed))
    needed = 3 * packed + (dense + 2 * job.state_bytes if job.layout is not None else 0)
    free = shutil.disk_usage(folder_above(folder)).free
    if needed > free:
        raise EnvironmentProblem(
            f"To keep the budget, blocks and packed weights lie in {folder} until all is done: {bytes_text(needed)} with the "
            f"result, and {bytes_text(free)} are free there. {REMEDY}"
        )


def _stored_bytes(config: Any, dtype: torch.dtype) -> int:
    """Of all tensors of a model, tied ones counted twice."""
    return sum(tensor.nbytes for tensor in empty_packed(config, dtype, QuantSpec()).state_dict().values())

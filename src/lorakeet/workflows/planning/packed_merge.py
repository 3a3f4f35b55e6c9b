"""How a merge into a quantised model keeps a memory budget: rehearsed on shapes, decided before anything is measured, or refused.

load       the base is read, or goes block by block into a store; at the end what was written
compare    it computes with the adapter and without, and after that what was made of it, whose packed layers may be larger
round      beside it one block in fp32, what the rounding of its largest layer holds, and the calibration rows' states
finish     the layers' numbers before rounding without the pairs, their grids and the rounded ones, while pairs are trained

Where the base has no room it is streamed, two blocks in memory or one, and what is rounded goes block by block into a store of
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

from lorakeet.data.chat import Encoder, Example, encode_rows
from lorakeet.data.prepare import Dataset
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.evaluate.wording import bytes_text
from lorakeet.memory.allocator import return_freed_memory
from lorakeet.memory.budget import enough_for, larger_than_machine
from lorakeet.memory.forecast import Phase, phases_of
from lorakeet.memory.measure import PeakMemory
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
from lorakeet.models.streaming.model import NotStreamed
from lorakeet.models.text.from_config import model_from_config
from lorakeet.models.text.load import load_text_model, load_tokenizer, read_config
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.packed_layout import PackedLayout
from lorakeet.models.text.repeated_blocks import ModelBuilder
from lorakeet.models.text.streamed_from_config import streamed_model_from_config
from lorakeet.quant.spec import QuantSpec
from lorakeet.workflows.planning.check import stores
from lorakeet.workflows.planning.forecast_text_run import INTERVALS, TOKENIZER_ENTRY, Precision, filling_rows, text_runtime_bytes
from lorakeet.workflows.planning.quantizing import PLANNED, RESIDENT, SPILLED, STREAMED, Way, stream_closed
from lorakeet.workflows.planning.rehearse_packed_merge import rehearse_finish, rehearse_rounding
from lorakeet.workflows.planning.rehearse_text import JUDGE, Judging, NotPlanned, Rehearsal, rehearse_judging
from lorakeet.workflows.planning.text_run import Arrangement, require_room_to_unpack
from lorakeet.workflows.runs.open_adapter import Opened
from lorakeet.workflows.runs.output_paths import folder_above, store_folder
from lorakeet.workflows.runs.peak_memory import say_peak

FP32 = 4  # bytes
BLOCK_COPIES = 3  # of a layer's blocks, as they are put into a file: as they are, in the file's order, as bytes
FINISH = 3.5  # of the model in fp32, where nothing can be rehearsed: without the pairs, its grid, rounded, and the packed layers
LEAST = Way(streamed=True, on_disk=True, slots=1)
WHAT = "a merge into packed weights"


@dataclass(frozen=True)
class PackedMergeJob:
    """What is merged, as far as it decides what is held."""

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


def keep_room(job: PackedMergeJob, out: Path, console: Console) -> Opened:
    """The adapter of `job` with how its models keep the run's memory.budget, which is said; as it was where it has none.

    Raises ConfigError with the least that works, EnvironmentProblem where the disk lacks room for what lies there meanwhile.
    """
    opened, budget = job.opened, job.opened.config.memory.bytes
    if budget is None:
        return opened
    say = partial(console.print, markup=False, soft_wrap=True)
    if warning := larger_than_machine(budget):
        say(warning)
    return_freed_memory()
    require_room_to_unpack(opened.config.model, budget)
    try:
        found, why_no_more = _ways(_MergePlanner(job), budget)
    except NotPlanned as error:
        say(str(error))
        opened.require_room(1 + (FINISH if job.finishes else 0), WHAT, console)
        return replace(opened, kept=Arrangement(budget))
    way = min(found, key=lambda tried: found[tried].peak)
    forecast = found[way]
    if forecast.peak > budget:
        raise ConfigError(_too_little(job, budget, found, why_no_more))
    slots, planned = forecast.slots_within(budget)
    say(f"Memory: {bytes_text(planned)} planned of {bytes_text(budget)} for {WHAT}: {_words(way, slots)}.")
    if not way.streamed:
        return replace(opened, kept=Arrangement(budget, planned))
    folder = store_folder(opened.config.memory.store, out, "blocks")
    _require_disk(folder, out, job, way)
    return replace(opened, kept=Arrangement(budget, planned, folder, folder if way.on_disk else None, slots=slots))


@contextmanager
def within_room(opened: Opened, out: Path, console: Console) -> Iterator[None]:
    """A context for the whole work, with the folder of its stores; at its end what the process held at most is said."""
    kept = opened.kept
    if kept is None or kept.budget is None:
        yield
        return
    remedy = f"Remove {out} if it is there, free some space, or name a folder on another disk with memory.store, and merge again."
    with stores(opened, remedy), PeakMemory() as memory:
        try:
            yield
        except NotStreamed as error:  # whose message is about a run's budget
            raise ConfigError(f"{error.reason} Leave --memory out.") from error
    if kept.planned is not None:
        say_peak(memory, kept.budget, kept.planned, console)


@contextmanager
def reloaded(out: Path, layout: PackedLayout, opened: Opened, console: Console) -> Iterator[TextModel]:
    """What was written, loaded again with its packed layers and closed at the end of the context.

    A .gguf file is laid out for it in the cache folder, and that copy does not outlast the context either.
    """
    quantize = QuantSpec(method="gguf") if layout.file is not None else QuantSpec()
    spec = ModelSpec(path=str(out), dtype="float32", products="float32", device=opened.checked_on, quantize=quantize)
    kept, laid_out = opened.kept or Arrangement(), bytes_to_unpack(spec) > 0
    text = load_text_model(spec, say=console.print, store=kept.store, slots=kept.slots)
    try:
        with stream_closed(text):
            yield text
    finally:
        if laid_out:
            shutil.rmtree(text.source, ignore_errors=True)


def check_layout_room(opened: Opened, like: str | None) -> None:
    """Raises ConfigError where a .gguf file whose layout is kept has still to be laid out, which the budget has no room for."""
    budget = opened.config.memory.bytes
    if budget is not None:
        require_room_to_unpack(ModelSpec(path=like or opened.config.model.path, quantize=QuantSpec(method="gguf")), budget)


def require_planned(opened: Opened, text: TextModel) -> None:
    """Raises ConfigError where a model under a budget cannot attend as it was planned, which shows when it is loaded."""
    asked = opened.config.model.attention
    wanted = PLANNED if asked == "auto" else asked
    if opened.kept is not None and opened.kept.planned is not None and text.attention != wanted:
        raise ConfigError(
            f"{text.name} attends with {text.attention}, row by row, but --memory is planned for attention {wanted}, over rows "
            "laid end to end. Leave --memory out."
        )


def _words(way: Way, slots: int) -> str:
    """The way, as a person reads it."""
    if not way.streamed:
        return "the models stay in memory"
    states = "there" if way.on_disk else "in memory"
    return f"blocks are streamed from disk, {slots} in memory, the calibration rows' states {states}"


def _too_little(job: PackedMergeJob, budget: int, found: Mapping[Way, _Forecast], why_no_more: str) -> str:
    """Why it is refused, with the least that works."""
    least = min(found.values(), key=lambda forecast: forecast.peak)
    enough = enough_for(least.peak)
    text = f"The budget is {budget >> 20} MiB, but {WHAT} takes at least {enough}, most of it {least.highest.name}"
    if job.finishes:
        return (
            f"{text}: --finish-steps trains through every layer's numbers before rounding, all of which are in memory. Without "
            "it blocks may be streamed from disk. Leave --finish-steps out, give that much with --memory, or do it on a larger "
            "machine."
        )
    return (
        f"{text}.{why_no_more} Fewer --calibration-rows, or shorter ones, may take less. Give that much with --memory, or do it "
        "on a larger machine."
    )


@dataclass(frozen=True)
class _Forecast:
    """The phase that holds most, and what a place for one more block takes, where there is one more that could have it."""

    highest: Phase
    comparing: int = 0  # bytes, of the phase in which places for more blocks are of use
    blocks: int = 0
    block_bytes: int = 0
    slots: int = 2  # that are counted

    @property
    def peak(self) -> int:
        """The most bytes held."""
        return self.highest.bytes

    def slots_within(self, budget: int) -> tuple[int, int]:
        """How many blocks have a place within `budget`, and the peak with them."""
        if not self.blocks:
            return self.slots, self.peak
        slots = min(self.blocks, self.slots + (budget - self.comparing) // self.block_bytes)
        return slots, max(self.peak, self.comparing + (slots - self.slots) * self.block_bytes)


def _ways(planner: _MergePlanner, budget: int) -> tuple[dict[Way, _Forecast], str]:
    """What each way holds, up to the first that keeps the budget; and why the model cannot be streamed, where it cannot."""
    found: dict[Way, _Forecast] = {}
    try:
        for way in (RESIDENT,) if planner.job.finishes else (RESIDENT, STREAMED, SPILLED, LEAST):
            found[way] = planner.forecast(way)
            if found[way].peak <= budget:
                break
    except NotStreamed as error:
        return found, f" {error.reason}"
    return found, ""


class _MergePlanner:
    """The forecasts of one merge."""

    def __init__(self, job: PackedMergeJob) -> None:
        self.job, self.spec = job, job.opened.config.model
        self.config = read_config(job.source)
        self.empty = empty_model(self.config, torch.float32)
        self.plan = plan_of(self.empty, job.opened.adapter)
        self.made = read_config(job.layout.folder)
        self.packing = packing_of(empty_model(self.made, torch.float32), self.made, QuantSpec(), job.layout.folder)
        self.as_it_was = self.packing == packing_of(self.empty, self.config, self.spec.quantize, job.source)
        named = self.spec.products
        self.products = torch.float32 if named == "auto" else getattr(torch, named)
        longest = job.opened.config.data.max_tokens
        self.judging = Judging(filling_rows(longest, max(longest, job.micro_tokens)), 0, 0)
        words = TOKENIZER_ENTRY * int(self.config.get_text_config().vocab_size)
        self.runtime = text_runtime_bytes(Precision(torch.float32, self.products, self.spec.quantize)) + words
        self._judged: dict[tuple[bool, int], tuple[Rehearsal, Rehearsal]] = {}

    def forecast(self, way: Way) -> _Forecast:
        """What is held that way. Raises NotStreamed where the model has no list of blocks, NotPlanned where nobody can know."""
        base, made = self._judging(way)
        adapter = FP32 * self.plan.parameters
        held = {
            "to load the base": add_usage(Usage(), base=base.base, adapter=adapter, scratch=self._reading(base)),
            "to compare": add_usage(base.peaks[JUDGE], scratch=INTERVALS),
            "to round": add_usage(self._rounding(way), base=0 if way.streamed or self.as_it_was else self._growth()),
            "to compare what was made": add_usage(made.peaks[JUDGE], scratch=INTERVALS),
            "to load what was written": add_usage(Usage(), base=made.base, adapter=adapter, scratch=self._reading(made)),
            **self._file(made, adapter),
        }
        if self.job.finishes:
            held["to finish"] = self._finishing()
        phases = {phase.name: phase for phase in phases_of(held, self.runtime, returning=True)}
        highest = max(phases.values(), key=lambda phase: phase.bytes)
        comparing = max(phases[name].bytes for name in ("to compare", "to compare what was made"))
        return _Forecast(highest, comparing, base.blocks, max(base.block_bytes, made.block_bytes), way.slots)

    def _judging(self, way: Way) -> tuple[Rehearsal, Rehearsal]:
        """The base as it computes, and what is made of it; ways that differ only in where the rows' states are share these."""
        key = way.streamed, way.slots
        if key not in self._judged:
            base = rehearse_judging(self._build(way), self.plan, self.judging, token_ids=())
            made = base if self.as_it_was else rehearse_judging(self._build_made(way), self.plan, self.judging, token_ids=())
            self._judged[key] = base, made
        return self._judged[key]

    def _file(self, made: Rehearsal, adapter: int) -> dict[str, Usage]:
        """Of a .gguf file: what is held while blocks are put into it, and while what was written is laid out, to be loaded."""
        if self.job.layout.file is None:
            return {}
        header = require_gguf(self.job.layout.file)
        after = empty_packed(self.made, torch.float32, QuantSpec(), self.job.layout.folder)
        blocks = BLOCK_COPIES * max(_layer_bytes(after, path) for path in self.packing) + bytes_of_header(header)
        laid_out = bytes_of_unpacking(header, packed=True)
        return {
            "to write the file": add_usage(Usage(), base=made.base, adapter=adapter, scratch=blocks),
            "to lay out what was written": add_usage(Usage(), adapter=adapter, scratch=laid_out),
        }

    def _growth(self) -> int:
        """By how much packed layers are larger than those of the base, which they replace one after the other."""
        before = empty_packed(self.config, torch.float32, self.spec.quantize, self.job.source)
        after = empty_packed(self.made, torch.float32, QuantSpec(), self.job.layout.folder)
        return sum(max(0, _layer_bytes(after, path) - _layer_bytes(before, path)) for path in self.packing)

    def _rounding(self, way: Way) -> Usage:
        """The first blocks of each kind, as they are folded and rounded on the calibration rows."""
        build = self._build(way, torch.float32)
        return rehearse_rounding(build, self.plan, self.job.rows, self.packing, ShapeSpill if way.on_disk else Spill)

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
        """That of the model in the layout that it is packed into."""
        return self._outline(way, self.made, QuantSpec(), self.job.layout.folder, self.products)

    def _outline(self, way: Way, config: Any, quantize: QuantSpec, files: Path, products: torch.dtype) -> ModelBuilder:
        make = partial(
            partial(streamed_model_from_config, slots=way.slots) if way.streamed else model_from_config, name=self.spec.path,
            dtype=torch.float32,
            products=products, attention=self.spec.attention, quantize=quantize, files=files,
        )  # fmt: skip
        return ModelBuilder(make, config)

    def _reading(self, found: Rehearsal) -> int:
        """Beside the base while it is read: a block on its way into the store, a weight, or some in a file's other dtype."""
        stored = stored_dtype(self.config)
        if found.blocks:
            family = family_of(self.config.get_text_config())
            return bytes_of_storing(self.empty, family, found.block_bytes, stored.itemsize + FP32)
        if found.packed:
            return found.largest * (stored.itemsize + FP32)
        return found.being_cast(stored, torch.float32)


def _require_disk(folder: Path, out: Path, job: PackedMergeJob, way: Way) -> None:
    """Raises EnvironmentProblem where a disk has no room for the stores and the rows' states in `folder`, or for the result."""
    config = read_config(job.source)
    packed = _stored_bytes(read_config(job.layout.folder), QuantSpec(), job.layout.folder)
    hidden = int(config.get_text_config().hidden_size)
    states = 2 * FP32 * hidden * sum(len(row.ids) for row in job.rows) if way.on_disk else 0
    stores_ = _stored_bytes(config, job.opened.config.model.quantize, job.source) + 2 * packed + states
    around, beside = folder_above(folder), folder_above(out)
    shared = _disk_of(around) == _disk_of(beside)
    needed, free = stores_ + (packed if shared else 0), shutil.disk_usage(around).free
    if needed > free:
        raise EnvironmentProblem(
            f"To keep the budget, blocks lie in {folder} until all is done: {bytes_text(needed)}{' with the result' * shared}, "
            f"and {bytes_text(free)} are free there. Free some space, or name a folder on another disk with memory.store in the "
            "run's config.yaml."
        )
    if not shared and packed > (free := shutil.disk_usage(beside).free):
        raise EnvironmentProblem(
            f"{out} takes {bytes_text(packed)}, and {bytes_text(free)} are free there. Free some space, or name an --out on "
            "another disk."
        )


def _disk_of(place: Path) -> int:
    return place.stat().st_dev


def _stored_bytes(config: Any, quantize: QuantSpec, files: Path) -> int:
    """Of all tensors of a model in fp32 but for its packed layers."""
    return sum(tensor.nbytes for tensor in empty_packed(config, torch.float32, quantize, files).state_dict().values())


def _layer_bytes(model: Any, path: str) -> int:
    """Of the tensors of one layer."""
    return sum(tensor.nbytes for tensor in model.get_submodule(path).state_dict().values())

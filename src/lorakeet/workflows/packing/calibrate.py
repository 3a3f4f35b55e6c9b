"""`lorakeet quantize --method gptq`: calibrated 4-bit weights in the layout that transformers loads through gptqmodel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from torch import Tensor

from lorakeet import __version__
from lorakeet.data.chat import Encoder, encode_rows
from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.errors import ConfigError, Problems
from lorakeet.export.model_folder import TensorGroup, write_model
from lorakeet.memory.budget import Budget
from lorakeet.memory.spill import Spill
from lorakeet.merge.checkpoint import files_along, open_checkpoint
from lorakeet.models.files.origin import packed_readme
from lorakeet.models.files.quantized import kept_experts, owners, skeleton, with_quantisation
from lorakeet.models.files.source import find_source
from lorakeet.models.files.stored_tensors import method_of, stored_quantisation, tensor_files
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.gptq_blocks import (
    QuantisedBlock,
    check_layers,
    check_tokens,
    inputs_of_widest,
    layers_in_blocks,
    quantise_blocks,
    weight_of,
)
from lorakeet.models.text.load import load_text_model, load_tokenizer, read_config
from lorakeet.models.text.model import TextModel
from lorakeet.quant.gptq import BITS, PARTS, gptq_buffer_shapes
from lorakeet.quant.gptq_config import GptqConfig, gptq_mapping
from lorakeet.quant.gptq_solve import GptqLayout
from lorakeet.workflows.options import QuantizeOptions
from lorakeet.workflows.planning.quantizing import QuantizeJob, check_written, fit_quantizing
from lorakeet.workflows.runs.output_paths import require_place
from lorakeet.workflows.runs.peak_memory import peak_said
from lorakeet.workflows.runs.residency import Residency, require_planned_attention, stream_closed, temporary_stores

DAMPING = 0.01  # the paper's
MICRO_TOKENS = 2048


def write_gptq(options: QuantizeOptions, layout: GptqLayout, console: Console) -> tuple[int, dict[str, float]]:
    """Writes `options.model` with GPTQ weights to `options.out` and loads it again as a check.

    Returns the bytes, and how far each layer's outputs moved on the rows: ‖X·(W − W′)ᵀ‖ / ‖X·Wᵀ‖. The rows' states and
    the packed layers that are not written yet are in memory beside the model, whose weights are pages of its files. Within a
    budget `memory`, such as "3GiB", all of that is in memory, or one block, with the states or not; the result is the same.
    Raises ConfigError for layers that do not fit the layout and for a budget that cannot be kept, DataError for too few
    calibration tokens, before anything is written.
    """
    model, out = options.model, options.out
    _check(options, layout)
    budget = Budget.parse(options.memory)
    tokens, limit = options.calibration_tokens, options.calibration_rows
    data = DataSpec(train=str(options.calibration), supervise="all", max_tokens=tokens, limit=limit)
    rows = read_rows(data.train, data)
    spec = _as_stored(model, console)
    if budget:  # which bounds the memory of the process
        spec = replace(spec, device="cpu")
    config, plain = read_config(Path(spec.path)), skeleton(read_config(Path(spec.path)))
    examples = encode_rows(rows, Encoder(load_tokenizer(Path(spec.path)), data)).examples
    layers = layers_in_blocks(plain, model)
    check_layers(layers, layout)
    check_tokens(examples, inputs_of_widest(layers))
    words = gptq_mapping(_settings(layout), damping=DAMPING, version=__version__)
    job = QuantizeJob(
        model, config, with_quantisation(config, words), getattr(torch, spec.dtype), layout=layout, rows=examples,
        micro_tokens=MICRO_TOKENS,
    )  # fmt: skip
    residency = fit_quantizing(budget, job, out, console)
    with temporary_stores(residency), peak_said(residency, console):
        return _quantised(job, spec, residency, layout, out, console)


def _quantised(
    job: QuantizeJob, spec: ModelSpec, residency: Residency[Any], layout: GptqLayout, out: Path, console: Console
) -> tuple[int, dict[str, float]]:
    """Loads the model, writes the folder, and loads that again."""
    text = load_text_model(spec, say=console.print, store=residency.store)
    with stream_closed(text):
        require_planned_attention(residency, text)
        experts = kept_experts(text.model)
        if experts:  # said before the long work, not after it
            console.print(experts, soft_wrap=True)
        errors: dict[str, float] = {}
        with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("measuring inputs", total=None)

            def done(block: QuantisedBlock) -> None:
                errors.update(block.errors)
                bar.update(task, total=block.count, completed=block.number + 1, description=f"block {block.number + 1}")

            written = _write(job, text, residency, layout, out, done)
    del text
    worst = max(errors, key=lambda path: (errors[path], path))
    console.print(
        f"Wrote {written:,} bytes to {out}: {len(errors)} layers in {layout.bits} bits, format {layout.zero_format}. Lorakeet "
        "loads it, and transformers where gptqmodel is installed.",
        soft_wrap=True,
    )
    moved = f"The outputs of {worst} moved most on the calibration rows: by {errors[worst]:.2%} of their length."
    console.print(moved, soft_wrap=True)

    def say(line: str) -> None:
        if line != experts:
            console.print(line)

    check_written(out, job, residency, say)
    return written, errors


def _check(options: QuantizeOptions, layout: GptqLayout) -> None:
    """Raises ConfigError with everything that is wrong with the settings."""
    problems = Problems("The GPTQ settings cannot be used")
    if options.out.exists():
        problems.add(f"{options.out} exists already and is never overwritten. Choose another folder or remove that one.")
    if options.head != "keep":
        problems.add("--head is quantize, but GPTQ is done on the blocks alone. Leave --head at keep.")
    if layout.bits not in BITS:
        problems.add(f"--bits is {layout.bits}; GPTQ's are {', '.join(map(str, BITS))}.")
    if layout.group_size != -1 and layout.group_size < 1:
        problems.add(f"--group-size is {layout.group_size}; expected a number of columns such as 128, or -1 for the whole row.")
    if options.calibration_rows < 1 or options.calibration_tokens < 2:
        problems.add("--calibration-rows and --calibration-tokens must leave something: at least 1 row and 2 tokens.")
    if options.calibration is None:
        problems.add(
            "--calibration is missing: GPTQ measures on rows what each layer reads. Name a file of texts such as the model will "
            "see."
        )
    problems.raise_if_any()
    require_place(options.out)


def _as_stored(model: str, console: Console) -> ModelSpec:
    """The model in the dtype of its files, or in fp32, so that weights are rounded once."""
    source = find_source(ModelSpec(path=model), console.print)
    config = read_config(source)
    if stored := stored_quantisation(config):
        raise ConfigError(f"{model} holds quantised weights ({method_of(stored)}); name the unquantised model.")
    narrow = getattr(config, "dtype", None) == torch.bfloat16
    return ModelSpec(path=str(source), dtype="bfloat16" if narrow else "float32", products="bfloat16" if narrow else "float32")


def _settings(layout: GptqLayout) -> GptqConfig:
    return GptqConfig(layout.bits, layout.group_size, layout.desc_act, layout.sym, layout.zero_format)


def _write(
    job: QuantizeJob,
    text: TextModel,
    residency: Residency[Any],
    layout: GptqLayout,
    out: Path,
    done: Callable[[QuantisedBlock], None],
) -> int:
    """Writes the folder, block by block as they are quantised; returns its bytes."""
    plain = skeleton(job.config)
    shapes = {path: weight_of(module).shape for path, module in layers_in_blocks(plain, job.name).items()}
    checkpoint, files = open_checkpoint(text.source), tensor_files(text.source)
    places = {name: path for name, path in owners(plain, files).items() if path in shapes}
    blocks = quantise_blocks(
        text, job.rows, layout, damping=DAMPING, micro_tokens=job.micro_tokens, spill=residency.spilled_states
    )
    solved = _Solved(blocks, residency.waiting(), done)
    solved.advance()  # what is wrong with rows or layers is said before anything is written
    parts = [
        _packed(name, places[name], shapes[places[name]], layout, solved)
        if name in places
        else TensorGroup({name: (file.tensors[name].dtype, file.tensors[name].shape)}, _reader(file.read, name))
        for name, file in files.items()
    ]
    words = gptq_mapping(_settings(layout), damping=DAMPING, version=__version__)
    config = {**checkpoint.config, "quantization_config": words}
    readme, along = packed_readme(job.name, f"GPTQ, {layout.bits} bits"), files_along(text.source, None)
    return write_model(out, parts, config=config, along=along, readme=readme, waiting=residency.waiting())


class _Solved:
    """The packed layers by path; blocks are quantised as they are needed, and wait in `waiting`."""

    def __init__(self, blocks: Iterator[QuantisedBlock], waiting: Spill, done: Callable[[QuantisedBlock], None]) -> None:
        self.blocks, self.waiting, self.done = blocks, waiting, done

    def advance(self) -> None:
        """Quantises the next block."""
        block = next(self.blocks)
        for path, base in block.layers.items():
            for part in PARTS:
                self.waiting.put((path, part), base.get_buffer(part).cpu())
        self.done(block)

    def take(self, path: str) -> dict[str, Tensor]:
        """The tensors of the packed layer at `path`, which is forgotten here."""
        while (path, PARTS[0]) not in self.waiting:
            self.advance()
        return {part: self.waiting.take((path, part)) for part in PARTS}


def _packed(name: str, path: str, shape: Sequence[int], layout: GptqLayout, solved: _Solved) -> TensorGroup:
    """The four tensors that stand for the weight `name` of the layer at `path`."""
    groups = 1 if layout.group_size == -1 else shape[1] // layout.group_size
    own = name.removesuffix(".weight")

    def make() -> Mapping[str, Tensor]:
        return {f"{own}.{part}": tensor for part, tensor in solved.take(path).items()}

    stored = gptq_buffer_shapes((shape[0], shape[1]), bits=layout.bits, groups=groups)
    return TensorGroup({f"{own}.{part}": kind for part, kind in stored.items()}, make)


def _reader(read: Callable[[str], Tensor], name: str) -> Callable[[], Mapping[str, Tensor]]:
    return lambda: {name: read(name)}

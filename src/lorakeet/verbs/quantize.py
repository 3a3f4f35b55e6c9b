"""`lorakeet quantize`: writes a model with its linear layers packed, in a layout that others load.

nf4 is written as bitsandbytes and transformers read it. int8 is a layout of Lorakeet's own (quant/safetensors_layout), which
is said. gptq has weights calibrated on rows, in the layout that transformers loads through gptqmodel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorakeet import __version__
from lorakeet.data.chat import Encoder, encode_rows
from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.errors import ConfigError, Problems, percent
from lorakeet.exporting.model_folder import Progress, part_as_it_is, write_model
from lorakeet.exporting.packed_tensors import LAYOUTS, SolvedBlocks, bytes_of_packing, packed_part, solved_part
from lorakeet.kinds.terminal import progress_line
from lorakeet.memory.budget import Budget
from lorakeet.merging.checkpoint import files_along, open_checkpoint
from lorakeet.models.files.origin import packed_readme
from lorakeet.models.files.quantized import kept_experts, linear_layers, owners, packable, skeleton, with_quantisation
from lorakeet.models.files.source import find_source
from lorakeet.models.files.stored_tensors import method_of, stored_dtype, stored_quantisation, tensor_files
from lorakeet.models.placement import dtype_for
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text import gptq_blocks
from lorakeet.models.text.load import load_text_model, load_tokenizer, read_config
from lorakeet.models.text.model import TextModel
from lorakeet.planning.check import why_not_on_gpu
from lorakeet.planning.quantizing import QuantizeJob, check_written, fit_quantizing
from lorakeet.quant.gptq import BITS
from lorakeet.quant.gptq_config import gptq_mapping
from lorakeet.quant.gptq_solve import GptqLayout
from lorakeet.runs.output_paths import require_new_place, require_place
from lorakeet.runs.residency import Residency, peak_said, require_planned_attention, stream_closed, temporary_stores
from lorakeet.verbs.options import QuantizeOptions

DAMPING = 0.01  # of GPTQ: the paper's
MICRO_TOKENS = 2048


@dataclass(frozen=True)
class Quantized:
    """What was written, and how far packing moved each weight, ‖W − W′‖ / ‖W‖, or with gptq its outputs X·Wᵀ."""

    folder: Path
    method: str
    bytes: int
    error: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> tuple[str, float]:
        """The weight that was moved most, and by how much."""
        return max(self.error.items(), key=lambda item: (item[1], item[0]))

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        mean = sum(self.error.values()) / len(self.error)
        return {
            "out": str(self.folder),
            "method": self.method,
            "bytes": self.bytes,
            "packed": len(self.error),
            "mean_relative_error": mean,
            "worst_relative_error": {"tensor": self.worst[0], "error": self.worst[1]},
        }


def quantize(options: QuantizeOptions, *, console: Console) -> Quantized:
    """Writes `model` with packed linear layers to `out`, a matrix at a time, and loads the result again as a check.

    From `bits` to `calibration_tokens` all counts for gptq alone (`write_gptq`). `memory`, such as "3GiB", is kept by the whole
    process, with the same result. Raises ConfigError where `out` exists, the model is quantised already, nothing in it can be
    packed or the budget cannot be kept.
    """
    if options.method == "gptq":
        layout = GptqLayout(options.bits, options.group_size, options.desc_act, options.sym, "gptq" if options.sym else "gptq_v2")
        written, error = write_gptq(options, layout, console)
        return Quantized(options.out, options.method, written, error)
    return _pack(options, console)


def _pack(options: QuantizeOptions, console: Console) -> Quantized:
    """nf4 and int8: each weight by itself."""
    model, method, out = options.model, options.method, options.out
    budget = Budget.parse(options.memory)
    require_new_place(out)
    source, config = _unquantised(model, console)
    checkpoint = open_checkpoint(source)
    plain = skeleton(config)
    chosen = packable(plain, head=options.head == "quantize")
    if not chosen:
        raise ConfigError(f"{model} has no linear layers that could be packed; its '{config.model_type}' blocks hold none.")
    layout, files = LAYOUTS[method], tensor_files(source)
    kept_dense = [path for path in linear_layers(plain) if path not in chosen]
    in_files = stored_dtype(config)
    words = layout.config(kept_dense, str(in_files).removeprefix("torch."))
    largest = max(module.get_parameter("weight").numel() for module in chosen.values())
    job = QuantizeJob(
        model, config, with_quantisation(config, words), dtype_for("auto", torch.device("cpu")),
        packing=bytes_of_packing(largest, in_files),
    )  # fmt: skip
    residency = fit_quantizing(budget, job, out, console)
    places, error = owners(plain, files), dict[str, float]()
    parts = [packed_part(name, file, chosen.get(places.get(name, "")), layout, error) for name, file in files.items()]
    with temporary_stores(residency), peak_said(residency, console):
        with progress_line(console, "packing") as step:
            written = write_model(
                out, parts, config={**checkpoint.config, "quantization_config": words}, along=files_along(source, None),
                readme=packed_readme(model, method), waiting=residency.waiting(), on_progress=step,
            )  # fmt: skip
        result = Quantized(out, method, written, error)
        console.print(f"Wrote {written:,} bytes to {out}: {len(error)} weights in {method}. {layout.note}", soft_wrap=True)
        console.print(f"Packing moved {result.worst[0]} most: by {percent(result.worst[1], 2)} of its length.", soft_wrap=True)
        check_written(out, job, residency, console.print)
    return result


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
    layers = gptq_blocks.layers_in_blocks(plain, model)
    gptq_blocks.check_layers(layers, layout)
    gptq_blocks.check_tokens(examples, gptq_blocks.inputs_of_widest(layers))
    packed = with_quantisation(config, gptq_mapping(layout, damping=DAMPING, version=__version__))
    dtype = getattr(torch, spec.dtype)
    job = QuantizeJob(model, config, packed, dtype, layout=layout, rows=examples, micro_tokens=MICRO_TOKENS)
    if why := why_not_on_gpu("the quantisation", spec.device, plain, dtype=job.dtype, beside=2 * job.state_bytes):
        console.print(why, markup=False, soft_wrap=True)
        spec = replace(spec, device="cpu")
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
        with progress_line(console, "quantising") as step:
            written, errors = _write(job, text, residency, layout, out, step)
    del text
    worst = max(errors, key=lambda path: (errors[path], path))
    console.print(
        f"Wrote {written:,} bytes to {out}: {len(errors)} layers in {layout.bits} bits, format {layout.zero_format}. Lorakeet "
        "loads it, and transformers where gptqmodel is installed.",
        soft_wrap=True,
    )
    moved = f"The outputs of {worst} moved most on the calibration rows: by {percent(errors[worst], 2)} of their length."
    console.print(moved, soft_wrap=True)

    def say(line: str) -> None:
        if line != experts:
            console.print(line)

    check_written(out, job, residency, say, spec.device)
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


def _unquantised(model: str, console: Console) -> tuple[Path, Any]:
    """The folder of the model, and its configuration. ConfigError if its weights are quantised."""
    source = find_source(ModelSpec(path=model), console.print)
    config = read_config(source)
    if stored := stored_quantisation(config):
        raise ConfigError(f"{model} holds quantised weights ({method_of(stored)}); name the unquantised model.")
    return source, config


def _as_stored(model: str, console: Console) -> ModelSpec:
    """The model in the dtype of its files, or in fp32, so that weights are rounded once."""
    source, config = _unquantised(model, console)
    narrow = getattr(config, "dtype", None) == torch.bfloat16
    return ModelSpec(path=str(source), dtype="bfloat16" if narrow else "float32", products="bfloat16" if narrow else "float32")


def _write(
    job: QuantizeJob, text: TextModel, residency: Residency[Any], layout: GptqLayout, out: Path, step: Progress
) -> tuple[int, dict[str, float]]:
    """Writes the folder, block by block as they are quantised; returns its bytes, and how far each layer's outputs moved."""
    plain = skeleton(job.config)
    shapes = {path: gptq_blocks.weight_of(module).shape for path, module in gptq_blocks.layers_in_blocks(plain, job.name).items()}
    checkpoint, files = open_checkpoint(text.source), tensor_files(text.source)
    places = {name: path for name, path in owners(plain, files).items() if path in shapes}
    spill = partial(residency.spilled_states, text)
    blocks = gptq_blocks.quantise_blocks(text, job.rows, layout, damping=DAMPING, micro_tokens=job.micro_tokens, spill=spill)
    solved = SolvedBlocks(blocks, residency.waiting(), step)
    solved.advance()  # what is wrong with rows or layers is said before anything is written
    parts = [
        solved_part(name, places[name], shapes[places[name]], layout, solved) if name in places else part_as_it_is(name, file)
        for name, file in files.items()
    ]
    config = {**checkpoint.config, "quantization_config": gptq_mapping(layout, damping=DAMPING, version=__version__)}
    readme, along = packed_readme(job.name, f"GPTQ, {layout.bits} bits"), files_along(text.source, None)
    return write_model(out, parts, config=config, along=along, readme=readme, waiting=residency.waiting()), solved.errors


"""`lorakeet quantize`: writes a model with its linear layers packed, in a layout that others load.

nf4 is written as bitsandbytes and transformers read it. int8 is a layout of Lorakeet's own (quant/safetensors_layout), which
is said. gptq is made in workflows/packing/calibrate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from torch import Tensor, nn

from lorakeet.errors import ConfigError
from lorakeet.export.model_folder import TensorGroup, write_model
from lorakeet.formats.files.safetensors_file import SafeFile
from lorakeet.memory.budget import Budget
from lorakeet.merge.checkpoint import files_along, open_checkpoint
from lorakeet.models.files.origin import packed_readme
from lorakeet.models.files.quantized import linear_layers, owners, packable, skeleton, with_quantisation
from lorakeet.models.files.source import find_source
from lorakeet.models.files.stored_tensors import method_of, stored_dtype, stored_quantisation, tensor_files
from lorakeet.models.modules import kind_of, weight_shape
from lorakeet.models.placement import dtype_for
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import read_config
from lorakeet.quant import safetensors_layout
from lorakeet.quant.gptq_solve import GptqLayout
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import TILE, PackedBase
from lorakeet.workflows.options import QuantizeOptions
from lorakeet.workflows.packing.calibrate import write_gptq
from lorakeet.workflows.planning.quantizing import QuantizeJob, check_written, fit_quantizing
from lorakeet.workflows.runs.output_paths import require_place
from lorakeet.workflows.runs.peak_memory import peak_said
from lorakeet.workflows.runs.residency import temporary_stores

COPIES = 10  # bytes of each number of a weight while it is packed: it and what it became in fp32, and its codes twice
TILE_COPIES = 20  # bytes of each number of those that are packed at once (quant/packed)


@dataclass(frozen=True)
class PackedFormat:
    """How a method packs one weight and what it writes; the names of tensors follow the weight's own."""

    pack: Callable[[Tensor], PackedBase]
    shapes: Callable[[tuple[int, int]], safetensors_layout.Shapes]
    tensors: Callable[[Any, torch.dtype], Mapping[str, Tensor]]
    config: Callable[[list[str], str], dict[str, Any]]  # from the layers that are kept and the dtype of the model
    note: str  # who reads it


LAYOUTS: dict[str, PackedFormat] = {
    "nf4": PackedFormat(
        pack=Nf4Base.of,
        shapes=lambda shape: safetensors_layout.nf4_shapes(shape, block_size=64, double_quant=True),
        tensors=safetensors_layout.nf4_tensors,
        config=lambda kept, dtype: safetensors_layout.nf4_config(block_size=64, double_quant=True, dense=kept, dtype=dtype),
        note="transformers loads it where bitsandbytes is installed, and so does Lorakeet.",
    ),
    "int8": PackedFormat(
        pack=Int8Base.of,
        shapes=safetensors_layout.int8_shapes,
        tensors=lambda base, dtype: safetensors_layout.int8_tensors(base),
        config=lambda kept, dtype: safetensors_layout.int8_config(kept),
        note="int8 is a layout of Lorakeet's own, which no other program reads.",
    ),
}


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

    From `bits` to `calibration_tokens` all counts for gptq alone (workflows/packing/calibrate). `memory`, such as "3GiB", is
    kept by the whole
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
    if out.exists():
        raise ConfigError(f"{out} exists already and is never overwritten. Choose another folder or remove that one.")
    require_place(out)
    source = find_source(ModelSpec(path=model), console.print)
    config = read_config(source)
    if stored := stored_quantisation(config):
        raise ConfigError(f"{model} holds quantised weights ({method_of(stored)}); name the unquantised model.")
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
    parts = [_part(name, file, chosen.get(places.get(name, "")), layout, error) for name, file in files.items()]
    with temporary_stores(residency), peak_said(residency, console):
        with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("packing")
            written = write_model(
                out,
                parts,
                config={**checkpoint.config, "quantization_config": words},
                along=files_along(source, None),
                readme=packed_readme(model, method),
                waiting=residency.waiting(),
                on_progress=lambda done, total, name: bar.update(
                    task, completed=done, total=total, description=f"packing {name}"
                ),
            )
        result = Quantized(out, method, written, error)
        console.print(f"Wrote {written:,} bytes to {out}: {len(error)} weights in {method}. {layout.note}", soft_wrap=True)
        console.print(f"Packing moved {result.worst[0]} most: by {result.worst[1]:.2%} of its length.", soft_wrap=True)
        check_written(out, job, residency, console.print)
    return result


def bytes_of_packing(numbers: int, stored: torch.dtype) -> int:
    """The peak in bytes while one weight is packed by nf4 or int8, and compared with what it was."""
    return numbers * (stored.itemsize + COPIES) + TILE_COPIES * min(TILE, numbers)


def _part(name: str, file: SafeFile, module: nn.Module | None, layout: PackedFormat, error: dict[str, float]) -> TensorGroup:
    """The tensor as it is, or, where it is the weight of `module`, packed; `error` takes down what packing did to it."""
    stored = file.tensors[name]
    if module is None:
        return TensorGroup({name: (stored.dtype, stored.shape)}, lambda: {name: file.read(name)})
    transposed = kind_of(module) == "conv1d"
    out, width = weight_shape(module, "conv1d" if transposed else "linear")

    def make() -> dict[str, Tensor]:
        weight = file.read(name)
        base = layout.pack(weight.t() if transposed else weight)
        exact, packed = weight.float(), base.dense()
        norm = exact.norm().clamp_min(torch.finfo(torch.float32).tiny)
        error[name] = float(packed.sub_(exact.t() if transposed else exact).norm() / norm)
        return {name + part: tensor for part, tensor in layout.tensors(base, weight.dtype).items()}

    return TensorGroup({name + part: found for part, found in layout.shapes((out, width)).items()}, make)

"""What stands in a packed model's files for each weight: packed by itself, solved block by block, or the tensor as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.exporting.model_folder import Progress, TensorGroup, part_as_it_is
from lorakeet.formats.files.safetensors_file import SafeFile
from lorakeet.memory.spill import Spill
from lorakeet.models.modules import kind_of, weight_shape
from lorakeet.models.text import gptq_blocks
from lorakeet.quant import safetensors_layout
from lorakeet.quant.gptq import PARTS, gptq_buffer_shapes
from lorakeet.quant.gptq_solve import GptqLayout
from lorakeet.quant.int8 import Int8Base
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import TILE, PackedBase

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


def bytes_of_packing(numbers: int, stored: torch.dtype) -> int:
    """The peak in bytes while one weight is packed by nf4 or int8, and compared with what it was."""
    return numbers * (stored.itemsize + COPIES) + TILE_COPIES * min(TILE, numbers)


def packed_part(
    name: str, file: SafeFile, module: nn.Module | None, layout: PackedFormat, error: dict[str, float]
) -> TensorGroup:
    """The tensor as it is, or, where it is the weight of `module`, packed; `error` takes down what packing did to it."""
    if module is None:
        return part_as_it_is(name, file)
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


class SolvedBlocks:
    """The packed layers by path, and how far each one's outputs moved; blocks are quantised as they are needed, and wait in
    `waiting`."""

    def __init__(self, blocks: Iterator[gptq_blocks.QuantisedBlock], waiting: Spill, step: Progress) -> None:
        self.blocks, self.waiting, self.step, self.errors = blocks, waiting, step, dict[str, float]()

    def advance(self) -> None:
        """Quantises the next block."""
        block = next(self.blocks)
        for path, base in block.layers.items():
            for part in PARTS:
                self.waiting.put((path, part), base.get_buffer(part).cpu())
        self.errors.update(block.errors)
        self.step(block.number + 1, block.count, f"block {block.number + 1}")

    def take(self, path: str) -> dict[str, Tensor]:
        """The tensors of the packed layer at `path`, which is forgotten here."""
        while (path, PARTS[0]) not in self.waiting:
            self.advance()
        return {part: self.waiting.take((path, part)) for part in PARTS}


def solved_part(name: str, path: str, shape: Sequence[int], layout: GptqLayout, solved: SolvedBlocks) -> TensorGroup:
    """The four tensors that stand for the weight `name` of the layer at `path`."""
    groups = 1 if layout.group_size == -1 else shape[1] // layout.group_size
    own = name.removesuffix(".weight")

    def make() -> Mapping[str, Tensor]:
        return {f"{own}.{part}": tensor for part, tensor in solved.take(path).items()}

    stored = gptq_buffer_shapes((shape[0], shape[1]), bits=layout.bits, groups=groups)
    return TensorGroup({f"{own}.{part}": kind for part, kind in stored.items()}, make)


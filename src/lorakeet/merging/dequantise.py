"""The base of a quantised run as dense weights: from the settings of its quantisation at load, or from quantised files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.core.layers.experts import stored_transposed
from lorakeet.core.tiled_product import RowSource
from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.files.json_object import read_object
from lorakeet.formats.files.safetensors_file import SafeFile, TensorEntry
from lorakeet.merging.checkpoint import CONFIG, Checkpoint
from lorakeet.models import modules
from lorakeet.models.files.checkpoint_pieces import Piece, pieces_of
from lorakeet.models.files.float_scales import Dequantised
from lorakeet.models.files.quantized import ignored_names, joined_names, owners, packable, packable_stacks, skeleton
from lorakeet.models.files.stored_tensors import READERS, StoredModel, stored_quantisation, tensor_files
from lorakeet.models.text.load import read_config
from lorakeet.quant.construct import quantise_weight
from lorakeet.quant.gptq import PARTS
from lorakeet.quant.pack_quantized import MARK
from lorakeet.quant.spec import QuantSpec


def rounding_steps(source: Path, spec: QuantSpec) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each weight in `source` that `spec` quantises, by its name on disk, a function that quantises and dequantises it.

    It takes the stored numbers, as quantisation at load does, and returns fp32.
    """
    config, files = read_config(source), tensor_files(source)
    plain = skeleton(config)
    chosen = packable(plain, head=spec.head == "quantize")
    places = owners(plain, files)
    found = {name: chosen[path] for name, path in places.items() if path in chosen}
    linear = {name: _rounding(modules.kind_of(module) == "conv1d", spec) for name, module in found.items()}
    return {**linear, **_rounded_stacks(plain, files, spec)}


def _rounded_stacks(plain: Any, files: Mapping[str, SafeFile], spec: QuantSpec) -> dict[str, Callable[[Tensor], Tensor]]:
    """The same for stacks of experts: a matrix is rounded whole, of which the files may have several parts."""
    pieces = pieces_of(plain, {name: file.tensors[name].shape for name, file in files.items()})
    steps: dict[str, Callable[[Tensor], Tensor]] = {}
    for path, module in packable_stacks(plain).items():
        own = pieces.get(path, ())
        across = bool(own) and own[0].across != stored_transposed(module)
        if len(own) == 1 and own[0].expert is None and own[0].rows is None:
            steps[own[0].name] = partial(_rounded_whole, _rounding(across, spec))
        elif own and not across and all(piece.expert is not None and piece.rows is None for piece in own):
            steps |= _rounded_parts(own, files, spec)
        else:
            raise ConfigError(
                f"The base's {path} is quantised at load, and cannot be rounded so in its files, which have it in another way. "
                "Merge into the original weights: --into original."
            )
    return steps


def _rounded_whole(rounded: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    return torch.stack([rounded(matrix) for matrix in weight])


def _rounded_parts(
    pieces: Sequence[Piece], files: Mapping[str, SafeFile], spec: QuantSpec
) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each part of an expert's matrix, its rows of the rounded matrix."""
    matrices: dict[int, list[Piece]] = {}
    for piece in pieces:
        matrices.setdefault(int(piece.expert or 0), []).append(piece)

    def step(piece: Piece, beside: Sequence[Piece]) -> Callable[[Tensor], Tensor]:
        def rounded(weight: Tensor) -> Tensor:
            parts = [weight if other is piece else files[other.name].read(other.name) for other in beside]
            whole = _rounding(False, spec)(torch.cat([part.to(weight.dtype) for part in parts]))
            return whole if piece.own is None else whole[piece.own]

        return rounded

    return {piece.name: step(piece, beside) for beside in matrices.values() for piece in beside}


def _rounding(transposed: bool, spec: QuantSpec) -> Callable[[Tensor], Tensor]:
    def rounded(weight: Tensor) -> Tensor:
        dense = quantise_weight(weight.t() if transposed else weight, spec).dense()
        return dense.t().contiguous() if transposed else dense

    return rounded


@dataclass(frozen=True)
class _Unpacked(SafeFile):
    """A file of a quantised model whose packed weights are read as dense fp32 tensors."""

    made: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        return self.made[name]() if name in self.made else super().read(name)

    def rows(self, name: str) -> RowSource:
        return self.made[name]() if name in self.made else super().rows(name)


def open_dequantised(folder: Path) -> Checkpoint:
    """Opens the quantised model in `folder` (GPTQ, NF4, int8) as a dense one; a weight is dequantised when it is read.

    Dequantised weights have the dtype of config.json, or else that of most other tensors. ConfigError if the folder is not
    quantised by a supported method, DataError for packed weights of no layer.
    """
    config = read_config(folder)
    stored = stored_quantisation(config)
    reader = READERS.get(str(stored.get("quant_method", ""))) if stored else None
    if reader is None or stored is None:
        raise ConfigError(f"{folder} holds no weights in {', '.join(READERS)}; expected a quantised model folder.")
    files = tensor_files(folder)
    plain = skeleton(config)
    stored_model = reader(files, stored)
    joined, ignored = joined_names(plain, stored_model.packed), ignored_names(plain, stored_model.packed)
    places = owners(plain, stored_model.packed)
    strange = sorted(set(stored_model.packed) - set(places) - joined - ignored)
    if strange:
        raise DataError(f"{folder} has {len(strange)} packed weights that belong to no layer of the model, such as {strange[0]}.")
    dtype = _usual_dtype(config, stored_model, files)
    tensors: dict[str, dict[str, TensorEntry]] = {file.path.name: {} for file in files.values()}
    made: dict[str, Callable[[], Tensor]] = {}
    for name, read in stored_model.dense.items():
        if isinstance(read, Dequantised):
            file = files[name] if name in files else files[f"{name}_blocks"]  # MXFP4's name
            tensors[file.path.name][name], made[name] = TensorEntry(dtype, read.shape, 0, 0), read
        else:
            tensors[files[name].path.name][name] = files[name].tensors[name]
    for name in joined:
        shape = files[name].tensors[name].shape if name in files else stored_model.packed[name]().shape
        tensors[_file_of(files, name).path.name][name] = TensorEntry(dtype, shape, 0, 0)
        made[name] = _dense(stored_model, name, False)
    for name, path in places.items():
        module = plain.get_submodule(path)
        tensors[_file_of(files, name).path.name][name] = TensorEntry(dtype, tuple(module.weight.shape), 0, 0)
        made[name] = _dense(stored_model, name, modules.kind_of(module) == "conv1d")
    shards = {file.path.name: file for file in files.values()}
    unpacked = {name: _Unpacked(file.path, tensors[name], file.metadata, made=made) for name, file in shards.items()}
    home = {name: file for file, shard in unpacked.items() for name in shard.tensors}
    settings = read_object(folder / CONFIG, expected="the settings of a model")
    for part in (settings, settings.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    return Checkpoint(folder, unpacked, home, settings)


def _file_of(files: Mapping[str, SafeFile], name: str) -> SafeFile:
    """The file of a packed weight, or of its codes: GPTQ and compressed-tensors have names of their own for these."""
    names = name, f"{name.removesuffix('.weight')}.{PARTS[0]}", f"{name}{MARK}"
    return next(files[each] for each in names if each in files)


def _dense(stored_model: StoredModel, name: str, transposed: bool) -> Callable[[], Tensor]:
    def made() -> Tensor:
        dense = stored_model.packed[name]().dense()
        return dense.t().contiguous() if transposed else dense

    return made


def _usual_dtype(config: Any, stored_model: StoredModel, files: Mapping[str, SafeFile]) -> torch.dtype:
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    kinds = Counter(
        files[name].tensors[name].dtype
        for name in stored_model.dense
        if name in files and files[name].tensors[name].dtype.itemsize > 1 and files[name].tensors[name].dtype.is_floating_point
    )
    return kinds.most_common(1)[0][0] if kinds else torch.float32

"""A GGUF file opened for reading: its metadata, and its tensors, whose bytes stay in the file until they are used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakeet.core.tiled_product import matrix_shape
from lorakeet.disk import open_buffered
from lorakeet.errors import DataError, one_message, readable
from lorakeet.formats.files.gguf_header import MOST_PARTS, check_gguf, gguf_package


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a GGUF file: its ggml type, its shape with rows first, and the place of its bytes, which stay in the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    path: Path
    offset: int  # where the bytes begin in the file
    layout: tuple[np.dtype[Any], tuple[int, ...]]  # of `data`

    @property
    def data(self) -> NDArray[Any]:
        """The stored numbers or bytes, rows first, read now: no page of the file stays mapped."""
        return self._read(0, self.layout[1])

    def numbers(self) -> NDArray[np.float32]:
        """The tensor dequantised to fp32, whatever its type."""
        return self._dequantised(self.data)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of dequantised rows."""
        return torch.float32

    def as_matrix(self) -> FileTensor:
        """The tensor as a matrix, all dimensions but the last flattened to rows (core/tiled_product.StackedRows)."""
        dtype, stored = self.layout
        return replace(self, shape=matrix_shape(self.shape), layout=(dtype, matrix_shape(stored)))

    def __getitem__(self, part: slice) -> Tensor:
        """Some rows dequantised to fp32, read now (core/tiled_product.RowSource). A vector, whose type may be blocks, is read
        whole.
        """
        if len(self.shape) < 2:
            return torch.from_numpy(np.require(self.numbers()[part], requirements="W"))
        start, stop, _ = part.indices(self.shape[0])
        shape = (max(0, stop - start), *self.layout[1][1:])
        return torch.from_numpy(np.require(self._dequantised(self._read(start, shape)), requirements="W"))

    def _read(self, first: int, shape: tuple[int, ...]) -> NDArray[Any]:
        """Reads stored numbers or bytes of that `shape` from row `first` on."""
        dtype, whole = self.layout
        with open_buffered(self.path) as file:
            file.seek(self.offset + first * math.prod(whole[1:]) * dtype.itemsize)
            return np.fromfile(file, dtype, math.prod(shape)).reshape(shape)

    def _dequantised(self, data: NDArray[Any]) -> NDArray[np.float32]:
        gguf = gguf_package()
        return np.asarray(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[self.kind]), dtype=np.float32)


class GgufFile:
    """The metadata of a GGUF file by key, and its tensors one at a time."""

    def __init__(self, path: Path, *, most_parts: int = MOST_PARTS) -> None:
        """DataError if the file cannot be read; `most_parts` as in `check_gguf`."""
        check_gguf(path, most_parts=most_parts)
        self.path = path
        with one_message(f"{path} is not a whole GGUF file", "It may have been cut off; fetch it again."), readable(path):
            self._reader = gguf_package().GGUFReader(path)

    def value(self, key: str) -> Any:
        """The value of a metadata key; None if the file has none."""
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: the key {key} has a text that is not UTF-8: {error}. Fetch the file again.") from error

    def text(self, key: str) -> str:
        """As `value`, for a text; empty if there is none."""
        value = self.value(key)
        return value if isinstance(value, str) else ""

    @property
    def is_adapter(self) -> bool:
        """True for a LoRA adapter, False for a model."""
        return self.text("general.type") == "adapter"

    @property
    def tensor_types(self) -> Counter[str]:
        """The number of tensors of each type."""
        return Counter(str(tensor.tensor_type.name) for tensor in self._reader.tensors)

    @property
    def types(self) -> Counter[str]:
        """The number of weights in matrices of each type."""
        counts: Counter[str] = Counter()
        for tensor in self._reader.tensors:
            if len(tensor.shape) > 1:
                counts[str(tensor.tensor_type.name)] += int(tensor.n_elements)
        return counts

    def tensors(self) -> Iterator[tuple[str, FileTensor]]:
        """(name, tensor) in the order of the file."""
        for entry in self._reader.tensors:
            layout = entry.data.dtype, tuple(map(int, entry.data.shape))
            shape, start = tuple(map(int, reversed(entry.shape))), int(entry.data_offset)
            yield entry.name, FileTensor(entry.name, entry.tensor_type.name, shape, self.path, start, layout)

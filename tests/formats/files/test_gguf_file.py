"""A GGUF file read: parts of a tensor are those of the whole; metadata and counts of types."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from lorakeet.errors import DataError
from lorakeet.formats.files.gguf_file import GgufFile


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("shape", [(64,), (6, 64), (2, 3, 64)])
def test_parts_of_a_tensor_of_a_file_are_those_of_the_whole(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Also of a vector, of which a file may have bytes or blocks: a norm in BF16, for one."""
    values, ggml = np.arange(np.prod(shape), dtype=np.float32).reshape(shape), GGMLQuantizationType[kind]
    stored = values if kind == "F32" else quants.quantize(values, ggml)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("a", stored, raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = torch.from_numpy(quants.dequantize(stored, ggml).copy())
    ((name, tensor),) = GgufFile(tmp_path / "x.gguf").tensors()
    assert name == "a"
    assert tensor.shape == shape and torch.equal(tensor[:], whole) and torch.equal(tensor[1:2], whole[1:2])
    tensor[:].mul_(2)  # of its own
    matrix = tensor.as_matrix()
    rows = whole if whole.ndim < 2 else whole.flatten(0, -2)
    assert matrix.shape == tuple(rows.shape) and torch.equal(matrix[3:5], rows[3:5])


def test_metadata_and_types_are_those_of_the_file(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_type("adapter")
    writer.add_float32("own", 0.5)
    writer.add_tensor("a", np.zeros((2, 4), np.float32))
    writer.add_tensor("b", np.zeros(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    assert file.is_adapter and file.text("general.architecture") == "llama" and file.value("own") == 0.5
    assert file.value("none") is None and file.text("own") == ""
    assert file.types == {"F32": 8} and file.tensor_types == {"F32": 2}
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:60])
    with pytest.raises(DataError, match=r"cut\.gguf is not a whole GGUF file"):
        GgufFile(tmp_path / "cut.gguf")

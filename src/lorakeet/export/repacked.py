"""A quantised model written again with other numbers in its packed layers: same layout, same settings, all else as it was."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.export.packed_model import Part, write_model
from lorakeet.formats.json_object import read_object
from lorakeet.formats.safe import SafeFile
from lorakeet.merge.checkpoint import CONFIG, files_along
from lorakeet.models.gguf_packed import file_blocks
from lorakeet.models.layout import PackedLayout
from lorakeet.models.stock import tensor_files
from lorakeet.quant import gptq, on_disk
from lorakeet.quant.gguf import GgufBase
from lorakeet.quant.gptq import GptqBase
from lorakeet.quant.nf4 import Nf4Base
from lorakeet.quant.packed import PackedBase


def write_repacked(layout: PackedLayout, bases: Mapping[str, PackedBase], out: Path, *, tokenizer: Path | None = None) -> int:
    """Writes the model of `layout` with `bases` (by the layers' paths) to `out`, whole or not at all; returns its bytes.

    A folder becomes a new folder with the same config.json; a .gguf file a new file that differs in the blocks of those layers
    alone. ConfigError where `out` exists, EnvironmentProblem where the disk is too full; nothing is left behind then.
    """
    if layout.file is not None:
        blocks = {layout.names[path]: base for path, base in bases.items() if isinstance(base, GgufBase)}
        return _patched(layout.file, file_blocks(layout.file, blocks), out)
    files = tensor_files(layout.folder)
    parts = [part for path, base in bases.items() for part in _parts(layout.names[path], base, files)]
    taken = {name for path in bases for name in _names(layout.names[path], bases[path])}
    parts += [
        Part({name: (file.tensors[name].dtype, file.tensors[name].shape)}, _reader(file, name))
        for name, file in files.items()
        if name not in taken
    ]
    config = read_object(layout.folder / CONFIG, expected="the settings of a model")
    return write_model(out, parts, config=config, along=files_along(layout.folder, tokenizer))


def _names(name: str, base: PackedBase) -> list[str]:
    if isinstance(base, GptqBase):
        return [f"{name.removesuffix('.weight')}.{part}" for part in gptq.PARTS]
    return [name + part for part in on_disk.NF4_PARTS]


def _parts(name: str, base: PackedBase, files: Mapping[str, SafeFile]) -> list[Part]:
    """The tensors of one packed weight."""
    if isinstance(base, GptqBase):
        shapes = gptq.buffer_shapes(base.shape, bits=base.bits, groups=base.groups)
        own = name.removesuffix(".weight")
        made = {f"{own}.{part}": base.get_buffer(part).cpu() for part in shapes}
    elif isinstance(base, Nf4Base):
        dtype = on_disk.nf4_dtype(files[name + on_disk.NF4_STATE].read(name + on_disk.NF4_STATE))
        made = {name + part: tensor for part, tensor in on_disk.nf4_tensors(base, dtype).items()}
    else:
        raise ValueError(f"{type(base).__name__} is no base of a GPTQ or NF4 folder")
    return [Part({key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in made.items()}, lambda: made)]


def _reader(file: SafeFile, name: str) -> Callable[[], Mapping[str, Tensor]]:
    return lambda: {name: file.read(name)}


def _patched(source: Path, blocks: Mapping[int, bytes], out: Path) -> int:
    """A copy of `source` with other bytes at some offsets."""
    if out.exists():
        raise ConfigError(f"{out} exists already and is never overwritten. Choose another file or remove that one.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.copyfile(source, partial)
        with partial.open("r+b") as file:
            for offset, content in blocks.items():
                file.seek(offset)
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise EnvironmentProblem(
                f"The disk of {out.parent} has no room for {source.stat().st_size:,} bytes. Free some space or name an --out on "
                "another disk; nothing was left behind."
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)
    return out.stat().st_size

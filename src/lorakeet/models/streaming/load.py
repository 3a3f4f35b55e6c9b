"""Writes a model's files to a store, tensor by tensor, and opens a streamed model from it: the whole is never in memory.

transformers names, joins and converts the tensors as usual; its results go into the store instead of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # torch offers no public name
from torch.utils._python_dispatch import _disable_current_modes  # nor for this
from transformers.core_model_loading import ConversionOps

from lorakeet.core.layers.experts import stack_shape
from lorakeet.errors import DataError
from lorakeet.memory.store import CPU, StoreWriter, WeightStore, new_store
from lorakeet.memory.stream import RecordStream, StreamedRows
from lorakeet.memory.transfer import CudaTransfer, HostTransfer
from lorakeet.models import modules
from lorakeet.models.families import Family, family_of_model
from lorakeet.models.files.fingerprint import fingerprint
from lorakeet.models.files.foreign_code import build_native
from lorakeet.models.files.packing import packing_of
from lorakeet.models.files.quantized import WeightHook, limits_of_packing, read_into, skeleton, stored_model_of
from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.models.files.stored_tensors import StoredModel, stored_quantisation, tensor_files
from lorakeet.models.files.validate import auto_class_of, loading, require_whole
from lorakeet.models.streaming.model import NotStreamed, StreamedBlocks, StreamedEmbedding, StreamedHead
from lorakeet.quant.construct import empty_base, empty_stack
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec
from lorakeet.quant.stack import PackedStack

Packs = Mapping[str, Callable[[Tensor], PackedStack]]  # by the name of a stack of experts in the model
Changes = Mapping[str, Callable[[Tensor], Tensor]]  # by the parameter's name in the model


@dataclass(frozen=True)
class Residence:
    """Where the blocks of a streamed model are: the computing device, and how many are there at a time."""

    slots: int = 2
    device: torch.device = CPU
    pinned: bool = False  # whether blocks stay in pinned host memory once they were read, for a CUDA device
    ends: bool = False  # whether embedding and head are there too, in place of reads row by row

    def transfer(self, store: WeightStore) -> HostTransfer | None:
        """Returns the transfer of records from `store` to the device; None for the CPU."""
        return CudaTransfer(store, self.device, keep=self.pinned) if self.device.type == "cuda" else None


ON_CPU = Residence()
EMPTY_ON_META = partial(empty_base, device="meta")


def streamed_model(
    source: Path,
    config: Any,
    dtype: torch.dtype,
    *,
    quantize: QuantSpec,
    folder: Path,
    residence: Residence = ON_CPU,
    changes: Changes | None = None,
    say: Callable[[str], None],
) -> tuple[Any, StreamedBlocks]:
    """Opens the frozen model in eval mode, with eager attention, and its blocks, from a store in `folder`; writes it if missing.

    `changes` are applied to dense weights as a missing store is written. Raises ConfigError if the model has no list of blocks,
    DataError for damaged files or a store of another model, EnvironmentProblem if the store cannot be written.
    """
    same, family = identity(source, dtype, quantize), family_of_model(config)
    path = folder / f"{source.name}-{same['model'][:16]}-{quantize.method}-{same['dtype']}.safetensors"
    if not path.is_file():
        say(f"Writing the frozen weights into {path}, from where they are streamed.")
        write_store(path, same, source=source, config=config, dtype=dtype, quantize=quantize, family=family, changes=changes)
    model, streamed = open_streamed(WeightStore.open(path, same), config, dtype, family, residence=residence)
    if quantize.method != "none" or stored_quantisation(config):
        for line in limits_of_packing(model):
            say(line)
    return model, streamed


def identity(source: Path, dtype: torch.dtype, quantize: QuantSpec) -> dict[str, str]:
    """Returns the identity of a store: its model, dtype and packing."""
    packing = f"{quantize.method} {quantize.block_size} {quantize.double_quant} {quantize.head}, with experts"
    return {"model": fingerprint(source), "dtype": str(dtype).removeprefix("torch."), "packing": packing}


def write_store(
    path: Path,
    same: Mapping[str, str],
    *,
    source: Path,
    config: Any,
    dtype: torch.dtype,
    quantize: QuantSpec,
    family: Family,
    changes: Changes | None = None,
) -> None:
    """Writes the store of a model folder to `path`, with one block in memory at a time."""
    stored_model = stored_model_of(source, config, quantize)
    empty = empty_model(config, dtype)
    records = records_of(empty, family)
    size = sum(tensor.nbytes for tensor in empty.state_dict().values())  # of the dense model: an upper bound
    more: dict[str, str] = {}
    with new_store(path, identity=more, tensors=8 * len(empty.state_dict()), size=0 if stored_model.packed else size) as writer:
        collected = _Collector(writer, empty, records, changes or {}, stored_model.pack)
        missing = _read_all(stored_model, config, dtype, collected, source)
        require_whole(source, config.model_type, misfits=collected.misfits, missing=missing | collected.waiting)
        more.update(same, packed=json.dumps(collected.packed))


def open_streamed(
    store: WeightStore,
    config: Any,
    dtype: torch.dtype,
    family: Family,
    *,
    residence: Residence = ON_CPU,
    base_of: Callable[[Mapping[str, Any]], PackedBase] = EMPTY_ON_META,
) -> tuple[Any, StreamedBlocks]:
    """Opens the model of a store whose records are its blocks; `residence` says where and how many are loaded.

    `base_of` makes an empty packed weight from its settings.
    """
    model = empty_model(config, dtype)
    for path, settings in json.loads(store.identity["packed"]).items():
        _put_packed(model, path, settings, base_of)
    model.requires_grad_(False).eval()
    prefix, count = modules.block_prefix(model, family)
    names = [f"{prefix}.{index}" for index in range(count)]
    streamed = StreamedBlocks(RecordStream(store, names, slots=residence.slots, transfer=residence.transfer(store)))
    device = residence.device
    _compute_buffers(model, device)
    blocks = cast(nn.ModuleList, model.get_submodule(prefix))
    for index in range(count):
        blocks[index] = streamed.add(blocks[index])
    if not residence.ends:
        _stream_ends(model, store, device, streamed)
    for name in store.tensors:
        if not name.startswith(f"{prefix}."):
            _make_resident(model, store, name, device)
    return model, streamed


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """Returns the model that `config` describes, on the meta device, with eager attention and tied weights; outside ledgers."""
    with _disable_current_modes(), torch.device("meta"), quiet_transformers():
        plain = skeleton(config).config
        model = build_native(auto_class_of(plain), plain, dtype=dtype, attn_implementation="eager")
    model.tie_weights()
    return model


def empty_packed(config: Any, dtype: torch.dtype, quantize: QuantSpec, files: Path | None = None) -> Any:
    """Returns the model on the meta device with packed linear layers, as `quantize` says or as its `files` are."""
    model = empty_model(config, dtype)
    for path, settings in packing_of(model, config, quantize, files).items():
        _put_packed(model, path, settings, EMPTY_ON_META)
    return model


def records_of(model: Any, family: Family) -> dict[str, set[str]]:
    """Returns the names of each block's tensors, by the block's path; NotStreamed if the model has no list of blocks."""
    prefix, count = modules.block_prefix(model, family)
    if not count:
        raise NotStreamed(f"{type(model).__name__} has no list of blocks that could be streamed.")
    found: dict[str, set[str]] = {f"{prefix}.{index}": set() for index in range(count)}
    for name in model.state_dict():
        if name.startswith(f"{prefix}."):
            found[modules.block_of(name, prefix)].add(name)
    return found


def bytes_of_storing(model: Any, family: Family, block_bytes: int, number_bytes: int) -> int:
    """Returns the peak in bytes of writing the store of `model`, which is on the meta device.

    It is a block of `block_bytes` and one more matrix of it, with `number_bytes` a number, or one matrix outside the blocks:
    transformers reads tensors one by one in the natural order of their names, so that those of a block are contiguous.
    """
    inside = {name for names in records_of(model, family).values() for name in names}
    sizes: dict[str, int] = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    within = max(size for name, size in sizes.items() if name in inside)
    elsewhere = max((size for name, size in sizes.items() if name not in inside), default=0)
    return max(block_bytes + within * number_bytes, elsewhere * number_bytes)


class _Collector:
    """Collects tensors until a block is complete, and writes it to the store."""

    def __init__(
        self, writer: StoreWriter, skeleton: Any, records: Mapping[str, set[str]], changes: Changes, pack: Packs
    ) -> None:
        self.writer, self.changes, self.pack = writer, changes, pack
        self.packed: dict[str, Any] = {}
        self.misfits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}  # by name: found and expected shape
        self.refused: OSError | None = None  # the disk's error
        self.shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in skeleton.state_dict().items()}
        self.transposed = {name for name, module in skeleton.named_modules() if modules.kind_of(module) == "conv1d"}
        self.stacks = {
            f"{path}.{name}": stack_shape(module, name)
            for path, module in skeleton.named_modules()
            for name in modules.expert_stacks(module)
        }
        self._record_of = {name: record for record, names in records.items() for name in names}
        self._waiting = {record: set(names) for record, names in records.items()}
        self._collected: dict[str, dict[str, Tensor]] = {record: {} for record in records}
        self.seen: set[str] = set()

    def take(self, name: str, value: Tensor | PackedBase | PackedStack) -> None:
        """Takes a tensor by its name in the model, or a packed weight by the name of the dense one."""
        shape, dtype = self.shapes[name]
        if isinstance(value, Tensor) and name in self.pack:
            value = self.pack[name](value)
        if isinstance(value, PackedStack):
            parts = {f"{name}.{leaf}": tensor for leaf, tensor in value.state_dict().items()}
            self.packed[name] = value.settings
            if value.shape != self.stacks[name]:
                self.misfits[name] = (tuple(value.shape), self.stacks[name])
        elif isinstance(value, PackedBase):
            path = name.removesuffix(".weight")
            expected = shape[::-1] if path in self.transposed else shape
            parts = {f"{path}.base.{leaf}": tensor for leaf, tensor in value.state_dict().items()}
            self.packed[path] = value.settings
            if value.shape != expected:
                self.misfits[name] = (tuple(value.shape), expected)
        else:
            parts = {name: self.changes[name](value.to(dtype)) if name in self.changes else value.to(dtype)}
            if tuple(value.shape) != shape:
                self.misfits[name] = (tuple(value.shape), shape)
        self.seen.add(name)
        record = self._record_of.get(name)
        if record is None:
            for full, tensor in parts.items():
                self.writer.add(full.rpartition(".")[0], {full.rpartition(".")[2]: tensor})
            return
        self._collected[record].update({full.removeprefix(f"{record}."): tensor for full, tensor in parts.items()})
        self._waiting[record].discard(name)
        if not self._waiting[record]:
            self.writer.add(record, self._collected.pop(record))

    @property
    def waiting(self) -> set[str]:
        """The tensors of blocks that have not arrived."""
        return {name for names in self._waiting.values() for name in names}


class _Send(ConversionOps):  # type: ignore[misc]
    """Sends tensors to the collector."""

    def __init__(self, collector: _Collector) -> None:
        self.collector = collector

    def convert(self, input_dict: dict[str, Any], **context: Any) -> dict[str, Any]:
        for name, value in input_dict.items():
            full = name if name in self.collector.shapes else context["full_layer_name"]
            try:
                self.collector.take(full, value[0] if isinstance(value, list) else value)
            except OSError as error:  # transformers would only log a line
                self.collector.refused = error
                raise
            context["missing_keys"].discard(full)
        return {}


def _read_all(stored_model: StoredModel, config: Any, dtype: torch.dtype, collector: _Collector, source: Path) -> set[str]:
    """Lets transformers read all tensors of `stored_model`; returns the names of those that are missing."""
    empty = skeleton(config)
    try:
        with loading(source, config.model_type, tensor_files(source)):
            _, report = read_into(
                empty, stored_model.reads, dtype, quantization_config=WeightHook(_Send(collector), lambda name: True)
            )
    except DataError as error:
        if collector.refused is not None:
            raise collector.refused from error
        raise
    return set(report["missing_keys"])


def _put_packed(
    model: Any, path: str, settings: Mapping[str, Any], base_of: Callable[[Mapping[str, Any]], PackedBase]
) -> None:
    """Replaces the linear layer at `path`, or the stack of experts, by a packed one on the meta device."""
    if len(settings["shape"]) == 3:
        one = base_of({**settings, "shape": settings["shape"][1:]})
        modules.put_stack(model, path, empty_stack(settings, device="meta").outline(one))
        return
    module = model.get_submodule(path)
    model.set_submodule(path, PackedLinear(base_of(settings), module.bias, transposed=not isinstance(module, nn.Linear)))


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Computes the buffers that are in no file (the angles of rotary positions) on the CPU, as transformers does, and moves them
    to `device`."""
    with torch.no_grad():
        for module in model.modules():
            names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
            if names:
                for name in names:
                    empty = cast(Tensor, module._buffers[name])
                    module._buffers[name] = torch.empty(empty.shape, dtype=empty.dtype)
                if not isinstance(module._buffers[names[0]], FakeTensor):  # in a rehearsal they have no numbers
                    model._init_weights(module)
                for name in names:
                    module._buffers[name] = cast(Tensor, module._buffers[name]).to(device)


def _stream_ends(model: Any, store: WeightStore, device: torch.device, streamed: StreamedBlocks) -> None:
    """Wraps the embedding and a plain head, so that their rows are read from the store."""
    embedding, head = modules.input_layer(model), modules.output_layer(model)
    path = modules.path_of(model, embedding)
    tied = head is not None and embedding is not None and cast(Any, head).weight is cast(Any, embedding).weight
    if modules.kind_of(cast(nn.Module, embedding)) == "embedding" and f"{path}.weight" in store.tensors:
        rows = store.rows(f"{path}.weight", device)
        modules.replace(model, path, StreamedEmbedding(cast(nn.Embedding, embedding), rows, streamed))
        stored = f"{path}.weight" if tied else f"{modules.path_of(model, head)}.weight"
        if type(head) is nn.Linear and head.bias is None and stored in store.tensors:
            matrix = StreamedRows(stored, device, streamed.stream)
            modules.replace(model, modules.path_of(model, head), StreamedHead(head, matrix))


def _make_resident(model: Any, store: WeightStore, name: str, device: torch.device) -> None:
    """Reads one tensor into its module on `device`, unless it is streamed."""
    path, _, leaf = name.rpartition(".")
    module = modules.find(model, path)
    if module is None or isinstance(module, (StreamedEmbedding, StreamedHead)):
        return
    if leaf in module._parameters:
        tensor = nn.Parameter(store.tensor(name).to(device), requires_grad=False)
        empty = module._parameters[leaf]
        for other in model.modules():  # tied ones stay tied
            for key, parameter in other._parameters.items():
                if parameter is empty:
                    other._parameters[key] = tensor
    else:
        module._buffers[leaf] = store.tensor(name).to(device)

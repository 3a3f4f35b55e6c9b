"""Builds a text model, in memory or streamed, from its configuration alone: shapes without weights, for planning.

Inside a memory.ledger.Ledger its tensors take no memory; outside they are real and random.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # torch offers no public name
from torch.utils._python_dispatch import _disable_current_modes  # nor for this
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from lorakeet.data.locate import PACKAGE, locate, package_file
from lorakeet.errors import ConfigError, DataError, nearest, one_message
from lorakeet.kernels.cpu.stored import StoredWeight
from lorakeet.kernels.gptq_words import WORD
from lorakeet.memory.ledger import Ledger
from lorakeet.memory.remembered import remembered
from lorakeet.memory.shape_only import ShapeStore
from lorakeet.models.families import Family, family_of_model
from lorakeet.models.files.foreign_code import build_native, read_native
from lorakeet.models.files.gguf_validate import config_of_gguf
from lorakeet.models.files.packing import Packing, packing_of
from lorakeet.models.files.quantized import plain_config
from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.models.files.validate import auto_class_of, require_sizes, require_text_model
from lorakeet.models.modules import block_of, put_stack
from lorakeet.models.row_rotary import choose_by_row
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.load import EMPTY_ON_META, ON_CPU, Residence, empty_packed, open_streamed, records_of
from lorakeet.models.streaming.model import StreamedBlocks
from lorakeet.models.text.load import set_attention
from lorakeet.models.text.model import PassOptions, TextModel
from lorakeet.quant.construct import empty_base, empty_stack
from lorakeet.quant.int8 import enable_int8_products
from lorakeet.quant.packed import TILE, PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec
from lorakeet.quant.stack import PackedStack


@cache
def published_configs() -> dict[str, Traversable]:
    """Returns the config.json files of well-known models that ship with Lorakeet, by hub id."""
    folder = files("lorakeet.models") / "shapes"
    shapes = [entry for entry in folder.iterdir() if entry.name.endswith(".json")]
    return {entry.name.removesuffix(".json").replace("--", "/"): entry for entry in shapes}


def config_of(spec: ModelSpec, say: Callable[[str], None]) -> Any:
    """Returns the transformers configuration of the model `spec.path`; reads and fetches no weights.

    It comes from a folder's config.json, the header of a .gguf file, a published shape (without network), or the config.json of
    a hub id. Raises ConfigError if there is none.
    """
    name = spec.path
    found = {known.lower(): known for known in published_configs()}.get(name.lower())
    if found is not None:
        return config_from_settings(json.loads(published_configs()[found].read_text(encoding="utf-8")))
    local = local_files(name)
    advice = (
        f"Name a folder with config.json, a .gguf file, package:NAME, a hub id, or one of the shapes that need no network: "
        f"{', '.join(published_configs())}.{nearest(name, list(published_configs()))}"
    )
    with one_message(f"model.path '{name}' has no configuration that could be read", advice, ConfigError), quiet_transformers():
        if local is None:
            say(f"Fetching the config.json of {name} from the model hub.")
            config = read_native(AutoConfig, name, revision=spec.revision)
        elif local.suffix.lower() == ".gguf":
            return config_of_gguf(local)
        else:
            config = read_native(AutoConfig, local, local_files_only=True)
    require_sizes(f"model.path '{name}'", config)
    require_text_model(f"model.path '{name}'", config)
    return config


def config_from_settings(settings: dict[str, Any]) -> Any:
    """Returns a transformers configuration from the content of a config.json."""
    kind = settings["model_type"]
    return AutoConfig.for_model(kind, **{key: value for key, value in settings.items() if key != "model_type"})


def model_from_config(
    config: Any,
    *,
    name: str,
    dtype: torch.dtype,
    products: torch.dtype,
    device: torch.device | str = "cpu",
    attention: str = "auto",
    quantize: QuantSpec | None = None,
    files: Path | None = None,
) -> TextModel:
    """Returns the frozen model that `config` describes, in eval mode, without a tokenizer.

    Its linear layers are packed as `quantize` says, or as they are already in `files`, a folder or .gguf file. Attention auto is
    varlen, which nearly every model can use.
    """
    device = torch.device(device)
    # What draws until numbers fit never ends on shapes.
    on_shapes = isinstance(torch.empty(0), FakeTensor)
    with quiet_transformers(), torch.device(device), no_init_weights() if on_shapes else nullcontext():
        own = plain_config(config)  # a copy, into which transformers writes the dtype
        try:
            model = build_native(auto_class_of(own), own, dtype=dtype, attn_implementation="eager")
        except DataError as error:
            if on_shapes and isinstance(error.__cause__, RuntimeError):  # not the configuration's fault
                raise error.__cause__ from None
            raise
    model.tie_weights()
    model = model.requires_grad_(False).eval()
    quantize = quantize or QuantSpec()
    put_packed(model, packing_of(model, config, quantize, files), device, in_int8=quantize.int8_products)
    return _text_model(model, None, attention, name=name, dtype=dtype, products=products, device=device)


def _text_model(model: Any, streamed: StreamedBlocks | None, attention: str, **about: Any) -> TextModel:
    set_attention(model, "varlen" if attention == "auto" else attention)
    choose_by_row(model)
    return TextModel(
        model=model, tokenizer=None, source=Path(), family=family_of_model(model.config), streamed=streamed,
        options=PassOptions(share_prefix=False, rows_apart=False),  # rows are not known: a plan may be larger, never smaller
        **about,
    )  # fmt: skip


def streamed_model_from_config(
    config: Any,
    *,
    name: str,
    dtype: torch.dtype,
    products: torch.dtype,
    attention: str = "auto",
    quantize: QuantSpec | None = None,
    files: Path | None = None,
    residence: Residence = ON_CPU,
) -> TextModel:
    """Returns the frozen model that `config` describes, in eval mode, without a tokenizer, where `residence` says.

    As in `model_from_config`, linear layers are packed as `quantize` says or as they are in `files`, and attention auto is
    varlen. Raises ConfigError if the model has no list of blocks.
    """
    family, quantize = family_of_model(config), quantize or QuantSpec()
    with _disable_current_modes():  # tensors on disk are not in the ledger
        store = shape_store(empty_packed(config, dtype, quantize, files), family)
    base_of = EMPTY_ON_META if quantize.int8_products else lambda settings: ShapeBase(EMPTY_ON_META(settings))
    model, streamed = open_streamed(store, config, dtype, family, residence=residence, base_of=base_of)
    if quantize.int8_products:
        enable_int8_products(model)
    return _text_model(model, streamed, attention, name=name, dtype=dtype, products=products, device=torch.device("cpu"))


def put_packed(model: nn.Module, packing: Packing, device: torch.device, *, in_int8: bool = False) -> None:
    """Replaces the layers of `packing` by packed layers of zeros; `in_int8` as in quant/int8."""
    for path, settings in packing.items():
        if len(settings["shape"]) == 3:
            on_shapes = isinstance(model.get_parameter(path), FakeTensor) and not in_int8
            stack = empty_stack(settings, device=device)
            if on_shapes:
                stack = stack.outline(ShapeBase(empty_base({**settings, "shape": settings["shape"][1:]}, device=device)))
            put_stack(model, path, stack)
            continue
        module = model.get_submodule(path)
        weight: Any = module.weight
        bias: Any = module.bias
        base = empty_base(settings, device=device)
        if isinstance(weight, FakeTensor) and not in_int8:
            base = ShapeBase(base)
        model.set_submodule(path, PackedLinear(base, bias, transposed=not isinstance(module, nn.Linear)))
    if in_int8:
        enable_int8_products(model)


class ShapeBase(PackedBase):
    """A packed base of shapes, with the same buffers. Unpacking only allocates, for a moment, what real unpacking does."""

    def __init__(self, base: PackedBase) -> None:
        super().__init__(base.shape)
        self._settings, self._row_step = base.settings, base.row_step
        stored = base.stored()
        self._stands_for = (
            None if stored is None else StoredWeight(stored.kind, *stored[1:3], codes=0, size=stored.size, groups=stored.groups)
        )
        for name, buffer in base._buffers.items():
            self.register_buffer(name, buffer)

    @property
    def settings(self) -> dict[str, Any]:
        return self._settings

    @property
    def row_step(self) -> int:
        return self._row_step

    def _stored_weight(self) -> StoredWeight | None:
        return self._stands_for

    def unpack_by_torch(self, out: Tensor, first: int) -> Tensor:
        settings = json.dumps({**self.settings, "shape": tuple(out.shape)})
        torch.empty(_while_unpacking(settings, out.dtype), dtype=torch.uint8, device=out.device)
        return out


@cache
def _while_unpacking(settings: str, dtype: torch.dtype) -> int:
    """Returns the peak in bytes of unpacking such a weight, beside the weight and its result: that of one of its equal tiles."""
    return remembered(lambda: ("unpacking", settings, dtype), partial(_peak_of_unpacking, settings, dtype))


def _peak_of_unpacking(settings: str, dtype: torch.dtype) -> int:
    packing = json.loads(settings)
    rows, columns = packing["shape"]
    step = WORD if packing["method"] == "gptq" else 1  # zero points fill whole words
    rows = min(rows, max(1, -(-TILE // (columns * step))) * step)
    with _disable_current_modes(), Ledger() as ledger:
        base, out = empty_base({**packing, "shape": (rows, columns)}), torch.empty(rows, columns, dtype=dtype)
        before = ledger.bytes
        with ledger.phase("unpack"):
            base.unpack_by_torch(out, 0)
        return ledger.peaks["unpack"].bytes - before


def local_files(name: str) -> Path | None:
    """Returns the local folder or .gguf file of a model path; None for a hub id."""
    if name.startswith(PACKAGE):
        distribution, _, relative = name[len(PACKAGE) :].partition("/")
        return package_file(distribution, suffix=relative or ".gguf")
    if Path(name).expanduser().exists() or name.lower().endswith(".gguf"):
        return locate(name)
    return None


def shape_store(model: Any, family: Family) -> ShapeStore:
    """Returns the store of the empty, packed `model`: a record for each block and for each module with tensors elsewhere."""
    records: dict[str, dict[str, Tensor]] = {record: {} for record in records_of(model, family)}
    prefix = next(iter(records)).rpartition(".")[0]
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    for name, tensor in model.state_dict().items():
        record = block_of(name, prefix)
        if record in records:
            records[record][name.removeprefix(f"{record}.")] = tensor
        elif name not in tied:
            path, _, leaf = name.rpartition(".")
            records.setdefault(path, {})[leaf] = tensor
    packed = {path: module.base.settings for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    packed |= {path: module.settings for path, module in model.named_modules() if isinstance(module, PackedStack)}
    return ShapeStore(records, {"packed": json.dumps(packed)})

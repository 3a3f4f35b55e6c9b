"""Builds a streamed text model from its configuration alone, as `from_config` does for a model in memory.

It is built and run inside a memory.ledger.Ledger: streamed tensors have shapes and no numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes  # torch offers no public name

from lorakeet.memory.shape_only import ShapeStore
from lorakeet.models.families import Family, family_of
from lorakeet.models.modules import block_of
from lorakeet.models.streaming.load import Residence, empty_packed, open_streamed, records_of
from lorakeet.models.text.from_config import ShapeBase
from lorakeet.models.text.load import set_attention
from lorakeet.models.text.model import PassOptions, TextModel
from lorakeet.quant.construct import empty_base
from lorakeet.quant.int8 import enable_int8_products
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec


def streamed_model_from_config(
    config: Any,
    *,
    name: str,
    dtype: torch.dtype,
    products: torch.dtype,
    attention: str = "auto",
    quantize: QuantSpec | None = None,
    files: Path | None = None,
    slots: int = 2,
) -> TextModel:
    """Returns the frozen model that `config` describes, in eval mode, without a tokenizer, with `slots` blocks in memory.

    As in `model_from_config`, linear layers are packed as `quantize` says or as they are in `files`, and attention auto is
    varlen. Raises ConfigError if the model has no list of blocks.
    """
    family, device = family_of(config.get_text_config()), torch.device("cpu")
    quantize = quantize or QuantSpec()
    with _disable_current_modes():  # tensors on disk are not in the ledger
        store = shape_store(empty_packed(config, dtype, quantize, files), family)
    base_of = partial(empty_base, device="meta") if quantize.int8_products else _shape_base
    model, streamed = open_streamed(store, config, dtype, family, residence=Residence(slots), base_of=base_of)
    if quantize.int8_products:
        enable_int8_products(model)
    set_attention(model, "varlen" if attention == "auto" else attention)
    return TextModel(
        model=model, tokenizer=None, name=name, source=Path(), family=family, device=device, dtype=dtype, products=products,
        streamed=streamed, options=PassOptions(share_prefix=False),  # as in `model_from_config`
    )  # fmt: skip


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
    return ShapeStore(records, {"packed": json.dumps(packed)})


def _shape_base(settings: Mapping[str, Any]) -> PackedBase:
    return ShapeBase(empty_base(settings, device="meta"))

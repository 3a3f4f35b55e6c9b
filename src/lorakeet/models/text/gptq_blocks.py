"""GPTQ over a text model, one decoder block at a time: what goes into a block is kept, everything else comes and goes.

    rows ─► embedding ─► inputs of block 0 ─► [its layers, stage by stage] ─► inputs of block 1 ─► …

The layers of a block that read the same input make a stage (q, k, v; o; gate, up; down). A stage is quantised with the inputs
that it gets from the quantised stages before it; then the whole quantised block computes the inputs of the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakeet.core.tiled_product import RowSource
from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, micro_batches, pack_examples
from lorakeet.errors import ConfigError, DataError, Problems
from lorakeet.memory.spill import Spill
from lorakeet.models import modules
from lorakeet.models.families import family_of
from lorakeet.models.files.quantized import packable
from lorakeet.models.text.calibration import CalibrationStates
from lorakeet.models.text.model import TextModel
from lorakeet.quant.gptq import gptq_buffer_shapes
from lorakeet.quant.gptq_solve import GptqLayout, Hessian, Sensitivity, gptq_quantise, output_error, sensitivity
from lorakeet.quant.packed import PackedBase, PackedLinear

Pack = Callable[[str, Tensor, Sensitivity, RowSource], PackedBase]  # path, weight (out, in), its inputs, their H
_STAGE = "H"  # under which that of a stage is kept


@dataclass(frozen=True)
class LayerSource:
    """Which layers are packed: those of a block, by its path, when its turn comes. They are dense, or as they stand, and then
    `dense` makes a dense one of each, by its path, just before it is packed, and puts it in its place."""

    of: Callable[[str], dict[str, nn.Module]]
    dense: Callable[[str], nn.Module] | None = None


@dataclass(frozen=True)
class QuantisedBlock:
    """The packed layers of one block, by path in the model, and how far each one's outputs moved on the calibration rows."""

    number: int
    count: int
    layers: dict[str, PackedBase]
    errors: dict[str, float]  # ‖X·(W − W′)ᵀ‖ / ‖X·Wᵀ‖


def layers_in_blocks(model: Any, name: str) -> dict[str, nn.Module]:
    """The layers that GPTQ quantises, by path; ConfigError where the model, which the user calls `name`, has none."""
    prefix, count = modules.block_prefix(model, family_of(model.config.get_text_config()))
    inside = packable(model, head=False).items() if count else ()
    layers = {path: module for path, module in inside if path.startswith(f"{prefix}.")}
    if not layers:
        raise ConfigError(f"{name} has no linear layers in a list of blocks, so there is nothing that GPTQ could quantise.")
    return layers


def check_layers(layers: dict[str, nn.Module], layout: GptqLayout) -> None:
    """Raises ConfigError that names every layer whose shape does not fit the format."""
    problems = Problems(f"The layers do not fit {layout.bits} bits in groups of {layout.group_size}")
    for path, module in layers.items():
        out, columns = weight_of(module).shape
        size = columns if layout.group_size == -1 else layout.group_size
        if columns % size:
            fitting = [str(other) for other in (128, 64, 32) if columns % other == 0]
            advice = f"take --group-size {', '.join(fitting)} or -1" if fitting else "take --group-size -1"
            problems.add(f"'{path}' has {columns} inputs, no multiple of the group size {size}; {advice}.")
            continue
        try:
            gptq_buffer_shapes((out, columns), bits=layout.bits, groups=columns // size)
        except ValueError as error:
            problems.add(f"'{path}': {error}.")
    problems.raise_if_any()


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in)."""
    weight = cast(Tensor, module.weight).detach()
    return weight.t() if isinstance(module, Conv1D) else weight


def taken_by_block(layers: dict[str, nn.Module]) -> LayerSource:
    """Dense layers, those of a block taken out of `layers` when its turn comes: whose dense weights can go with it."""

    def layers_of(block: str) -> dict[str, nn.Module]:
        return {path: layers.pop(path) for path in list(layers) if path.startswith(f"{block}.")}

    return LayerSource(layers_of)


def inputs_of_widest(layers: dict[str, nn.Module]) -> int:
    """How many inputs the widest of the layers has; 0 without a layer."""
    return max((weight_of(module).shape[1] for module in layers.values()), default=0)


def quantise_blocks(
    text: TextModel,
    rows: Sequence[Example],
    layout: GptqLayout,
    *,
    damping: float = 0.01,
    micro_tokens: int = 2048,
    spill: Callable[[], Spill] = Spill,
) -> Iterator[QuantisedBlock]:
    """Quantises the blocks of `text` in order, which it uses up: a block that has been handed out is no longer in the model.

    What goes into blocks is kept in places that `aside` makes. Raises, before the first block, ConfigError for layers that do not
    fit `layout`, DataError for too few tokens.
    """
    layers = layers_in_blocks(text.model, text.name)
    check_layers(layers, layout)
    check_tokens(rows, inputs_of_widest(layers))
    yield from pack_blocks(
        text,
        rows,
        lambda path, weight, inputs, hessian: gptq_quantise(weight, inputs, layout),
        taken_by_block(layers),
        damping=damping,
        micro_tokens=micro_tokens,
        spill=spill,
    )


def pack_blocks(
    text: TextModel,
    rows: Sequence[Example],
    pack: Pack,
    layers: LayerSource,
    *,
    damping: float = 0.01,
    micro_tokens: int = 2048,
    keep: bool = False,
    spill: Callable[[], Spill] = Spill,
) -> Iterator[QuantisedBlock]:
    """Packs `layers` as `pack` says; others stay. `keep` leaves the packed blocks in the model, which else is used up.

    A streamed model's block comes in for its turn and goes as it came; `aside` makes places for what goes into blocks, and for
    the H of a stage while it is used. Whether the rows have tokens enough is for the caller to ask (`check_tokens`).
    """
    prefix, count = modules.block_prefix(text.model, text.family)
    blocks = cast(nn.ModuleList, modules.find(text.model, prefix))
    passages, kept = CalibrationStates(text, blocks, _batches(text, rows, micro_tokens), spill), spill()
    try:
        for number in range(count):
            start = f"{prefix}.{number}."
            with torch.no_grad(), _present(text, blocks, number) as module:
                own = {path.removeprefix(start): layer for path, layer in layers.of(f"{prefix}.{number}").items()}
                standing = {} if text.streamed is None else dict(own)
                block = _QuantizedBlock(module, number, passages, start)
                bases, errors = _quantise(block, own, pack, layers.dense, damping, kept)
                if number + 1 < count:  # nobody reads what the last one gives
                    passages.advance(module, number)
                while standing:  # a streamed block goes with the layers that it came with
                    module.set_submodule(*standing.popitem())
                own.clear()
            if not keep and text.streamed is None:
                blocks[number] = nn.Identity()
            del module, block
            yield QuantisedBlock(
                number,
                count,
                {start + name: bases.pop(name) for name in list(bases)},  # held by whoever takes them alone
                {start + name: error for name, error in errors.items()},
            )
    finally:
        passages.close()
        kept.close()


@contextmanager
def _present(text: TextModel, blocks: nn.ModuleList, number: int) -> Iterator[nn.Module]:
    """The block with its weights; of a streamed model it alone is in memory, and gone after that."""
    if text.streamed is None:
        yield blocks[number]
        return
    text.release()
    with text.streamed.present(number, then=number) as module:
        yield module
    text.release()


def check_tokens(rows: Sequence[Example], widest: int) -> None:
    """Raises DataError where the rows have fewer tokens than the widest layer has inputs: its H could not have full rank."""
    tokens = sum(len(row.ids) for row in rows)
    if tokens < widest:
        raise DataError(
            f"The calibration rows have {tokens:,} tokens, but the widest layer has {widest:,} inputs, and GPTQ needs at least "
            "as many tokens to tell them apart. Give more or longer rows."
        )


def _batches(text: TextModel, rows: Sequence[Example], micro_tokens: int) -> list[Batch]:
    """Rows laid end to end where the attention keeps them apart, else one by one: padding would count as inputs."""
    if text.attention == "varlen":
        return micro_batches(rows, micro_tokens)
    return [pack_examples([row]) for row in rows]


class _Enough(Exception):
    """Ends the pass through a block once the stage's inputs are known."""


class _QuantizedBlock:
    """A block with what goes into it, batch by batch; `start` is what paths in the model have before those in the block."""

    def __init__(self, module: nn.Module, number: int, passages: CalibrationStates, start: str) -> None:
        self.module, self.number, self.passages, self.start = module, number, passages, start

    def run(self, batch: int) -> Tensor:
        """The block's output for a batch."""
        return self.passages.run(self.module, self.number, batch)

    def inputs_of(self, layer: nn.Module, take: Callable[[Tensor], None]) -> None:
        """Calls `take` with the input of `layer` for each batch; the block runs no further than that."""

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            take(args[0])
            raise _Enough

        handle = layer.register_forward_pre_hook(stop)
        try:
            for batch in range(self.passages.count):
                try:
                    self.run(batch)
                except _Enough:
                    continue
        finally:
            handle.remove()

    def hessian_of(self, layer: nn.Module) -> Hessian:
        """That of what goes into `layer`."""
        found: list[Hessian] = []

        def take(x: Tensor) -> None:
            if not found:
                found.append(Hessian(x.shape[-1], x.device))
            found[0].add(x)

        self.inputs_of(layer, take)
        return found[0]

    def stages(self, layers: dict[str, nn.Module]) -> list[list[str]]:
        """The layers in the order in which they are called, those with the same input together."""
        seen: list[tuple[Tensor, list[str]]] = []

        def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                known = next((names for tensor, names in seen if tensor is args[0]), None)
                if known is None:
                    seen.append((args[0], [name]))
                elif name not in known:
                    known.append(name)

            return hook

        handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
        try:
            self.run(0)
        finally:
            for handle in handles:
                handle.remove()
        return [names for _, names in seen]


def _quantise(
    block: _QuantizedBlock,
    layers: dict[str, nn.Module],
    pack: Pack,
    dense_of: Callable[[str], nn.Module] | None,
    damping: float,
    kept: Spill,
) -> tuple[dict[str, PackedBase], dict[str, float]]:
    """Puts a PackedLinear in the place of every layer, stage by stage, and takes it out of `layers`."""
    bases: dict[str, PackedBase] = {}
    errors: dict[str, float] = {}
    for stage in block.stages(layers) if layers else []:
        kept.put(_STAGE, block.hessian_of(layers[stage[0]]).matrix)
        hessian = kept.rows(_STAGE)
        inputs = sensitivity(hessian, damping=damping)
        dense = {name: layers.pop(name) for name in stage}
        for name in stage:
            layer = dense.pop(name)
            if dense_of is not None:
                layer = dense_of(block.start + name)
            weight = weight_of(layer)
            base = pack(block.start + name, weight, inputs, hessian)
            bases[name], errors[name] = base, output_error(weight, base, hessian)
            packed = PackedLinear(base, cast(Any, layer).bias, transposed=isinstance(layer, Conv1D))
            block.module.set_submodule(name, packed)
        kept.drop(_STAGE)
        del hessian, inputs, layer, weight, packed  # before the next stage's come
    return bases, errors

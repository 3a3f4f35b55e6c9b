"""GPTQ over a text model, one decoder block at a time: only the inputs of the current block are kept.

    rows ─► embedding ─► inputs of block 0 ─► [its layers, stage by stage] ─► inputs of block 1 ─► …

The layers of a block with the same input form a stage (q, k, v; o; gate, up; down). A stage is quantised with its inputs from
the quantised stages before it; then the whole quantised block computes the inputs of the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from lorakeet.core.tiled_product import RowSource
from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, micro_batches, pack_examples
from lorakeet.errors import ConfigError, DataError, Problems
from lorakeet.memory.spill import Spill
from lorakeet.models import modules
from lorakeet.models.families import family_of_model
from lorakeet.models.files.quantized import packable
from lorakeet.models.text.model import TextModel
from lorakeet.quant.gptq import gptq_buffer_shapes
from lorakeet.quant.gptq_solve import GptqLayout, Hessian, Sensitivity, gptq_quantise, output_error, sensitivity
from lorakeet.quant.packed import PackedBase, PackedLinear

Pack = Callable[[str, Tensor, Sensitivity, RowSource], PackedBase]  # path, weight (out, in), its inputs, their H
_STAGE = "H"  # the key of a stage's H
_NAMED = 3  # layers that a refusal names; the others are counted


@dataclass(frozen=True)
class LayerSource:
    """The layers to pack: `of(path of a block)` returns those of a block, by path. If they are not dense, `dense(path)` replaces
    a layer by a dense one just before it is packed, and returns it."""

    of: Callable[[str], dict[str, nn.Module]]
    dense: Callable[[str], nn.Module] | None = None


@dataclass(frozen=True)
class QuantisedBlock:
    """The packed layers of one block, by path in the model, and the relative output error of each on the calibration rows."""

    number: int
    count: int
    layers: dict[str, PackedBase]
    errors: dict[str, float]  # ‖X·(W − W′)ᵀ‖ / ‖X·Wᵀ‖


def layers_in_blocks(model: Any, name: str) -> dict[str, nn.Module]:
    """Returns the layers that GPTQ quantises, by path; ConfigError if the model, `name` to the user, has none."""
    prefix, count = modules.block_prefix(model, family_of_model(model.config))
    inside = packable(model, head=False).items() if count else ()
    layers = {path: module for path, module in inside if path.startswith(f"{prefix}.")}
    if not layers:
        raise ConfigError(f"{name} has no linear layers in a list of blocks, so there is nothing that GPTQ could quantise.")
    return layers


def check_layers(layers: dict[str, nn.Module], layout: GptqLayout) -> None:
    """Raises ConfigError for layers whose shape does not fit the format: one line for each reason, with their count."""
    problems = Problems(f"The layers do not fit {layout.bits} bits in groups of {layout.group_size}")
    reasons: dict[str, list[str]] = {}
    for path, module in layers.items():
        out, columns = weight_of(module).shape
        size = columns if layout.group_size == -1 else layout.group_size
        if columns % size:
            fitting = [str(other) for other in (128, 64, 32) if columns % other == 0]
            advice = f"take --group-size {', '.join(fitting)} or -1" if fitting else "take --group-size -1"
            reasons.setdefault(f"{columns} inputs, no multiple of the group size {size}; {advice}", []).append(path)
            continue
        try:
            gptq_buffer_shapes((out, columns), bits=layout.bits, groups=columns // size)
        except ValueError as error:
            reasons.setdefault(str(error), []).append(path)
    for reason, paths in reasons.items():
        more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        layers_of = f"{len(paths)} layers" if len(paths) > 1 else "1 layer"
        problems.add(f"{layers_of} ({', '.join(paths[:_NAMED])}{more}): {reason}.")
    problems.raise_if_any()


def weight_of(module: nn.Module) -> Tensor:
    """Returns the weight of a linear layer as (out, in)."""
    weight = cast(Tensor, module.weight).detach()
    return weight.t() if isinstance(module, Conv1D) else weight


def taken_by_block(layers: dict[str, nn.Module]) -> LayerSource:
    """Returns dense layers that are removed from `layers` block by block, so that their weights can be freed."""

    def layers_of(block: str) -> dict[str, nn.Module]:
        return {path: layers.pop(path) for path in list(layers) if path.startswith(f"{block}.")}

    return LayerSource(layers_of)


def inputs_of_widest(layers: dict[str, nn.Module]) -> int:
    """Returns the largest number of inputs of a layer; 0 without layers."""
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
    """Quantises the blocks of `text` in order and yields them; a yielded block is no longer in the model.

    `spill` makes the stores of the blocks' inputs. Raises, before the first block, ConfigError for layers that do not fit
    `layout`, DataError for too few tokens.
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
    """Packs `layers` with `pack`, block by block. `keep` leaves the packed blocks in the model; otherwise they are removed.

    A streamed model's block is loaded for its turn and freed unchanged. `spill` makes the stores of the blocks' inputs and of
    the H of a stage. The caller checks that the rows have enough tokens (`check_tokens`).
    """
    prefix, count = modules.block_prefix(text.model, text.family)
    blocks = cast(nn.ModuleList, modules.find(text.model, prefix))
    packed = text.attention == "varlen"  # which separates packed rows; else one row a batch: padding would count as inputs
    batches = micro_batches(rows, micro_tokens) if packed else [pack_examples([row]) for row in rows]
    states, hessians = CalibrationStates(text, blocks, batches, spill), spill()
    try:
        for number in range(count):
            start = f"{prefix}.{number}."
            with torch.no_grad(), _present(text, blocks, number) as module:
                own = {path.removeprefix(start): layer for path, layer in layers.of(f"{prefix}.{number}").items()}
                originals = {} if text.streamed is None else dict(own)
                block = _QuantizedBlock(module, number, states, start)
                bases, errors = _quantise(block, own, pack, layers.dense, damping, hessians)
                if number + 1 < count:  # the output of the last one is not needed
                    states.advance(module, number)
                while originals:  # a streamed block keeps its own layers
                    module.set_submodule(*originals.popitem())
                own.clear()
            if not keep and text.streamed is None:
                blocks[number] = nn.Identity()
            del module, block
            yield QuantisedBlock(
                number,
                count,
                {start + name: bases.pop(name) for name in list(bases)},  # so that only the caller keeps them alive
                {start + name: error for name, error in errors.items()},
            )
    finally:
        states.close()
        hessians.close()


@contextmanager
def _present(text: TextModel, blocks: nn.ModuleList, number: int) -> Iterator[nn.Module]:
    """A context with the block and its weights; of a streamed model it is the only one in memory, and freed afterwards."""
    if text.streamed is None:
        yield blocks[number]
        return
    text.release()
    with text.streamed.present(number, then=number) as module:
        yield module
    text.release()


def check_tokens(rows: Sequence[Example], widest: int) -> None:
    """Raises DataError if the rows have fewer tokens than the widest layer has inputs: its H could not have full rank."""
    tokens = sum(len(row.ids) for row in rows)
    if tokens < widest:
        raise DataError(
            f"The calibration rows have {tokens:,} tokens, but the widest layer has {widest:,} inputs, and GPTQ needs at least "
            "as many tokens to tell them apart. Give more or longer rows."
        )


class _InputFound(Exception):
    """Stops the pass through a block once a stage's inputs are known."""


class _QuantizedBlock:
    """A block with its inputs, batch by batch; `start` is the prefix of its paths in the model."""

    def __init__(self, module: nn.Module, number: int, states: CalibrationStates, start: str) -> None:
        self.module, self.number, self.states, self.start = module, number, states, start

    def run(self, batch: int) -> Tensor:
        """Returns the block's output for a batch."""
        return self.states.run(self.module, self.number, batch)

    def inputs_of(self, layer: nn.Module, take: Callable[[Tensor], None]) -> None:
        """Calls `take` with the input of `layer` for each batch; the block runs no further than that."""

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            take(args[0])
            raise _InputFound

        handle = layer.register_forward_pre_hook(stop)
        try:
            for batch in range(self.states.count):
                try:
                    self.run(batch)
                except _InputFound:
                    continue
        finally:
            handle.remove()

    def hessian_of(self, layer: nn.Module) -> Hessian:
        """Returns H of the inputs of `layer`."""
        found: list[Hessian] = []

        def take(x: Tensor) -> None:
            if not found:
                found.append(Hessian(x.shape[-1], x.device))
            found[0].add(x)

        self.inputs_of(layer, take)
        return found[0]

    def stages(self, layers: dict[str, nn.Module]) -> list[list[str]]:
        """Returns the names of the layers in the order of their calls, grouped by the same input."""
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
    hessians: Spill,
) -> tuple[dict[str, PackedBase], dict[str, float]]:
    """Replaces every layer by a PackedLinear, stage by stage, and removes it from `layers`."""
    bases: dict[str, PackedBase] = {}
    errors: dict[str, float] = {}
    for stage in block.stages(layers) if layers else []:
        hessians.put(_STAGE, block.hessian_of(layers[stage[0]]).matrix)
        hessian = hessians.rows(_STAGE)
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
        hessians.drop(_STAGE)
        del hessian, inputs, layer, weight, packed  # before the next stage's are made
    return bases, errors


@dataclass(frozen=True)
class _ArgumentStub:
    """Replaces a spilled tensor among the arguments of a call."""

    batch: int
    number: int


class CalibrationStates:
    """The hidden states of all batches before one block after another, recorded without running a block.

    `new` makes a Spill, in memory or in a scratch file; three are made. One batch is in memory at a time.
    """

    def __init__(self, text: TextModel, blocks: nn.ModuleList, batches: Sequence[Batch], new: Callable[[], Spill]) -> None:
        self.count = len(batches)
        self._states, self._next, self._shared = new(), new(), new()
        self._calls: list[list[Any]] = []  # by batch, the arguments of each block, with stubs for tensors
        originals = list(blocks)
        recorders = [_Recorder(block) for block in originals]
        try:
            for number, recorder in enumerate(recorders):
                blocks[number] = recorder
            watched = text.with_every_token()
            with torch.no_grad():
                for number, batch in enumerate(batches):
                    watched.hidden(batch)
                    self._keep(number, recorders)
        finally:
            for number, block in enumerate(originals):
                blocks[number] = block

    def states(self, batch: int) -> Tensor:
        """Returns the input of the current block, which must not be written to."""
        return self._states.get(batch)

    def run(self, block: nn.Module, number: int, batch: int) -> Tensor:
        """Returns the output of `block`, the one of that number, for a batch."""
        args, kwargs = tree_map_only(_ArgumentStub, self._shared.get, self._calls[batch][number])
        found = block(self.states(batch), *args, **kwargs)
        return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]

    def advance(self, block: nn.Module, number: int) -> None:
        """Runs every batch through `block`: its outputs are the inputs of the next one."""
        for batch in range(self.count):
            self._next.put(batch, self.run(block, number, batch))
            self._states.take(batch)
        self._states, self._next = self._next, self._states

    def close(self) -> None:
        """Drops everything and closes the scratch files."""
        for spill in (self._states, self._next, self._shared):
            spill.close()

    def _keep(self, batch: int, recorders: Sequence[_Recorder]) -> None:
        """Spills the arguments of the blocks' calls; a tensor that several blocks get is stored once."""
        stubs: dict[int, _ArgumentStub] = {}

        def spill(tensor: Tensor) -> _ArgumentStub:
            if id(tensor) not in stubs:
                stubs[id(tensor)] = _ArgumentStub(batch, len(stubs))
                self._shared.put(stubs[id(tensor)], tensor)
            return stubs[id(tensor)]

        calls = [recorder.call for recorder in recorders]  # kept alive until all are stored, so that ids stay unique
        self._states.put(batch, recorders[0].states)
        self._calls.append([tree_map_only(Tensor, spill, call) for call in calls])
        for recorder in recorders:
            recorder.forget()


class _Recorder(nn.Module):
    """Replaces a block: records its arguments and returns its input unchanged."""

    states: Tensor
    call: Any

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = [block]  # in a list, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"][0], name)  # models read settings such as attention_type from their blocks

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.__dict__["states"], self.__dict__["call"] = hidden_states, (args, kwargs)
        return hidden_states

    def forget(self) -> None:
        """Drops the recorded arguments."""
        del self.__dict__["states"], self.__dict__["call"]

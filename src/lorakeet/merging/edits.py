"""Plans which tensors of a checkpoint an adapter changes, and how; everything is checked before a byte is written.

    linear, conv1d, conv2d, embedding     PATH.weight                                  fold
    experts, kept in one tensor           BLOCK.gate_up_proj, BLOCK.down_proj          fold, all experts
    experts, kept one by one              BLOCK.0.w1.weight, .w3, .w2                  fold, one expert's rows
                                          BLOCK.0.gate_proj.weight, .up_proj, .down_proj
    a pair's bias                         PATH.bias                                    add scale·bias
    trained token rows                    PATH.weight                                  write the rows, append if needed
    extras                                the parameter                                replace

If the head shares the embedding's weight and only one of the two changes, the head gets a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter, Pair, TokenRows
from lorakeet.core.dora import DoraPair
from lorakeet.core.lowrank import LoraPair
from lorakeet.core.math import Kind, delta, fold
from lorakeet.core.plan import PlanEntry
from lorakeet.errors import Problems
from lorakeet.merging.checkpoint import Checkpoint
from lorakeet.models.files.checkpoint_pieces import Piece

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
HEADS = ("lm_head", "embed_out")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
TRANSPOSED_EXPERTS = ("gpt_oss", "aria_text")
# The parts of a fused parameter, in row order, by their names in checkpoints with one matrix per expert.
_PARTS = {"gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")), "down_proj": (("w2",), ("down_proj",))}


Change = Callable[[str, int], Tensor]  # path and number of the expert to ΔW (out, in), fp32


@dataclass
class Edit:
    """The changes of one tensor: `steps` are applied in order, in fp32; `shape` is the result's, `source` the tensor to read."""

    source: str
    shape: tuple[int, ...]
    steps: list[Callable[[Tensor], Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Edits:
    """All changes by name of the written tensor, changed settings of config.json, and notes for the user."""

    by_name: dict[str, Edit]
    config: dict[str, Any]
    notes: tuple[str, ...]


def edits_for(
    checkpoint: Checkpoint,
    adapter: Adapter,
    *,
    change: Change | None = None,
    before: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Edits:
    """The changes that `adapter` makes to `checkpoint`. ConfigError lists every tensor that is missing or has another shape.

    `change` returns each ΔW in place of the pairs, which then give only paths and shapes. `before` has, by name on disk, a
    function to apply first to a tensor, changed by the adapter or not (such as the rounding of a quantised base).
    """
    trained_on = f" ({adapter.base})" if adapter.base else ""
    advice = f"If this is not the model that the adapter was trained on, name that one{trained_on} with --base."
    planner = _EditPlanner(checkpoint, Problems(f"The adapter does not fit {checkpoint.folder}", remedy=advice), change)
    planner.untie(adapter)
    for path, tensor in adapter.extras.items():
        planner.replace(path, tensor)
    for path, rows in adapter.token_rows.items():
        planner.write_rows(path, rows)
    for path, pair in adapter.pairs.items():
        if pair.kind == "experts":
            planner.fold_experts(path, pair)
        else:
            planner.fold(path, pair)
    planner.problems.raise_if_any()
    for name, step in (before or {}).items():
        planner.edits.setdefault(name, Edit(name, checkpoint.stored(name).shape)).steps.insert(0, step)
    return Edits(planner.edits, planner.config, tuple(planner.notes))


class _EditPlanner:
    def __init__(self, checkpoint: Checkpoint, problems: Problems, change: Change | None = None) -> None:
        self.checkpoint = checkpoint
        self.change = change
        self.problems = problems
        self.edits: dict[str, Edit] = {}
        self.config: dict[str, Any] = {}
        self.notes: list[str] = []
        self.head = ""  # name of the head's new tensor, once untied
        self.model_type = str(checkpoint.setting("model_type") or "")
        text = dict(checkpoint.setting("text_config") or {}).get("model_type", "")  # of a wrapper that also sees or hears
        self.transposed_experts = bool({self.model_type, text} & set(TRANSPOSED_EXPERTS))

    def untie(self, adapter: Adapter) -> None:
        """Gives the head a tensor of its own if it shares the embedding's and the adapter changes only one of them."""
        embedding = _embedding(self.checkpoint)
        head = next((found for name in HEADS if (found := self.checkpoint.find(f"{name}.weight"))), None)
        if embedding is None or (head is not None and self.checkpoint.setting("tie_word_embeddings") is not True):
            return
        changed = [*adapter.pairs, *(path.rpartition(".")[0] for path in adapter.extras)]
        if len(adapter.token_rows) > 1:
            names = " and ".join(sorted(adapter.token_rows))
            self.problems.add(f"{names} have trained token rows each, but the base has one weight for both. Take one out.")
        heads = [path for path in (*changed, *adapter.token_rows) if _leaf(path) in HEADS]
        if not heads and not any(_leaf(path) in EMBEDDINGS for path in changed):
            return
        self.head = f"{heads[0] if heads else HEADS[0]}.weight"
        self.edits[self.head] = Edit(embedding, self.checkpoint.stored(embedding).shape)
        self.config["tie_word_embeddings"] = False
        self.notes.append(
            f"The base shares one weight between {embedding} and its head; the adapter changes only one of them, so {self.head} "
            "is now written separately and tie_word_embeddings is false."
        )

    def edit(self, wanted: str) -> Edit | None:
        """The edit of the parameter `wanted`, new if there is none; None, and a problem, if the checkpoint lacks it."""
        if self.head and wanted == self.head:
            return self.edits[self.head]
        name = self.checkpoint.find(wanted)
        if name is None:
            self.problems.add(f"{wanted}: the checkpoint has no such tensor.")
            return None
        stored = self.checkpoint.stored(name)
        if stored.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            self.problems.add(f"{name} is stored as {stored.dtype}, which cannot be folded into; use the dense model.")
            return None
        return self.edits.setdefault(name, Edit(name, stored.shape))

    def replace(self, path: str, tensor: Tensor) -> None:
        edit = self.edit(path)
        if edit is None:
            return
        shape = tuple(tensor.shape)
        vocabulary = _leaf(path.rpartition(".")[0]) in (*EMBEDDINGS, *HEADS) and shape[1:] == edit.shape[1:]
        if shape != edit.shape and not vocabulary:
            self.problems.add(f"{path} is {edit.shape} in the checkpoint and {shape} in the adapter.")
            return
        if shape != edit.shape:
            self._resize_vocabulary(shape[0])
        edit.shape = shape
        edit.steps.append(lambda _: tensor.float())

    def write_rows(self, path: str, rows: TokenRows) -> None:
        edit = self.edit(f"{path}.weight")
        if edit is None:
            return
        if len(edit.shape) != 2 or edit.shape[1] != rows.rows.shape[1]:
            self.problems.add(f"{path}.weight is {edit.shape} in the checkpoint; the trained rows are {tuple(rows.rows.shape)}.")
            return
        if problem := rows.problem(edit.shape[0]):
            self.problems.add(f"{path}: {problem}")
            return
        count = max(edit.shape[0], max(rows.ids) + 1)
        if count != edit.shape[0]:
            self._resize_vocabulary(count)
            tokens = f" ({', '.join(rows.tokens)})" if rows.tokens else ""
            self.notes.append(f"{path}.weight grows from {edit.shape[0]} to {count} rows for the new tokens{tokens}.")
        edit.shape = (count, edit.shape[1])

        def extended(weight: Tensor) -> Tensor:
            added = weight.mean(0, keepdim=True).expand(count - weight.shape[0], -1)  # new rows begin as the mean row
            return torch.cat([weight, added]).index_copy_(0, torch.tensor(rows.ids), rows.rows.float())

        edit.steps.append(extended)

    def _resize_vocabulary(self, count: int) -> None:
        self.config["vocab_size"] = max(count, self.config.get("vocab_size", 0))

    def fold(self, path: str, pair: Pair) -> None:
        if pieces := self._pieces(f"{path}.weight"):
            self._fold_pieces(path, pair, pieces)
            return
        edit = self.edit(f"{path}.weight")
        if edit is None:
            return
        kind = self._kind(path, pair, edit.shape)
        shape = _weight_shape(pair, kind)
        if edit.shape != shape:
            self.problems.add(f"{path}.weight is {edit.shape} in the checkpoint; the pair is for {shape} ({kind}).")
            return
        edit.steps.append(self._step(path, pair, kind))
        if pair.bias is not None and pair.magnitude is not None:
            self.problems.add(f"{path} is a DoRA pair with a bias, which cannot be merged; keep it an adapter.")
        elif pair.bias is not None and bool(pair.bias.any()):  # PEFT writes zeros where only other pairs have one
            self._add_bias(path, pair.bias * pair.scale)

    def _add_bias(self, path: str, bias: Tensor) -> None:
        name = self.checkpoint.find(f"{path}.bias")
        if name is None:
            self.problems.add(
                f"{path} has no bias in the checkpoint, and the pair adds one, which the model's configuration "
                f"({self.model_type or 'unknown'}) does not allow. Keep this adapter unmerged."
            )
            return
        edit = self.edits.setdefault(name, Edit(name, self.checkpoint.stored(name).shape))
        edit.steps.append(lambda old: fold(old, bias))

    def _kind(self, path: str, pair: Pair, shape: tuple[int, ...]) -> Kind:
        """The kind of the pair: the stored shape distinguishes linear and conv1d, and the model's type if it is square."""
        if pair.kind not in ("linear", "conv1d"):
            return pair.kind
        out_in = (pair.B.shape[0], pair.A.shape[1])
        if shape == out_in != out_in[::-1]:
            return "linear"
        if shape == out_in[::-1] != out_in:
            return "conv1d"
        return "conv1d" if self.model_type in CONV1D_MODELS and _leaf(path) not in HEADS else "linear"

    def _pieces(self, wanted: str) -> tuple[Piece, ...]:
        """Where the parameter `wanted` lies in tensors of other names; () where one of its name holds it, or none."""
        if (self.head and wanted == self.head) or self.checkpoint.find(wanted) is not None:
            return ()
        return self.checkpoint.pieces.get(wanted, ())

    def _fold_pieces(self, path: str, pair: Pair, pieces: tuple[Piece, ...]) -> None:
        if pair.kind not in ("linear", "experts") or pair.bias is not None:
            self.problems.add(f"{path} lies in {pieces[0].name}, into which such a pair cannot be merged; keep it an adapter.")
            return
        across = pair.kind == "experts" and self.transposed_experts
        for piece in (replace(piece, across=piece.across ^ across) for piece in pieces):
            edit, wanted = self.edit(piece.name), _part_of(pair, piece).weight_shape
            if edit is None:
                continue
            shape = edit.shape if piece.rows is None else (piece.rows.stop - piece.rows.start, *edit.shape[1:])
            if (*shape[:-2], *(shape[:-3:-1] if piece.across else shape[-2:])) != wanted:
                self.problems.add(f"{path} is {shape} in {piece.name} of the checkpoint; the pair is for {wanted}.")
            else:
                edit.steps.append(self._piece_step(path, pair, piece))

    def _piece_step(self, path: str, pair: Pair, piece: Piece) -> Callable[[Tensor], Tensor]:
        """The function that adds the part of the pair, or of the change in its place, that belongs to a piece of the weight."""
        part = _part_of(pair, piece)
        change = self.change

        def own(expert: int) -> Tensor:
            assert change is not None
            found = change(path, expert if piece.expert is None else piece.expert)
            return found if piece.own is None else found[piece.own]

        def step(weight: Tensor) -> Tensor:
            whole = weight.transpose(-1, -2) if piece.across else weight
            held = whole if piece.rows is None else whole[piece.rows]
            new = module_of(path, part, part.kind).fold(held) if change is None else fold_change(held, part.kind, own)
            if piece.rows is not None:
                whole = whole.clone()
                whole[piece.rows] = new
                new = whole
            return new.transpose(-1, -2) if piece.across else new

        return step

    def fold_experts(self, path: str, pair: Pair) -> None:
        block, _, parameter = path.rpartition(".")
        if self.checkpoint.find(path) is not None and self.transposed_experts:
            edit, shape = self.edit(path), pair.weight_shape
            if edit is not None and edit.shape != (shape[0], shape[2], shape[1]):
                self.problems.add(f"{path} is {edit.shape} in the checkpoint; the pair is for {shape}, stored transposed.")
            elif edit is not None:
                edit.steps.append(self._piece_step(path, pair, Piece(path, across=True)))
            return
        if self.checkpoint.find(path) is not None:
            edit = self.edit(path)
            shape = pair.weight_shape
            if edit is not None and edit.shape != shape:
                self.problems.add(f"{path} is {edit.shape} in the checkpoint; the pair is for {shape}.")
            elif edit is not None:
                edit.steps.append(self._step(path, pair, "experts"))
            return
        parts = _part_names(self.checkpoint, path)
        if not parts and (pieces := self._pieces(path)):
            self._fold_pieces(path, pair, pieces)
            return
        if not parts:
            tried = ", ".join([path, *(f"{block}.0.{p[0]}.weight" for p in _PARTS.get(parameter, ()))])
            self.problems.add(f"{path}: the checkpoint has no such tensor (tried {tried}).")
            return
        rows = pair.B.shape[1] // len(parts)
        for expert in range(pair.A.shape[0]):
            for number, part in enumerate(parts):
                own = slice(number * rows, (number + 1) * rows)
                self._fold_expert(path, pair, f"{block}.{expert}.{part}.weight", expert, own)

    def _fold_expert(self, path: str, pair: Pair, name: str, expert: int, rows: slice) -> None:
        edit = self.edit(name)
        shape = (rows.stop - rows.start, pair.A.shape[2])
        if edit is None:
            return
        if edit.shape != shape:
            self.problems.add(f"{name} is {edit.shape} in the checkpoint; the pair is for {shape}.")
        elif self.change is None:
            A, B = pair.A[expert].float(), pair.B[expert, rows].float()
            edit.steps.append(lambda weight: fold(weight, delta(A, B, pair.scale)))
        else:
            change = self.change
            edit.steps.append(lambda weight: fold(weight, change(path, expert)[rows]))

    def _step(self, path: str, pair: Pair, kind: Kind) -> Callable[[Tensor], Tensor]:
        """The function that adds the pair, or the change in its place, to the stored weight."""
        change = self.change
        if change is None:
            return lambda weight: module_of(path, pair, kind).fold(weight)
        return lambda weight: fold_change(weight, kind, lambda expert: change(path, expert))


def _part_of(pair: Pair, piece: Piece) -> Pair:
    """The pair of a piece of the weight: of one expert, of some rows."""
    if pair.kind == "experts":
        if piece.expert is None:
            return pair
        rows = slice(None) if piece.own is None else piece.own
        return replace(pair, A=pair.A[piece.expert], B=pair.B[piece.expert, rows], kind="linear")
    if piece.own is None:
        return pair
    magnitude = None if pair.magnitude is None else pair.magnitude[piece.own]
    return replace(pair, B=pair.B[piece.own], magnitude=magnitude)


def find_shared(checkpoint: Checkpoint, wanted: str) -> str | None:
    """The name on disk of the parameter `wanted`; for a head that shares the embedding's weight, the embedding's."""
    name = checkpoint.find(wanted)
    return _embedding(checkpoint) if name is None and _leaf(wanted.rpartition(".")[0]) in HEADS else name


def _embedding(checkpoint: Checkpoint) -> str | None:
    return next((name for name in checkpoint.home if _leaf(name.rpartition(".")[0]) in EMBEDDINGS), None)


def _part_names(checkpoint: Checkpoint, path: str) -> tuple[str, ...]:
    """The names of an expert's matrices that make up the fused parameter `path`, in order; () if there are none."""
    block, _, parameter = path.rpartition(".")
    found = (parts for parts in _PARTS.get(parameter, ()) if checkpoint.find(f"{block}.0.{parts[0]}.weight"))
    return next(found, ())


def expert_parts(checkpoint: Checkpoint, path: str) -> list[list[str]]:
    """The tensors on disk that make up the fused parameter `path`, for each expert in order; [] if it is none."""
    found: list[list[str]] = []
    block, parts = path.rpartition(".")[0], _part_names(checkpoint, path)
    while parts and checkpoint.find(f"{block}.{len(found)}.{parts[0]}.weight"):
        names = [checkpoint.find(f"{block}.{len(found)}.{part}.weight") for part in parts]
        found.append([name for name in names if name is not None])
    return found


def fold_change(weight: Tensor, kind: Kind, change: Callable[[int], Tensor]) -> Tensor:
    """W + ΔW; `change` returns ΔW (out, in) of an expert by number, 0 without experts."""
    if kind == "experts":
        return torch.stack([fold(weight[expert], change(expert)) for expert in range(weight.shape[0])])
    found = change(0)
    return fold(weight, found.t() if kind in ("conv1d", "embedding") else found.view(weight.shape))


def module_of(path: str, pair: Pair, kind: Kind) -> LoraPair:
    """The pair as a module with a `fold` method."""
    shape = _weight_shape(pair, kind)
    planned = shape[::-1] if kind == "conv1d" else shape
    variant = "lora" if pair.magnitude is None else "dora"
    entry = PlanEntry(path, kind, planned, pair.rank, pair.alpha, pair.scale_rule, variant)  # type: ignore[arg-type]
    module = LoraPair(entry) if pair.magnitude is None else DoraPair(entry)
    module.load(pair)
    return module


def _weight_shape(pair: Pair, kind: Kind) -> tuple[int, ...]:
    """The shape of the stored weight that `pair` changes (table in core/math)."""
    return pair.weight_shape[::-1] if kind in ("conv1d", "embedding") else pair.weight_shape


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]

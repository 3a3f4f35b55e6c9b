"""PEFT's adapter folder, the native format: adapter_config.json and adapter_model.safetensors.

    base_model.model.PATH.lora_A.weight, .lora_B.weight        linear, conv1d, conv2d     (rank, in) and (out, rank)
    base_model.model.PATH.lora_B.bias                          a pair's bias              (out,)
    base_model.model.PATH.lora_embedding_A, _B                 embedding                  (rank, vocab) and (hidden, rank)
    base_model.model.PATH.lora_magnitude_vector                DoRA                       (out,); (1, out, 1, 1) for conv2d
    base_model.model.PATH.token_adapter.trainable_tokens_delta trained token rows         (ids, hidden)
    base_model.model.PATH[.base_layer].lora_A.weight           experts, see below; linear with a target parameter PATH.weight
    base_model.model.PATH.base_layer.weight                    whole weight under a pair, as PEFT adds for embeddings
    base_model.model.PARAMETER                                 modules_to_save

linear and conv1d look alike on disk. fan_in_fan_out distinguishes them; for an adapter with both, our note in the safetensors
metadata, which PEFT ignores. Without either, the model decides. Pairs are fp32.

PEFT wraps the module of a mixture-of-experts block once for each of its 3-D parameters that is targeted (`target_parameters`), in
the order in which the module registers them. So a tensor's name has its nesting depth, and not the name of its parameter:

    mlp.experts.base_layer.lora_A.weight    gate_up_proj, registered first, innermost
    mlp.experts.lora_A.weight               down_proj, wrapped around it

    on disk                           here
    lora_A  (E·rank, in)              A (E, rank, in)     the expert is the slow axis of A's rows …
    lora_B  (out, rank·E)             B (E, out, rank)    … and the fast axis of B's columns
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter, FlatPairs, FlatPairsLayout, Pair, Places, TokenRows
from lorakeet.core.math import Kind
from lorakeet.errors import DataError, Problems, reader
from lorakeet.formats.files.json_object import parse_object
from lorakeet.formats.files.lru_cache import LruCache
from lorakeet.formats.files.safetensors_file import Header, SafeFile, open_safetensors, save_tensors, save_text
from lorakeet.formats.files.tensors import check_finite, missing_slots, named_like_a_part, require_few
from lorakeet.formats.limits import metadata_without_peft
from lorakeet.formats.peft.peft_config import (
    CONFIG_NAME,
    LONGEST,
    PeftConfig,
    check_writable,
    config_bytes,
    config_text,
    read_peft_config,
)
from lorakeet.formats.peft.renamed_targets import WEIGHT

MODEL_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
NAME, SUFFIX, WEIGHTS, MAGIC = "peft", "", MODEL_NAME, b""  # as `AdapterFormat` says
_PREFIX = "base_model.model."
_TOKENS = ".token_adapter.trainable_tokens_delta"
_SLOT = re.compile(
    r"(?P<path>.+)\.(?P<slot>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
)
_NOTE = "lorakeet"  # key of our note in the safetensors metadata
NESTED = ".base_layer"
_REGISTERED = ("gate_up_proj", "up_proj", "down_proj")  # the order in which the blocks of transformers 5 register them

Slots = dict[str, Tensor]
Names = tuple[str, str, str, str]  # of the tensors A, B, magnitude and bias of a pair in a file


def owns(tensor: str) -> bool:
    """True for the names of PEFT's tensors."""
    return tensor.startswith(_PREFIX)


@reader("an adapter")
def read(
    folder: Path, /, *, opened: Callable[[Path], SafeFile] = open_safetensors, configured: bytes | None = None, **_unused: object
) -> Adapter:
    """The adapter in `folder`. ConfigError and DataError list everything that cannot be understood; nothing is dropped.

    `opened` opens the tensors' file (formats/files/loaded_file has others); `configured` are the bytes of adapter_config.json,
    if they have been read.
    """
    configured = config_bytes(folder) if configured is None else configured
    config = read_peft_config(folder, configured)
    model = folder / MODEL_NAME
    if not model.exists() and (folder / PICKLE_NAME).exists():
        raise DataError(
            f"{folder / PICKLE_NAME} is a pickle file, which can run code when it is loaded, so it is never opened. "
            f"Save the adapter again in PEFT, which writes {MODEL_NAME}."
        )
    file = opened(model)
    require_few(file)
    if file.header is None or len(configured) > LONGEST:
        return _read(folder, config, file)
    key = (configured, file.header)
    layout = LAYOUTS.get(key)
    adapter = None if layout is None else layout.filled(file)
    if adapter is None:
        adapter = _read(folder, config, file)  # raises if anything is wrong
        names: dict[str, Names] = {}
        for path, pair in adapter.pairs.items():
            first, second = (f"{_PREFIX}{path}.{slot}" for slot in _factor_slots(pair.kind))
            names[path] = first, second, f"{_PREFIX}{path}.lora_magnitude_vector", f"{_PREFIX}{path}.lora_B.bias"
        if layout is None and (layout := shared_layout_of(adapter, file.header, names)) is not None:
            adapter = LAYOUTS.put(key, layout).filled(file) or adapter
    return adapter


def _read(folder: Path, config: PeftConfig, file: SafeFile) -> Adapter:
    problems = Problems(f"The adapter in {folder} cannot be read", DataError)
    groups, tokens, others = _sorted_by_kind(file, problems)
    note = _note(file)
    pairs = _pairs(config, note, groups, problems)
    _require_targets(config, pairs, problems)
    wrapped = {*pairs, *(path.rpartition(".")[0] for path, pair in pairs.items() if pair.kind == "experts"), *tokens}
    extras = {_extra_path(name, wrapped, config, problems): tensor for name, tensor in others.items()}
    token_rows = _token_rows(config, note, tokens, problems)
    if not pairs and not extras and not token_rows and not problems.errors:
        problems.add(f"{file.path} holds no tensor.")
    problems.locate(folder)
    problems.raise_if_any()
    metadata = {**config.metadata, **{str(key): str(value) for key, value in note.get("metadata", {}).items()}}
    return Adapter(pairs, extras, token_rows, config.base, metadata)


def _sorted_by_kind(file: SafeFile, problems: Problems) -> tuple[dict[str, Slots], dict[str, Tensor], dict[str, Tensor]]:
    """Pair tensors by path and slot, token rows by path, and everything else by name; prefixes removed."""
    groups: dict[str, Slots] = {}
    tokens: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name in sorted(file.tensors):
        if not named_like_a_part(name, file, problems):
            continue
        tensor = file.read(name)
        if tensor.is_floating_point() and not file.finite:
            check_finite(tensor.float(), f"{file.path}: {name}", problems)
        if not name.startswith(_PREFIX):
            problems.add(f"{file.path}: {name} is no tensor of PEFT, whose names begin with {_PREFIX!r}. Fetch the file again.")
            continue
        own = name[len(_PREFIX) :]
        if match := _SLOT.fullmatch(own):
            wide = tensor if tensor.dtype == torch.float32 else tensor.float()  # checked first: torch's own check takes longer
            groups.setdefault(match["path"], {})[match["slot"]] = wide
        elif own.endswith(_TOKENS):
            tokens[own[: -len(_TOKENS)]] = tensor.float()
        elif ".lora_" in own or ".token_adapter." in own:
            problems.add(f"{file.path}: {name} {tuple(tensor.shape)} is a kind of adapter tensor that is not known here.")
        else:
            others[own] = tensor
    return groups, tokens, others


def _note(file: SafeFile) -> dict[str, Any]:
    where, expected = f"{file.path}: the metadata key {_NOTE!r}", "a table of tables"
    note = parse_object(file.metadata.get(_NOTE, "{}"), where, expected=expected)
    if not all(isinstance(part, dict) for part in note.values()):
        raise DataError(f"{where} is not {expected}.")
    return note


def _pairs(config: PeftConfig, note: Mapping[str, Any], groups: dict[str, Slots], problems: Problems) -> dict[str, Pair]:
    pairs: dict[str, Pair] = {}
    blocks: dict[str, dict[int, Slots]] = {}  # module: nesting depth: tensors
    for nested, slots in groups.items():
        path, depth = nested, 0
        while path.endswith(NESTED):
            path, depth = path[: -len(NESTED)], depth + 1
        blocks.setdefault(path, {})[depth] = slots
    for path, levels in sorted(blocks.items()):
        named = parameters_at(config, path)
        if len(levels) > 1 or max(levels) > 0 or (named and not config.targets(path) and named != [WEIGHT]):
            assigned = assign(config, path, levels)
            if isinstance(assigned, str):
                problems.add(assigned)
                continue
            for depth, name in assigned.items():
                key = f"{path}.{name}"
                _add_pair(config, key, "experts", levels[depth], key=key, pairs=pairs, problems=problems)
        else:
            kind = _kind(config, note, path, levels[0])
            key = f"{path}.{WEIGHT}" if named == [WEIGHT] and not config.targets(path) else path
            _add_pair(config, path, kind, levels[0], key=key, pairs=pairs, problems=problems)
    return pairs


def _kind(config: PeftConfig, note: Mapping[str, Any], path: str, slots: Slots) -> Kind:
    if any(slot.startswith("lora_embedding") for slot in slots):
        return "embedding"
    if any(slot in slots and slots[slot].dim() == 4 for slot in ("lora_A.weight", "lora_B.weight")):
        return "conv2d"
    noted = note.get("kinds", {}).get(path)
    if noted in ("linear", "conv1d"):
        return "linear" if noted == "linear" else "conv1d"
    return "conv1d" if config.fan_in_fan_out else "linear"


def _add_pair(
    config: PeftConfig, path: str, kind: Kind, slots: Slots, *, key: str, pairs: dict[str, Pair], problems: Problems
) -> None:
    """Adds the pair at `path`; `key` is what the patterns of rank and alpha match."""
    first, second = _factor_slots(kind)
    if missing := missing_slots(path, slots, (first, second)):
        problems.add(missing)
        return
    A, B, rank = slots[first], slots[second], config.rank_of(key)
    if kind == "experts":
        unpacked = unpack_experts(A, B, rank)
        if isinstance(unpacked, str):
            problems.add(f"{path} {unpacked}.")
            return
        A, B = unpacked
    wrong = _shape_problem(path, kind, A, B, rank)
    if not wrong:
        wrong = _slot_problem(config, path, kind, slots, rows=B.shape[0])
    if more := sorted(set(slots) - {first, second, "lora_magnitude_vector", "lora_B.bias"}):
        wrong = f"{path} has {', '.join(more)} beside {first} and {second}; PEFT uses one of the two pairs. Fetch the file again."
    if wrong:
        problems.add(wrong)
        return
    magnitude = slots.get("lora_magnitude_vector")
    flat = None if magnitude is None else magnitude.flatten()
    pairs[path] = Pair(A, B, config.alpha_of(key), kind, config.scale_rule, flat, slots.get("lora_B.bias"))


def _slot_problem(config: PeftConfig, path: str, kind: Kind, slots: Slots, *, rows: int) -> str:
    """What is wrong with the magnitude and the bias of a pair on a weight with so many rows; an empty string if nothing."""
    magnitude, bias = slots.get("lora_magnitude_vector"), slots.get("lora_B.bias")
    if (magnitude is not None) != config.dora:
        return f"{path} has {'a' if magnitude is not None else 'no'} DoRA magnitude, and use_dora is {config.dora}."
    if magnitude is not None and kind in ("embedding", "experts"):
        return f"{path} is DoRA on a weight of kind {kind}, which is not supported."
    if magnitude is not None and magnitude.numel() != rows:
        return f"{path} has a DoRA magnitude {tuple(magnitude.shape)}; its B needs {rows} numbers."
    if (bias is not None) != (config.lora_bias and kind not in ("embedding", "experts")):
        return f"{path} has {'a' if bias is not None else 'no'} lora_B.bias, and lora_bias is {config.lora_bias}."
    if bias is not None and bias.shape != (rows,):
        return f"{path} has a lora_B.bias {tuple(bias.shape)}; expected ({rows},)."
    return ""


def _factor_slots(kind: Kind) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A.weight", "lora_B.weight")


def _shape_problem(path: str, kind: Kind, A: Tensor, B: Tensor, rank: int) -> str:
    if kind == "experts":
        return ""
    dims = 4 if kind == "conv2d" else 2
    if A.dim() != dims or B.dim() != dims:
        return f"{path} has A {tuple(A.shape)} and B {tuple(B.shape)}; only linear layers and 2-D convolutions are supported."
    if kind == "conv2d" and tuple(B.shape[2:]) != (1, 1):
        return f"{path} has B {tuple(B.shape)}; expected a 1×1 convolution (out, rank, 1, 1)."
    if A.shape[0] != B.shape[1]:
        return f"{path} has A {tuple(A.shape)} and B {tuple(B.shape)}: their ranks {A.shape[0]} and {B.shape[1]} differ."
    if A.shape[0] != rank:
        return (
            f"{path} has rank {A.shape[0]} on disk, but {CONFIG_NAME} says {rank}, so its scale is uncertain. PEFT sorts the "
            "keys of rank_pattern when it saves: of two that match a module, another may have been first. Correct it."
        )
    return ""


def _require_targets(config: PeftConfig, pairs: Mapping[str, Pair], problems: Problems) -> None:
    """Adds to `problems` if the configuration gives some modules no pair that have one in the file."""
    named = {path for path in pairs if parameters_at(config, path) == [WEIGHT]}
    lost = [path for path, pair in pairs.items() if pair.kind != "experts" and not config.targets(path) and path not in named]
    if config.all_linear:
        lost += [path for path, pair in pairs.items() if pair.kind in ("embedding", "conv2d")]
    if lost:
        shown = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
        problems.add(
            f"{CONFIG_NAME} leaves out {len(lost)} of the {len(pairs)} modules that have a pair in {MODEL_NAME} ({shown}), so "
            "PEFT ignores these pairs. Correct its target_modules, exclude_modules, layers_to_transform or modules_to_save."
        )


def _extra_path(name: str, wrapped: Collection[str], config: PeftConfig, problems: Problems) -> str:
    """The parameter's path in the model: under a pair PEFT calls it PATH.base_layer.weight, and ignores PATH.weight."""
    head, nested, last = name.rpartition(f"{NESTED}.")
    if not nested:
        owner = name.rpartition(".")[0]
        if owner in wrapped or config.targets(owner):
            problems.add(
                f"{name} is a whole tensor of a module that has a pair or trained rows; PEFT ignores it there, and calls the "
                f"weight under a pair {owner}{NESTED}.weight. Take it out of {MODEL_NAME}, or give it that name."
            )
        return name
    if head not in wrapped:
        problems.add(f"{name} is the weight under a pair, but {head} has no pair.")
    return f"{head}.{last}"


def _token_rows(
    config: PeftConfig, note: Mapping[str, Any], tokens: Mapping[str, Tensor], problems: Problems
) -> dict[str, TokenRows]:
    found: dict[str, TokenRows] = {}
    for path, rows in tokens.items():
        ids = config.token_ids
        if isinstance(ids, Mapping):
            named = {ids[name] for name in ids if path == name or path.endswith(name)}
            ids = named.pop() if len(named) == 1 else None
        elif len(tokens) > 1:
            problems.add(f"{path} has trained token rows; ids in a list are of the embedding alone. Give the ids by name.")
            continue
        if rows.dim() != 2:
            problems.add(f"{path} has trained token rows {tuple(rows.shape)}; expected a matrix, a row for each id.")
            continue
        if ids is None or len(ids) != rows.shape[0]:
            count = "no" if ids is None else len(ids)
            problems.add(f"{path} has {rows.shape[0]} trained token rows; trainable_token_indices gives {count} ids for it.")
            continue
        about = note.get("tokens", {}).get(path) or {}
        texts = about.get("tokens", []) if isinstance(about, dict) else None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            problems.add(f"{path}: the metadata key {_NOTE!r} says {str(about)[:80]!r} of its tokens; expected a table.")
            continue
        found[path] = TokenRows(tuple(ids), rows, tuple(texts), str(about.get("tied", "")))
    if config.token_ids and not tokens:
        problems.add("trainable_token_indices is set, but no tensor holds the trained rows.")
    return found


def write(adapter: Adapter, folder: Path, **_unused: object) -> None:
    """Writes `adapter` into `folder` (made if missing) so that PEFT loads it; the same adapter gives the same bytes.

    Each file appears whole or not at all, the tensors before the configuration. ConfigError if PEFT's layout cannot hold a part.
    """
    check_writable(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}
    if note := _note_for(adapter):
        metadata[_NOTE] = json.dumps(note, sort_keys=True, ensure_ascii=False)
    save_tensors(folder / MODEL_NAME, peft_tensors(adapter), metadata=metadata)
    saved = sorted({path.rpartition(".")[0] for path in adapter.extras} - set(adapter.pairs))
    save_text(folder / CONFIG_NAME, config_text(adapter, modules_to_save=saved))


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of the file by name, fp32; experts' stacks have the two dimensions that PEFT gives them."""
    tensors: dict[str, Tensor] = {}
    nesting = _nesting(adapter)
    biased = any(pair.bias is not None for pair in adapter.pairs.values())
    for path, pair in adapter.pairs.items():
        A, B, where = pair.A, pair.B, _PREFIX + path
        if pair.kind == "experts":
            A, B = pack_experts(A, B)
            where = _PREFIX + path.rpartition(".")[0] + NESTED * nesting[path]
        first, second = _factor_slots(pair.kind)
        tensors[f"{where}.{first}"], tensors[f"{where}.{second}"] = A.float(), B.float()
        if biased:
            tensors[f"{where}.lora_B.bias"] = torch.zeros(B.shape[0]) if pair.bias is None else pair.bias.float()
        if pair.magnitude is not None:
            shape = (1, -1, 1, 1) if pair.kind == "conv2d" else (-1,)
            tensors[f"{where}.lora_magnitude_vector"] = pair.magnitude.float().reshape(shape)
    for path, tensor in adapter.extras.items():
        module, _, name = path.rpartition(".")
        tensors[f"{_PREFIX}{module}{NESTED}.{name}" if module in adapter.pairs else _PREFIX + path] = tensor
    for path, rows in adapter.token_rows.items():
        tensors[f"{_PREFIX}{path}{_TOKENS}"] = rows.rows.float()
    return tensors


def _nesting(adapter: Adapter) -> dict[str, int]:
    """Nesting depth of each expert pair on disk, by its path."""
    blocks: dict[str, list[str]] = {}
    for path, pair in adapter.pairs.items():
        if pair.kind == "experts":
            module, _, name = path.rpartition(".")
            blocks.setdefault(module, []).append(name)
    wrapped = {module: sorted(names, key=_registration, reverse=True) for module, names in blocks.items()}  # outermost first
    return {f"{module}.{name}": depth for module, names in wrapped.items() for depth, name in enumerate(names)}


def _note_for(adapter: Adapter) -> dict[str, Any]:
    """Our note: all that PEFT's configuration has no key for."""
    note: dict[str, Any] = {}
    flat = Counter(pair.kind for pair in adapter.pairs.values() if pair.kind in ("linear", "conv1d"))
    if len(flat) > 1:
        note["kinds"] = {path: pair.kind for path, pair in adapter.pairs.items() if pair.kind == "linear"}
    tokens = {
        path: {"tokens": list(rows.tokens), "tied": rows.tied}
        for path, rows in adapter.token_rows.items()
        if rows.tokens or rows.tied
    }
    own = metadata_without_peft(adapter)
    return note | ({"tokens": tokens} if tokens else {}) | ({"metadata": own} if own else {})


@dataclass(frozen=True)
class SharedLayout:
    """An adapter without its numbers, shared by all adapters with equal configuration and header.

    A server loads hundreds of adapters that differ only in their numbers. For the first of them, the layout is parsed and
    checked: which tensor is A or B of which layer, with which rank and scale. The others only fill in numbers.
    """

    outline: FlatPairsLayout
    base: str
    metadata: Mapping[str, str]

    def filled(self, file: SafeFile) -> Adapter | None:
        """The adapter with the numbers of `file`, whose header has this layout.

        None if its tensors must be read one by one: some number is not finite, or the dtypes differ.
        """
        numbers = file.numbers() if file.finite else None
        if numbers is None:
            return None
        return Adapter(FlatPairs(self.outline, numbers), base=self.base, metadata=dict(self.metadata))


def shared_layout_of(adapter: Adapter, header: Header, names: Mapping[str, Names]) -> SharedLayout | None:
    """The layout of an `adapter` read from a file with this `header`, in which the pairs have these `names`.

    None unless the adapter consists of exactly the tensors of the file, unchanged.
    """
    if adapter.extras or adapter.token_rows or not adapter.pairs or header.has_empty:
        return None
    places = {name: place for place, name in enumerate(header.order)}
    pairs: dict[str, Pair] = {}
    found: dict[str, Places] = {}
    for path, pair in adapter.pairs.items():
        tensors = (pair.A, pair.B, pair.magnitude, pair.bias)
        at = tuple(None if tensor is None else places.get(name) for name, tensor in zip(names[path], tensors, strict=True))
        for place, tensor in zip(at, tensors, strict=True):
            if tensor is not None and (place is None or tensor.shape != header.outline[place].shape):
                return None
        found[path] = cast(Places, at)
        A, B, magnitude, bias = (None if place is None else header.outline[place] for place in at)
        pairs[path] = replace(pair, A=cast(Tensor, A), B=cast(Tensor, B), magnitude=magnitude, bias=bias)
    used = [place for at in found.values() for place in at if place is not None]
    if sorted(used) != list(range(len(places))):
        return None
    outline = FlatPairsLayout(pairs, found, header.outline)
    return SharedLayout(outline, adapter.base, dict(adapter.metadata))


LAYOUTS: LruCache[tuple[bytes, Header], SharedLayout] = LruCache(8)  # by the bytes of the configuration, and the header


def parameters_at(config: PeftConfig, path: str) -> list[str]:
    """The parameters of the module at `path` that target_parameters names."""
    return sorted(config.parameters_at(path), key=_registration)


def _registration(name: str) -> tuple[int, str]:
    return (_REGISTERED.index(name) if name in _REGISTERED else len(_REGISTERED), name)


def assign(config: PeftConfig, path: str, depths: Iterable[int]) -> dict[int, str] | str:
    """The parameter of each nesting depth of the pairs at `path`, or what is wrong. Depth 0 is the outermost."""
    names = parameters_at(config, path)
    levels = sorted(depths, reverse=True)  # innermost, registered first, comes first
    if len(names) != len(levels) or levels != list(range(len(levels)))[::-1]:
        return (
            f"{path} has {len(levels)} pairs on its parameters, and target_parameters names {len(names)} "
            f"({', '.join(names) or 'none'}), so it is unclear which pair belongs to which."
        )
    if len(names) > 1 and not set(names) <= set(_REGISTERED):
        return f"{path} has pairs on {', '.join(names)}; the order of nesting is known for {', '.join(_REGISTERED)} only."
    return dict(zip(levels, names, strict=True))


def unpack_experts(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor] | str:
    """Reshapes (E·rank, in) and (out, rank·E) to A (E, rank, in) and B (E, out, rank); or returns what is wrong."""
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] % rank or A.shape[0] != B.shape[1]:
        return f"has A {tuple(A.shape)} and B {tuple(B.shape)}; expected (experts·{rank}, in) and (out, {rank}·experts)"
    experts = A.shape[0] // rank
    return (A.reshape(experts, rank, A.shape[1]).contiguous(), B.reshape(B.shape[0], rank, experts).permute(2, 0, 1).contiguous())


def pack_experts(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Reshapes A (E, rank, in) and B (E, out, rank) to (E·rank, in) and (out, rank·E); the inverse of `unpack_experts`."""
    experts, rank, width = A.shape
    return A.reshape(experts * rank, width), B.permute(1, 2, 0).reshape(B.shape[1], rank * experts)

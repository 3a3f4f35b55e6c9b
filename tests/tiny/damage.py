"""Damage to files as Hypothesis draws it: bytes flipped, cut, put in; values of JSON documents exchanged for any others."""

from __future__ import annotations

import copy
import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**29, -(10**29), 10**400, 0.5, -1.5, 1e308, float("nan"), float("inf"),
    "", "x", "0", "../x", "é\ud800", "x" * 3000, "auto", "float16", "llama",
    [], {}, [[]], [None], ["x"], [1, 2], {"a": 1}, {"": None}, [[[[[[[[]]]]]]]],
]  # fmt: skip
PARTS = ["", "0", "lora_A", "lora_B", "alpha", "weight", "lora_embedding_A", "base_layer", "é", "x" * 400, "m"]
DEEP = "[" * 5000 + "]" * 5000
TEXTS = [b"", b"\xff\xfe", b"null", b"[]", b"{", b'"x"', b"1" * 5000, DEEP.encode(), b'{"a":' * 3000 + b"1" + b"}" * 3000, b"NaN"]


@st.composite
def other_json(draw: Any, document: Any) -> bytes:
    """The text of `document` with one to three values exchanged or keys taken out or in; at times another text altogether."""
    if draw(st.integers(0, 9)) == 0:
        return bytes(draw(st.sampled_from(TEXTS)))
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        holder, key = _place(draw, changed)
        if holder is None:
            break
        if isinstance(holder, dict) and draw(st.integers(0, 9)) == 0:
            holder.pop(key)
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return json.dumps(changed).encode()


def _place(draw: Any, document: Any) -> tuple[Any, Any]:
    """A container within `document`, and a key of it."""
    holder, key = None, None
    while isinstance(document, (dict, list)) and document:
        holder = document
        key = draw(st.sampled_from(sorted(document) if isinstance(document, dict) else range(len(document))))
        document = document[key]
        if draw(st.booleans()):
            break
    return holder, key


@st.composite
def other_bytes(draw: Any, data: bytes, reach: int | None = None) -> bytes:
    """`data` with one to four places damaged, all of them among the first `reach` bytes; or cut off."""
    end = min(len(data), reach or len(data))
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, min(end, len(changed)) - 1)))
        how = draw(st.integers(0, 5))
        if how == 0 and changed:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif how == 1 and changed:
            changed[place] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x7B, 0x5B]))
        elif how == 2:
            number = draw(st.sampled_from([0, 1, 2, 2**16, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
            changed[place : place + 8] = struct.pack("<Q", number)
        elif how == 3:
            changed[place : place + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
        elif how == 4:
            other = draw(st.integers(0, max(0, end - 1)))
            changed[place : place + 8] = changed[other : other + 8]
        else:
            changed = changed[: draw(st.integers(0, len(changed)))]
    return bytes(changed)


@st.composite
def other_safetensors(draw: Any, data: bytes) -> bytes:
    """A safetensors file with its header or its bytes damaged."""
    length = int.from_bytes(data[:8], "little")
    how = draw(st.integers(0, 2))
    if how == 0:
        return bytes(draw(other_bytes(data, 8 + length)))
    if how == 1:
        return bytes(draw(other_tensors(data)))
    header = draw(other_header(json.loads(data[8 : 8 + length])))
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


@st.composite
def other_tensors(draw: Any, data: bytes) -> bytes:
    """A sound file with one or two tensors of another shape, dtype or content, and at times another note in its metadata."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    note = dict(header.get("__metadata__") or {})
    tensors = load(data)
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=2, unique=True)):
        old = tensors[name]
        own = [old.shape, old.shape[::-1], (1, *old.shape)]
        shape = draw(st.sampled_from([(), (1,), (0,), (0, 3), (2, 0), (3, 5, 1, 1), (2, 2, 2), *own]))
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float64]))
        tensors[name] = torch.full(shape, draw(st.sampled_from([0.0, 1.0, math.nan, math.inf]))).to(dtype)
    if note and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(note)))
        text = note[key]
        changed = draw(other_json(json.loads(text))) if text.startswith("{") else draw(st.sampled_from([b"", b"{", b"[]", b"{}"]))
        note[key] = changed.decode("utf-8", "replace")
    return save(tensors, note)


@st.composite
def other_header(draw: Any, header: dict[str, Any]) -> bytes:
    """A header with values exchanged, or with a tensor under another name, dtype or shape of as many bytes."""
    how = draw(st.integers(0, 3))
    names = sorted(name for name in header if name != "__metadata__")
    changed = copy.deepcopy(header)
    name = draw(st.sampled_from(names))
    if how == 0:
        return bytes(draw(other_json(header)))
    if how == 1:
        parts = name.split(".")
        parts[draw(st.integers(0, len(parts) - 1))] = draw(st.sampled_from(PARTS))
        changed[".".join(parts)] = changed.pop(name)
    elif how == 2:
        shape = changed[name]["shape"]
        count = 1
        for size in shape:
            count *= size
        others = [[count], [1, count], [count, 1], [count, 1, 1], [], shape[::-1], [1] * 70]
        changed[name]["shape"] = draw(st.sampled_from(others))
    else:
        kinds = {"F32": ["I32"], "F16": ["BF16", "I16"], "I64": ["F64"]}.get(changed[name]["dtype"], ["F32"])
        changed[name]["dtype"] = draw(st.sampled_from(kinds))
    return json.dumps(changed).encode()


@st.composite
def other_file(draw: Any, name: str, data: bytes) -> bytes:
    """A file damaged as its name suggests."""
    if name.endswith(".safetensors"):
        return bytes(draw(other_safetensors(data)))
    if name.endswith(".json") and draw(st.integers(0, 4)):
        return bytes(draw(other_json(json.loads(data))))
    return bytes(draw(other_bytes(data, 2000 if name.endswith(".gguf") else None)))


@st.composite
def other_folder(draw: Any, files: dict[str, bytes], kept: tuple[str, ...] = ()) -> dict[str, bytes]:
    """The files of a folder with one or two of them damaged, and at times one missing."""
    changed = dict(files)
    names = sorted(set(files) - set(kept))
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        if draw(st.integers(0, 19)) == 0:
            del changed[name]
        else:
            changed[name] = draw(other_file(name, files[name]))
    return changed


def files_in(folder: Path) -> dict[str, bytes]:
    """The bytes of the files of a folder, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def put(files: dict[str, bytes], folder: Path) -> Path:
    """Writes the files into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder

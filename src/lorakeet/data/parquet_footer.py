"""What a Parquet file says of its columns, read without pyarrow, which ends the process where its footer is damaged.

The footer is Thrift's compact form (parquet-format): a struct is fields, each a byte of the distance to the field before and of
its type, until a zero. Whole numbers have a variable length, with the sign in the last bit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
_NUMBERS = (4, 5, 6)  # of 16, 32 and 64 bits
_MAGIC = b"PAR1"
_DEEPEST = 20  # structs within each other; parquet-format has 6
_PAGE_HEADER = 64  # bytes that hold the first fields of a page's header
DICTIONARY = 2  # the kind of page that holds shared texts
BYTES = 6  # the type of a column of texts and bytes
ENCODINGS = ("PLAIN", "", "PLAIN_DICTIONARY", "RLE", "BIT_PACKED", "DELTA_BINARY_PACKED", "DELTA_LENGTH_BYTE_ARRAY",
             "DELTA_BYTE_ARRAY", "RLE_DICTIONARY", "BYTE_STREAM_SPLIT")  # fmt: skip


@dataclass(frozen=True)
class ColumnChunk:
    """A column of a group of rows."""

    path: str
    texts: bool
    encodings: frozenset[str]
    values: int
    unpacked: int  # bytes
    begin: int  # of its first page in the file


def read_footer(stream: IO[bytes]) -> list[list[ColumnChunk]]:
    """The columns of each group of rows. ValueError for what is no footer, or lacks a part."""
    stream.seek(-8, 2)
    ending = stream.read(8)
    size = int.from_bytes(ending[:4], "little")
    if ending[4:] != _MAGIC or stream.tell() < size + 12:
        raise ValueError("it has no footer of a Parquet file")
    stream.seek(-8 - size, 2)
    about = _Thrift(stream.read(size)).struct()
    try:
        return [[_chunk(column[3]) for column in group[1]] for group in about.get(4, [])]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"its footer lacks a part ({type(error).__name__}: {error})") from error


def _chunk(column: dict[int, Any]) -> ColumnChunk:
    begin = min(place for place in (column[9], column.get(11)) if place)
    names = frozenset(ENCODINGS[number] for number in column[2])
    path = ".".join(part.decode() for part in column[3])
    return ColumnChunk(path, column[1] == BYTES, names, column[5], column[6], begin)


def shared_bytes(stream: IO[bytes], chunk: ColumnChunk) -> int:
    """Bytes of the texts that a column shares, from the header of its first page; no text of it is longer. 0 if there are none.

    ValueError where no page begins.
    """
    stream.seek(chunk.begin)
    fields = _Thrift(stream.read(_PAGE_HEADER)).fields()
    found = {}
    for number, value in fields:
        found[number] = value
        if number == 2:
            break
    if not isinstance(found.get(1), int) or not isinstance(found.get(2), int):
        raise ValueError(f"the column {chunk.path} has no page where it begins")
    return int(found[2]) if found[1] == DICTIONARY else 0


class _Thrift:
    """A reader of the compact form. ValueError at the end of the bytes, and for what it has not."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The fields by number."""
        if depth > _DEEPEST:
            raise ValueError("its footer is nested too deep")
        return dict(self.fields(depth))

    def fields(self, depth: int = 0) -> Iterator[tuple[int, Any]]:
        """The fields of a struct, as they come."""
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._number()
            kind = head & 15
            yield number, kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _NUMBERS:
            return self._number()
        if kind == _BINARY:
            return self._take(self._size())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            head = self._byte()
            count = self._size() if head >> 4 == 15 else head >> 4
            if count > len(self._data) - self._at:
                raise ValueError("its footer names more values than it has bytes")
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind == _MAP:
            count = self._size()
            kinds = self._byte() if count else 0
            return [(self._value(kinds >> 4, depth + 1), self._value(kinds & 15, depth + 1)) for _ in range(count)]
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind == _DOUBLE:
            return struct.unpack("<d", self._take(8))[0]
        raise ValueError(f"its footer has a value of the kind {kind}")

    def _number(self) -> int:
        value = self._size()
        return (value >> 1) ^ -(value & 1)

    def _size(self) -> int:
        value, shift = 0, 0
        while shift < 70:
            byte = self._byte()
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
        raise ValueError("its footer has a number without end")

    def _byte(self) -> int:
        return self._take(1)[0]

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) != count:
            raise ValueError("its footer ends early")
        self._at += count
        return taken

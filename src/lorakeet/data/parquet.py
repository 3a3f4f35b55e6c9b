"""Reads the rows of Parquet files (extra [parquet]): a file of few bytes never fills the memory.

A text that many rows repeat stands once in the file, and once in memory until its row is read. What a row unpacks to is known
before it becomes values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

from lorakeet.data.guarded_stream import MOST_UNPACKED, too_large
from lorakeet.data.locate import Location, open_binary
from lorakeet.data.parquet_footer import ColumnChunk, read_footer, shared_bytes
from lorakeet.data.spec import LONGEST_ROW
from lorakeet.data.tables import FileRecord, RowProblems
from lorakeet.errors import DataError, LorakeetError, PackageMissing, spelt

AT_ONCE = 1024  # rows
_USUAL = 8  # times its size is what a large file may unpack to
_VALUES = 32 << 20  # bytes of the rows that become values at once
_CAN_SHARE = {"PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}  # encodings that Arrow reads as shared texts
_PREFIXED = "DELTA_BYTE_ARRAY"  # an encoding in which a text repeats the beginning of the one before
_NUMBER = 8  # bytes that a value without a length counts


def parquet_records(
    location: Location, problems: RowProblems, most: int = MOST_UNPACKED, longest: int = 8 * LONGEST_ROW
) -> Iterator[FileRecord]:
    """Yields the rows of a Parquet file. A row of more than `longest` bytes is added to `problems` and left out.

    DataError for whatever pyarrow cannot read or turn into values, and where a column of a group of rows, or all rows, unpack to
    more than `most` bytes and 8 times the size of the file.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise PackageMissing(f"{location.name} is a Parquet file, which needs pyarrow", "lorakeet[parquet]") from error
    name = location.name.rsplit("/", 1)[-1]
    number, unpacked = 0, 0
    with open_binary(location, most) as stream:
        most = max(most, _USUAL * location.path.stat().st_size)
        with _parquet_of(location, 0):
            groups = read_footer(stream)
            if max((max(one.unpacked, _NUMBER * one.values) for group in groups for one in group), default=0) > most:
                raise too_large(location.path, most)
            stream.seek(0)
            batches = _batches(stream, parquet.ParquetFile(stream), groups)
        while True:
            with _parquet_of(location, number):
                batch = next(batches, None)
                if batch is None:
                    return
                sizes = sum((_sizes(column) for column in batch.columns), np.zeros(batch.num_rows, np.int64))
            for start, end in _parts(sizes, longest):
                if start == end:
                    problems.add(f"{name}:{number + end + 1}", _refusal(int(sizes[end]), longest))
                    continue
                unpacked += int(sizes[start:end].sum())
                if unpacked > most:
                    raise too_large(location.path, most)
                with _parquet_of(location, number + start):
                    rows = batch.slice(start, end - start).to_pylist()
                for place, values in enumerate(rows, start=number + start + 1):
                    yield FileRecord(f"{name}:{place}", values)
            number += batch.num_rows


def _batches(stream: IO[bytes], file: Any, groups: Sequence[Sequence[ColumnChunk]]) -> Iterator[Any]:
    """The rows as Arrow holds them, group by group; texts stay shared, as the file has them.

    No batch crosses groups: Arrow cannot keep the texts of two groups shared in one list.
    """
    from pyarrow import parquet

    for number, chunks in enumerate(groups):
        shared = [one.path for one in chunks if one.texts and _CAN_SHARE.issuperset(one.encodings)]
        size = _rows_at_once(stream, [one for one in chunks if one.texts and one.path not in shared])
        opened = parquet.ParquetFile(stream, metadata=file.metadata, read_dictionary=shared)
        yield from opened.iter_batches(batch_size=size, row_groups=[number])


def _rows_at_once(stream: IO[bytes], unshared: Sequence[ColumnChunk]) -> int:
    """How many rows are read at once, where Arrow unpacks the texts of these columns before their sizes are known."""
    if any(_PREFIXED in one.encodings for one in unshared):
        return 1
    longest = max((shared_bytes(stream, one) for one in unshared), default=0)
    return max(1, min(AT_ONCE, _VALUES // max(longest, 1)))


def _refusal(size: int, longest: int) -> str:
    return (
        f"the row has {size:,} bytes; expected at most {longest:,}. Shorten or remove it, or raise "
        f"{spelt('data.longest_row')} (a row of "
        "such a file may have 8 times as many bytes)."
    )


def _parts(sizes: Any, longest: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that become values at once; an empty range stands for the one row at its place, which is too large."""
    start, total = 0, 0
    for place, size in enumerate(sizes.tolist()):
        if size > longest or (start < place and total + size > _VALUES):
            if start < place:
                yield start, place
            start, total = place, 0
        if size > longest:
            yield place, place
            start = place + 1
            continue
        total += size
    if start < len(sizes):
        yield start, len(sizes)


def _sizes(column: Any) -> Any:
    """The bytes of each value of an Arrow array when it is unpacked, as int64; 8 for what is no text."""
    import pyarrow
    from pyarrow import compute, types

    kind = column.type
    if isinstance(column, pyarrow.ExtensionArray):
        return _sizes(column.storage)
    if types.is_dictionary(kind):
        known = np.append(_sizes(column.dictionary), 0)  # the last is of a value that is missing
        return known[compute.fill_null(column.indices, len(known) - 1).to_numpy(zero_copy_only=False)]
    if types.is_struct(kind):
        return sum((_sizes(field) for field in column.flatten()), np.zeros(len(column), np.int64))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        inner = (column.keys, column.items) if types.is_map(kind) else (column.values,)
        ends = np.append(0, np.cumsum(sum(map(_sizes, inner))))
        offsets = column.offsets.to_numpy(zero_copy_only=False)
        return ends[offsets[1:]] - ends[offsets[:-1]] + _NUMBER
    if types.is_fixed_size_list(kind):
        inner = _sizes(column.values)[column.offset * kind.list_size :][: len(column) * kind.list_size]
        return inner.reshape(len(column), kind.list_size).sum(1) + _NUMBER
    if types.is_primitive(kind) or types.is_null(kind) or types.is_decimal(kind) or types.is_fixed_size_binary(kind):
        width = 0 if types.is_null(kind) else kind.bit_width // 8
        return np.full(len(column), max(_NUMBER, width), np.int64)
    lengths = compute.fill_null(compute.binary_length(column), 0)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64) + _NUMBER


@contextmanager
def _parquet_of(location: Location, number: int) -> Iterator[None]:
    """A context in which whatever pyarrow raises is a DataError that names the file and the row after which it came."""
    try:
        yield
    except LorakeetError:
        raise
    except Exception as error:  # text that is not UTF-8, dates after the year 9999, numbers of 128 bits, damage
        where = f"{location.path} cannot be read as Parquet" + (f" after row {number:,}" if number else "")
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(f"{where} ({said}). Check that the file is whole and its columns are texts and numbers.") from error

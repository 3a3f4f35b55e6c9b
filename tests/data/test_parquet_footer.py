"""The footer of a Parquet file is read as pyarrow reads it, and a damaged one is one error: pyarrow would end the process."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lorakeet.data.locate import locate_data
from lorakeet.data.parquet import parquet_records
from lorakeet.data.parquet_footer import read_footer, shared_bytes
from lorakeet.data.tables import RowProblems
from lorakeet.errors import DataError

COLUMNS = {"text": ["a", "bb", "a"] * 20, "m": [[{"role": "user", "content": "x"}]] * 60, "n": list(range(60)), "f": [0.5] * 60}


def stored(**options: Any) -> bytes:
    target = io.BytesIO()
    parquet.write_table(pyarrow.table(COLUMNS), target, row_group_size=25, **options)
    return target.getvalue()


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"compression": "zstd", "data_page_version": "2.0"}])
def test_it_says_what_pyarrow_says(options: dict[str, Any]) -> None:
    raw = stored(**options)
    about = parquet.ParquetFile(io.BytesIO(raw)).metadata
    groups = read_footer(io.BytesIO(raw))
    assert len(groups) == about.num_row_groups == 3
    for number, group in enumerate(groups):
        theirs = [about.row_group(number).column(place) for place in range(about.num_columns)]
        sizes = [(one.num_values, one.total_uncompressed_size) for one in theirs]
        kinds = [(one.path_in_schema, one.physical_type == "BYTE_ARRAY", set(one.encodings)) for one in theirs]
        assert [(one.values, one.unpacked) for one in group] == sizes
        assert [(one.path, one.texts, one.encodings) for one in group] == kinds
        for ours, one in zip(group, theirs, strict=True):
            assert (shared_bytes(io.BytesIO(raw), ours) > 0) is one.has_dictionary_page


@pytest.mark.slow
def test_a_damaged_footer_is_one_message_or_read(tmp_path: Path) -> None:
    raw, draw = stored(), random.Random(4)
    footer = int.from_bytes(raw[-8:-4], "little") + 8
    refused = 0
    for number in range(400):
        changed = bytearray(raw)
        for _ in range(draw.randint(1, 3)):
            changed[len(raw) - draw.randint(1, footer)] = draw.choice([0, 1, 0x15, 0x1C, 0xFF, draw.randrange(256)])
        (tmp_path / "a.parquet").write_bytes(changed)
        try:
            list(parquet_records(locate_data(str(tmp_path / "a.parquet")), RowProblems("x")))
        except DataError as error:
            refused += 1
            assert "a.parquet" in str(error), number
    assert refused > 100


@pytest.mark.parametrize("raw", [b"", b"PAR1", b"PAR1" + b"\xff" * 4 + b"PAR1", b"PAR1\x19\xfc\xff\xff\x0f\x00\x07\0\0\0PAR1"])
def test_what_is_no_footer_is_an_error(raw: bytes) -> None:
    with pytest.raises((ValueError, OSError)):
        read_footer(io.BytesIO(raw))


def test_structs_without_end_and_lists_of_lies_are_errors() -> None:
    for data in (b"\x1c" * 5000, b"\x19\xfc" + b"\xff" * 9 + b"\x01", b"\x16" + b"\xff" * 20):
        with pytest.raises(ValueError, match="its footer"):
            read_footer(io.BytesIO(b"PAR1" + data + len(data).to_bytes(4, "little") + b"PAR1"))

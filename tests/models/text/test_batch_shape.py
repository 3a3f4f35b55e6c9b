"""Shapes of micro-batches: places for every row and for filler, none too long, and room in the largest for all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorakeet.models.text.batch_shape import BatchShape


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(90, 200))
def test_a_shape_has_places_for_all_rows_and_none_is_too_long(lengths: list[int], longest: int) -> None:
    shape = BatchShape.of(lengths, longest)
    rows = shape.rows_of(lengths)
    assert rows[: len(lengths)] == lengths and sum(rows) == shape.tokens and len(rows) == shape.rows
    assert max(rows) <= longest
    others = shape.unlike(lengths)
    assert sum(others) == shape.tokens and len(others) == shape.rows and max(others) <= longest
    assert others != rows or shape.tokens == shape.rows * longest or shape.rows == 1
    room = BatchShape.largest(longest, sum(lengths), len(lengths))
    assert shape.tokens <= room.tokens and shape.rows <= room.rows


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 64), st.data())
def test_the_largest_shape_has_room_for_any_micro_batch(longest: int, micro_tokens: int, rows: int, data: st.DataObject) -> None:
    room = BatchShape.largest(longest, micro_tokens, rows)
    count = data.draw(st.integers(1, min(rows, micro_tokens)))
    most = min(longest, micro_tokens // count)
    lengths = data.draw(st.lists(st.integers(1, most), min_size=count, max_size=count))
    for shape in (BatchShape.of(lengths, longest), BatchShape.of([longest], longest)):
        assert shape.tokens <= room.tokens and shape.rows <= room.rows and max(shape.rows_of([longest])) <= longest

"""Slots: the longest beginning with the same key is gone on from, in place or by a copy, and never one of another key."""

from __future__ import annotations

import torch

from lorakeet.models.generate.kv_cache import KeyValues
from lorakeet.models.generate.slot_states import RowsPass
from lorakeet.serve.cache_slots import CacheSlots, prefix_key
from tiny.small_configs import small_config

A, B = prefix_key({"a@1": 1.0}), prefix_key({"a@2": 1.0})
LONG = tuple(range(40))


def filled(slots: CacheSlots, key: object, ids: tuple[int, ...]) -> int:
    number, count = slots.take(key, ids)  # type: ignore[arg-type]
    slots.wrote(number, ids[count:])
    return number


def test_a_free_slot_goes_on_from_what_it_holds() -> None:
    slots = CacheSlots(KeyValues(slots=2, capacity=64))
    number = filled(slots, A, LONG)
    slots.release(number)
    assert slots.take(A, (*LONG, 7)) == (number, 40)
    assert slots.free == 1


def test_one_token_is_always_left_to_compute() -> None:
    slots = CacheSlots(KeyValues(slots=1, capacity=64))
    slots.release(filled(slots, A, LONG))
    assert slots.take(A, LONG) == (0, 39)


def test_another_version_or_weight_begins_anew() -> None:
    slots = CacheSlots(KeyValues(slots=1, capacity=64))
    for key in (B, prefix_key({"a@1": 0.5}), prefix_key({}), prefix_key({"a@1": 1.0, "b@1": 1.0})):
        slots.release(filled(slots, A, LONG))
        assert slots.take(key, LONG)[1] == 0
        slots.release(0)


def test_a_busy_slot_lends_its_beginning() -> None:
    cache = KeyValues(slots=2, capacity=64)
    key, value = cache.layer(0, torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
    slots = CacheSlots(cache)
    number = filled(slots, A, LONG)
    key[number].fill_(3.0)
    value[number].fill_(4.0)
    other, count = slots.take(A, (*LONG[:30], 99))
    assert (other, count) == (1 - number, 30)
    assert float(key[other, :, :30].min()) == 3.0 and float(value[other, :, :30].max()) == 4.0


def test_the_slot_that_was_used_longest_ago_is_written_over() -> None:
    slots = CacheSlots(KeyValues(slots=2, capacity=64))
    first = filled(slots, A, LONG)
    second = filled(slots, B, LONG)
    slots.release(first)
    slots.release(second)
    assert slots.take(prefix_key({}), LONG) == (first, 0)


def test_where_layers_pass_states_on_a_beginning_is_reused_at_its_end_only() -> None:
    cache = KeyValues(slots=2, capacity=64)
    slots = CacheSlots(cache)
    number = filled(slots, A, LONG)
    rows = RowsPass([number], [0], 1, 32, torch.device("cpu"))
    with cache.states.lent(small_config("lfm2"), rows, cache.layer) as lent:
        lent.update_conv_state(torch.full((1, 2, 3), 7.0), 0)
    assert slots.take(A, (*LONG, 7)) == (1 - number, 40), "copied from the busy slot"
    with cache.states.lent(small_config("lfm2"), RowsPass([1 - number], [40], 1, 64, torch.device("cpu")), cache.layer) as lent:
        assert lent.get_conv_state(0).tolist() == [[[7.0] * 3] * 2]
    slots.release(number)
    assert slots.take(A, (*LONG[:30], 99)) == (number, 0), "the state is that after 40 tokens"

"""The slots of the key-value cache: who writes in which, and which beginnings they hold that a new prompt can go on from.

A beginning counts only for the adapters, with weights, that it was computed with. Adapters are named by version here, so that a
new version under an old name never goes on from what the old one computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorakeet.models.generate.kv_cache import KeyValues

Key = tuple[tuple[str, float], ...]
LEAST_COPIED = 16  # tokens: copying fewer is not worth a pass over the cache


def prefix_key(adapters: Mapping[str, float]) -> Key:
    """What a beginning was computed with, independent of the order in which adapters were named."""
    return tuple(sorted(adapters.items()))


@dataclass
class _SlotState:
    number: int
    key: Key = ()
    ids: list[int] = field(default_factory=list)  # the tokens whose keys and values it holds
    busy: bool = False
    used: int = 0


class CacheSlots:
    """Hands out slots. A free one keeps what it holds until it is needed."""

    def __init__(self, cache: KeyValues) -> None:
        self.cache = cache
        self._slots = [_SlotState(number) for number in range(cache.slots)]
        self._clock = 0

    @property
    def free(self) -> int:
        """How many slots nobody writes in."""
        return sum(not slot.busy for slot in self._slots)

    def take(self, key: Key, ids: tuple[int, ...]) -> tuple[int, int]:
        """A free slot for the prompt `ids`, and how many of its tokens it holds already. Call only where one is free.

        At least one token is left to compute, since its logits are wanted. The beginning may come from a busy slot: what the
        cache has of a running text never changes.
        """
        self._clock += 1
        shared = {slot.number: _common(slot.ids, ids[:-1]) if slot.key == key else 0 for slot in self._slots}
        open_slots = [slot for slot in self._slots if not slot.busy]
        own = max(open_slots, key=lambda slot: (shared[slot.number], -slot.used))
        best = max(self._slots, key=lambda slot: shared[slot.number])
        count = shared[own.number]
        if count >= shared[best.number] - LEAST_COPIED and count:
            chosen = own
        else:
            chosen = min(open_slots, key=lambda slot: (shared[slot.number] > 0, slot.used))
            count = shared[best.number] if shared[best.number] >= LEAST_COPIED else 0
            if count:
                self.cache.copy_prefix(best.number, chosen.number, count)
        chosen.key, chosen.ids, chosen.busy, chosen.used = key, list(ids[:count]), True, self._clock
        return chosen.number, count

    def wrote(self, number: int, ids: tuple[int, ...]) -> None:
        """The keys and values of `ids` now follow in the slot."""
        self._slots[number].ids.extend(ids)

    def release(self, number: int) -> None:
        """Nobody writes in the slot any more; what it holds can be gone on from."""
        self._slots[number].busy = False

    def wipe(self, number: int) -> None:
        """Drops all that the slot holds, which is not to be gone on from."""
        self._slots[number].key, self._slots[number].ids = (), []
        self.cache.wipe(number)

    def forget(self, adapter: str) -> None:
        """Drops what was computed with this version of an adapter, in the slots where nobody writes."""
        for slot in self._slots:
            if not slot.busy and any(name == adapter for name, _ in slot.key):
                slot.key, slot.ids = (), []


def _common(held: list[int], wanted: tuple[int, ...]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    count = 0
    for ours, theirs in zip(held, wanted, strict=False):
        if ours != theirs:
            break
        count += 1
    return count

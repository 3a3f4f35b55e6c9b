"""Slots of the KV cache, and reuse of prefixes that they contain for new prompts.

A prefix is reused only for the adapters and weights that it was computed with. Adapters are identified by version, so that a new
version under an old name never reuses what the old one computed. Where layers pass a state on, a slot has only the one after its
last token, so that it is reused as a whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorakeet.models.generate.kv_cache import KeyValues

Key = tuple[tuple[str, float], ...]
LEAST_COPIED = 16  # tokens: copying fewer does not pay


def prefix_key(adapters: Mapping[str, float]) -> Key:
    """The key of prefixes computed with `adapters`, independent of their order."""
    return tuple(sorted(adapters.items()))


@dataclass
class _SlotState:
    number: int
    key: Key = ()
    ids: list[int] = field(default_factory=list)  # whose keys and values are in the slot
    busy: bool = False
    used: int = 0


class CacheSlots:
    """Assigns slots. A free one keeps its prefix until it is assigned again."""

    def __init__(self, cache: KeyValues) -> None:
        self.cache = cache
        self._slots = [_SlotState(number) for number in range(cache.slots)]
        self._clock = 0

    @property
    def free(self) -> int:
        """The number of free slots."""
        return sum(not slot.busy for slot in self._slots)

    def take(self, key: Key, ids: tuple[int, ...]) -> tuple[int, int]:
        """Assigns a free slot to the prompt `ids`; returns it and how many of the tokens it contains. Call only if one is free.

        At least one token is left to compute, since its logits are needed. The prefix may be copied from a busy slot: cached
        tokens of a running text never change.
        """
        self._clock += 1
        shared = {slot.number: self._shared(slot, ids[:-1]) if slot.key == key else 0 for slot in self._slots}
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

    def _shared(self, slot: _SlotState, wanted: tuple[int, ...]) -> int:
        """How many tokens of a slot can be reused for the tokens `wanted`."""
        count = _common(slot.ids, wanted)
        return 0 if self.cache.states and count < len(slot.ids) else count

    def wrote(self, number: int, ids: tuple[int, ...]) -> None:
        """Records that the keys and values of `ids` were appended to the slot."""
        self._slots[number].ids.extend(ids)

    def release(self, number: int) -> None:
        """Frees the slot; its prefix can be reused."""
        self._slots[number].busy = False

    def wipe(self, number: int) -> None:
        """Empties the slot, so that its content is not reused."""
        self._slots[number].key, self._slots[number].ids = (), []
        self.cache.wipe(number)

    def forget(self, adapter: str) -> None:
        """Empties the free slots that were computed with this version of an adapter."""
        for slot in self._slots:
            if not slot.busy and any(name == adapter for name, _ in slot.key):
                slot.key, slot.ids = (), []


def _common(cached: list[int], wanted: tuple[int, ...]) -> int:
    """The length of the common prefix of two sequences."""
    count = 0
    for ours, theirs in zip(cached, wanted, strict=False):
        if ours != theirs:
            break
        count += 1
    return count

"""States by slot: each text over them has the logits of transformers' own code on the whole text, whatever shares its pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorakeet.errors import ConfigError
from lorakeet.models import servable
from lorakeet.models.generate.kv_cache import CacheRow, KeyValues, check_cached, step
from tiny.family_columns import EXACT, NOISE, loaded, saved
from tiny.hybrids import HYBRIDS, LENGTHS, OTHERS, Hybrid, hybrid, prompts

CAPACITY, WRITTEN = 80, 4
MORE = 3  # slots that are left empty between others


@pytest.fixture(params=(*HYBRIDS, *OTHERS), scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hybrid]:
    torch.set_num_threads(1)
    yield hybrid(request.param, tmp_path_factory.mktemp(request.param))


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, of the largest logit."""
    return float((found - wanted).abs().max()) / float(wanted.abs().max())


def own_noise(made: Hybrid, texts: list[tuple[int, ...]]) -> float:
    """The most that the logits of transformers' code in fp32 are off its own in fp64, as in tiny/family_columns."""
    wide = {name: copy.deepcopy(model).double() for name, model in made.own.items()}
    exact = Hybrid(made.folder, made.live, wide)
    named = [(ids, adapter_for(number)) for number, ids in enumerate(texts)]
    return max(off(made.logits(ids, name).double(), exact.logits(ids, name)) for ids, name in named)


def adapter_for(number: int) -> str:
    return ("a", "", "b")[number % 3]


def weights(name: str) -> dict[str, float]:
    return {name: 1.0} if name else {}


@pytest.mark.slow
def test_texts_in_company_have_transformers_logits(made: Hybrid) -> None:
    """Prompts of every length together, in pieces, then tokens beside prompts that begin later, with mixed adapters."""
    text, selection = made.live.text, made.live.selection
    texts = [(*ids, *range(40, 40 + WRITTEN)) for ids in prompts()]
    wanted = [made.logits(ids, adapter_for(number)) for number, ids in enumerate(texts)]
    cache, done = KeyValues(slots=len(texts) + MORE, capacity=CAPACITY), [0] * len(texts)
    most = 0.0
    for turn in range(40):
        rows, owners = [], []
        for number, ids in enumerate(texts):
            if done[number] == len(ids) or (number % 2 and turn < 2):  # every other text joins later
                continue
            rest = LENGTHS[number] - done[number]
            count = min(rest, 30) if rest > 0 else 1
            slot = number if number < 4 else number + MORE
            rows.append(CacheRow(slot, done[number], ids[done[number] : done[number] + count], weights(adapter_for(number))))
            owners.append(number)
        if not rows:
            break
        for row, number, found in zip(rows, owners, step(text, cache, rows, selection), strict=True):
            done[number] += len(row.ids)
            most = max(most, off(found, wanted[number][done[number] - 1]))
    assert done == [len(ids) for ids in texts]
    assert most <= EXACT or most <= NOISE * own_noise(made, texts), most


def test_a_slot_used_again_has_nothing_of_its_former_text(made: Hybrid) -> None:
    text, selection = made.live.text, made.live.selection
    first, second = prompts((65, 7))
    cache, anew = KeyValues(slots=2, capacity=CAPACITY), KeyValues(slots=2, capacity=CAPACITY)
    for own, slot in ((cache, 1), (anew, 0)):
        step(text, own, [CacheRow(slot, 0, first, {"a": 1.0})], selection)
    for start, end in ((0, 1), (1, 6), (6, 7)):
        row = CacheRow(1, start, second[start:end], {"b": 1.0})
        assert torch.equal(step(text, cache, [row], selection), step(text, anew, [row], selection))


def test_a_text_goes_on_in_a_copy_and_a_wiped_slot_holds_no_number(made: Hybrid) -> None:
    text, selection = made.live.text, made.live.selection
    ids = prompts((12,))[0]
    cache = KeyValues(slots=3, capacity=CAPACITY)
    step(text, cache, [CacheRow(0, 0, ids[:9], {"a": 1.0})], selection)
    cache.copy_prefix(0, 2, 9)
    step(text, cache, [CacheRow(0, 9, ids[:3], {"a": 1.0})], selection)
    found = step(text, cache, [CacheRow(2, 9, ids[9:], {"a": 1.0})], selection)
    assert off(found[0], made.logits(ids, "a")[-1]) <= EXACT
    broken = step(text, cache, [CacheRow(1, 0, ids, {"a": 1e30})], selection)
    assert not bool(broken.isfinite().all())
    cache.wipe(1)
    found = step(text, cache, [CacheRow(1, 0, ids, {"a": 1.0})], selection)
    assert off(found[0], made.logits(ids, "a")[-1]) <= EXACT


def test_a_served_model_passes_the_check(made: Hybrid) -> None:
    made.live.selection.use(None)
    check_cached(made.live.text, CAPACITY)


def test_the_check_finds_states_that_begin_anew_within_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Jamba's do, where the table would not name it."""
    saved("jamba", tmp_path)
    monkeypatch.setattr(servable, "OWN_STATES", ())
    with pytest.raises(ConfigError, match=r"'jamba' model, which cannot be served here: over a cache its logits are 0\.1"):
        check_cached(loaded(tmp_path))


def test_bytes_are_those_of_keys_values_and_states(made: Hybrid) -> None:
    cache = KeyValues(slots=3, capacity=CAPACITY)
    step(made.live.text, cache, [CacheRow(0, 0, (5, 6, 7), {})], made.live.selection)
    assert cache.states.bytes > 0 and cache.bytes > cache.states.bytes

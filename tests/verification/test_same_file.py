"""A server that loads adapters answers as the certified one does, loaded beside: one wrong module is seen, in bf16 too."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binom

from lorakeet.core.adapter import Adapter
from lorakeet.formats.peft import peft
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.serving import ServingModel
from lorakeet.runs.open_adapter import open_adapter
from lorakeet.serve.engine import Engine
from lorakeet.serve.load_places import LoadPlaces
from lorakeet.serve.registry import Registry
from lorakeet.serve.service import Service
from lorakeet.verification.same_file import PROMPTS, check_same_file
from lorakeet.verification.server_apis import LlamaCppApi, adapters_of, find_api
from tiny.site import Site

ROWS = [list(range(5, 200, 3))]
GATES = ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj")


@contextmanager
def serving(base: Path, adapter: Adapter, places: tuple[Path, ...], folder: Path) -> Iterator[str]:
    """Lorakeet's own server of an adapter "mine" in bf16, which loads others from `places`."""
    peft.write(adapter, folder / "mine")
    text = load_text_model(ModelSpec(path=str(base), dtype="bfloat16"))
    live = ServingModel(text)
    engine = Engine(text, live.selection, slots=2, context=256, chunk=64)
    engine.start()
    registry = Registry(live, engine, base="base", budget=None, changed=lambda: None)
    registry.register("mine", folder / "mine")
    site = Site(Service(text, engine, registry, places=LoadPlaces(places)))
    try:
        yield site.url
    finally:
        site.stop()
        engine.drain(timeout=0.0)


def without_one(held: Adapter) -> Adapter:
    pair = held.pairs[GATES[1]]
    return dataclasses.replace(held, pairs={**held.pairs, GATES[1]: dataclasses.replace(pair, B=pair.B * 0)})


def swapped(held: Adapter) -> Adapter:
    first, second = (held.pairs[path] for path in GATES)
    pairs = {GATES[0]: dataclasses.replace(first, A=second.A), GATES[1]: dataclasses.replace(second, A=first.A)}
    return dataclasses.replace(held, pairs={**held.pairs, **pairs})


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda held: held, without_one, swapped])
def test_one_wrong_module_is_seen_beside_the_certified_file(
    finished: Any, change: Callable[[Adapter], Adapter], tmp_path: Path
) -> None:
    held = open_adapter(finished.path).adapter
    served = change(held)
    with serving(finished.model, served, (Path(tempfile.gettempdir()),), tmp_path) as url:
        found = check_same_file(find_api(url, "mine", ""), ("live", url), held, ROWS)
        left = adapters_of(url)
    assert not isinstance(found, str)
    assert found.passed is (served is held) and found.n == 12
    assert left == ["mine"]


def test_a_server_that_loads_none_shows_nothing(finished: Any, tmp_path: Path) -> None:
    held = open_adapter(finished.path).adapter
    with serving(finished.model, held, (), tmp_path) as url:
        assert "lora_path is in no folder" in str(check_same_file(find_api(url, "mine", ""), ("live", url), held, ROWS))
        assert isinstance(check_same_file(find_api(url, "base", ""), ("live", url), held, ROWS), str)
    assert isinstance(check_same_file(LlamaCppApi("http://127.0.0.1:1", ""), ("live", "llama.cpp"), held, ROWS), str)


def test_answers_that_vary_by_chance_hardly_ever_fail() -> None:
    """However often each answer deviates from the usual one, by itself: both names of the certified adapter must agree always."""
    chances = [step / 200 for step in range(1, 200)]
    fails = [(1 - chance) ** (2 * PROMPTS) * binom.sf(PROMPTS / 2 - 1, PROMPTS, chance) for chance in chances]
    assert max(fails) < 1.1e-4

"""What the tests of serving share: a tiny live model, adapters on disk, and an engine that answers in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakeet.formats.peft import peft
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.serving import ServingModel
from lorakeet.serve.access import Access
from lorakeet.serve.adapter_store import AdapterStore
from lorakeet.serve.engine import Engine
from lorakeet.serve.load_places import LoadPlaces
from lorakeet.serve.registry import Registry
from lorakeet.serve.routes.connections import ConnectionLimits
from lorakeet.serve.service import RequestLimits, Service
from lorakeet.serve.upload_space import MOST_UPLOADED
from tiny.adapters import random_adapter
from tiny.asking import Asking
from tiny.models import tiny_model
from tiny.site import Site

VOCABULARY = 320


@pytest.fixture
def live(tiny_llama_folder: Path) -> ServingModel:
    return ServingModel(load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32")))


@pytest.fixture
def bare(live: ServingModel) -> Any:
    """A model of the same shapes, without anything on it, for making adapters."""
    return tiny_model("llama", vocab_size=live.text.model.config.vocab_size)


@pytest.fixture
def saved(bare: Any, tmp_path: Path) -> Callable[..., Path]:
    """`saved("a", seed=1)`: a random adapter in PEFT's layout on disk, strong enough to change what is written."""

    def build(name: str, *leaves: str, seed: int = 0, rank: int = 4, **options: Any) -> Path:
        folder = tmp_path / "adapters" / name
        peft.write(random_adapter(bare, *leaves, seed=seed, rank=rank, alpha=3.0 * rank, **options), folder)
        return folder

    return build


@pytest.fixture
def asking(live: ServingModel) -> Iterator[Callable[..., Asking]]:
    """`asking(slots=4)`: an engine over the tiny model, stopped when the test ends."""
    made: list[Engine] = []

    def build(**settings: Any) -> Asking:
        engine = Engine(live.text, live.selection, **{"slots": 4, "context": 64, "chunk": 8, **settings})
        engine.start()
        made.append(engine)
        return Asking(engine)

    yield build
    for engine in made:
        engine.drain(timeout=0.0)


@pytest.fixture
def site(live: ServingModel, saved: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """`site(slots=4, …)`: a server with the adapters a and b (of a smaller rank, on other layers)."""
    made: list[Site] = []

    def build(
        *, access: Access | None = None, store: Path | None = None, limits: RequestLimits | None = None,
        budget: int | None = None, names: tuple[str, ...] = ("a", "b"), connections: ConnectionLimits | None = None,
        uploads: int = MOST_UPLOADED, **settings: Any,
    ) -> Site:  # fmt: skip
        engine = Engine(live.text, live.selection, **{"slots": 4, "context": 128, "chunk": 32, **settings})
        engine.start()
        kept = None if store is None else AdapterStore(store, uploads)
        registry = Registry(live, engine, base="tiny", budget=budget, changed=lambda: kept and kept.remember(registry))
        if kept is not None:
            kept.restore(registry, lambda _: None)
        for seed, name in enumerate(names):
            if name not in registry.names:
                registry.register(name, saved(name, *(("q_proj", "up_proj") if name == "b" else ()), seed=seed))
        limits = limits or RequestLimits(stop=60.0)  # however slow this machine is, what was begun ends
        places = LoadPlaces([tmp_path / "adapters", *([] if store is None else [store])])
        service = Service(live.text, engine, registry, access=access, store=kept, limits=limits, places=places)
        made.append(Site(service, connections))
        return made[-1]

    yield build
    for one in made:
        one.stop()

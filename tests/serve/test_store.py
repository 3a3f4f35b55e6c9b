"""The folder of a server: what it remembers, what it finds again, and that an upload is there whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import ConfigError, DataError
from lorakeet.formats import peft
from lorakeet.models.active import LiveModel
from lorakeet.serve.registry import Registry
from lorakeet.serve.store import LIST, Store


@pytest.fixture
def registry(live: LiveModel, asking: Callable[..., Any]) -> Registry:
    return Registry(live, asking().engine, base="base")


def upload(store: Store, name: str, folder: Path) -> None:
    for file in ("adapter_config.json", peft.MODEL_NAME):
        shutil.copy(folder / file, store.incoming(name, file))


def test_a_restart_finds_everything_again(registry: Registry, saved: Callable[..., Path], tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    elsewhere = saved("elsewhere", seed=1)
    registry.register("known", elsewhere)
    registry.load("loaded", elsewhere, pinned=True)
    upload(store, "sent", saved("sent", seed=2))
    store.accept("sent", registry, replace=False)
    store.remember(registry)
    upload(store, "half", saved("half"))
    shutil.copytree(saved("dropped", seed=3), tmp_path / "s" / "dropped")
    (tmp_path / "s" / "broken").mkdir()
    again, said = Registry(registry.live, registry.engine, base="base"), list[str]()
    restarted = Store(tmp_path / "s")
    restarted.restore(again, said.append)
    assert again.names == ("known", "loaded", "sent", "dropped")
    assert len(said) == 1 and "broken is not served" in said[0]
    assert again.get("loaded").pinned and (again.get("loaded").probe.difference(registry.get("loaded").probe) or 0) < 1e-5  # type: ignore[union-attr]
    assert [again.get(name).source.private for name in again.names] == [False, False, True, False]
    assert again.get("sent").source.digest == registry.get("sent").source.digest != ""
    assert not (tmp_path / "s" / ".incoming").exists(), "what had not come in whole is gone"
    for name in registry.names:
        registry.unload(name)
    for name in again.names:
        again.release(again.lease(name))
    listed = json.loads((tmp_path / "s" / LIST).read_text())["adapters"]
    assert list(listed) == list(again.names)


def test_a_changed_upload_is_refused_after_a_restart(registry: Registry, saved: Callable[..., Path], tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    upload(store, "a", saved("a", seed=1))
    store.accept("a", registry, replace=False)
    store.remember(registry)
    other = saved("b", seed=2)
    shutil.copy(other / peft.MODEL_NAME, registry.get("a").source.path / peft.MODEL_NAME)
    registry.unload("a")
    again = Registry(registry.live, registry.engine, base="base")
    Store(tmp_path / "s").restore(again, print)
    with pytest.raises(DataError, match="have changed since they were checked"):
        again.lease("a")


def test_uploads_are_kept_only_when_they_pass(registry: Registry, saved: Callable[..., Path], tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    with pytest.raises(DataError, match="is not whole"):
        store.accept("a", registry, replace=False)
    upload(store, "a", saved("a", seed=1))
    store.accept("a", registry, replace=False)
    first = registry.get("a").source.path
    upload(store, "a", saved("wrong", "embed_tokens"))
    with pytest.raises(ConfigError, match="no pair can be served there"):
        store.accept("a", registry, replace=True)
    assert registry.get("a").source.path == first and first.is_dir()
    upload(store, "a", saved("a2", seed=2))
    with pytest.raises(ConfigError, match="is loaded already"):
        store.accept("a", registry, replace=False)
    upload(store, "a", saved("a2", seed=2))
    store.accept("a", registry, replace=True)
    assert sorted(p.name for p in (tmp_path / "s" / "uploads").iterdir()) == [registry.get("a").source.path.name]
    for name, file in (("../x", peft.MODEL_NAME), ("x", "../../etc"), ("x", "adapter_model.bin"), ("x/y", peft.MODEL_NAME)):
        with pytest.raises(ConfigError):
            store.incoming(name, file)

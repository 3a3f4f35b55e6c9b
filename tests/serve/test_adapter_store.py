"""The folder of a server: what it remembers, what it finds again, and that an upload is there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.peft import peft
from lorakeet.models.text.serving import ServingModel
from lorakeet.serve import adapter_files
from lorakeet.serve.adapter_store import LIST, AdapterStore
from lorakeet.serve.model_names import UnknownModel
from lorakeet.serve.registry import Registry


@pytest.fixture
def registry(live: ServingModel, asking: Callable[..., Any]) -> Registry:
    return Registry(live, asking().engine, base="base")


def upload(store: AdapterStore, name: str, folder: Path) -> None:
    for file in ("adapter_config.json", peft.MODEL_NAME):
        with store.incoming(name, file) as part:
            shutil.copy(folder / file, part)


def test_a_restart_finds_everything_again(registry: Registry, saved: Callable[..., Path], tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "s")
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
    restarted = AdapterStore(tmp_path / "s")
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
    store = AdapterStore(tmp_path / "s")
    upload(store, "a", saved("a", seed=1))
    store.accept("a", registry, replace=False)
    store.remember(registry)
    other = saved("b", seed=2)
    shutil.copy(other / peft.MODEL_NAME, registry.get("a").source.path / peft.MODEL_NAME)
    registry.unload("a")
    again = Registry(registry.live, registry.engine, base="base")
    AdapterStore(tmp_path / "s").restore(again, print)
    with pytest.raises(DataError, match="have changed since they were checked"):
        again.lease("a")


def test_uploads_are_kept_only_when_they_pass(registry: Registry, saved: Callable[..., Path], tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "s")
    with pytest.raises(DataError, match="is not whole"):
        store.accept("a", registry, replace=False)
    upload(store, "a", saved("a", seed=1))
    store.accept("a", registry, replace=False)
    first = registry.get("a").source.path
    upload(store, "a", saved("wrong", "embed_tokens"))
    with pytest.raises(ConfigError, match="a pair on it cannot be served"):
        store.accept("a", registry, replace=True)
    assert registry.get("a").source.path == first and first.is_dir()
    upload(store, "a", saved("a2", seed=2))
    with pytest.raises(ConfigError, match="is loaded already"):
        store.accept("a", registry, replace=False)
    upload(store, "a", saved("a2", seed=2))
    store.accept("a", registry, replace=True)
    assert sorted(p.name for p in (tmp_path / "s" / "uploads").iterdir()) == [registry.get("a").source.path.name]
    for name, file in (("../x", peft.MODEL_NAME), ("x", "../../etc"), ("x", "adapter_model.bin"), ("x/y", peft.MODEL_NAME)):
        with pytest.raises(ConfigError), store.incoming(name, file):
            pass


def test_a_kill_at_any_moment_of_uploads_leaves_whole_adapters(
    registry: Registry, saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder as it is before and after each rename and removal is what a kill there leaves; a server starts from each."""
    folder, moments = tmp_path / "s", list[tuple[Path, str]]()
    store, doing = AdapterStore(folder), ["first"]
    monkeypatch.setattr(registry, "_changed", lambda: store.remember(registry))

    def watched(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*arguments: Any, **more: Any) -> Any:
            moments.append((Path(shutil.copytree(folder, tmp_path / f"moment {len(moments)}")), doing[-1]))
            found = original(*arguments, **more)
            moments.append((Path(shutil.copytree(folder, tmp_path / f"moment {len(moments)}")), doing[-1]))
            return found

        monkeypatch.setattr(module, name, call)

    wholes = [saved("v1", seed=1, rank=2), saved("v2", seed=2, rank=3)]
    for module, name in ((os, "replace"), (os, "rename"), (shutil, "rmtree")):
        watched(module, name)
    for number, whole in enumerate(wholes):
        upload(store, "a", whole)
        store.accept("a", registry, replace=bool(number))
        doing.append("served")
    doing.append("removing")
    registry.unload("a")
    store.tidy("a", registry)
    monkeypatch.undo()
    assert len(moments) > 20
    sent = [(whole / peft.MODEL_NAME).read_bytes() for whole in wholes]
    for place, what in moments:
        shutil.rmtree(folder)
        shutil.copytree(place, folder)
        again, said = Registry(registry.live, registry.engine, base="base"), list[str]()
        AdapterStore(folder).restore(again, said.append)
        assert set(again.names) <= {"a"} and (what != "served" or again.names == ("a",)), (place, said)
        for version in again.versions:
            assert (version.source.path / peft.MODEL_NAME).read_bytes() in sent
        assert not said or what == "removing", said


def test_the_same_name_sent_by_many_at_once_ends_in_one_whole_version(
    registry: Registry, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """Ranks differ, so that a configuration beside another's numbers would be refused; alphas differ too."""
    store = AdapterStore(tmp_path / "s")
    folders = [saved(f"v{number}", seed=number, rank=2 + number) for number in range(4)]
    errors: list[BaseException] = []
    begun = threading.Barrier(len(folders) + 1)

    def send(number: int) -> None:
        begun.wait()
        try:
            for _ in range(3):
                for file in ("adapter_config.json", peft.MODEL_NAME):
                    with store.incoming("a", file, f"admin {number}") as part:
                        shutil.copy(folders[number] / file, part)
                store.accept("a", registry, replace=True, uploader=f"admin {number}")
        except BaseException as error:
            errors.append(error)

    def drop() -> None:
        begun.wait()
        for _ in range(6):
            with contextlib.suppress(UnknownModel):
                registry.unload("a")
            store.tidy("a", registry)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(len(folders))] + [threading.Thread(target=drop)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    served = registry.get("a")
    rank = served.source.ranks[0]
    for file in ("adapter_config.json", peft.MODEL_NAME):
        assert (served.source.path / file).read_bytes() == (folders[rank - 2] / file).read_bytes()
    assert [place.name for place in (tmp_path / "s" / "uploads").iterdir()] == [served.source.path.name]
    assert registry.resident == 1 and not list((tmp_path / "s" / ".incoming").rglob("*.part"))


def test_a_file_that_is_sent_twice_at_once_is_one_of_the_two(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "s")
    with store.incoming("a", peft.MODEL_NAME) as first, store.incoming("a", peft.MODEL_NAME) as second:
        assert first != second
        with first.open("wb") as one:
            one.write(b"1" * 1000)
            second.write_bytes(b"2" * 10)
            one.write(b"1" * 1000)
    assert [file.read_bytes() for file in (tmp_path / "s").rglob(peft.MODEL_NAME)] == [b"1" * 2000]
    with pytest.raises(ZeroDivisionError), store.incoming("a", peft.MODEL_NAME) as broken:
        broken.write_bytes(b"3")
        _ = 1 / 0
    assert [file.read_bytes() for file in (tmp_path / "s").rglob(peft.MODEL_NAME)] == [b"1" * 2000]


def test_what_cannot_be_served_at_a_start_stays_in_the_list(
    registry: Registry, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """Its disk may be away, or the base may be another this time."""
    store = AdapterStore(tmp_path / "s")
    folder = saved("away", seed=1)
    registry.register("here", saved("here"))
    registry.load("away", folder, pinned=True)
    registry.load("gone", folder)
    store.remember(registry)
    before = json.loads((tmp_path / "s" / LIST).read_text())["adapters"]
    folder.rename(tmp_path / "elsewhere")
    again, said = Registry(registry.live, registry.engine, base="base"), list[str]()
    restarted = AdapterStore(tmp_path / "s")
    restarted.restore(again, said.append)
    assert again.names == ("here",) and len(said) == 2 and "'away' is not served" in said[0] and LIST in said[0]
    assert json.loads((tmp_path / "s" / LIST).read_text())["adapters"].items() >= {k: before[k] for k in ("away", "gone")}.items()
    assert restarted.forget("gone", again) and not restarted.forget("gone", again)
    (tmp_path / "elsewhere").rename(folder)
    third = Registry(registry.live, registry.engine, base="base")
    AdapterStore(tmp_path / "s").restore(third, said.append)
    assert set(third.names) == {"here", "away"} and third.get("away").pinned and third.get("away").probe is not None
    (tmp_path / "s" / LIST).write_text('{"adapters": []}')
    with pytest.raises(DataError, match="has no object of adapters by name"):
        AdapterStore(tmp_path / "s").restore(third, said.append)


def test_a_disk_too_full_for_the_list_changes_nothing(
    live: ServingModel, asking: Callable[..., Any], saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(tmp_path / "s")
    registry = Registry(live, asking().engine, base="base", changed=lambda: store.remember(registry))
    upload(store, "a", saved("a", seed=1))
    store.accept("a", registry, replace=False)
    first, listed = registry.get("a"), (tmp_path / "s" / LIST).read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorakeet.serve.adapter_store.save_text", full)
    for name in ("a", "b"):
        upload(store, name, saved("other", seed=2))
        with pytest.raises(OSError, match="No space left"):
            store.accept(name, registry, replace=True)
    with pytest.raises(OSError, match="No space left"):
        registry.load("c", saved("c"))
    for pinned in (True, False):
        first.pinned = not pinned
        with pytest.raises(OSError, match="No space left"):
            registry.pin("a", pinned)
        assert first.pinned is not pinned
    assert registry.names == ("a",) and registry.get("a") is first and registry.resident == 1
    assert list((tmp_path / "s" / "uploads").iterdir()) == [first.source.path]
    assert (tmp_path / "s" / LIST).read_bytes() == listed
    registry.release(registry.lease("a"))


def test_an_upload_that_another_start_may_serve_is_not_overwritten(
    registry: Registry, saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(tmp_path / "s")
    upload(store, "sent", saved("sent"))
    store.accept("sent", registry, replace=False)
    store.remember(registry)
    other = Registry(registry.live, registry.engine, base="sent")  # which leaves the adapter out, for its name
    store = AdapterStore(tmp_path / "s")
    store.restore(other, print)
    other.base = "other"
    upload(store, "sent", saved("new", seed=2))
    with pytest.raises(ConfigError, match="'sent' is in the server's list, but could not be served"):
        store.accept("sent", other, replace=False)
    kept = tmp_path / "s" / "uploads" / "sent@1"
    assert kept.is_dir()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("lorakeet.serve.adapter_store.save_text", full)
        with pytest.raises(OSError, match="No space left"):
            store.forget("sent", other)
    assert store.forget("sent", other) and json.loads((tmp_path / "s" / LIST).read_text())["adapters"] == {}
    store.accept("sent", other, replace=False)
    assert other.names == ("sent",)


@pytest.mark.parametrize("error", [IndexError("tuple index out of range"), RecursionError(), RuntimeError("x"), MemoryError()])
def test_what_a_reader_raises_stops_no_start(
    error: Exception, registry: Registry, saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(tmp_path / "s")
    upload(store, "listed", saved("listed", seed=1))
    store.accept("listed", registry, replace=False)
    store.remember(registry)
    for name in ("bad", "good"):
        shutil.copytree(saved(name, seed=2), tmp_path / "s" / name)
    real = adapter_files.detect

    def read(path: Path) -> Any:
        if path.name in ("bad", "listed@1"):
            raise error
        return real(path)

    monkeypatch.setattr(adapter_files, "detect", read)
    again, said = Registry(registry.live, registry.engine, base="base"), list[str]()
    AdapterStore(tmp_path / "s").restore(again, said.append)
    assert again.names == ("good",)
    assert [text.split()[0] for text in said] == ["'listed'", "bad"]
    assert all(f"cannot be read as an adapter ({type(error).__name__}" in text for text in said)
    assert "listed" in json.loads((tmp_path / "s" / LIST).read_text())["adapters"]


def test_a_pipe_in_an_adapters_folder_holds_nothing_up(registry: Registry, saved: Callable[..., Path], tmp_path: Path) -> None:
    for file in ("adapter_config.json", peft.MODEL_NAME):
        folder = saved(f"pipe-{file}", seed=1)
        (folder / file).unlink()
        os.mkfifo(folder / file)
        with pytest.raises(DataError):
            registry.load("pipe", folder)
    registry.load("good", saved("good", seed=2))

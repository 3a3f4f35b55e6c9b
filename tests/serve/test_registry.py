"""The registry: known by the thousand, few in memory, upgraded while in use, refused when wrong, and nothing left behind."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.errors import ConfigError, DataError, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, tolerance_check
from lorakeet.formats import gguf
from lorakeet.formats.files.base_model import open_base
from lorakeet.formats.peft import peft
from lorakeet.models.text.serving import ServingModel
from lorakeet.serve.model_names import UnknownModel
from lorakeet.serve.probe import Probe, extend_certificate
from lorakeet.serve.registry import AdapterMemoryFull, Registry

IDS = (30, 51, 77, 80)


@pytest.fixture
def server(asking: Callable[..., Any]) -> Any:
    return asking()


@pytest.fixture
def registry(live: ServingModel, server: Any) -> Registry:
    return Registry(live, server.engine, base="base")


def write(server: Any, registry: Registry, model: str) -> list[int]:
    lease = registry.lease(model)
    try:
        found: list[int] = server.ask(IDS, lease.adapters).ids
    finally:
        registry.release(lease)
    return found


def tensors() -> tuple[int, int]:
    gc.collect()
    found = [held for held in gc.get_objects() if issubclass(type(held), torch.Tensor)]
    return len(found), sum(held.numel() for held in found)


def test_names_mixes_and_the_base(registry: Registry, server: Any, saved: Callable[..., Path]) -> None:
    registry.register("a", saved("a", seed=1))
    registry.load("b.1", saved("b", seed=2))
    texts = [tuple(write(server, registry, model)) for model in ("a", "base:b.1", "base", "a*0.2+b.1*0.8")]
    assert len(set(texts)) == 4, texts
    assert write(server, registry, "a:latest") == list(texts[0]) == write(server, registry, "a*1")
    assert write(server, registry, "a*0.1 + b.1*0.8 + a*0.1") == list(texts[3])
    with pytest.raises(UnknownModel, match=r"No model 'b\.2' is served. Did you mean 'b\.1'"):
        registry.lease("b.2")
    for broken in ("a*x", "a*nan"):
        with pytest.raises(ConfigError, match="is no number"):
            registry.lease(broken)


@pytest.mark.slow
def test_loading_and_unloading_leaves_nothing(registry: Registry, server: Any, saved: Callable[..., Path]) -> None:
    folder = saved("a")

    def cycle() -> None:
        registry.load("a", folder)
        registry.unload("a")

    registry.load("a", folder)
    write(server, registry, "a")
    registry.unload("a")
    cycle()
    before = tensors()
    for _ in range(150):
        cycle()
    assert tensors() == before
    assert (registry.resident, registry.resident_bytes, registry.names, registry.live.names) == (0, 0, (), ())


def test_an_upgrade_under_one_name_while_a_text_is_written(registry: Registry, server: Any, saved: Callable[..., Path]) -> None:
    registry.load("a", saved("old", seed=1))
    old = registry.lease("a")
    expected = server.ask(IDS, old.adapters, max_tokens=40).ids
    begun = server.begin(IDS, old.adapters, max_tokens=40)
    registry.load("a", saved("new", seed=2), replace=True)
    new = write(server, registry, "a")
    assert server.end(begun).ids == expected, "it ends on the version that it began with"
    assert new != expected[: len(new)] and registry.resident == 2
    registry.release(old)
    assert registry.resident == 1 and len(registry.live.names) == 1, "the old version is freed with its last user"


def test_unloading_while_a_text_is_written(registry: Registry, server: Any, saved: Callable[..., Path]) -> None:
    registry.load("a", saved("a"))
    lease = registry.lease("a")
    begun = server.begin(IDS, lease.adapters, max_tokens=40)
    registry.unload("a")
    with pytest.raises(UnknownModel):
        registry.lease("a")
    assert registry.resident == 1 and server.end(begun).reason in ("length", "stop")
    registry.release(lease)
    assert registry.resident == 0


@pytest.mark.slow
def test_thousands_known_few_in_memory(live: ServingModel, server: Any, saved: Callable[..., Path]) -> None:
    first = saved("a0")
    size = peft.read(first).parameters * 4
    registry = Registry(live, server.engine, base="base", budget=6 * size)  # three, each with a copy in fp32 for a text
    for number in range(200):
        registry.register(f"a{number}", first if number % 2 else saved("other", seed=9))
    assert registry.resident == 0
    for number in range(0, 20):
        write(server, registry, f"a{number}")
        assert registry.resident_bytes <= 3 * size
    assert [registry.get(f"a{number}").loaded for number in (16, 17, 18, 19)] == [False, True, True, True]
    registry.pin("a17", True)
    for number in (30, 31, 32):
        write(server, registry, f"a{number}")
    assert registry.get("a17").loaded
    leases = [registry.lease(name) for name in ("a1", "a2")]
    with pytest.raises(AdapterMemoryFull, match="in use or pinned"):
        registry.lease("a3")
    for lease in leases:
        registry.release(lease)
    write(server, registry, "a3")
    assert registry.get("a1").loads == 2, "loaded, put out, and loaded again"


def test_copies_count_in_the_memory_of_adapters(live: ServingModel, server: Any, saved: Callable[..., Path]) -> None:
    size, slots = peft.read(saved("a")).parameters * 4, server.engine.cache.slots
    registry = Registry(live, server.engine, base="base", budget=(10 + slots) * size - 1)
    for number in range(12):
        registry.register(f"a{number}", saved("a"))
    leases = [registry.lease(f"a{number}") for number in range(9)]
    assert registry.resident == 9, "no more copies than texts are written at once"
    said = f"takes {size:,} bytes, and copies of {slots * size:,} bytes for running texts"
    with pytest.raises(AdapterMemoryFull, match=said):
        registry.lease("a9")
    for lease in leases:
        registry.release(lease)


def test_a_mix_needs_memory_for_its_copy(live: ServingModel, server: Any, saved: Callable[..., Path]) -> None:
    size, slots = peft.read(saved("a")).parameters * 4, server.engine.cache.slots
    registry = Registry(live, server.engine, base="base", budget=2 * (1 + slots) * size - 1)
    for name in ("a", "b"):
        registry.register(name, saved(name))
    leases = [registry.lease(f"a*0.{number}+b") for number in range(1, slots)]
    said = f"The mix needs copies of {2 * slots * size:,} bytes for running texts; {2 * size:,} of"
    with pytest.raises(AdapterMemoryFull, match=said):
        registry.lease("a+b*0.5")
    leases.append(registry.lease("a*0.1+b"))  # a copy that is there already
    registry.release(leases.pop(1))
    leases.append(registry.lease("a+b*0.5"))
    for lease in leases:
        registry.release(lease)
    assert registry.get("a").users == registry.get("b").users == 0


def test_a_changed_file_is_refused_until_it_is_loaded_again(live: ServingModel, server: Any, saved: Callable[..., Path]) -> None:
    folder, other = saved("a", seed=1), saved("b", seed=2)
    registry = Registry(live, server.engine, base="base", budget=2 * peft.read(folder).parameters * 4)  # one, with its copy
    registry.load("a", folder)
    registry.register("b", other)
    expected = write(server, registry, "a")
    shutil.copy(other / peft.MODEL_NAME, folder / peft.MODEL_NAME)
    assert write(server, registry, "a") == expected, "what is in memory is what was checked"
    write(server, registry, "b")
    with pytest.raises(DataError, match=r"'a' at .* have changed since they were checked"):
        registry.lease("a")
    (folder / peft.MODEL_NAME).write_bytes(b"cut")
    with pytest.raises(DataError, match="not a whole safetensors file"):
        registry.load("a", folder, replace=True)
    shutil.copy(other / peft.MODEL_NAME, folder / peft.MODEL_NAME)
    registry.load("a", folder, replace=True)
    assert write(server, registry, "a") == write(server, registry, "b")


def test_the_same_name_at_once_is_loaded_once(registry: Registry, saved: Callable[..., Path]) -> None:
    folder, errors = saved("a"), []

    def load() -> None:
        try:
            registry.load("a", folder)
        except ConfigError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 3 and all("is loaded already" in error for error in errors)
    assert registry.resident == 1


def test_a_certificate_is_held_to(registry: Registry, server: Any, saved: Callable[..., Path]) -> None:
    folder = saved("a")
    path = folder / "certificate.json"
    check = tolerance_check("run", {"x": 0.0}, tolerance={"x": 1.0}, between=("a", "b"))
    Certificate("The run", (check,)).write(path)
    version = registry.load("a", folder)
    assert version.probe is not None and version.probe.effect > 0.1
    extended = extend_certificate(path, "a", version.probe, registry.prober.tolerance)
    assert extended.passed and [found.name for found in extended.checks] == ["run", "served"]
    registry.load("a", folder, replace=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 4.0}))
    with pytest.raises(VerificationFailed, match=r"'a' does not compute what .*certificate\.json says: .* differ by"):
        registry.load("a", folder, replace=True)
    assert registry.get("a").source.scales == (3.0,) and registry.resident == 1, "the good version is still served"


def test_a_record_of_another_base_is_said_not_to_compare(
    registry: Registry, saved: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved("a")
    check = tolerance_check("run", {"x": 0.0}, tolerance={"x": 1.0}, between=("a", "b"))
    elsewhere = Probe("base, nf4 block_size=64 double_quant=True", "float32", (0.0,) * 64).to_text()
    Certificate("The run", (check,), {"probe": elsewhere}).write(folder / "certificate.json")
    registry.load("a", folder)
    assert "not compared adapter=a" in caplog.text and "nf4 block_size=64" in caplog.text and registry.names == ("a",)


def test_wrong_adapters_are_refused_before_they_are_seen(registry: Registry, saved: Callable[..., Path]) -> None:
    folder = saved("a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    for name in ("../a", "a/b", "a+b", "a*2", "", "a..b", "a:b", ".a"):
        with pytest.raises(ConfigError, match="cannot be used"):
            registry.register(name, folder)
    for call in (registry.register, registry.load):
        with pytest.raises(DataError, match="rank 4 on disk"):
            call("a", folder)
    assert registry.names == ()


def test_dora_is_served_but_not_mixed(registry: Registry, server: Any, saved: Callable[..., Path]) -> None:
    registry.load("d", saved("d", dora=True))
    registry.load("a", saved("a", seed=1))
    assert write(server, registry, "d") != write(server, registry, "base")
    with pytest.raises(ConfigError, match="d has DoRA or biases"):
        registry.lease("a*0.5+d*0.5")
    assert registry.get("a").users == registry.get("d").users == 0


def test_a_text_with_dora_leaves_the_mixes_of_others_alone(registry: Registry, server: Any, saved: Callable[..., Path]) -> None:
    for name in "abd":
        registry.load(name, saved(name, seed=ord(name), dora=name == "d"))
    wanted = ("a*0.7+b*0.3", "d", "base", "a")
    expected = [write(server, registry, model) for model in wanted]
    leases = [registry.lease(model) for model in wanted]
    begun = [server.begin(IDS, lease.adapters) for lease in leases]
    answers = [server.end(one) for one in begun]
    for lease in leases:
        registry.release(lease)
    assert [(answer.ids, answer.reason in ("length", "stop")) for answer in answers] == [(ids, True) for ids in expected]


def test_other_formats(registry: Registry, server: Any, saved: Callable[..., Path], tiny_llama_folder: Path) -> None:
    folder = saved("a", "q_proj", "up_proj", seed=1)
    gguf.write(peft.read(folder), folder.parent / "a.gguf", base=open_base(tiny_llama_folder))
    registry.load("a", folder)
    registry.load("g", folder.parent / "a.gguf")
    assert write(server, registry, "g") == write(server, registry, "a")


def test_probes_are_made_where_they_can_be_compared(registry: Registry, saved: Callable[..., Path]) -> None:
    folder = saved("a")
    registry.register("known", folder)
    registry.release(registry.lease("known"))
    assert registry.get("known").probe is None, "no record to compare with, and nobody's text waits for one"
    made = registry.probe("known")
    assert registry.get("known").probe == made == registry.load("loaded", folder).probe
    other = saved("b", seed=2)
    registry.register("recorded", other, probe=made)
    with pytest.raises(VerificationFailed, match="'recorded' does not compute what the server's record of it says"):
        registry.lease("recorded")
    assert registry.get("recorded").users == 0 and not registry.get("recorded").loaded

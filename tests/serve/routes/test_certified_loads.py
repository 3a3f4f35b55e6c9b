"""Adapters that reach a running server are compared with their certificates: loads, uploads and the folder of --adapters-dir."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorakeet.errors import VerificationFailed
from lorakeet.evaluate.certificate import Certificate, tolerance_check
from lorakeet.formats.files.digest import sha256_of
from lorakeet.formats.identity import WEIGHTS, identity_of
from lorakeet.serve.registry import Registry
from tiny.damages import DAMAGES, SEVEN

FILES = ("adapter_config.json", "adapter_model.safetensors", "certificate.json")


@pytest.fixture
def run(saved: Callable[..., Path]) -> Path:
    """A run's adapter with its certificate, laid out as a run is."""
    folder = saved("run/adapter", seed=5).parent
    check = tolerance_check("run", {"x": 0.0}, tolerance={"x": 1.0}, between=("a", "b"))
    Certificate("The run", (check,), identity=identity_of(folder / "adapter")).write(folder / "certificate.json")
    return folder


def refused(answer: httpx.Response, name: str) -> str:
    """The message of a refusal, which is the client's: 4xx."""
    assert 400 <= answer.status_code < 500, answer.text
    said = str(answer.json()["error"]["message"])
    assert DAMAGES[name][1] in said
    return said


def listed(url: str) -> set[str]:
    return {model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]}


@pytest.mark.parametrize("name", SEVEN)
def test_a_damaged_adapter_is_not_loaded(site: Callable[..., Any], run: Path, name: str) -> None:
    url, body = site().url, {"lora_name": "mine", "lora_path": str(run), "load_inplace": True}
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60).status_code == 200
    asked = {"model": "mine", "prompt": "This drug", "temperature": 0, "max_tokens": 8}
    before = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()["choices"][0]["text"]
    DAMAGES[name][0](run)
    refused(httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60), name)
    assert httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()["choices"][0]["text"] == before
    refused(httpx.post(f"{url}/v1/load_lora_adapter", json={**body, "lora_name": "other"}, timeout=60), name)
    assert "other" not in listed(url)


@pytest.mark.parametrize("name", SEVEN)
def test_a_damaged_upload_is_not_served(site: Callable[..., Any], run: Path, name: str, tmp_path: Path) -> None:
    served = site(store=tmp_path / "store")
    DAMAGES[name][0](run)
    sent = {file: next(run.rglob(file)) for file in FILES}
    for file, path in sent.items():
        assert httpx.put(f"{served.url}/v1/adapters/up/{file}", content=path.read_bytes()).status_code == 200
    digests = {file: sha256_of(path) for file, path in sent.items()}
    refused(httpx.post(f"{served.url}/v1/adapters/up", json={"sha256": digests}, timeout=60), name)
    assert "up" not in listed(served.url) and not list((tmp_path / "store" / "uploads").iterdir())


@pytest.mark.parametrize("name", SEVEN)
def test_a_damaged_adapter_of_the_folder_is_not_served(site: Callable[..., Any], run: Path, name: str, tmp_path: Path) -> None:
    """It is registered by its header, and refused when it is requested; one without a whole header is not listed."""
    (tmp_path / "store").mkdir()
    DAMAGES[name][0](run)
    run.rename(tmp_path / "store" / "mine")
    url = site(store=tmp_path / "store").url
    asked = {"model": "mine", "prompt": "This drug", "max_tokens": 8}
    answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
    if name == "cut in half":
        assert answer.status_code == 404 and "mine" not in listed(url)
    else:
        refused(answer, name)


def test_another_base_is_refused_unless_that_is_allowed(live: Any, asking: Callable[..., Any], run: Path) -> None:
    check = tolerance_check("run", {"x": 0.0}, tolerance={"x": 1.0}, between=("a", "b"))
    held = {WEIGHTS: "0" * 64, "base quantisation": "none"}
    Certificate("The run", (check,), identity={**identity_of(run / "adapter"), **held}).write(run / "certificate.json")
    engine = asking().engine
    with pytest.raises(VerificationFailed, match="base weights has changed"):
        Registry(live, engine, base="base", held=lambda: {**held, WEIGHTS: "1" * 64}).load("a", run)
    allowed = Registry(live, engine, base="base", held=lambda: {**held, WEIGHTS: "1" * 64}, uncertified=True)
    quantised = Registry(live, engine, base="base", held=lambda: {**held, "base quantisation": "nf4"})  # as --quantize requests
    for name, registry in {"b": allowed, "c": quantised, "d": Registry(live, engine, base="base", held=lambda: held)}.items():
        assert registry.load(name, run).loaded

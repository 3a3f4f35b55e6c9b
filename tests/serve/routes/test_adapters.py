"""Adapters over HTTP: vLLM's and llama.cpp's calls, uploads, pins, upgrades while streams run, and certificates."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorakeet.errors import VerificationFailed
from lorakeet.evaluate.certificate import Certificate, read_certificate, tolerance_check
from lorakeet.formats.files.digest import sha256_of
from lorakeet.formats.identity import WEIGHTS, identity_of
from lorakeet.formats.peft import peft
from lorakeet.serve import adapter_files, adapter_store, registry
from lorakeet.serve.registry import Registry
from lorakeet.serve.service import RequestLimits
from tiny.damages import DAMAGES, SEVEN


@pytest.fixture
def served(site: Callable[..., Any], tmp_path: Path) -> Any:
    return site(store=tmp_path / "store")


@pytest.fixture
def http(served: Any) -> Any:
    with httpx.Client(base_url=served.url, timeout=30) as client:
        yield client


def text(http: Any, model: str, **more: Any) -> str:
    body = {"model": model, "prompt": "This drug", "temperature": 0, "max_tokens": 10, **more}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["choices"][0]["text"]
    return found


def send(http: Any, name: str, folder: Path, **more: Any) -> Any:
    for file in ("adapter_config.json", peft.MODEL_NAME):
        assert http.put(f"/v1/adapters/{name}/{file}", content=(folder / file).read_bytes()).status_code == 200
    return http.post(f"/v1/adapters/{name}", json={"sha256": digests_of(folder), **more})


def digests_of(folder: Path) -> dict[str, str]:
    return {file: sha256_of(folder / file) for file in ("adapter_config.json", peft.MODEL_NAME)}


def test_vllms_calls(http: Any, saved: Callable[..., Path]) -> None:
    folder = saved("c", seed=5)
    loaded = http.post("/v1/load_lora_adapter", json={"lora_name": "c", "lora_path": str(folder)})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'c' added successfully.")
    assert text(http, "c") != text(http, "tiny")
    again = http.post("/v1/load_lora_adapter", json={"lora_name": "c", "lora_path": str(folder)})
    assert again.status_code == 400 and "is loaded already" in again.json()["error"]["message"]
    gone = http.post("/v1/unload_lora_adapter", json={"lora_name": "c"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'c' removed successfully.")
    missing = http.post("/v1/unload_lora_adapter", json={"lora_name": "c"})
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "NotFoundError"
    nowhere = http.post("/v1/load_lora_adapter", json={"lora_name": "c", "lora_path": str(folder / "no")})
    assert nowhere.status_code == 400 and "does not exist" in nowhere.json()["error"]["message"]


def test_llama_cpps_scales(http: Any) -> None:
    listed = http.get("/lora-adapters").json()
    assert [(entry["id"], entry["scale"], entry["task_name"]) for entry in listed] == [(0, 0.0, "a"), (1, 0.0, "b")]
    base, mixed = text(http, "tiny"), text(http, "a*0.2+b*0.8")
    assert text(http, "tiny", lora=[{"id": 0, "scale": 0.2}, {"id": 1, "scale": 0.8}]) == mixed != base
    assert text(http, "tiny", lora=[]) == base
    assert http.post("/lora-adapters", json=[{"id": 0, "scale": 1.0}]).json() == {"success": True}
    assert text(http, "tiny") == text(http, "a") and text(http, "tiny", lora=[]) == base
    assert http.post("/lora-adapters", json=[]).json() == {"success": True}
    assert text(http, "tiny") == base
    assert http.post("/lora-adapters", json=[{"id": 9}]).status_code == 400


def test_an_upload_is_served_once_it_is_whole_and_checked(http: Any, served: Any, saved: Callable[..., Path]) -> None:
    folder = saved("up", seed=6)
    assert http.put("/v1/adapters/up/adapter_model.safetensors", content=b"x").status_code == 200
    assert http.post("/v1/adapters/up", json={}).status_code == 400, "half an upload"
    assert http.get("/v1/adapters/up").status_code == 404
    about = send(http, "up", folder).json()
    assert (about["loaded"], about["ranks"], about["scales"]) == (True, [4], [3.0]) and about["effect"] > 0.1
    assert text(http, "up") != text(http, "tiny")
    assert http.delete("/v1/adapters/up").json()["removed"]
    assert http.get("/v1/adapters/up").status_code == 404 and not list(served.service.store.folder.glob("uploads/*"))
    for path in ("/v1/adapters/..%2Fx/adapter_model.safetensors", "/v1/adapters/up/adapter_model.bin", "/v1/adapters/up/x.py"):
        assert http.put(path, content=b"x").status_code in (400, 404)


def test_the_config_of_one_and_the_weights_of_another_are_refused(http: Any, saved: Callable[..., Path]) -> None:
    """Two clients with one key send files of one name at the same time."""
    first, second = saved("first", seed=1), saved("second", seed=2)
    part = {"adapter_config.json": digests_of(first)["adapter_config.json"]}
    for digests in (digests_of(first), part, None):
        for file, folder in (("adapter_config.json", first), (peft.MODEL_NAME, second)):
            assert http.put(f"/v1/adapters/up/{file}", content=(folder / file).read_bytes()).status_code == 200
        assert http.post("/v1/adapters/up", json={"sha256": digests}).status_code == 400
        assert http.get("/v1/adapters/up").status_code == 404


def test_an_upload_has_a_limit(site: Callable[..., Any], saved: Callable[..., Path], tmp_path: Path) -> None:
    served = site(store=tmp_path / "small", limits=RequestLimits(upload=1000))
    answer = httpx.put(f"{served.url}/v1/adapters/up/adapter_model.safetensors", content=bytes(2000))
    assert answer.status_code == 413 and "larger than the 1,000 bytes" in answer.json()["error"]["message"]
    assert not list((tmp_path / "small").rglob("*.safetensors"))


def test_all_uploads_have_a_limit_that_a_restart_knows_and_a_removal_frees(
    site: Callable[..., Any], saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved("up", seed=6)
    size = sum(-(-file.stat().st_size // 4096) * 4096 for file in folder.iterdir() if file.name in adapter_store.ACCEPTED)
    for attempt in range(2):  # the second server finds the upload of the first
        served = site(store=tmp_path / "small", uploads=size)
        with httpx.Client(base_url=served.url, timeout=30) as client:
            if not attempt:
                assert send(client, "one", folder).status_code == 200
            refused = client.put("/v1/adapters/two/adapter_model.safetensors", content=bytes(2000))
            assert refused.status_code == 507, refused.text
            assert "--uploads-total" in refused.json()["error"]["message"]
            assert not list((tmp_path / "small" / ".incoming").rglob("*.part")), "nothing of it stays"
            assert client.get("/v1/adapters/one").status_code == 200
        served.stop()
    served = site(store=tmp_path / "small", uploads=size)
    with httpx.Client(base_url=served.url, timeout=30) as client:
        assert client.delete("/v1/adapters/one").status_code == 200
        assert send(client, "two", folder).status_code == 200


def test_an_upgrade_while_a_stream_runs(http: Any, saved: Callable[..., Path]) -> None:
    expected = text(http, "a", max_tokens=60)
    body = {"model": "a", "prompt": "This drug", "temperature": 0, "max_tokens": 60, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        upgrade = {"lora_name": "a", "lora_path": str(saved("a-new", seed=9)), "load_inplace": True}
        assert http.post("/v1/load_lora_adapter", json=upgrade).status_code == 200
        new = text(http, "a")
        pieces = [line for line in (first, *lines) if line.startswith("data: {")]
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in pieces) == expected
    assert not expected.startswith(new)


def test_a_certificate_is_extended(http: Any, saved: Callable[..., Path]) -> None:
    assert http.post("/v1/adapters/a/certificate").status_code == 400, "none came with it"
    folder = saved("run", seed=7)
    check = tolerance_check("run", {"x": 0.0}, tolerance={"x": 1.0}, between=("a", "b"))
    export = tolerance_check("run-merged/: logits", {"x": 2.0}, tolerance={"x": 1.0}, between=("a", "b"))
    Certificate("The run", (check, export)).write(folder / "certificate.json")
    assert send(http, "unrelated", saved("z")).status_code == 200
    http.post("/v1/load_lora_adapter", json={"lora_name": "run", "lora_path": str(folder)})
    answer = http.post("/v1/adapters/run/certificate").json()
    assert answer["passed"] and "served" in answer["checks"][2] and answer["artefacts"] == {"run-merged/": "failed"}
    names = [found.name for found in read_certificate(folder / "certificate.json").checks]
    assert names == ["run", "run-merged/: logits", "served"]


def test_scales_that_are_no_numbers_are_refused(http: Any) -> None:
    for scale in ("NaN", "1e999", "-1e31"):
        entry = f'[{{"id": 0, "scale": {scale}}}]'
        request = f'{{"lora": {entry}, "model": "tiny", "prompt": "x"}}'
        for path, body in (("/lora-adapters", entry), ("/v1/completions", request)):
            answer = http.post(path, content=body)
            assert answer.status_code == 400 and "The scale of adapter 0 is" in answer.json()["error"]["message"]
    assert text(http, "tiny")


def test_an_upload_goes_from_a_full_disk(
    http: Any, served: Any, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of names cannot be written before there is room, which what is removed makes."""
    assert send(http, "up", saved("up", seed=5)).status_code == 200
    uploads, write = served.service.store.folder / "uploads", adapter_store.save_text

    def full(*given: Any) -> None:
        if list(uploads.iterdir()):
            raise OSError(28, "No space left on device")
        write(*given)

    monkeypatch.setattr(adapter_store, "save_text", full)
    assert http.delete("/v1/adapters/a").status_code == 507, "nothing of it can be removed"
    assert http.delete("/v1/adapters/up").status_code == 200
    assert list(json.loads((served.service.store.folder / adapter_store.LIST).read_text())["adapters"]) == ["b"]


def test_no_adapter_takes_the_name_of_the_base(http: Any, saved: Callable[..., Path]) -> None:
    answer = http.post("/v1/load_lora_adapter", json={"lora_name": "tiny", "lora_path": str(saved("c", seed=5))})
    assert answer.status_code == 400 and "since the base is" in answer.json()["error"]["message"]


def test_an_upload_that_a_reader_fails_at_is_the_callers(
    http: Any, served: Any, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> Any:
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(adapter_files, "detect", read)
    answer = send(http, "up", saved("up", seed=6))
    assert answer.status_code == 400 and "cannot be read as an adapter (IndexError" in answer.json()["error"]["message"]
    monkeypatch.undo()
    assert not list(served.service.store.folder.glob("uploads/*"))
    assert send(http, "up", saved("up", seed=6)).status_code == 200


def test_paths_outside_stated_folders_are_refused_alike(http: Any, tmp_path: Path, saved: Callable[..., Path]) -> None:
    (tmp_path / "elsewhere").mkdir()
    saved("c", seed=5).rename(tmp_path / "elsewhere" / "c")
    answers = [
        http.post("/v1/load_lora_adapter", json={"lora_name": "c", "lora_path": str(path)})
        for path in (tmp_path / "elsewhere" / "c", tmp_path / "elsewhere" / "no", "/root", "/proc/self/environ", "/etc/passwd")
    ]
    assert {answer.status_code for answer in answers} == {400}
    assert len({answer.text for answer in answers}) == 1 and "--lora-paths" in answers[0].text


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
    engine, other = asking().engine, {**held, WEIGHTS: "1" * 64}
    with pytest.raises(VerificationFailed, match="base weights has changed"):
        Registry(live, engine, base="base", stored_base=lambda: other).load("a", run)
    allowed = Registry(live, engine, base="base", stored_base=lambda: other, uncertified=True)
    packed = {**held, "base quantisation": "nf4"}  # as --quantize requests
    quantised, same = (Registry(live, engine, base="base", stored_base=lambda base=base: base) for base in (packed, held))
    for name, found in {"b": allowed, "c": quantised, "d": same}.items():
        assert found.load(name, run).loaded


def test_an_upload_that_takes_long_holds_no_other_and_no_reply(
    http: Any, served: Any, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, end = threading.Event(), threading.Event()
    inspected = registry.inspect_adapter

    def slowly(path: Path, *given: Any, **more: Any) -> Any:
        if path.name.startswith("slow"):
            begun.set()
            assert end.wait(60)
        return inspected(path, *given, **more)

    monkeypatch.setattr(registry, "inspect_adapter", slowly)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(send, http, "slow", saved("slow", seed=5))
        try:
            assert begun.wait(30)
            other = pool.submit(send, http, "other", saved("other", seed=6))
            assert other.result(30).status_code == 200
            assert text(http, "other") and text(http, "a") and http.delete("/v1/adapters/a").status_code == 200
            assert not slow.done()
        finally:
            end.set()
        assert slow.result().status_code == 200
    assert text(http, "slow")


def test_a_header_of_more_tensors_than_the_model_has_is_not_parsed(http: Any, saved: Callable[..., Path], tmp_path: Path) -> None:
    """600,000 empty tensors took 30 s."""
    folder = saved("up", seed=6)
    entry = {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}
    header = json.dumps({f"base_model.model.{number}.lora_A.weight": entry for number in range(20_000)}).encode()
    (folder / peft.MODEL_NAME).write_bytes(len(header).to_bytes(8, "little") + header)
    answer = send(http, "up", folder)
    assert answer.status_code == 400
    assert f"a header of {len(header):,} bytes; expected at most" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {f"layers.{number}.(q|v)_proj": 4 for number in range(30_000)}},
        {"target_modules": "(a+)+$"}, {"target_modules": r".*(.).*\1.*\1.*\1.*\1.*\1.*\1.*b"}, {"exclude_modules": "(.*a)*b"},
        {"layers_pattern": ["(a|b)*"], "layers_to_transform": [0], "target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["(.*)*x"] * 3},
        {"target_modules": "x" * (17 << 20)},
    ],
)  # fmt: skip
def test_a_configuration_of_endless_work_is_refused(http: Any, saved: Callable[..., Path], config: dict[str, Any]) -> None:
    folder = saved("up", seed=6)
    place = folder / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | config))
    answer = send(http, "up", folder)
    assert answer.status_code == 400, answer.text
    assert text(http, "a")

"""The options of a server, checked without its model."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import ConfigError, EnvironmentProblem, PackageMissing
from lorakeet.memory.budget import Budget
from lorakeet.verbs.early import serving_options
from lorakeet.verbs.early.serving_options import named_paths, require_servable, vllm_flags
from lorakeet.verbs.options import ServeOptions


def options(**given: Any) -> ServeOptions:
    return ServeOptions(**{"model": "model", "port": 0, **given})


def test_a_server_that_can_be_started_has_its_budget() -> None:
    assert require_servable(options(memory="2GiB")).bytes == 2 << 30


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 opens the server to other machines"),
        ({"queue": 0, "slots": -1}, "2 problems"),
        ({"context": 1}, "--context is 1; it must be 2 or more"),
        ({"upload_limit": "4"}, "without a unit"),
        ({"uploads_total": "4"}, "without a unit"),
        ({"port": 70000}, "--port is 70000; expected 0 to 65535"),
        ({"keys": Path("nowhere.json")}, "nowhere.json"),
    ],
)
def test_options_that_cannot_be_served_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        require_servable(options(**given))


def test_keys_open_other_addresses(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [{"owner": "ann", "key": "secret-secret", "adapters": ["a"]}]}))
    assert require_servable(options(host="0.0.0.0", keys=keys)) == Budget()


def test_a_port_in_use_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentProblem) as caught:
            require_servable(options(port=port))
    assert caught.value.code == "port-in-use" and caught.value.values == {"host": "127.0.0.1", "port": port}
    monkeypatch.setattr(serving_options, "find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(PackageMissing) as caught:
        require_servable(options())
    assert caught.value.values == {"packages": ["uvicorn"]}
    assert caught.value.remedies[0].command == "pip install 'lorakeet[serve]'"


def test_every_wrong_adapter_is_named() -> None:
    assert named_paths(["a=x", "b=~/y"]) == {"a": Path("x"), "b": Path("~/y").expanduser()}
    with pytest.raises(ConfigError, match=r"3 problems[\s\S]*expected name=PATH[\s\S]*cannot be used[\s\S]*given twice"):
        named_paths(["a", "../b=x", "c=x", "c=y"])


def test_vllm_gets_what_it_has_a_flag_for() -> None:
    given = options(engine="vllm", adapter=("a=x",), context=64)
    assert vllm_flags(given) == ["--max-model-len", "64", "--host", "127.0.0.1", "--port", "0"]
    with pytest.raises(ConfigError, match="cannot pass on --queue, --slots"):
        vllm_flags(options(engine="vllm", adapter=("a=x",), slots=2, queue=3))
    with pytest.raises(ConfigError, match="at least one --adapter"):
        vllm_flags(options(engine="vllm"))

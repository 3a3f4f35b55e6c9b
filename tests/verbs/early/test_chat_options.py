"""What `lorakeet chat` refuses before its model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakeet.errors import ConfigError
from lorakeet.verbs.early.chat_options import is_server, require_chattable, target_name
from lorakeet.verbs.options import ChatOptions


def test_servers_are_addresses() -> None:
    assert is_server("http://127.0.0.1:8000#a") and is_server("https://x") and not is_server("runs/http")
    require_chattable(ChatOptions(target="http://127.0.0.1:1"))


def test_an_adapter_is_called_as_its_run(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    (run / "adapter").mkdir(parents=True)
    (run / "config.yaml").write_text("model: m\n")
    assert target_name(run / "adapter", {}) == target_name(run, {}) == "mine"
    assert target_name(tmp_path / "other.safetensors", {}) == "other.safetensors"
    with pytest.raises(ConfigError, match=r"--adapter mine=…: .* has that name already"):
        target_name(run, {"mine": run})

"""FlashAttention 3 and 4: turned on where they are installed, for the GPUs that they are for, and left where a proof fails."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import attention
from torch.nn.attention import _fa3, _fa4

from lorakeet.kernels import flash_varlen, newer_flash
from lorakeet.kernels.newer_flash import implementation, leave_newer_flash, newer_flash_in_words
from lorakeet.kernels.newer_flash import newer_flash as turned_on
from tiny.flash import CARD, Flash

CPU = torch.device("cpu")


class Registry:
    """What torch keeps of them; `broken` ones do not load."""

    def __init__(self) -> None:
        self.on: str | None = None
        self.calls: list[str] = []
        self.broken: tuple[str, ...] = ()
        self.error: type[Exception] = RuntimeError
        self.restored: Callable[[], Any] = list

    def activate(self, name: str) -> None:
        self.calls.append(name)
        if name in self.broken:
            raise self.error(f"Module '{name}' does not expose kernels")
        self.on = name

    def restore(self) -> None:
        self.calls.append("own")
        self.on = None
        self.restored()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """As if torch had a GPU, and both packages were here."""
    found = Registry()
    names: dict[str, Any] = {
        "activate_flash_attention_impl": found.activate, "restore_flash_attention_impl": found.restore,
        "current_flash_attention_impl": lambda: found.on, "list_flash_attention_impls": lambda: ["FA3", "FA4"],
    }  # fmt: skip
    for name, value in names.items():
        assert hasattr(attention, name), "torch's own name"
        monkeypatch.setattr(attention, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(newer_flash, "PACKAGES", {"FA3": "json", "FA4": "json.decoder"})
    forget()
    yield found
    forget()


def forget() -> None:
    newer_flash._installed.cache_clear()
    newer_flash._LEFT.clear()
    flash_varlen.proved.cache_clear()
    flash_varlen.newer_is_proved.cache_clear()


def gpu(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    newer_flash._installed.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))


def test_torch_knows_both_by_these_names_and_packages() -> None:
    assert set(newer_flash.PACKAGES) <= set(attention.list_flash_attention_impls())
    for name, module in (("FA3", _fa3), ("FA4", _fa4)):
        assert newer_flash.PACKAGES[name] in inspect.getsource(module)


@pytest.mark.parametrize(("major", "expected"), [(7, ""), (8, ""), (9, "FA3"), (10, "FA4"), (12, "")])
def test_each_gpu_gets_the_one_that_is_for_it(
    major: int, expected: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(major, monkeypatch)
    assert turned_on(CARD) == turned_on(CARD) == expected
    assert registry.calls == [expected] * bool(expected), "once"
    assert turned_on(CPU) == ""


def test_without_a_package_torch_keeps_its_own(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newer_flash, "PACKAGES", {"FA3": "no_such", "FA4": "json.decoder"})
    gpu(9, monkeypatch)
    assert turned_on(CARD) == "FA4"
    registry.on = None
    monkeypatch.setattr(newer_flash, "PACKAGES", {"FA3": "no_such", "FA4": "no_such.thing"})
    gpu(9, monkeypatch)
    assert turned_on(CARD) == "" and registry.calls == ["FA4"]


def test_the_users_own_choice_stays(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.on = "another"
    gpu(9, monkeypatch)
    assert turned_on(CARD) == "" and registry.calls == []


@pytest.mark.parametrize("error", [RuntimeError, ImportError, AttributeError, OSError])
def test_one_that_does_not_load_is_left_with_a_word(
    error: type[Exception], registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry.broken, registry.error = ("FA3",), error
    gpu(9, monkeypatch)
    for _ in range(2):
        assert turned_on(CARD) == ""
    assert registry.calls == ["FA3"] and len(caplog.messages) == 1
    said = f"FlashAttention 3 (json) cannot be loaded ({error.__name__}: Module 'FA3' does not expose kernels)"
    assert said in caplog.messages[0]


def test_a_package_whose_import_fails_is_left_with_a_word(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """flash_attn, around flash_attn.cute, is imported where the latter is looked for."""

    def fail(*_: Any) -> None:
        raise OSError("undefined symbol")

    registry.broken, registry.error = ("FA4",), OSError
    monkeypatch.setattr(newer_flash.importlib.util, "find_spec", fail)
    gpu(10, monkeypatch)
    assert turned_on(CARD) == "" and "FlashAttention 4" in caplog.messages[0]


def test_one_that_computes_otherwise_is_left_and_what_was_proved_with_it_is_proved_anew(
    registry: Registry, flash: Flash, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Right for some heads, wrong for others: then torch's own computes all."""
    monkeypatch.setattr(flash_varlen, "newer_flash", lambda device: "FA3" if "FA3" not in newer_flash._LEFT else "")
    registry.on = "FA3"
    assert flash_varlen.matches_definition(CPU, torch.bfloat16, 4, 2, 16)
    kept = flash_varlen.proved.cache_info().currsize
    assert kept == 1 and registry.on == "FA3"
    flash.aligned, registry.restored = False, lambda: setattr(flash, "aligned", True)
    assert flash_varlen.matches_definition(CPU, torch.bfloat16, 8, 2, 16), "by torch's own"
    assert registry.on is None and registry.calls == ["own"]
    assert caplog.messages[0].startswith("FlashAttention 3 (json) computes O of rows of [5, 300, 70, 1] tokens behind 140")
    assert "Torch's own flash kernel" in caplog.messages[0] and len(caplog.messages) == 1
    assert flash_varlen.proved.cache_info().currsize == 1, "the heads before are proved again when they come"


def test_what_was_turned_off_is_not_restored_twice(registry: Registry) -> None:
    leave_newer_flash("FA3", "is slow")
    assert registry.calls == []


def test_it_is_said_which_one_a_gpu_uses_and_why_not_the_other(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def words(major: int, minor: int) -> str:
        newer_flash._installed.cache_clear()
        return newer_flash_in_words((major, minor))

    third, fourth = words(9, 0).split("; ")
    assert third.startswith("FlashAttention 3 (json) is used: in place of torch's own flash kernel, once it has proved right")
    assert fourth == "FlashAttention 4 (json.decoder) is not used: FlashAttention 3 (json) comes first"
    third, fourth = words(10, 0).split("; ")
    wrong = "FlashAttention 3 (json) is not used: it is for GPUs of compute capability 9.x, and this one has 10.0"
    assert third == wrong and " is used: " in fourth
    assert words(8, 6).count(" is not used: it is for GPUs of compute capability 9.x and 10.x, and this one has 8.6") == 1
    monkeypatch.setattr(attention, "list_flash_attention_impls", list)
    assert f"FlashAttention 3 (json) is not used: torch {torch.__version__} does not know it" in words(9, 0)
    monkeypatch.setattr(newer_flash, "PACKAGES", {"FA3": "no_such", "FA4": "no_such.thing"})
    assert words(9, 0) == "" and registry.calls == []


def test_the_one_that_is_turned_on_has_a_name(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    assert implementation() == ""
    registry.on = "FA3"
    assert implementation() == "FA3"
    monkeypatch.delattr(attention, "current_flash_attention_impl")
    assert implementation() == "", "an older torch"

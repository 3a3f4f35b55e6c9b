"""Keys: who is who, who may do what, how often; and no key is ever shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakeet.errors import ConfigError
from lorakeet.serve.access import Access, Caller, NotAllowed, QuotaSpent, hash_key, read_keys


def keys(folder: Path, *entries: Any) -> Path:
    path = folder / "keys.json"
    path.write_text(json.dumps({"keys": list(entries)}))
    return path


def test_without_keys_everyone_may_do_everything() -> None:
    caller = Access().caller(None)
    caller.require_admin()
    assert Access().open and caller.sees("anything")


def test_two_keys_each_with_its_own_adapters(tmp_path: Path) -> None:
    access = read_keys(
        keys(
            tmp_path,
            {"key": "sk-first-1", "owner": "one", "adapters": ["a"]},
            {"sha256": hash_key("sk-second-2"), "owner": "two", "adapters": ["b"], "admin": True},
        )
    )
    one, two = access.caller("Bearer sk-first-1"), access.caller("bearer sk-second-2")
    assert (one.owner, two.owner) == ("one", "two")
    assert one.visible(("a", "b")) == ("a",) and two.visible(("a", "b")) == ("b",)
    two.require_admin("b")
    with pytest.raises(NotAllowed, match="'two' may not load or change an adapter called 'a'"):
        two.require_admin("a")
    with pytest.raises(NotAllowed, match="'one' may use adapters") as error:
        one.require_admin()
    assert error.value.status == 403
    for header in (None, "", "Bearer", "Bearer sk-first", "Basic sk-first-1", "sk-first-1"):
        with pytest.raises(NotAllowed, match="No valid API key") as error:
            access.caller(header)
        assert error.value.status == 401


def test_a_quota_is_by_the_minute() -> None:
    now = [0.0]
    caller = Caller("one", per_minute=2)
    for moment in (0.0, 10.0):
        now[0] = moment
        caller.count(now=lambda: now[0])
    now[0] = 20.0
    with pytest.raises(QuotaSpent, match="'one' may make 2 requests a minute; try again in 40 s") as error:
        caller.count(now=lambda: now[0])
    assert error.value.retry_after == 40
    now[0] = 60.0
    caller.count(now=lambda: now[0])
    with pytest.raises(ConfigError, match="3 texts are requested at once, but the key of 'one' may make 2 requests a minute"):
        Caller("one", per_minute=2).count(3)


def test_several_requests_wait_for_as_many_of_before() -> None:
    now = [0.0]
    caller = Caller("one", per_minute=3)
    for moment in (0.0, 10.0, 30.0):
        now[0] = moment
        caller.count(now=lambda: now[0])
    with pytest.raises(QuotaSpent) as error:
        caller.count(2, now=lambda: now[0])
    assert error.value.retry_after == 40
    now[0] += 40.0
    caller.count(2, now=lambda: now[0])


def test_everything_wrong_is_reported_at_once_without_a_key(tmp_path: Path) -> None:
    path = keys(
        tmp_path, {"key": "short"}, {"key": "secret-secret", "adaptors": ["a"]}, {"key": "secret-secret", "adapters": "a"}, 5,
        {"key": "secret-secret", "requests_per_minute": 0}, {"key": "secret-secret", "admin": "no"}, {"sha256": "é" * 64},
        {"key": "secret secret"}, {"key": "secret-secret", "requests_per_minute": True},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="9 problems") as error:
        read_keys(path)
    assert "unknown fields adaptors" in str(error.value) and "admin must be true or false" in str(error.value)
    assert "secret" not in str(error.value)
    capital = keys(tmp_path, {"sha256": hash_key("sk-first-1").upper()})
    assert read_keys(capital).caller("Bearer sk-first-1").owner == "1"
    path.write_text("{}")
    with pytest.raises(ConfigError, match="has no keys"):
        read_keys(path)

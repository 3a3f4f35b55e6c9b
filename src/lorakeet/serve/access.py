"""API keys: who may use which adapters, how often, and who may load and unload. Only hashes of keys are stored."""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakeet.errors import ConfigError, LorakeetError, Problems
from lorakeet.formats.files.json_object import read_object

EVERYTHING = "*"
_KEY = re.compile(r"[!-~]{8,}")  # what an HTTP header carries unchanged
_HASH = re.compile(r"[0-9A-Fa-f]{64}")
_WORD = re.compile(r"[^\s/?&='\"]{8,}")
_MINUTE = 60.0


class NotAllowed(LorakeetError):
    """No key, a wrong one, or one that does not permit the request; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class QuotaSpent(LorakeetError):
    """The key has made as many requests as it may in a minute."""

    def __init__(self, owner: str, quota: int, retry_after: int) -> None:
        super().__init__(f"'{owner}' may make {quota} requests a minute; try again in {retry_after} s.")
        self.retry_after = retry_after


@dataclass
class Caller:
    """The owner of a key and its permissions. Without a file of keys, all requests have one Caller that may do everything."""

    owner: str = ""
    adapters: frozenset[str] = frozenset({EVERYTHING})
    admin: bool = True
    per_minute: int | None = None
    _requests: deque[float] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sees(self, name: str) -> bool:
        """True if the adapter `name` exists for this caller."""
        return EVERYTHING in self.adapters or name in self.adapters

    def visible(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that exist for this caller."""
        return tuple(name for name in names if self.sees(name))

    def require_admin(self, name: str | None = None) -> None:
        """Raises NotAllowed if the key may not load, unload or change adapters, or none called `name`, existing or not."""
        if not self.admin:
            raise NotAllowed(f"The key of '{self.owner}' may use adapters, not load or change them.", 403)
        if name is not None and not self.sees(name):
            raise NotAllowed(f"The key of '{self.owner}' may not load or change an adapter called '{name}'.", 403)

    def count(self, requests: int = 1, now: Callable[[], float] = time.monotonic) -> None:
        """Counts requests, each text of one. QuotaSpent if they are too many in a minute, ConfigError if they always are."""
        if self.per_minute is None:
            return
        if requests > self.per_minute:
            raise ConfigError(
                f"{requests} texts are requested at once, but the key of '{self.owner}' may make {self.per_minute} requests a "
                "minute, and each text counts, of every prompt and of n. Send smaller lists, or a smaller n."
            )
        with self._lock:
            moment = now()
            while self._requests and moment - self._requests[0] >= _MINUTE:
                self._requests.popleft()
            if (over := len(self._requests) + requests - self.per_minute) > 0:
                passed = moment - self._requests[over - 1]  # the last one that must be older than a minute
                raise QuotaSpent(self.owner, self.per_minute, max(1, int(_MINUTE - passed + 0.999)))
            self._requests.extend([moment] * requests)


class Access:
    """Finds the Caller of a request. Without keys, everyone may do everything: the server then listens on this machine only."""

    def __init__(self, callers: dict[str, Caller] | None = None) -> None:
        """`callers` by the SHA-256 of their key."""
        self._callers = callers
        self._everyone = Caller()

    @property
    def open(self) -> bool:
        """True if no key is required."""
        return self._callers is None

    def caller(self, header: str | None) -> Caller:
        """The caller of "Authorization: Bearer KEY"; NotAllowed (401) without a key that is known."""
        if self._callers is None:
            return self._everyone
        kind, _, key = (header or "").partition(" ")
        if kind.lower() == "bearer" and key:
            given = hash_key(key.strip())
            for known, caller in self._callers.items():
                if hmac.compare_digest(known, given):
                    return caller
        raise NotAllowed("No valid API key; send it as 'Authorization: Bearer KEY'.", 401)

    def without_keys(self, text: str, header: str | None = None) -> str:
        """The text with *** in place of the key in `header`, and of each word that is a known one: a client may put its key
        into a path."""
        if len(given := (header or "").partition(" ")[2].strip()) >= 8:
            text = text.replace(given, "***")
        known = self._callers or {}
        return _WORD.sub(lambda word: "***" if hash_key(word[0]) in known else word[0], text)


def hash_key(key: str) -> str:
    """The SHA-256 of a key, which is all that is stored."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> Access:
    """The keys in a JSON file {"keys": [{"key" or "sha256", "owner", "adapters", "admin", "requests_per_minute"}]}.

    ConfigError lists everything that is wrong, and shows no key.
    """
    data = read_object(path, expected="an object with a list of keys")
    problems = Problems(f"The keys in {path} cannot be used")
    callers: dict[str, Caller] = {}
    entries = data.get("keys")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f'{path} has no keys; expected {{"keys": [{{"key": "…", "owner": "…", "adapters": ["…"]}}]}}.')
    for number, entry in enumerate(entries, start=1):
        problem = _problem(entry)
        if problem:
            problems.add(f"{path}, key {number}: {problem}")
            continue
        known = str(entry.get("sha256") or hash_key(entry["key"])).lower()
        if known in callers:
            problems.add(f"{path}, key {number}: the same key occurs twice.")
        adapters = entry.get("adapters", [EVERYTHING])
        admin, quota = entry.get("admin", False), entry.get("requests_per_minute")
        callers[known] = Caller(str(entry.get("owner", number)), frozenset(adapters), admin, quota)
    problems.raise_if_any()
    return Access(callers)


def _problem(entry: Any) -> str:
    """What is wrong with one entry of the file, or an empty string."""
    if not isinstance(entry, dict):
        return "it is no object."
    unknown = set(entry) - {"key", "sha256", "owner", "adapters", "admin", "requests_per_minute"}
    if unknown:
        return f"unknown fields {', '.join(sorted(unknown))}."
    key, digest = entry.get("key"), entry.get("sha256")
    if digest is None and not (isinstance(key, str) and _KEY.fullmatch(key)):
        return "it needs a key of at least 8 letters, digits or signs of ASCII without spaces, or the sha256 of one in hex."
    if digest is not None and not (key is None and isinstance(digest, str) and _HASH.fullmatch(digest)):
        return "sha256 must be 64 hex digits, without a key beside it."
    if not isinstance(entry.get("admin", False), bool):
        return "admin must be true or false."
    adapters = entry.get("adapters", [])
    if not isinstance(adapters, list) or not all(isinstance(name, str) for name in adapters):
        return "adapters must be a list of names, or ['*']."
    quota = entry.get("requests_per_minute")
    if quota is not None and (not isinstance(quota, int) or isinstance(quota, bool) or quota < 1):
        return "requests_per_minute must be a whole number of 1 or more."
    return ""

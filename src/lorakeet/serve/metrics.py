"""Counts and times by adapter, in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
MOST_LABELS = 2000  # adapters with a label of their own; all further ones share one
Key = tuple[tuple[str, str], ...]  # labels and their values
Value = TypeVar("Value")
_FAMILIES = {
    "requests": ("counter", "lorakeet_requests_total", "Requests that ended, by adapter and how."),
    "prompt": ("counter", "lorakeet_prompt_tokens_total", "Tokens of prompts, by adapter."),
    "cached": ("counter", "lorakeet_cached_tokens_total", "Tokens of prompts that were in the prefix cache, by adapter."),
    "written": ("counter", "lorakeet_generated_tokens_total", "Tokens written, by adapter."),
    "loads": ("counter", "lorakeet_adapter_loads_total", "Loads of an adapter into memory."),
    "checks": ("counter", "lorakeet_adapter_checks_total", "First loads, by how they compare with the certificate."),
    "first": ("histogram", "lorakeet_time_to_first_token_seconds", "From the request, loads included, to its first token."),
    "token": ("histogram", "lorakeet_time_per_output_token_seconds", "Mean time between a text's tokens, by adapter."),
    "load": ("histogram", "lorakeet_adapter_load_seconds", "How long it took to bring an adapter into memory."),
}


class ServerMetrics:
    """Counters and histograms. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[Key, float]] = {}
        self._times: dict[str, dict[Key, tuple[list[int], float]]] = {}
        self._seen: set[str] = set()

    def add(self, what: str, amount: float = 1.0, **labels: str) -> None:
        """Adds to the counter `what`."""
        with self._lock:
            counts = self._counts.setdefault(what, {})
            key = self._key(labels)
            counts[key] = counts.get(key, 0.0) + amount

    def observe(self, what: str, seconds: float, **labels: str) -> None:
        """Adds a time to the histogram `what`."""
        with self._lock:
            times = self._times.setdefault(what, {})
            key = self._key(labels)
            buckets, total = times.get(key, ([0] * (len(BOUNDS) + 1), 0.0))
            buckets[bisect.bisect_left(BOUNDS, seconds)] += 1
            times[key] = (buckets, total + seconds)

    def _key(self, labels: Mapping[str, str]) -> Key:
        adapter = labels.get("adapter", "")
        if adapter not in self._seen and len(self._seen) >= MOST_LABELS:
            labels = {**labels, "adapter": "(others)"}
        self._seen.add(labels.get("adapter", ""))
        return tuple(sorted(labels.items()))

    def text(self, gauges: Mapping[str, float], seen: Callable[[str], bool] = lambda _: True) -> str:
        """All metrics as a page, without adapters that may not be `seen`; `gauges` are current values by name."""
        lines: list[str] = []
        with self._lock:
            for what, (kind, name, about) in _FAMILIES.items():
                if what in self._counts or what in self._times:
                    lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
                for key, value in _of(self._counts.get(what, {}), seen):
                    lines.append(f"{name}{_labels(key)} {_number(value)}")
                for key, (buckets, total) in _of(self._times.get(what, {}), seen):
                    lines += _histogram(name, key, buckets, total)
        for name, value in gauges.items():
            lines += [f"# TYPE lorakeet_{name} gauge", f"lorakeet_{name} {_number(value)}"]
        return "\n".join(lines) + "\n"


def _of(values: Mapping[Key, Value], seen: Callable[[str], bool]) -> list[tuple[Key, Value]]:
    """The values of visible adapters; of a mix only if all of its adapters are visible."""
    return [(key, value) for key, value in values.items() if all(seen(name) for name in dict(key)["adapter"].split("+"))]


def _number(value: float) -> str:
    """Unrounded: a counter with six digits would not move, and then jump."""
    return str(int(value)) if value == int(value) else repr(value)


def _histogram(name: str, key: Key, buckets: list[int], total: float) -> Iterable[str]:
    reached = 0
    for bound, count in zip((*map(str, BOUNDS), "+Inf"), buckets, strict=True):
        reached += count
        yield f"{name}_bucket{_labels((*key, ('le', bound)))} {reached}"
    yield f"{name}_sum{_labels(key)} {total:.6f}"
    yield f"{name}_count{_labels(key)} {reached}"


def _labels(key: Iterable[tuple[str, str]]) -> str:
    inner = ",".join(f'{name}="{_quoted(value)}"' for name, value in key)
    return f"{{{inner}}}" if inner else ""


def _quoted(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

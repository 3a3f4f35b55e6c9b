"""Streamed completions from a server over loopback, some open at once: what a client sees of them."""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from harness.processes import rotated, summary

WORDS = (
    "after again always anxious back better calm cold day dizzy doctor dose dry evening first food good hard head heart help "
    "hour late light little lost morning mouth never night often pain pill quiet sleep slow small still strong taste tired took"
)
PROMPT = "The patient took the drug for two weeks and wrote the following review of it. "


class Refused(Exception):
    """The server did not generate what was requested."""


@dataclass(frozen=True)
class Law:
    """The models of requests: drawn from `names` uniformly, or by Zipf's law.

    All prompts begin alike, unless they are `fresh`: then no prompt can be gone on from where another one was computed. With
    `words` they are so many words by chance, which share nothing either.
    """

    names: Sequence[str]
    zipf: bool = False
    fresh: bool = False
    words: int = 0
    asking: Callable[[str], dict[str, Any]] = lambda name: {"model": name}

    def prompt(self, luck: float) -> str:
        if self.words:
            return f"({luck:.6f}) {' '.join(random.Random(luck).choices(WORDS.split(), k=self.words))}"
        return f"({luck:.6f}) {PROMPT}" if self.fresh else f"{PROMPT}({luck:.6f})"


@dataclass(frozen=True)
class Load:
    """The load: `streams` requests are open at once, of `requests` in all, each for `tokens` tokens."""

    streams: int
    requests: int
    tokens: int


@dataclass
class Measured:
    """One round of traffic."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)  # seconds to the first token, by request
    each: list[float] = field(default_factory=list)  # mean seconds between tokens, by request
    resident: int = 0  # bytes of the server afterwards

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def rounds_of(url: str, pid: int, laws: Mapping[str, Law], load: Load, rounds: int) -> dict[str, list[Measured]]:
    """`rounds` of each law's traffic, interleaved, so that other work of the machine affects all of them. First a short one of
    each, which is not timed."""
    for law in laws.values():
        traffic(url, law, Load(load.streams, min(load.requests, 2 * load.streams), 4), seed=rounds)  # as none of them has
    found: dict[str, list[Measured]] = {name: [] for name in laws}
    for number in range(rounds):
        for name in rotated(list(laws), number):
            measured = traffic(url, laws[name], load, seed=number)
            measured.resident = resident(pid)
            found[name].append(measured)
    return found


def told(rounds: Sequence[Measured]) -> dict[str, Any]:
    """What several rounds of one law's traffic have in common."""
    first = [seconds for one in rounds for seconds in one.first]
    each = [seconds for one in rounds for seconds in one.each]
    return {
        "tokens_per_second": summary(one.rate for one in rounds).median,
        "of_each_round": [one.rate for one in rounds],
        "ttft_p50": statistics.median(first),
        "ttft_p99": _p99(first),
        "tpot_p50": statistics.median(each),
        "tpot_p99": _p99(each),
        "resident_bytes": rounds[-1].resident,
    }


def line(numbers: Mapping[str, Any]) -> str:
    """The same in one line."""
    return (
        f"{numbers['tokens_per_second']:7.1f} tokens/s, first token {numbers['ttft_p50']:.2f} s (p99 {numbers['ttft_p99']:.2f}), "
        f"then each {1e3 * numbers['tpot_p50']:.0f} ms (p99 {1e3 * numbers['tpot_p99']:.0f}), "
        f"{numbers['resident_bytes'] / 2**20:.0f} MiB"
    )


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def traffic(url: str, law: Law, load: Load, *, seed: int) -> Measured:
    """All requests of `load`; every one begins as one ends. SystemExit that says why where one fails."""
    draw = random.Random(seed)
    weights = [1.0 / (rank + 1) for rank in range(len(law.names))] if law.zipf else None
    models = iter(draw.choices(law.names, weights, k=load.requests))
    found, failed, lock = Measured(), list[str](), threading.Lock()

    def work() -> None:
        with httpx.Client(timeout=600) as client:
            while True:
                with lock:
                    model, luck = next(models, None), draw.random()
                if model is None:
                    return
                asked = {**law.asking(model), "prompt": law.prompt(luck), "max_tokens": load.tokens}
                try:
                    count, first, each = _stream(client, url, asked)
                except (httpx.HTTPError, Refused) as error:
                    failed.append(f"{asked}: {type(error).__name__}: {error}")
                    return
                with lock:
                    found.tokens += count
                    found.first.append(first)
                    found.each.append(each)

    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(load.streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.seconds = time.perf_counter() - began
    if len(found.first) != load.requests:
        missing = f"{load.requests - len(found.first)} of {load.requests} requests were not served:"
        raise SystemExit("\n".join([missing, *failed[:4]]))
    return found


def _stream(client: httpx.Client, url: str, asked: dict[str, Any]) -> tuple[int, float, float]:
    """(tokens, seconds to the first, mean seconds between) of one streamed completion."""
    body = {**asked, "temperature": 0, "stream": True, "n": 1, "stream_options": {"include_usage": True}}
    began, times, written = time.perf_counter(), [], 0
    request = client.build_request("POST", f"{url}/v1/completions", json=body)
    try:
        answer = client.send(request, stream=True)
    except httpx.RemoteProtocolError:  # a kept connection that the server has just closed: asked again, once
        answer = client.send(request, stream=True)
    try:
        if answer.status_code != 200:
            raise Refused(f"{answer.status_code} {answer.read().decode()}")
        for text in answer.iter_lines():
            if text.startswith("data: {"):
                times.append(time.perf_counter())
                written = (json.loads(text[6:]).get("usage") or {}).get("completion_tokens", written)
    finally:
        answer.close()
    if not written:
        raise Refused("no token was written")
    return written, times[0] - began, (times[-1] - times[0]) / max(1, written - 1)


def resident(pid: int) -> int:
    """Bytes of memory that a process holds, where the system says so."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(text.split()[1]) * 1024 for text in lines if text.startswith("VmRSS")), 0)

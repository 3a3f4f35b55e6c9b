"""llama.cpp's own server over a GGUF file, for as long as a block runs; what Ollama starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness.processes import BENCHMARKS


@contextmanager
def llama_server(
    model: Path, adapters: Sequence[Path] = (), *, slots: int = 1, context: int = 512, scale: float = 0.0
) -> Iterator[tuple[str, int]]:
    """The server with these GGUF adapters, each applied at `scale` unless a request asks otherwise: its address and process id.

    `context` tokens for each of `slots` texts. SystemExit where it does not start.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = {
        "model": str(model), "adapters": [str(path) for path in adapters], "scale": scale,
        "slots": slots, "context": context, "threads": threads,
    }  # fmt: skip
    command = [sys.executable, "-m", "contenders.llama_server", json.dumps(given)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=BENCHMARKS
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        line = next((line for line in process.stdout if line.startswith("listening ")), "")
        if not line:
            raise SystemExit("llama.cpp's server did not start; is xllamacpp installed?")
        try:
            yield line.split()[1], process.pid
        finally:
            process.stdin.close()
            process.terminate()

"""llama.cpp's own server (package xllamacpp) in a process of its own: python -m contenders.llama_server '{"model": …}'.

Prints "listening URL" and serves until its standard input ends. The wheels on PyPI are built without AVX-512; for llama.cpp's
best speed build xllamacpp from source.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    import xllamacpp

    given = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = given["model"]
    params.n_parallel = given["slots"]
    params.n_ctx = given["slots"] * given["context"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given["threads"]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, given["scale"]) for path in given["adapters"]]
    server = xllamacpp.Server(params)
    print(f"listening {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

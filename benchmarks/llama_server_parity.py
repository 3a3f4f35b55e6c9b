"""Claim: llama.cpp's own server answers for an exported model as the live adapter does, as closely as its bits allow.

    python benchmarks/llama_server_parity.py RUN [--rows 16]

RUN is a finished run. Its merged model in f16 and q8_0, and its LoRA GGUF over the base in f16, are served by llama.cpp's server
(pip install xllamacpp), which Ollama starts, and queried as `lorakeet verify --against URL` does: prompt ids, the ten most likely
tokens at eight positions of each held-out row, greedy texts and answers, within the tolerances of the precision. No timings: a
busy machine does not change them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.llama_server import llama_server
from harness.machine import origin, write_result
from rich.console import Console

from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.values import encode
from lorakeet.exporting.gguf_model import write_gguf
from lorakeet.formats import gguf
from lorakeet.formats.files.base_model import open_base
from lorakeet.models.files.source import find_source
from lorakeet.models.text.load import load_tokenizer
from lorakeet.runs.open_adapter import Opened, open_adapter
from lorakeet.verbs.options import VerifyOptions
from lorakeet.verbs.verify import certify_artefacts

CONTEXT = 1024
WAYS = (("f16 merged", "f16", "float16"), ("q8_0 merged", "q8_0", "8-bit"), ("f16 base + adapter", "f16", "float16"))


def written(opened: Opened, folder: Path, console: Console) -> Iterator[tuple[str, str, Path, list[Path]]]:
    """Name, precision, model and adapters of each way; the files of one are removed before the next is made."""
    source = find_source(opened.config.model, console.print)
    tokenizer = load_tokenizer(opened.tokenizer or source)
    for name, quant, precision in WAYS:
        merged = name.endswith("merged")
        model, lora = folder / "model.gguf", folder / "adapter.gguf"
        write_gguf(source, opened.adapter if merged else None, model, tokenizer=tokenizer, quant=quant, facts={})
        if not merged:
            gguf.write(opened.adapter, lora, base=open_base(source))
        yield name, precision, model, [] if merged else [lora]
        model.unlink()


def measure(opened: Opened, rows: int, folder: Path, console: Console) -> dict[str, Certificate]:
    """The certificate of each way."""
    found = {}
    for name, precision, model, adapters in written(opened, folder, console):
        with llama_server(model, adapters, context=CONTEXT, scale=1.0) as (url, _):
            options = VerifyOptions(name, against=(url,), precision=precision, rows=rows)
            asked = certify_artefacts(opened, options, console)
        checks = tuple(replace(check, name=check.name.replace(url, name), right=name, against="") for check in asked.checks)
        found[name] = Certificate(f"llama.cpp's server of {name}", checks)
        for check in checks:
            told = ", ".join(f"{key} {value:.3g} of {check.tolerance[key]:g}" for key, value in check.measured.items())
            print(f"{check.name}: {told}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--rows", type=int, default=16, help="held-out rows that are compared")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about, console, opened = origin(), Console(), open_adapter(given.run)
    with TemporaryDirectory() as name:
        found = measure(opened, given.rows, Path(name), console)
    kept = all(certificate.passed for certificate in found.values())
    print(f"Every server within the tolerances of its bits: {'yes' if kept else 'NO'}")
    checks = {name: encode(one.checks) for name, one in found.items()}
    content: dict[str, Any] = {"rows": given.rows, "checks": checks, "kept": kept}
    print(f"Written: {write_result('llama_server_parity', content, seed=0, about=about, folder=given.results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

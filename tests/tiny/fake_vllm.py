"""A program that stands for `python -m vllm…`: it ends at once, or answers as vLLM describes its API once it was polled twice."""

from __future__ import annotations

import json
import os
import sys
from http.server import ThreadingHTTPServer
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def fake_python(folder: Path, behaviour: str, file: Path | None = None, tokenizer: Path | None = None) -> Path:
    """A program to name in LORAKEET_VLLM_PYTHON: "dies", or "serves" the GGUF model `file`; it writes its words to words.json."""
    program = folder / "python"
    given = json.dumps({"behaviour": behaviour, "file": str(file), "tokenizer": str(tokenizer), "folder": str(folder)})
    paths = f"{TESTS}:{TESTS.parent / 'src'}"
    program.write_text(f"#!/bin/sh\nPYTHONPATH='{paths}' exec '{sys.executable}' -m tiny.fake_vllm '{given}' \"$@\"\n")
    program.chmod(0o755)
    return program


def main() -> int:
    given, words = json.loads(sys.argv[1]), sys.argv[2:]
    kept = {name: os.environ.get(name) for name in ("VLLM_ALLOW_RUNTIME_LORA_UPDATING",)}
    Path(given["folder"], "words.json").write_text(json.dumps({"words": words, "environment": kept, "pid": os.getpid()}))
    if given["behaviour"] == "dies":
        print("no engine for this machine", file=sys.stderr)
        return 7
    from lorakeet.exporting.llama_cpp import LlamaCpp
    from lorakeet.models.text.load import load_tokenizer
    from tiny.servers import Fake

    class Polled(Fake):
        kind, polls = "vLLM", 0
        engine, tokenizer = LlamaCpp(Path(given["file"]), context=512), load_tokenizer(Path(given["tokenizer"]))

        def do_GET(self) -> None:
            if self.path == "/health":
                Polled.polls += 1
                self.send_response(200 if Polled.polls > 2 else 503)
                self.end_headers()
                return
            super().do_GET()

    port = int(words[words.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Polled).serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

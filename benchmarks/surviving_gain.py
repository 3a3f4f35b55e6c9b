"""Claim: of what an adapter gained on the test rows, 95 % and more survive a merge into a model that stays quantised.

    python benchmarks/surviving_gain.py RUN [--layouts gptq nf4 q4_0 q4_k_m] [--finish-steps 300] [--work DIR]

RUN is a finished run on an unquantised base. The base is quantised once for each layout (GPTQ in groups of 64 on training rows;
GGUF by llama.cpp), and `lorakeet merge --into packed` puts the adapter into it: rounded to the nearest, by error feedback, and
with a finish. Each share has its interval. Calibration and finish see training rows only. With --work an interrupted run
resumes. Shares are no timings: a busy machine does not change them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.machine import origin, write_result
from rich.console import Console

from lorakeet.data.prepare import load_dataset
from lorakeet.evaluate.values import encode
from lorakeet.exporting.gguf_model import DIRECT, write_gguf
from lorakeet.exporting.llama_cpp import is_installed, quantise
from lorakeet.models.files.source import find_source
from lorakeet.models.text.load import load_tokenizer
from lorakeet.runs.open_adapter import Opened, open_adapter
from lorakeet.verbs.merge import merge
from lorakeet.verbs.options import MergeOptions, QuantizeOptions
from lorakeet.verbs.packing.merge import FEEDBACK, NEAREST, WRITTEN
from lorakeet.verbs.quantize import quantize

LAYOUTS = ("gptq", "nf4", "q4_0", "q4_k_m")
ASKED = 0.95
CALIBRATION_ROWS = 128


def target(opened: Opened, layout: str, work: Path, console: Console) -> Path:
    """The base in that layout; made if `work` has none."""
    source = find_source(opened.config.model, console.print)
    path = work / (layout if layout in ("gptq", "nf4") else f"{layout}.gguf")
    if path.exists():
        return path
    if layout in ("gptq", "nf4"):
        rows = load_dataset(opened.config.data).train[:CALIBRATION_ROWS]
        texts = work / "texts.jsonl"
        texts.write_text("".join(json.dumps({"text": max((t.free_text for t in row.turns), key=len)}) + "\n" for row in rows))
        how: Any = {"calibration": str(texts), "group_size": 64} if layout == "gptq" else {}
        quantize(QuantizeOptions(str(source), method=layout, out=path, **how), console=console)  # type: ignore[arg-type]
        return path
    if not is_installed() and layout not in DIRECT:
        raise SystemExit(f"{layout} needs llama.cpp's quantiser: pip install 'lorakeet[llama]'")
    wide = work / "wide.gguf"
    direct = layout in DIRECT
    made = path if direct else wide
    write_gguf(source, None, made, tokenizer=load_tokenizer(source), quant=layout if direct else "f16", facts={})
    if not direct:
        quantise(wide, path, layout)
        wide.unlink()
    return path


def measure(opened: Opened, run: Path, layout: str, given: argparse.Namespace, work: Path, console: Console) -> dict[str, Any]:
    """What survives in that layout, each way, and what the certificate says."""
    like = target(opened, layout, work, console)
    with TemporaryDirectory(dir=work) as name:
        out = Path(name) / ("out.gguf" if like.suffix == ".gguf" else "out")
        merged = merge(
            MergeOptions(
                (str(run),),
                out=out,
                into="packed",
                like=str(like),
                calibration_rows=given.calibration_rows,
                finish_steps=given.finish_steps,
                keep=1e-9,
            ),
            console=console,
        )
    shares = {way: encode(share) for way, share in merged.surviving.items()}
    found = merged.certificate
    return {"surviving_share": shares, "passed": found.passed, "checks": encode(found.checks), "facts": found.facts}


def part(note: Path, name: str, make: Callable[[], Any]) -> Any:
    """What `note` has under that name, else what `make` gives, noted."""
    found = json.loads(note.read_text()) if note.is_file() else {}
    if name not in found:
        found[name] = make()
        note.write_text(json.dumps(found))
    return found[name]


def shown(share: Mapping[str, float]) -> str:
    return f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"


def parser_for(claim: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark of survival takes."""
    parser = argparse.ArgumentParser(description=claim)
    parser.add_argument("run", type=Path, help="a finished run on an unquantised base")
    parser.add_argument("--calibration-rows", type=int, default=192)
    parser.add_argument("--work", type=Path, help="a folder that keeps what is done, so that a broken off run goes on")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_for((__doc__ or "").splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--finish-steps", type=int, default=300)
    given = parser.parse_args(arguments)
    about, console, opened = origin(), Console(), open_adapter(given.run)
    with TemporaryDirectory() as name:
        work = given.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        settings = f"{given.calibration_rows} rows, {given.finish_steps} steps"
        found = {
            layout: part(
                work / "found.json",
                f"{layout}, {settings}",
                lambda layout=layout: measure(opened, given.run, layout, given, work, console),
            )
            for layout in given.layouts
        }
    print(f"{'layout':8} {'nearest':>26} {'error feedback':>26} {'written':>26}")
    for layout, values in found.items():
        shares = values["surviving_share"]
        print(f"{layout:8} " + " ".join(f"{shown(shares[way]):>26}" for way in (NEAREST, FEEDBACK, WRITTEN)))
    kept = all(values["surviving_share"][WRITTEN]["value"] >= ASKED for values in found.values())
    print(f"at least {ASKED:.0%} of the gain survives in every layout: {'yes' if kept else 'NO'}")
    settings_used = {"calibration_rows": given.calibration_rows, "finish_steps": given.finish_steps}
    content = {"layouts": found, "claim_kept": kept, **settings_used}
    name = "_".join(("surviving_gain", *given.layouts))
    print(f"Written: {write_result(name, content, seed=0, about=about, folder=given.results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

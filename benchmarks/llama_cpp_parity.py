"""Claim: what is exported computes in llama.cpp what the live adapter computes in torch, as closely as its bits allow.

    python benchmarks/llama_cpp_parity.py RUN [--quants f16 q8_0 q4_k_m] [--rows 32]

RUN is a finished run. It is exported by `lorakeet export` in each quant, and its adapter by `lorakeet convert --to gguf` beside a
GGUF file of the base alone. Each runs in llama.cpp on the same held-out rows as the live adapter in fp32: ids of texts, KL
and top-1 agreement a token, the largest difference of a logit (as a share of the largest logit), the task's answers, greedy texts
and every stored weight, within the tolerances of `lorakeet verify`. No timings: a busy machine does not change them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.machine import origin, write_result
from rich.console import Console

from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.values import encode
from lorakeet.exporting.gguf_model import write_gguf
from lorakeet.models.files.source import find_source
from lorakeet.models.text.load import load_tokenizer
from lorakeet.runs.open_adapter import Opened, open_adapter
from lorakeet.verbs.convert import convert
from lorakeet.verbs.export import export
from lorakeet.verbs.options import ConvertOptions, ExportOptions, VerifyOptions
from lorakeet.verbs.verify import certify_artefacts

QUANTS = ("f16", "q8_0", "q4_k_m")
LORA, BASE = "adapter.gguf", "base-f16.gguf"


def written(run: Path, opened: Opened, quants: Sequence[str], folder: Path, console: Console) -> list[str]:
    """The exported files and the adapter's, in `folder`; the base's lies beside them."""
    source = find_source(opened.config.model, console.print)
    for quant in quants:
        export(ExportOptions(str(run), out=folder / f"{quant}.gguf", quant=quant), console=console)
    write_gguf(source, None, folder / BASE, tokenizer=load_tokenizer(opened.tokenizer or source), quant="f16", facts={})
    convert(ConvertOptions(run, folder / LORA, to="gguf", base=source), console=console)
    return [str(folder / name) for name in (*(f"{quant}.gguf" for quant in quants), LORA)]


def table(certificate: Certificate, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The numbers of each file by name, from the certificate's checks."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        own = {check.name.rpartition(": ")[2]: check for check in certificate.checks if check.name.startswith(f"{name}:")}
        numbers = {key: value for check in own.values() for key, value in check.measured.items()}
        estimates = {key: encode(value) for check in own.values() for key, value in check.estimates.items()}
        found[name] = {
            "measured": numbers,
            "estimates": estimates,
            "tokens": own["logits"].n,
            "passed": all(check.passed for check in own.values()),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--quants", nargs="+", default=QUANTS)
    parser.add_argument("--rows", type=int, default=32, help="held-out rows that go through both sides")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about, console, opened = origin(), Console(), open_adapter(given.run)
    with TemporaryDirectory() as name:
        folder = Path(name)
        targets = written(given.run, opened, given.quants, folder, console)
        options = VerifyOptions(given.run.name, against=tuple(targets), base_gguf=folder / BASE, rows=given.rows)
        certificate = certify_artefacts(opened, options, console)
    names = [f"{BASE} + {LORA}" if Path(target).name == LORA else Path(target).name for target in targets]
    files = table(certificate, names)
    print(f"{'file':32} {'mean KL':>10} {'top-1':>7} {'logit':>8} {'accuracy live, there':>21}")
    for file, values in files.items():
        numbers, estimates = values["measured"], values["estimates"]
        sides = [estimates[key]["value"] for key in ("accuracy_live", "accuracy_there") if key in estimates]
        accuracies = ", ".join(f"{value:.3f}" for value in sides)
        print(
            f"{file:32} {numbers['mean_kl']:>10.2g} {numbers['top1_agreement']:>7.4f} {numbers['logit']:>8.2g} "
            f"{accuracies:>21}  {'pass' if values['passed'] else 'FAIL'}"
        )
    print(f"Every file within the tolerances of its bits: {'yes' if certificate.passed else 'NO'}")
    content = {"rows": given.rows, "files": files, "checks": encode(certificate), "kept": certificate.passed}
    print(f"Written: {write_result('llama_cpp_parity', content, seed=0, about=about, folder=given.results)}")
    return 0 if certificate.passed else 1


if __name__ == "__main__":
    sys.exit(main())

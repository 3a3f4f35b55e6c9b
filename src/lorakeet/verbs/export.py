"""`lorakeet export`: the trained model as a GGUF file, or as a folder for Ollama, certified in llama.cpp, with its model card."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.errors import ConfigError, EnvironmentProblem, PackageMissing
from lorakeet.evaluate.certificate import CERTIFICATE, Certificate, read_certificate
from lorakeet.evaluate.report.report import read_report
from lorakeet.evaluate.values import encode
from lorakeet.exporting import ollama
from lorakeet.exporting.card import card_of_export
from lorakeet.exporting.gguf_model import DIGEST, DIRECT, NAME, GgufModel, write_gguf
from lorakeet.exporting.llama_cpp import ModelRefused, is_installed
from lorakeet.exporting.ollama import push, require_address
from lorakeet.exporting.runtime_support import REFUSES_ADAPTERS, require_separable
from lorakeet.formats import gguf
from lorakeet.formats.files.base_model import open_base
from lorakeet.formats.files.digest import sha256_of
from lorakeet.formats.files.safetensors_file import save_text
from lorakeet.formats.identity import with_note
from lorakeet.kinds.terminal import progress_line, show_certificate
from lorakeet.models.files.source import find_source
from lorakeet.models.text.load import load_tokenizer
from lorakeet.planning.check import export_sizes, fit_check, size_of_check
from lorakeet.runs.certified import certified_whole, of_model, require_certified_model
from lorakeet.runs.open_adapter import Opened, open_by_options
from lorakeet.runs.output_paths import require_absent, require_place
from lorakeet.runs.residency import peak_said, temporary_stores
from lorakeet.verbs.early.pushing_options import beside
from lorakeet.verbs.options import ExportOptions
from lorakeet.verification.certify import HowCompared, certify_artefacts
from lorakeet.verification.checks import named_check

README = "README.md"
CHECK_ROWS = 8


@dataclass(frozen=True)
class Exported:
    """What was written, and what llama.cpp said of it (None where llama.cpp is not installed)."""

    out: Path
    model: GgufModel
    certificate: Certificate | None

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "out": str(self.out),
            "bytes": self.model.bytes,
            "types": dict(self.model.types),
            "notes": list(self.model.notes),
            "passed": None if self.certificate is None else self.certificate.passed,
            "certificate": None if self.certificate is None else encode(self.certificate),
        }


@dataclass(frozen=True)
class _Job:
    """What all steps of one export need."""

    opened: Opened
    source: Path
    tokenizer: Any
    options: ExportOptions
    console: Console

    @property
    def name(self) -> str:
        """The model's name: the given one, or that of the run folder or adapter folder."""
        return self.options.name or (self.opened.run.path.name if self.opened.run else self.opened.folder.name)

    def for_ollama(self) -> ollama.OllamaModel:
        system, apart = self.opened.config.data.system or "", self.options.separate
        return ollama.describe_template(self.tokenizer, system=system, adapter=apart, say=self.console.print)


def export(options: ExportOptions, *, console: Console) -> Exported:
    """Writes the merged model to `out`, checks it in llama.cpp against the live adapter, and writes model card and certificate.

    to: gguf (a file) or ollama (a folder with its Modelfile); `separate` keeps base and adapter in two files, for ollama.
    The check keeps `memory`, or else the run's memory.budget, if need be by streaming; where it cannot, nothing is written
    (ConfigError). The pages of the file that llama.cpp maps are not counted.
    `push` with an `out` that holds this export already, checked, gives it to Ollama as it is.
    Raises VerificationFailed (exit code 3) where the check fails, or llama.cpp refuses the file; what was written stays, with a
    certificate that says so.
    """
    out = options.out
    written = options.push and (out / ollama.MODELFILE).is_file()
    _check(options, written)
    opened = open_by_options(options.run_or_adapter, options, console)
    source = find_source(opened.config.model, console.print)
    if is_installed() and not written:
        peak, disk = export_sizes(source, opened.adapter, options.quant)
        what = "the check of an export"
        size = partial(size_of_check, opened, [str(out)], source, what, rows=CHECK_ROWS, memory=peak, disk=disk)
        opened = fit_check(opened, size, out, console)
    job = _Job(opened, source, load_tokenizer(opened.tokenizer or source), options, console)
    with peak_said(opened.residency, console, mapped=is_installed()):
        found = _written_before(job) if written else _written(job)
    if options.push:
        _push(job, found)
    return found


def _check(options: ExportOptions, written: bool) -> None:
    """Raises ConfigError for options that contradict each other, and for an `out` that cannot be written."""
    out, quant = options.out, options.quant
    if not written:
        require_absent(out)
    if options.separate and options.to != "ollama":
        raise ConfigError("--separate is for --to ollama; the adapter alone as a GGUF file: lorakeet convert … --to gguf.")
    if options.push:
        if options.to != "ollama":
            raise ConfigError("--push gives a model to Ollama; it needs --to ollama.")
        require_address(options.host)
    if quant not in DIRECT and not is_installed():
        raise PackageMissing(f"--quant {quant} needs llama.cpp's quantiser; {', '.join(DIRECT)} need none", "lorakeet[llama]")
    require_place(out)


def _written(job: _Job) -> Exported:
    """Writes the model, then its certificate and model card."""
    console, out, run, config = job.console, job.options.out, job.opened.run, job.opened.config
    if config.model.quantize.method != "none":
        console.print("The adapter was trained on a quantised base; it is folded into the dense weights that were quantised.")
    with certified_whole(out, "The export") as made:
        written = _write_model(job, made, with_adapter=True) if job.options.to == "gguf" else _to_ollama(job, made)
        for note in written.notes:
            console.print(note, soft_wrap=True)
        console.print(f"Wrote {written.bytes:,} bytes (tensors: {written.words}) to {out}", soft_wrap=True)
        certificate = _certify(job, made)
        # Beside a file they come first: it never stands without its own certificate, nor with another one's.
        place = (made / CERTIFICATE, made / README) if made.is_dir() else (beside(out, CERTIFICATE), beside(out, README))
        if certificate is None:
            place[0].unlink(missing_ok=True)
        else:
            certificate.write(place[0])
        report = read_report(run.report) if run is not None and run.report.exists() else None
        about, rows = (written, made, job.name), config.data.train if run else None
        text = card_of_export(*about, source=job.source, base=config.model, rows=rows, said=(report, certificate))
        save_text(place[1], text)
    written = dataclasses.replace(written, path=out / written.path.relative_to(made))
    if certificate is not None:
        certificate.raise_if_failed()
    return Exported(out, written, certificate)


def _written_before(job: _Job) -> Exported:
    """The export that an earlier command left in the folder `out` with its certificate.

    ConfigError unless it is of this adapter and these settings and has all its files; VerificationFailed where its check failed.
    """
    out, expected = job.options.out, _identity(job)
    found = read_certificate(out / CERTIFICATE) if (out / CERTIFICATE).exists() else None
    files = [out / ollama.MODEL, *([out / ollama.ADAPTER] if job.options.separate else [])]
    missing = not all(file.is_file() for file in files)
    if found is None or missing or {key: found.facts.get(key) for key in expected} != expected:
        said = "; ".join(f"{key}: {value}" for key, value in expected.items())
        raise ConfigError(
            f"{out} exists already and is never overwritten; --push sends a folder again only where it holds a checked export "
            f"of this adapter with these settings ({said}). Choose another --out or remove that one."
        )
    found.raise_if_failed()
    require_certified_model(out, found, uncertified=job.options.uncertified, say=job.console.print)
    job.console.print(f"{out} holds this export already, and its check passed: it is sent as it is.", soft_wrap=True)
    return Exported(out, GgufModel.of(files[0]), found)


def _push(job: _Job, exported: Exported) -> None:
    """Gives the folder to Ollama; EnvironmentProblem says how to go on where that fails."""
    folder, model = exported.out, job.for_ollama()
    with progress_line(job.console, "sending") as step:
        try:
            push(
                folder, model, job.name, host=job.options.host, say=job.console.print,
                on_progress=lambda file, sent, total: step(sent, total, file),
            )  # fmt: skip
        except EnvironmentProblem as error:
            checked = "The same command sends it again without writing it anew; or by hand"
            again = "By hand" if exported.certificate is None else checked
            by_hand = f"cd {shlex.quote(str(folder))} && ollama create {shlex.quote(job.name)} -f {ollama.MODELFILE}"
            raise EnvironmentProblem(f"{error} {folder} is complete. {again}: {by_hand}") from error


def _to_ollama(job: _Job, out: Path) -> GgufModel:
    """The new folder `out`: the Modelfile beside the GGUF files."""
    if job.options.separate:
        require_separable(job.opened.adapter)
        job.console.print(REFUSES_ADAPTERS, soft_wrap=True)
    model = job.for_ollama()
    out.mkdir()
    if model.adapter:
        gguf.write(job.opened.adapter, out / model.adapter, base=open_base(job.source))
    written = _write_model(job, out / model.model, with_adapter=not job.options.separate)
    save_text(out / ollama.MODELFILE, model.modelfile())
    return written


def _write_model(job: _Job, out: Path, *, with_adapter: bool) -> GgufModel:
    """The GGUF model at `out`."""
    adapter = job.opened.adapter if with_adapter else None
    facts = {NAME: job.name, "lorakeet.base": job.opened.config.model.path}
    facts |= {DIGEST: _digest(job.opened)} if with_adapter else {}
    with progress_line(job.console, "writing") as step:
        quant = job.options.quant
        return write_gguf(job.source, adapter, out, tokenizer=job.tokenizer, quant=quant, facts=facts, on_progress=step)


def _digest(opened: Opened) -> str:
    """SHA-256 of the adapter's weights on disk, by which a stale export is known."""
    return sha256_of(*sorted(opened.folder.glob("*.safetensors")))


def _identity(job: _Job) -> dict[str, str]:
    """The facts in a certificate by which an export is known again."""
    form = "base and adapter apart" if job.options.separate else "one model"
    known = {"adapter SHA-256": _digest(job.opened), "base": job.opened.config.model.path}
    return known | {"quantisation": job.options.quant, "form": form}


def _certify(job: _Job, out: Path) -> Certificate | None:
    """The artefact in llama.cpp against the live adapter; None, said once, where llama.cpp is not installed."""
    if not is_installed():
        said = "Not checked: llama.cpp is not installed here. pip install 'lorakeet[llama]', then:"
        run, written = (shlex.quote(str(path)) for path in (job.options.run_or_adapter, job.options.out))
        job.console.print(f"{said} lorakeet verify {run} --against {written}", soft_wrap=True)
        return None
    try:
        with temporary_stores(job.opened.residency):
            how, of = HowCompared(CHECK_ROWS), job.options.run_or_adapter
            found = certify_artefacts(job.opened, [str(out)], how, job.console, of=of)
    except ModelRefused as error:
        names = ("live adapter", out.name)
        said = str(error).replace(str(out), out.name)
        check = named_check("loads in llama.cpp", names, {"refusals": 1.0}, {"refusals": 0.0}, n=1, detail=said)
        found = Certificate(f"What became of {job.options.run_or_adapter}", (check,))
    found = of_model(dataclasses.replace(found, facts={**found.facts, **_identity(job)}), out)
    found = with_note(found, job.opened.note)
    show_certificate(found, job.console)
    return found

"""`lorakeet export`: the trained model as a GGUF file, or as a folder for Ollama, certified in llama.cpp, with its model card."""

from __future__ import annotations

import dataclasses
import math
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.disk import written_whole
from lorakeet.errors import ConfigError, EnvironmentProblem, PackageMissing
from lorakeet.evaluate.certificate import CERTIFICATE, Certificate, read_certificate
from lorakeet.evaluate.report.report import Report, read_report
from lorakeet.evaluate.values import encode
from lorakeet.exporting import ollama
from lorakeet.exporting.card import CardFacts, card, licence_of
from lorakeet.exporting.gguf_model import DIGEST, DIRECT, NAME, GgufModel, GgufTensors, write_gguf
from lorakeet.exporting.llama_cpp import ModelRefused, is_installed, quantise
from lorakeet.exporting.ollama import push, require_address
from lorakeet.exporting.runtime_support import features_of_adapter, limits_of
from lorakeet.formats import gguf
from lorakeet.formats.files.base_model import open_base
from lorakeet.formats.files.digest import sha256_of
from lorakeet.formats.files.gguf_file import GgufFile
from lorakeet.formats.files.safetensors_file import open_safetensors, save_text
from lorakeet.formats.identity import accept_content, content_differences, with_note
from lorakeet.kinds.terminal import progress_line, show_certificate
from lorakeet.models.files.origin import base_form
from lorakeet.models.files.source import find_source
from lorakeet.models.text.load import load_tokenizer
from lorakeet.planning.check import FP32, fit_check, size_of_check, tensor_peak
from lorakeet.runs.certified import certified_whole, model_identity, of_model
from lorakeet.runs.open_adapter import Opened, open_adapter
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


_REFUSES_ADAPTERS = (
    "Ollama from 0.34.1 refuses a Modelfile with ADAPTER, so a folder of --separate is for older versions and for llama.cpp. "
    "For a newer Ollama leave out --separate: the adapter is then merged into the model."
)


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
    opened = open_adapter(
        Path(options.run_or_adapter), base=options.base, uncertified=options.uncertified, say=console.print
    ).within(options.memory)
    source = find_source(opened.config.model, console.print)
    if is_installed() and not written:
        peak, disk = _taken(source, opened, options.quant)
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
    if options.push and options.to != "ollama":
        raise ConfigError("--push gives a model to Ollama; it needs --to ollama.")
    if options.push:
        require_address(options.host)
    if quant not in DIRECT and not is_installed():
        direct = ", ".join(DIRECT)
        raise PackageMissing(f"--quant {quant} needs llama.cpp's quantiser; {direct} need none", "lorakeet[llama]")
    require_place(out)


def _written(job: _Job) -> Exported:
    """Writes the model, then its certificate and model card."""
    console, out = job.console, job.options.out
    if job.opened.config.model.quantize.method != "none":
        console.print("The adapter was trained on a quantised base; it is folded into the dense weights that were quantised.")
    with certified_whole(out, "The export") as made:
        written = _write_model(job, made, with_adapter=True) if job.options.to == "gguf" else _to_ollama(job, made)
        for note in written.notes:
            console.print(note, soft_wrap=True)
        console.print(f"Wrote {written.bytes:,} bytes (tensors: {_types(written)}) to {out}", soft_wrap=True)
        certificate = _certify(job, made)
        # Beside a file they come first: it never stands without its own certificate, nor with another one's.
        place = (made / CERTIFICATE, made / README) if made.is_dir() else (beside(out, CERTIFICATE), beside(out, README))
        if certificate is None:
            place[0].unlink(missing_ok=True)
        else:
            certificate.write(place[0])
        _write_readme(job, made, written, certificate, place[1])
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
    apart = content_differences(found.identity, model_identity(out)) if found.identity else []
    accept_content(str(out), apart, uncertified=job.options.uncertified, say=job.console.print)
    job.console.print(f"{out} holds this export already, and its check passed: it is sent as it is.", soft_wrap=True)
    return Exported(out, GgufModel(files[0], files[0].stat().st_size, dict(GgufFile(files[0]).tensor_types), ()), found)


def _push(job: _Job, exported: Exported) -> None:
    """Gives the folder to Ollama; EnvironmentProblem says how to go on where that fails."""
    folder, model = exported.out, _ollama_model(job)
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
        _require_separable(job.opened)
        job.console.print(_REFUSES_ADAPTERS, soft_wrap=True)
    model = _ollama_model(job)
    out.mkdir()
    if model.adapter:
        gguf.write(job.opened.adapter, out / model.adapter, base=open_base(job.source))
    written = _write_model(job, out / model.model, with_adapter=not job.options.separate)
    save_text(out / ollama.MODELFILE, model.modelfile())
    return written


def _require_separable(opened: Opened) -> None:
    """ConfigError where the adapter has what a GGUF adapter beside its base cannot hold."""
    limits = limits_of("ollama", features_of_adapter(opened.adapter, tied=False))
    if refused := [f"{limit.feature} ({limit.what})" for limit in limits if limit.effect == "refused"]:
        raise ConfigError(
            f"--separate: this adapter cannot stay in a file of its own for Ollama: {'; '.join(refused)}. Leave out --separate: "
            "the merged model holds all of it."
        )


def _ollama_model(job: _Job) -> ollama.OllamaModel:
    system = job.opened.config.data.system or ""
    return ollama.describe_template(job.tokenizer, system=system, adapter=job.options.separate, say=job.console.print)


def _write_model(job: _Job, out: Path, *, with_adapter: bool) -> GgufModel:
    """The GGUF model at `out`; types that gguf cannot write are made by llama.cpp from a wide file, which is then removed."""
    adapter = job.opened.adapter if with_adapter else None
    facts = {NAME: job.name, "lorakeet.base": job.opened.config.model.path}
    if with_adapter:
        facts[DIGEST] = _digest(job.opened)
    with progress_line(job.console, "writing") as step:
        write = partial(write_gguf, job.source, adapter, tokenizer=job.tokenizer, facts=facts, on_progress=step)
        quant = job.options.quant
        if quant in DIRECT:
            return write(out, quant=quant)
        with written_whole(out) as made:
            wide = made.with_name(f"{out.name}.wide")
            kept = write(wide, quant=_wide(job.source))
            quantise(wide, made, quant)
    return GgufModel(out, out.stat().st_size, dict(GgufFile(out).tensor_types), kept.notes)


def _wide(source: Path) -> str:
    """The type that loses nothing of the stored base: f32, or bf16 where all matrices are bf16."""
    kinds = {
        str(stored.dtype)
        for file in source.glob("*.safetensors")
        for stored in open_safetensors(file).tensors.values()
        if len(stored.shape) > 1
    }
    return "bf16" if kinds == {"torch.bfloat16"} else "f32"


def _taken(source: Path, opened: Opened, quant: str) -> tuple[int, int]:
    """Bytes of memory while the file is written, a tensor at a time, and about those of the file and of a wide one beside it."""
    folded = GgufTensors(source, opened.adapter)
    sizes = {name: math.prod(folded.shape(name)) for name in folded.names}
    changed = max((folded.whole(name) for name in folded.names), default=0)
    wide = FP32 if quant == "f32" or (quant not in DIRECT and _wide(source) == "f32") else FP32 // 2
    numbers = sum(sizes.values())
    return tensor_peak(FP32 * changed, max(sizes.values())), numbers * (wide + (0 if quant in DIRECT else 1))


def _types(written: GgufModel) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(written.types.items(), key=lambda item: -item[1]))


def _digest(opened: Opened) -> str:
    """SHA-256 of the adapter's weights on disk, by which a stale export is known."""
    return sha256_of(*sorted(opened.folder.glob("*.safetensors")))


def _identity(job: _Job) -> dict[str, str]:
    """The facts in a certificate by which an export is known again."""
    form = "base and adapter apart" if job.options.separate else "one model"
    return {
        "adapter SHA-256": _digest(job.opened),
        "base": job.opened.config.model.path,
        "quantisation": job.options.quant,
        "form": form,
    }


def _certify(job: _Job, out: Path) -> Certificate | None:
    """The artefact in llama.cpp against the live adapter; None, said once, where llama.cpp is not installed."""
    if not is_installed():
        said = "Not checked: llama.cpp is not installed here. pip install 'lorakeet[llama]', then:"
        run, written = (shlex.quote(str(path)) for path in (job.options.run_or_adapter, job.options.out))
        job.console.print(f"{said} lorakeet verify {run} --against {written}", soft_wrap=True)
        return None
    try:
        with temporary_stores(job.opened.residency):
            found = certify_artefacts(
                job.opened, [str(out)], HowCompared(CHECK_ROWS), job.console, of=job.options.run_or_adapter
            )
    except ModelRefused as error:
        names = ("live adapter", out.name)
        said = str(error).replace(str(out), out.name)
        check = named_check("loads in llama.cpp", names, {"refusals": 1.0}, {"refusals": 0.0}, n=1, detail=said)
        found = Certificate(f"What became of {job.options.run_or_adapter}", (check,))
    found = of_model(dataclasses.replace(found, facts={**found.facts, **_identity(job)}), out)
    found = with_note(found, job.opened.note)
    show_certificate(found, job.console)
    return found


def _write_readme(job: _Job, out: Path, written: GgufModel, certificate: Certificate | None, place: Path) -> None:
    to, run, config = job.options.to, job.opened.run, job.opened.config
    report: Report | None = read_report(run.report) if run is not None and run.report.exists() else None
    files = {written.path.name: f"the model, {written.bytes:,} bytes (tensors: {_types(written)})"}
    if to == "ollama":
        files |= {ollama.MODELFILE: "the instructions for Ollama"}
        if (out / ollama.ADAPTER).exists():
            files[ollama.ADAPTER] = "the adapter, applied to the model as it runs"
    usage = [f"llama-server -m {out.name}"]
    if to == "ollama":
        usage = ["cd FOLDER", f"ollama create {job.name} -f {ollama.MODELFILE}", f"ollama run {job.name}"]
    settings = {"Learning rows": Path(config.data.train).name or "not known"} if run else {}
    facts = CardFacts(
        title=job.name, base_model=config.model.path, files=files, usage=usage, library="gguf", licence=licence_of(job.source),
        datasets=(config.data.train,), notes=written.notes, settings=settings, base_form=base_form(config.model),
    )  # fmt: skip
    save_text(place, card(facts, report, certificate))

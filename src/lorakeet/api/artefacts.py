"""Merging, exporting, verifying and using runs from Python: the verbs of the command line, with their options as arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from lorakeet.api.display import ShownCertificate
from lorakeet.api.run import FinishedRun
from lorakeet.errors import ConfigError
from lorakeet.evaluate.certificate import Certificate
from lorakeet.settings import load as load_settings
from lorakeet.workflows.export import Exported
from lorakeet.workflows.export import export as export_verb
from lorakeet.workflows.merge import Merged
from lorakeet.workflows.merge import merge as merge_verb
from lorakeet.workflows.options import ExportOptions, MergeOptions, PredictOptions, VerifyOptions
from lorakeet.workflows.predict import Predicted
from lorakeet.workflows.predict import predict as predict_verb
from lorakeet.workflows.runs.terminal import TerminalConsole
from lorakeet.workflows.verify import Verified
from lorakeet.workflows.verify import verify as verify_verb

AnyRun = FinishedRun | str | Path
OptionsT = TypeVar("OptionsT", MergeOptions, ExportOptions, PredictOptions, VerifyOptions)


def merge(*runs: AnyRun, out: str | Path, quiet: bool = False, **options: Any) -> Merged:
    """Merges a run into its base at `out`, or combines several into one adapter; the certificate is in the result.

    `options`: fields of MergeOptions, such as `into="packed"` or `weights=(0.7, 0.3)`. Raises as `lorakeet merge` ends.
    """
    given = {"runs_or_adapters": [_path(run) for run in runs], "out": str(out), **options}
    return merge_verb(_options(MergeOptions, given, "lk.merge"), console=TerminalConsole(quiet=quiet))


def export(run: AnyRun, out: str | Path, *, quant: str = "f16", quiet: bool = False, **options: Any) -> Exported:
    """Writes the merged model as a GGUF file (`out` ends in .gguf) or, with to="ollama", as a folder for Ollama; checks it.

    `quant`: f32, f16, bf16, q8_0, or with llama.cpp q4_k_m and others. `options`: other fields of ExportOptions.
    """
    given = {"run_or_adapter": _path(run), "out": str(out), "quant": quant, **options}
    return export_verb(_options(ExportOptions, given, "lk.export"), console=TerminalConsole(quiet=quiet))


def predict(run: AnyRun, data: str | Path, out: str | Path, *, quiet: bool = False, **options: Any) -> Predicted:
    """Answers the rows of the file `data`, and writes them with their answers to `out` (.csv, .tsv or .jsonl).

    `options`: other fields of PredictOptions, such as `text_column="Text"` or `review=0.9`. Raises as `lorakeet predict` ends.
    """
    given = {"run_or_adapter": _path(run), "data": str(data), "out": str(out), **options}
    return predict_verb(_options(PredictOptions, given, "lk.predict"), console=TerminalConsole(quiet=quiet))


def verify(run: AnyRun, *against: str | Path, quiet: bool = False, **options: Any) -> Certificate:
    """Compares the trained adapter with merged folders, .gguf files or servers; returns the certificate.

    Without `against`, what earlier commands wrote beside the run. Raises VerificationFailed where they differ.
    """
    if "deploy" in options:
        raise ConfigError("lk.verify compares artefacts. `lorakeet verify RUN --deploy vllm` says if vLLM loads the adapter.")
    given = {"run_or_adapter": _path(run), "against": [str(one) for one in against], **options}
    found = verify_verb(_options(VerifyOptions, given, "lk.verify"), console=TerminalConsole(quiet=quiet))
    assert isinstance(found, Verified)  # without `deploy`, which has no argument here
    return ShownCertificate.of(found.certificate)


def _path(run: AnyRun) -> str:
    return str(run.path if isinstance(run, FinishedRun) else run)


def _options(cls: type[OptionsT], given: dict[str, Any], where: str) -> OptionsT:
    return load_settings(cls, given, where=where)

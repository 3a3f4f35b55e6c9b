"""Merging, exporting, verifying and using runs from Python: the verbs of the command line, with their options as arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from lorakeet.api.arguments import as_argument, python_call
from lorakeet.api.display import ShownCertificate, ShownMerge
from lorakeet.api.records import is_frame, row_names
from lorakeet.api.rows import naming_rows, stored
from lorakeet.api.run import FinishedRun, ShownReport
from lorakeet.data.tables import InMemory
from lorakeet.errors import ConfigError
from lorakeet.evaluate.certificate import Certificate
from lorakeet.runs.terminal import TerminalConsole
from lorakeet.settings import load as load_settings
from lorakeet.verbs.evaluate import evaluate as evaluate_verb
from lorakeet.verbs.export import Exported
from lorakeet.verbs.export import export as export_verb
from lorakeet.verbs.merge import merge as merge_verb
from lorakeet.verbs.merges.into_model import Merged
from lorakeet.verbs.options import EvaluateOptions, ExportOptions, MergeOptions, PredictOptions, VerifyOptions
from lorakeet.verbs.predict import Predicted
from lorakeet.verbs.predict import predict as predict_verb
from lorakeet.verbs.verify import Verified
from lorakeet.verbs.verify import verify as verify_verb

AnyRun = FinishedRun | str | Path
OptionsT = TypeVar("OptionsT", EvaluateOptions, MergeOptions, ExportOptions, PredictOptions, VerifyOptions)


@python_call(as_argument)
def merge(*runs: AnyRun, out: str | Path, quiet: bool = False, **options: Any) -> Merged:
    """Merges a run into its base at `out`, or combines several into one adapter; the certificate is in the result.

    `options`: fields of MergeOptions, such as `into="packed"` or `weights=(0.7, 0.3)`. Raises as `lorakeet merge` ends.
    """
    given = {"runs_or_adapters": [_path(run) for run in runs], "out": str(out), **options}
    return ShownMerge.of(merge_verb(_options(MergeOptions, given, "lk.merge"), console=TerminalConsole(quiet=quiet)))


@python_call(as_argument)
def export(run: AnyRun, out: str | Path, *, quant: str = "f16", quiet: bool = False, **options: Any) -> Exported:
    """Writes the merged model as a GGUF file (`out` ends in .gguf) or, with to="ollama", as a folder for Ollama; checks it.

    `quant`: f32, f16, bf16, q8_0, or with llama.cpp q4_k_m and others. `options`: other fields of ExportOptions.
    """
    given = {"run_or_adapter": _path(run), "out": str(out), "quant": quant, **options}
    return export_verb(_options(ExportOptions, given, "lk.export"), console=TerminalConsole(quiet=quiet))


@python_call(as_argument)
def predict(run: AnyRun, data: Any, out: str | Path | None = None, *, quiet: bool = False, **options: Any) -> Any:
    """Answers rows: of records in memory, or of the file `data`, which needs `out` (.csv, .tsv or .jsonl).

    A pandas.DataFrame is returned with the answers in new columns and its own index; other records as a list of dicts. With
    `out` the rows are written there, and counts are returned. `options`: other fields of PredictOptions, such as
    `text_column="Text"` or `review=0.9`. Raises as `lorakeet predict` ends.
    """
    if isinstance(data, (str, Path)):
        if out is None:
            raise ConfigError(f"data is the file {data}, and out is missing; expected the file for its rows with their answers.")
        return _predicted(run, str(data), out, {}, quiet=quiet, **options)
    path, known = _given(data)
    options = {"encoding": "utf-8", **options}
    if out is not None:
        return _predicted(run, path, out, known, quiet=quiet, **options)
    with TemporaryDirectory() as place:
        written = Path(place) / "answers.jsonl"
        found = _predicted(run, path, written, known, quiet=True, **options)
        records = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    if not quiet:
        print("\n".join([*found.notes, f"{found.answered:,} of {found.rows:,} rows answered; {found.review:,} to review"]))
    if not is_frame(data):
        return records
    return data.assign(**{column: [record[column] for record in records] for column in found.columns})


def _predicted(
    run: AnyRun, data: str, out: str | Path, known: Mapping[str, InMemory], *, quiet: bool, **options: Any
) -> Predicted:
    given = {"run_or_adapter": _path(run), "data": data, "out": str(out), **options}
    with naming_rows(known):
        return predict_verb(_options(PredictOptions, given, "lk.predict"), console=TerminalConsole(quiet=quiet))


@python_call(as_argument)
def evaluate(run: AnyRun, data: Any = None, out: str | Path | None = None, *, quiet: bool = False, **options: Any) -> ShownReport:
    """Measures a run or an adapter against its base, on a file or records in memory; without `data` on the run's own rows.

    A report is written to the new folder `out`, if that is given. `options`: other fields of EvaluateOptions, such as
    `metric="my.py:score"`. Raises as `lorakeet evaluate` ends.
    """
    path, known = (data, {}) if data is None or isinstance(data, (str, Path)) else _given(data)
    given = {"run_or_adapter": _path(run), "data": None if path is None else str(path), **options}
    with naming_rows(known):
        chosen = _options(EvaluateOptions, given | ({} if out is None else {"out": str(out)}), "lk.evaluate")
        return ShownReport(evaluate_verb(chosen, console=TerminalConsole(quiet=quiet)).report)


def _given(records: Any) -> tuple[str, dict[str, InMemory]]:
    """A file with the records, and how messages name them."""
    path, count = stored(records, "data")
    return str(path), {str(path): InMemory("data", row_names(records, "data", count))}


@python_call(as_argument)
def verify(run: AnyRun, *against: str | Path, quiet: bool = False, **options: Any) -> Certificate:
    """Compares the trained adapter with merged folders, .gguf files or servers; returns the certificate.

    Without `against`, what earlier commands wrote beside the run. Raises VerificationFailed where they differ.
    """
    if "deploy" in options:
        raise ConfigError("lk.verify compares artefacts; only the command line says if vLLM loads an adapter. Leave deploy= out.")
    given = {"run_or_adapter": _path(run), "against": [str(one) for one in against], **options}
    found = verify_verb(_options(VerifyOptions, given, "lk.verify"), console=TerminalConsole(quiet=quiet))
    assert isinstance(found, Verified)  # without `deploy`, which has no argument here
    return ShownCertificate.of(found.certificate)


def _path(run: AnyRun) -> str:
    return str(run.path if isinstance(run, FinishedRun) else run)


def _options(cls: type[OptionsT], given: dict[str, Any], where: str) -> OptionsT:
    return load_settings(cls, given, where=where)

"""What can be refused before torch is imported, which takes seconds: missing files, results that exist, wrong columns.

Each verb names its check in `verbs/options.Verb`, and checks all of it again, by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakeet.config import RunConfig, read_run
from lorakeet.data.locate import locate_model
from lorakeet.data.predicted.contents import require_rereadable
from lorakeet.data.predicted.written_records import require_written_format
from lorakeet.data.read import check_first_record, is_absent
from lorakeet.data.spec import NO_ROWS, DataSpec
from lorakeet.exporting.hub import require_repository_name
from lorakeet.formats.adapter_format import require_adapter
from lorakeet.registry import function_at
from lorakeet.runs.output_paths import require_absent, require_empty, require_place
from lorakeet.train.launch import launched
from lorakeet.train.run import RunFolder
from lorakeet.verbs.early.chat_options import require_chattable
from lorakeet.verbs.early.pushing_options import require_pushable
from lorakeet.verbs.early.serving_options import named_paths, require_servable, vllm_flags
from lorakeet.verbs.early.studio_options import require_studio
from lorakeet.verbs.options import (
    CompressOptions,
    ConvertOptions,
    EvaluateOptions,
    ExportOptions,
    ExtractOptions,
    FinetuneOptions,
    MergeOptions,
    PlanOptions,
    PredictOptions,
    PushOptions,
    QuantizeOptions,
    ServeOptions,
    TuneOptions,
    VerifyOptions,
)
from lorakeet.verbs.packages import missing_packages


def require_new_run(run: RunFolder) -> None:
    """Raises ConfigError or EnvironmentProblem unless a new run can be written to that folder; writes nothing."""
    run.require_free()
    require_place(run.path)


def _before_finetune(config: RunConfig, options: FinetuneOptions) -> None:
    if options.resume is None and not options.dry_run:
        require_new_run(RunFolder(Path(config.out), launched().command))
    _require_rows(config, whole=True)
    _require_model(config)


def _before_quickstart(config: RunConfig, options: FinetuneOptions) -> None:
    if not missing_packages(config):
        _before_finetune(config, options)
    elif options.resume is None and not options.dry_run:  # what is missing is fetched first
        require_new_run(RunFolder(Path(config.out), launched().command))


def _before_plan(config: RunConfig, options: PlanOptions) -> None:
    names = [name for name in (config.data.train, config.data.held_out, config.data.test) if name]
    if options.tokens is None and config.declaration.text_model and NO_ROWS not in names and not any(map(is_absent, names)):
        _require_rows(config)
    _require_model(config)


def _before_tune(config: RunConfig, options: TuneOptions) -> None:
    require_empty(options.folder(config.out))
    _require_rows(config, whole=True)
    _require_model(config)


def _before_evaluate(options: EvaluateOptions) -> None:
    if options.out is not None:
        require_empty(options.out)
    settings = _settings(options.run_or_adapter, options.config)
    if options.data is None:
        _require_rows(settings)
    elif settings is None or settings.declaration.text_model:
        data = DataSpec() if settings is None else settings.data
        check_first_record(options.data, replace(data, limit=None))


def _before_predict(options: PredictOptions) -> None:
    require_absent(options.out)
    require_place(options.out)
    require_written_format(options.out)
    _settings(options.run_or_adapter, options.config)
    require_rereadable(options.data)


def _before_merge(options: MergeOptions) -> None:
    require_absent(options.out)
    require_place(options.out)
    for path in options.runs_or_adapters:
        require_adapter(Path(path))


def _before_compress(options: CompressOptions) -> None:
    require_empty(options.out)
    _require_rows(_settings(options.run, options.config))


def _before_extract(options: ExtractOptions) -> None:
    require_absent(options.out)
    require_place(options.out)
    if options.data:
        check_first_record(options.data, DataSpec(train=options.data))
    for name in (options.tuned, options.base):
        locate_model(name)


def _before_quantize(options: QuantizeOptions) -> None:
    if options.method != "gptq":  # whose settings are refused together
        require_absent(options.out)
        require_place(options.out)
    elif options.calibration:
        check_first_record(options.calibration, DataSpec(train=options.calibration))
    locate_model(options.model)


def _before_convert(options: ConvertOptions) -> None:
    require_adapter(options.source)


def _before_export(options: ExportOptions) -> None:
    if not options.push:  # which may send what is there already
        require_absent(options.out)
        require_place(options.out)
    require_adapter(Path(options.run_or_adapter))


def _before_verify(options: VerifyOptions) -> None:
    settings = _settings(options.run_or_adapter, None)
    if options.deploy is None:
        _require_rows(settings)


def _before_serve(options: ServeOptions) -> None:
    paths = named_paths(options.adapter)
    if options.engine == "vllm":  # whose model may be on another machine
        vllm_flags(options)
    else:
        require_servable(options)
        locate_model(options.model)
    for path in paths.values():
        require_adapter(path)


def _before_push(options: PushOptions) -> None:
    require_repository_name(options.name)
    require_pushable(options)


def _settings(path: str, config: Path | None) -> RunConfig | None:
    """The settings of a run, or of the file `config`; None of a bare adapter. Raises DataError where nothing is at `path`."""
    require_adapter(Path(path))
    run = RunFolder.at(Path(path))
    if config is not None:
        return read_run(config)
    return None if run is None else read_run(run.config)


def _require_rows(config: RunConfig | None, *, whole: bool = False) -> None:
    """Raises DataError for rows that are missing; nothing for an adapter without a run.

    `whole`: also for single rows of a file that is read in less time than torch is imported.
    """
    if config is not None:
        function_at(config.declaration.require_rows)(config, whole=whole)


def _require_model(config: RunConfig) -> None:
    """Raises DataError or EnvironmentProblem for a model that is named by a path and is not there."""
    function_at(config.declaration.require_model)(config)


_CHECKS: dict[str, Callable[..., None]] = {
    "quickstart": _before_quickstart,
    "finetune": _before_finetune,
    "plan": _before_plan,
    "tune": _before_tune,
    "evaluate": _before_evaluate,
    "predict": _before_predict,
    "merge": _before_merge,
    "compress": _before_compress,
    "extract": _before_extract,
    "quantize": _before_quantize,
    "convert": _before_convert,
    "export": _before_export,
    "verify": _before_verify,
    "serve": _before_serve,
    "chat": require_chattable,
    "studio": require_studio,
    "push": _before_push,
}


def check_early(verb: str, options: Any, config: RunConfig | None) -> None:
    """Raises what `verb` would raise later for these options, and for the run file if it takes one.

    A verb that a kind brings names "module:function" instead.
    """
    check = function_at(verb) if ":" in verb else _CHECKS[verb]
    check(options) if config is None else check(config, options)

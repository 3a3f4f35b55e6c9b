"""`lorakeet compress`: cuts an adapter to the smallest size that is shown to be as good as the uncut one on held-out rows.

open → moments on training rows → spectra → one cut for each size → scores on held-out rows, paired → report and adapter.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.config import dump_yaml
from lorakeet.core.adapter import Adapter
from lorakeet.core.initialise import seed_for
from lorakeet.data.chat import Encoder, encode_rows
from lorakeet.data.prepare import Dataset
from lorakeet.data.split import write_split_record
from lorakeet.errors import ConfigError, DataError, VerificationFailed
from lorakeet.evaluate.certificate import Certificate, tolerance_check
from lorakeet.evaluate.compare import Scores, per_row
from lorakeet.evaluate.non_inferiority import fewest_rows, least_margin
from lorakeet.evaluate.report.rank_values import RankCurve
from lorakeet.evaluate.report.report import Report, write_report
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.values import encode
from lorakeet.formats.identity import with_note
from lorakeet.formats.peft import peft
from lorakeet.kinds.report import rank_map
from lorakeet.kinds.terminal import show_certificate, show_results
from lorakeet.kinds.text.evaluate import TextEvaluator
from lorakeet.kinds.text.rank_curve import (
    in_model,
    moments_of,
    rank_curve,
    report_of_cut,
    show_curve,
    why_none,
)
from lorakeet.kinds.text.reply import ADAPTER
from lorakeet.models.fits import plan_of
from lorakeet.models.targets import plan_for
from lorakeet.models.text.model import TextModel
from lorakeet.planning.encoded_rows import within_context
from lorakeet.planning.evaluation import model_to_measure
from lorakeet.planning.forecast_text_run import Workload, largest_rows
from lorakeet.planning.rehearse_text import made_up_rows
from lorakeet.ranks import resize
from lorakeet.ranks.allocate import pair_parameters, rank_pattern
from lorakeet.ranks.resize import SHARES, RankedCut, sizes_of
from lorakeet.runs.certified import identified
from lorakeet.runs.open_adapter import NAME, Opened, open_by_options
from lorakeet.runs.output_paths import require_empty, writing
from lorakeet.train.durable import new_folder
from lorakeet.train.run import RunFolder
from lorakeet.verbs.options import CompressOptions

COPIES = 6 + sum(SHARES)  # of the adapter: as read, its spectra, every cut, that of --to, one in the model, one from disk


@dataclass(frozen=True)
class Compressed:
    """The rank curve, the adapter that was written, and its report."""

    out: Path
    curve: RankCurve
    written: Adapter
    report: Report

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "out": str(self.out),
            "parameters": self.written.parameters,
            "ranks": {path: pair.rank for path, pair in self.written.pairs.items()},
            "curve": encode(self.curve),
        }


def compress(options: CompressOptions, *, console: Console) -> Compressed:
    """Writes the adapter of `run` to `out`, cut to `to`, or to the smallest size that is shown to be as good as the uncut one.

    As good: on held-out rows, the whole interval of the loss is at most `tolerance` of the uncut adapter's loss above it, that of
    accuracy at most `metric_tolerance` below it, and neither shows the cut adapter worse.

    `memory`, or else the run's memory.budget, must fit the base and a backward pass. Raises ConfigError and DataError for what
    cannot be cut or measured, and VerificationFailed if no cut is good enough.
    """
    require_empty(options.out)
    shares = _share(options.tolerance, "--tolerance"), _share(options.metric_tolerance, "--metric-tolerance")
    opened = open_by_options(options.run, options, console, config=options.config)
    if why := opened.config.declaration.lacks.get("compress"):
        said, values = f"{options.run} was trained by {opened.config.train.registered.name}. {why}", {"what": "compress"}
        raise ConfigError(said, code="kind-lacks", values={"kind": opened.config.declaration.name, **values})
    resize.check_pairs(opened.adapter)
    if not opened.config.data.train:
        raise ConfigError(
            "An adapter without a run has no rows to measure on. Give the run file that it was trained with in --config."
        )
    dataset = opened.dataset
    if not dataset.held_out:
        raise DataError("The run has no held-out rows, so no cut can be evaluated. Name a data.held_out file in its run file.")
    if options.to is None:
        _require_enough_rows(dataset, shares[1], opened.config.evaluate)
    config = opened.config
    most, parts = largest_rows(config), (*dataset.train, *dataset.held_out, *dataset.test)
    workload = Workload(bool(dataset.labels), sum(len(row.text) for row in parts))
    made_up = made_up_rows(most, 2)  # from the second batch on, gradients are accumulated
    weigh = partial(moments_of, config=config, rows=made_up, name=NAME)
    with model_to_measure(opened, console, workload, weigh, COPIES) as (text, _):
        chosen, curve, evaluator = _chosen(opened, text, dataset, options, shares, console)
        return _write(opened, chosen, curve, evaluator, dataset, options.out)


def _chosen(
    opened: Opened, text: TextModel, dataset: Dataset, options: CompressOptions, shares: tuple[float, float], console: Console
) -> tuple[RankedCut, RankCurve, TextEvaluator]:
    """The cut to write, the curve of all cuts, and the evaluator that measured them."""
    settings = within_context(opened.config, text.name, text.context, partial(console.print, markup=False, soft_wrap=True))
    encoder = Encoder(text.tokenizer, settings.data, dataset.labels)
    plan = plan_of(text.model, opened.adapter)
    if options.rows < 1:
        raise ConfigError(f"--rows is {options.rows}; a cut is weighed by 1 training row or more. Use 256.")
    seed, encoded = settings.train.seed, encode_rows(dataset.train, encoder).examples
    examples = sorted(encoded, key=lambda example: seed_for(seed, f"compress/{example.key}"))[: options.rows]
    console.print(f"The pairs are weighed by {len(examples)} training rows.", soft_wrap=True)
    moments = moments_of(text, settings, examples, NAME, console)
    found = resize.spectra(opened.adapter, moments, options.weighting)
    cuts = sizes_of(opened.adapter, plan, found, options.to)
    evaluator = TextEvaluator(settings, text, encoder, dataset.held_out, console, NAME)
    prompts = None if dataset.labels else evaluator.replier().prompts(evaluator.fitting(), dataset.train)
    curve, margin = rank_curve(evaluator, cuts, prompts, pair_parameters(plan), shares)
    name = cuts[0].name if options.to is not None else curve.marked
    show_curve(curve, console)
    if options.to is not None:
        console.print(f"Writing the size that --to names: {name}.", markup=False, soft_wrap=True)
    if not name:
        raise VerificationFailed(
            f"No cut of {opened.folder} {curve.rule} on {len(dataset.held_out)} held-out rows; nothing was written. "
            f"{why_none(curve, margin)} Keep the uncut adapter, allow more with --tolerance or --metric-tolerance, or name a "
            "size with --to."
        )
    return next(item for item in cuts if item.name == name), curve, evaluator


def _require_enough_rows(dataset: Dataset, margin: float, spec: EvaluateSpec) -> None:
    """Raises ConfigError, before anything is loaded, if so few labelled rows show no cut to be as good, whatever it answers."""
    rows, needed = len(dataset.held_out), fewest_rows(margin, spec.confidence)
    if not dataset.labels or any(row.group for row in dataset.held_out) or (needed is not None and rows >= needed):
        return
    allowed = f"--metric-tolerance allows {100 * margin:g} points of accuracy less"
    why = f"{rows} held-out rows cannot show that of any cut: it takes {needed:,}" if needed else "no number of rows shows that"
    least = math.ceil(100 * least_margin(rows, spec.confidence))
    raise ConfigError(
        f"{allowed}, and {why}. Allow more (--metric-tolerance {least}% or above), hold out more rows, or name a size with --to."
    )


def _share(text: str, flag: str) -> float:
    """0.01 for "1%" or "0.01", given with `flag`. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value < 1:
        raise ConfigError(f"{flag} is {text!r}; expected a share from 0 to less than 1, such as 2% or 0.02.")
    return value


def _write(
    opened: Opened, chosen: RankedCut, curve: RankCurve, evaluator: TextEvaluator, dataset: Dataset, out: Path
) -> Compressed:
    """Writes a run folder with the cut adapter, reads it again and evaluates it; the report has the rank curve."""
    text, console = evaluator.text, evaluator.console
    plan = plan_of(text.model, chosen.adapter)
    lora = replace(evaluator.config.lora, rank_pattern=rank_pattern(plan, evaluator.config.lora))
    if evaluator.config.ranks.choose == "prune":  # some matrices have no pair any more
        targets = plan_for(text.model, replace(evaluator.config.lora, new_tokens=()), text.family)
        lost = [entry.path for entry in targets.entries if entry.path not in chosen.adapter.pairs]
        lora = replace(lora, exclude_modules=(*lora.exclude_modules, *lost))
    ranks = replace(evaluator.config.ranks, choose="given", budget=None)
    config = replace(evaluator.config, lora=lora, ranks=ranks, out=str(out))
    rows = evaluator.fitting()
    with writing(f"The run folder {out}", "Free some space, or choose another --out."), new_folder(out) as path:
        folder = RunFolder(path)
        folder.adapter.mkdir()
        peft.write(chosen.adapter, folder.adapter)
        if opened.tokenizer is not None:
            text.tokenizer.save_pretrained(folder.adapter)
        stored = RankedCut(chosen.name, peft.read(folder.adapter), chosen.parameters)
        with in_model(evaluator, chosen) as measuring:
            live = measuring.scores(rows, ADAPTER)
        with in_model(evaluator, stored) as measuring:
            certificate = _certify(live, measuring.scores(rows, ADAPTER), out)
        certificate = with_note(identified(certificate, folder.adapter, opened.trained_model), opened.note)
        part, others = ("test", dataset.test) if dataset.test else ("held-out", dataset.held_out)
        report = report_of_cut(replace(evaluator, rows=others), stored, curve, (part, opened, dataset))
        report = replace(report, ranks=rank_map(plan), certificate=certificate)
        folder.write(folder.config, dump_yaml(config))
        write_split_record(folder.split, dataset.split_record())
        write_report(report, path)
    show_results(report, console)
    show_certificate(certificate, console)
    console.print(f"Wrote {chosen.name} to {out / 'adapter'}   Report: {out / 'report.html'}", soft_wrap=True)
    certificate.raise_if_failed()
    return Compressed(out, curve, chosen.adapter, report)


def _certify(live: Scores, stored: Scores, out: Path) -> Certificate:
    difference = float(abs(per_row(live) - per_row(stored)).max())
    between = ("cut adapter", "what was written")
    check = tolerance_check(
        "adapter on disk", {"loss": difference}, tolerance={"loss": 0.0}, between=between, n=len(per_row(live))
    )
    return Certificate(f"The compressed adapter {out}", (check,))


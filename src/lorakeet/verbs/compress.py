"""`lorakeet compress`: cuts an adapter to the smallest size that is shown to be as good as the uncut one on held-out rows.

open → moments on training rows → spectra → one cut for each size → scores on held-out rows, paired → report and adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from lorakeet.config import RunConfig, dump_yaml
from lorakeet.core.adapter import Adapter
from lorakeet.core.initialise import seed_for
from lorakeet.core.plan import Plan
from lorakeet.data.chat import Encoder, Example, encode_rows
from lorakeet.data.pack import micro_batches
from lorakeet.data.prepare import Dataset
from lorakeet.data.rows import Row
from lorakeet.data.split import write_split_record
from lorakeet.errors import ConfigError, DataError, VerificationFailed
from lorakeet.evaluate.answers import Answers, measure
from lorakeet.evaluate.certificate import Certificate, tolerance_check
from lorakeet.evaluate.compare import Comparison, Scores, compare_scores, per_row
from lorakeet.evaluate.likelihood import RowLosses, measure_losses
from lorakeet.evaluate.non_inferiority import Margin, fewest_rows, least_margin
from lorakeet.evaluate.replies import Replies, compare_replies, measure_replies, share_metric
from lorakeet.evaluate.report.rank_values import CurvePoint, RankCurve
from lorakeet.evaluate.report.report import Report, SystemResult, write_report
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.values import encode
from lorakeet.evaluate.verdict import of_unfound, verdict_of
from lorakeet.evaluate.wording import metric_words, span
from lorakeet.formats.identity import Uncertified, with_note
from lorakeet.formats.peft import peft
from lorakeet.kinds.report import machine, rank_map, versions
from lorakeet.kinds.terminal import show_certificate, show_results
from lorakeet.kinds.text.evaluate import TextEvaluator
from lorakeet.kinds.text.reply import ADAPTER, BASE, Prompts, Replier
from lorakeet.memory.cuda import enforcing_gpu_budget
from lorakeet.models.fits import plan_of
from lorakeet.models.fuse import fuse, unfuse
from lorakeet.models.inject import activate, attach, eject
from lorakeet.models.targets import plan_for
from lorakeet.models.text.model import TextModel
from lorakeet.planning.encoded_rows import within_context
from lorakeet.planning.evaluation import fit_evaluation
from lorakeet.planning.forecast_text_run import Workload, largest_rows
from lorakeet.planning.rehearse_text import made_up_rows
from lorakeet.ranks import resize
from lorakeet.ranks.allocate import pair_parameters, rank_pattern
from lorakeet.runs.certified import identified
from lorakeet.runs.open_adapter import NAME, Opened, open_adapter
from lorakeet.runs.output_paths import require_empty, writing
from lorakeet.runs.residency import peak_said
from lorakeet.runs.terminal import WholeTable
from lorakeet.train.durable import new_folder
from lorakeet.train.progress import counted, uncounted
from lorakeet.train.run import RunFolder
from lorakeet.train.text.task import TextTask
from lorakeet.verbs.options import CompressOptions

SHARES = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625, 0.03125)  # of the pairs' parameters: the points of the curve
COPIES = 6 + sum(SHARES)  # of the adapter: as read, its spectra, every cut, that of --to, one in the model, one from disk
CUT = "cut"  # the name of a cut adapter in the model while it is measured
FULL = "uncut adapter"
_WEIGHS = "training rows weigh the pairs"
CHOSEN_HERE = "There are no test rows: the size was chosen on the same held-out rows that it is evaluated on."


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


@dataclass(frozen=True)
class _Measured:
    """What one adapter scored on held-out rows, and its replies to their prompts, if rows without labels end in answers."""

    scores: Scores
    replies: Replies | None = None

    def against(self, other: _Measured, spec: EvaluateSpec) -> tuple[Comparison, ...]:
        """The comparisons that decide: accuracy or the replies' main metric, and the loss last."""
        found = compare_scores(self.scores, other.scores, spec)
        if self.replies is None or other.replies is None:
            return found
        return (compare_replies(self.replies, other.replies, share_metric(self.replies.how), spec), *found)


@dataclass(frozen=True)
class _Cut:
    name: str
    adapter: Adapter
    parameters: int


def compress(options: CompressOptions, *, console: Console) -> Compressed:
    """Writes the adapter of `run` to `out`, cut to `to`, or to the smallest size that is shown to be as good as the uncut one.

    As good: on held-out rows, the whole interval of the loss is at most `tolerance` of the uncut adapter's loss above it, that of
    accuracy at most `metric_tolerance` below it, and neither shows the cut adapter worse.

    `memory`, or else the run's memory.budget, must fit the base and a backward pass. Raises ConfigError and DataError for what
    cannot be cut or measured, and VerificationFailed if no cut is good enough.
    """
    require_empty(options.out)
    shares = _share(options.tolerance, "--tolerance"), _share(options.metric_tolerance, "--metric-tolerance")
    path = Path(options.run)
    opened = open_adapter(
        path, base=options.base, config=options.config, uncertified=options.uncertified, say=console.print
    ).within(options.memory)
    if why := opened.config.declaration.lacks.get("compress"):
        said, values = f"{path} was trained by {opened.config.train.registered.name}. {why}", {"what": "compress"}
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
    residency = fit_evaluation(
        config, opened.adapter, partial(console.print, markup=False, soft_wrap=True), workload,
        weigh=lambda text: _moments(text, config, made_up, NAME), copies=COPIES,
    )  # fmt: skip
    with enforcing_gpu_budget(residency.budget, "Raise it with --memory."), peak_said(residency, console):
        text = opened.text_model(console)
        chosen, curve, evaluator = _chosen(opened, text, dataset, options, shares, console)
        return _write(opened, chosen, curve, evaluator, dataset, options.out)


def _chosen(
    opened: Opened, text: TextModel, dataset: Dataset, options: CompressOptions, shares: tuple[float, float], console: Console
) -> tuple[_Cut, RankCurve, TextEvaluator]:
    """The cut to write, the curve of all cuts, and the evaluator that measured them."""
    settings = within_context(opened.config, text.name, text.context, partial(console.print, markup=False, soft_wrap=True))
    encoder = Encoder(text.tokenizer, settings.data, dataset.labels)
    plan = plan_of(text.model, opened.adapter)
    if options.rows < 1:
        raise ConfigError(f"--rows is {options.rows}; a cut is weighed by 1 training row or more. Use 256.")
    seed, encoded = settings.train.seed, encode_rows(dataset.train, encoder).examples
    examples = sorted(encoded, key=lambda example: seed_for(seed, f"compress/{example.key}"))[: options.rows]
    console.print(f"The pairs are weighed by {len(examples)} training rows.", soft_wrap=True)
    found = weighed(opened.adapter, text, settings, examples, options.weighting, console=console)
    cuts = _cuts(opened.adapter, plan, found, options.to)
    evaluator = TextEvaluator(settings, text, encoder, dataset.held_out, console, NAME)
    prompts = None if dataset.labels else _replier(evaluator).prompts(evaluator.fitting(), dataset.train)
    curve, margin = _curve(evaluator, cuts, prompts, pair_parameters(plan), shares)
    name = cuts[0].name if options.to is not None else curve.marked
    _show(curve, console)
    if options.to is not None:
        console.print(f"Writing the size that --to names: {name}.", markup=False, soft_wrap=True)
    if not name:
        raise VerificationFailed(
            f"No cut of {opened.folder} {curve.rule} on {len(dataset.held_out)} held-out rows; nothing was written. "
            f"{_why_none(curve, margin)} Keep the uncut adapter, allow more with --tolerance or --metric-tolerance, or name a "
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


def weighed(
    adapter: Adapter,
    text: TextModel,
    config: RunConfig,
    rows: Sequence[Example],
    weighting: resize.Weighting,
    name: str = NAME,
    *,
    console: Console | None = None,
) -> dict[str, resize.Spectrum]:
    """The spectrum of every pair, weighed by its inputs and gradients on `rows`; `adapter` is in the model as `name`."""
    return resize.spectra(adapter, _moments(text, config, rows, name, console), weighting)


def _moments(
    text: TextModel, config: RunConfig, rows: Sequence[Example], name: str, console: Console | None = None
) -> dict[str, resize.Moments]:
    """The moments of inputs and output gradients of every pair of the adapter `name` on `rows`; progress on `console`."""
    unfuse(text.model)  # every pair is called by itself
    activate(text.model, name)
    spec = config.train
    task = TextTask(text.with_every_token(), rows, held_out=(), spec=spec, name=name)
    batches = [batch for batch in micro_batches(rows, spec.micro_tokens, padded=text.pads) if batch.targets]
    total = sum(len(batch.lengths) for batch in batches)
    count = uncounted if console is None else partial(counted, console)
    with resize.collect_moments(text.model, name) as moments, torch.random.fork_rng(devices=[]), count(_WEIGHS, total) as advance:
        for batch in batches:
            task.gradients([batch], 1)
            advance(len(batch.lengths))
    for parameter in task.parameters().values():
        parameter.grad = None
    text.model.eval()
    fuse(text.model)  # as evaluate computes
    return moments


def _cuts(adapter: Adapter, plan: Plan, found: dict[str, resize.Spectrum], to: str | None) -> list[_Cut]:
    """The requested size, then the other sizes of the curve, the largest first."""
    full = pair_parameters(plan)
    least = pair_parameters(replace(plan, entries=tuple(replace(entry, rank=1) for entry in plan.entries)))
    cuts = [] if to is None else [_named(resize.cut_to_target(to, adapter, plan, found))]
    if to is not None and cuts[0].parameters >= full:
        raise ConfigError(f"--to {to} is not less than the {full:,} parameters of the pairs. Give a smaller size.")
    for share in SHARES:
        if least <= round(share * full) < full:
            item = _named(resize.cut_to_budget(adapter, plan, found, round(share * full)))
            if item.parameters not in {other.parameters for other in cuts}:
                cuts.append(item)
    if not cuts:
        raise ConfigError(f"The pairs have {full:,} parameters and rank 1 each: there is nothing to cut. Keep the adapter.")
    return cuts


def _named(adapter: Adapter) -> _Cut:
    parameters = sum(pair.A.numel() + pair.B.numel() for pair in adapter.pairs.values())
    ranks = sorted({pair.rank for pair in adapter.pairs.values()})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
    return _Cut(f"{parameters:,} parameters, {span}", adapter, parameters)


def _curve(
    evaluator: TextEvaluator, cuts: Sequence[_Cut], prompts: Prompts | None, full_parameters: int, shares: tuple[float, float]
) -> tuple[RankCurve, Margin]:
    """Every cut and the uncut adapter on the held-out rows, paired, and the margin within which a cut is as good."""
    rows, spec = evaluator.fitting(), evaluator.config.evaluate
    evaluator.console.print(f"{len(cuts) + 1} sizes are measured on {len(rows)} held-out rows.", soft_wrap=True)
    evaluator.console.print(f"Size 1 of {len(cuts) + 1}: the {FULL}.", soft_wrap=True)
    base, full = _scores(evaluator, rows, BASE), _measured(evaluator, rows, prompts, FULL)
    labelled = isinstance(full.scores, Answers)
    count = float(full.scores.tokens.sum()) if isinstance(full.scores, RowLosses) else len(rows)
    margin = Margin(loss=shares[0] * float(per_row(full.scores).sum()) / count, metric=shares[1])
    points = [CurvePoint(FULL, full_parameters, compare_scores(base, full.scores, spec)[-1].difference)]
    for number, item in enumerate(sorted(cuts, key=lambda item: -item.parameters), 2):
        evaluator.console.print(f"Size {number} of {len(cuts) + 1}: {item.name}.", soft_wrap=True)
        with _in_model(evaluator, item) as measuring:
            measured = _measured(measuring, rows, prompts, item.name)
        found = measured.against(full, spec)
        gain = compare_scores(base, measured.scores, spec)[-1].difference
        points.append(CurvePoint(item.name, item.parameters, gain, found, margin.why_not(found)))
    unit = "nats a row" if labelled else "nats a token"
    allowed = f"{margin.loss:.4f} {unit} more loss ({100 * shares[0]:g} % of the uncut adapter's)"
    if len(points[-1].against_full) > 1:
        allowed += f" and {metric_words(points[-1].against_full[0].metric).said(shares[1]).removeprefix('+')} less"
    rule = f"is shown to be as good as the uncut adapter, within {allowed}"
    marked = ""
    for point in points[1:]:  # largest first, up to one that fails: tests in a fixed order need no correction
        if point.why_not:
            break
        marked = point.name
    return RankCurve(tuple(points), rule, unit, marked), margin


def _why_none(curve: RankCurve, margin: Margin) -> str:
    """Why even the largest cut is not good enough, and how many rows could show that it is."""
    largest = curve.points[1]
    needed = margin.rows_needed(largest.against_full)
    likely = ""
    if needed:
        replies = largest.against_full[0].metric not in ("accuracy", "loss")
        more = f"{needed:,} held-out rows{', with evaluate.answers as high,' if replies else ''}"
        likely = f" If these are the true differences, about {more} show it with 80 % probability."
    found = "; ".join(_difference(comparison) for comparison in largest.against_full)
    return f"The largest cut against the uncut adapter: {found} ({largest.why_not}).{likely}"


def _difference(comparison: Comparison) -> str:
    found = comparison.difference
    words = metric_words(comparison.metric)
    return f"{words.title.lower()} {words.change(found.value, 4)} [{words.ends(found, 4, signs=True, between=', ')}]"


def _scores(evaluator: TextEvaluator, rows: Sequence[Row], system: str) -> Scores:
    return evaluator.answers(rows, system) if evaluator.encoder.labels else evaluator.losses(rows, system)


def _measured(evaluator: TextEvaluator, rows: Sequence[Row], prompts: Prompts | None, system: str) -> _Measured:
    """The evaluator's adapter, called `system`."""
    scores = replace(_scores(evaluator, rows, ADAPTER), system=system)
    if prompts is None:
        return _Measured(scores)
    return _Measured(scores, replace(_replier(evaluator).write(ADAPTER, prompts), system=system))


def _replier(evaluator: TextEvaluator) -> Replier:
    return Replier(evaluator.config, evaluator.text, evaluator.encoder, evaluator.console, evaluator.name)


@contextmanager
def _in_model(evaluator: TextEvaluator, item: _Cut) -> Iterator[TextEvaluator]:
    """A context in which the cut adapter is in the model, with its evaluator."""
    attach(evaluator.text.model, item.adapter, CUT)
    try:
        yield replace(evaluator, name=CUT)
    finally:
        eject(evaluator.text.model, CUT)


def _write(opened: Opened, chosen: _Cut, curve: RankCurve, evaluator: TextEvaluator, dataset: Dataset, out: Path) -> Compressed:
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
        stored = _Cut(chosen.name, peft.read(folder.adapter), chosen.parameters)
        with _in_model(evaluator, chosen) as measuring:
            live = _scores(measuring, rows, ADAPTER)
        with _in_model(evaluator, stored) as measuring:
            certificate = _certify(live, _scores(measuring, rows, ADAPTER), out)
        certificate = with_note(identified(certificate, folder.adapter, opened.trained_model), opened.note)
        part, others = ("test", dataset.test) if dataset.test else ("held-out", dataset.held_out)
        report = _report(replace(evaluator, rows=others), stored, curve, (part, opened, dataset))
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


def _report(evaluator: TextEvaluator, item: _Cut, curve: RankCurve, about: tuple[str, Opened, Dataset]) -> Report:
    """Evaluates the cut adapter against the uncut one first, then against its base; with the rank curve."""
    part, opened, dataset = about
    rows, spec = evaluator.fitting(), evaluator.config.evaluate
    known = (*dataset.train, *(dataset.held_out if part == "test" else ()))
    prompts = None if dataset.labels else _replier(evaluator).prompts(rows, known)
    full = _measured(evaluator, rows, prompts, FULL)
    with _in_model(evaluator, item) as measuring:
        against = _measured(measuring, rows, prompts, ADAPTER).against(full, spec)
        report = measuring.report(f"Compressing {opened.folder.parent.name}", baseline_rows=known)
    adapter, *others = report.systems
    measured = measure(full.scores, spec) if isinstance(full.scores, Answers) else measure_losses(full.scores, spec)
    if full.replies is not None:
        measured = {**measure_replies(full.replies, share_metric(full.replies.how), spec), **measured}
    uncut = SystemResult(FULL, "floor", measured)
    compared = (*against, *report.comparisons)
    noted = (f"The uncut adapter is {opened.note}.",) if isinstance(opened.note, Uncertified) else ()
    chosen_here = part == "held-out" and item.name == curve.marked
    return replace(
        report,
        warnings=(*noted, *report.warnings, *((CHOSEN_HERE,) if chosen_here else ())),
        subtitle=f"{evaluator.text.name}, cut to {item.name}, evaluated on {report.rows_of} {part} rows",
        systems=(adapter, uncut, *others),
        comparisons=compared,
        verdict=of_unfound(verdict_of(compared), report.confusions),
        part=part,
        rank_curve=curve,
        facts={
            "Adapter": f"{item.name}, cut from {opened.folder}" + (f", which is {opened.note}" if opened.note else ""),
            f"Against the uncut adapter, on {part} rows": "; ".join(f"{_difference(one)}: {one.verdict}" for one in against),
            "Versions": versions(),
            "Machine": machine(evaluator.text.device),
        },
    )


def _show(curve: RankCurve, console: Console) -> None:
    table = WholeTable("adapter", f"gain, {curve.unit}", title="The rank curve", title_justify="left")
    for found in curve.points[1].against_full:
        table.add_column(f"{metric_words(found.metric).title.lower()} − uncut")
    table.add_column("as good")
    for point in curve.points:
        gain = point.gain
        cells = [f"{gain.value:.4f} [{span(gain, 4, between=', ')}]"]
        for found in point.against_full:
            change, words = found.difference, metric_words(found.metric)
            cells.append(f"{words.change(change.value, 4)} [{words.ends(change, 4, signs=True, between=', ')}]")
        if point.against_full:
            cells.append(f"no: {point.why_not}" if point.why_not else "yes")
        table.add_row(point.name, *(Text(cell) for cell in cells), style="bold" if point.name == curve.marked else "")
    console.print(table)
    said = f"Smallest, from the largest down, that {curve.rule}: {curve.marked}" if curve.marked else f"No cut {curve.rule}."
    console.print(said, markup=False, soft_wrap=True)

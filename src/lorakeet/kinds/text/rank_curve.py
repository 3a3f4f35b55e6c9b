"""The rank curve: an adapter and its cuts on held-out rows, paired, and the smallest one that is shown to be as good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console
from rich.text import Text

from lorakeet.config import RunConfig
from lorakeet.data.chat import Example
from lorakeet.data.pack import micro_batches
from lorakeet.data.prepare import Dataset
from lorakeet.data.rows import Row
from lorakeet.errors import percent
from lorakeet.evaluate.answers import Answers
from lorakeet.evaluate.compare import Comparison, Scores, compare_scores, measure_scores, per_row
from lorakeet.evaluate.likelihood import RowLosses
from lorakeet.evaluate.non_inferiority import Margin
from lorakeet.evaluate.replies import Replies, compare_replies, measure_replies, share_metric
from lorakeet.evaluate.report.rank_values import CurvePoint, RankCurve
from lorakeet.evaluate.report.report import Report, SystemResult
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.verdict import of_unfound, verdict_of
from lorakeet.evaluate.wording import metric_words, span
from lorakeet.formats.identity import Uncertified
from lorakeet.kinds.report import machine, versions
from lorakeet.kinds.text.evaluate import TextEvaluator
from lorakeet.kinds.text.reply import ADAPTER, BASE, Prompts
from lorakeet.models.fuse import fuse, unfuse
from lorakeet.models.inject import activate, attach, eject
from lorakeet.models.text.model import TextModel
from lorakeet.ranks import resize
from lorakeet.ranks.resize import RankedCut
from lorakeet.runs.open_adapter import Opened
from lorakeet.runs.terminal import WholeTable
from lorakeet.train.progress import counted, uncounted
from lorakeet.train.text.task import TextTask

CUT = "cut"  # the name of a cut adapter in the model while it is measured
FULL = "uncut adapter"
_WEIGHS = "training rows weigh the pairs"


@dataclass(frozen=True)
class Measured:
    """What one adapter scored on held-out rows, and its replies to their prompts, if rows without labels end in answers."""

    scores: Scores
    replies: Replies | None = None

    def against(self, other: Measured, spec: EvaluateSpec) -> tuple[Comparison, ...]:
        """The comparisons that decide: accuracy or the replies' main metric, and the loss last."""
        found = compare_scores(self.scores, other.scores, spec)
        if self.replies is None or other.replies is None:
            return found
        return (compare_replies(self.replies, other.replies, share_metric(self.replies.how), spec), *found)


def moments_of(
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


def rank_curve(
    evaluator: TextEvaluator, cuts: Sequence[RankedCut], prompts: Prompts | None, pair_count: int, shares: tuple[float, float]
) -> tuple[RankCurve, Margin]:
    """Every cut and the uncut adapter on the held-out rows, paired, and the margin within which a cut is as good."""
    rows, spec = evaluator.fitting(), evaluator.config.evaluate
    evaluator.console.print(f"{len(cuts) + 1} sizes are measured on {len(rows)} held-out rows.", soft_wrap=True)
    evaluator.console.print(f"Size 1 of {len(cuts) + 1}: the {FULL}.", soft_wrap=True)
    base, full = evaluator.scores(rows, BASE), measured_by(evaluator, rows, prompts, FULL)
    labelled = isinstance(full.scores, Answers)
    count = float(full.scores.tokens.sum()) if isinstance(full.scores, RowLosses) else len(rows)
    margin = Margin(loss=shares[0] * float(per_row(full.scores).sum()) / count, metric=shares[1])
    points = [CurvePoint(FULL, pair_count, compare_scores(base, full.scores, spec)[-1].difference)]
    for number, item in enumerate(sorted(cuts, key=lambda item: -item.parameters), 2):
        evaluator.console.print(f"Size {number} of {len(cuts) + 1}: {item.name}.", soft_wrap=True)
        with in_model(evaluator, item) as measuring:
            measured = measured_by(measuring, rows, prompts, item.name)
        found = measured.against(full, spec)
        gain = compare_scores(base, measured.scores, spec)[-1].difference
        points.append(CurvePoint(item.name, item.parameters, gain, found, margin.why_not(found)))
    unit = "nats a row" if labelled else "nats a token"
    allowed = f"{margin.loss:.4f} {unit} more loss ({percent(shares[0], 2)} of the uncut adapter's)"
    if len(points[-1].against_full) > 1:
        allowed += f" and {metric_words(points[-1].against_full[0].metric).said(shares[1]).removeprefix('+')} less"
    rule = f"is shown to be as good as the uncut adapter, within {allowed}"
    marked = ""
    for point in points[1:]:  # largest first, up to one that fails: tests in a fixed order need no correction
        if point.why_not:
            break
        marked = point.name
    return RankCurve(tuple(points), rule, unit, marked), margin


def why_none(curve: RankCurve, margin: Margin) -> str:
    """Why even the largest cut is not good enough, and how many rows could show that it is."""
    largest = curve.points[1]
    needed = margin.rows_needed(largest.against_full)
    likely = ""
    if needed:
        replies = largest.against_full[0].metric not in ("accuracy", "loss")
        more = f"{needed:,} held-out rows{', with evaluate.answers as high,' if replies else ''}"
        likely = f" If these are the true differences, about {more} show it with 80 % probability."
    found = "; ".join(change_in_words(comparison) for comparison in largest.against_full)
    return f"The largest cut against the uncut adapter: {found} ({largest.why_not}).{likely}"


def change_in_words(comparison: Comparison) -> str:
    """Such as "accuracy -0.0100 [-0.0300, +0.0100]"."""
    return f"{metric_words(comparison.metric).title.lower()} {_change(comparison)}"


def _change(comparison: Comparison) -> str:
    found, words = comparison.difference, metric_words(comparison.metric)
    return f"{words.change(found.value, 4)} [{words.ends(found, 4, signs=True, between=', ')}]"


def measured_by(evaluator: TextEvaluator, rows: Sequence[Row], prompts: Prompts | None, system: str) -> Measured:
    """The evaluator's adapter, called `system`."""
    scores = replace(evaluator.scores(rows, ADAPTER), system=system)
    if prompts is None:
        return Measured(scores)
    return Measured(scores, replace(evaluator.replier().write(ADAPTER, prompts), system=system))


@contextmanager
def in_model(evaluator: TextEvaluator, item: RankedCut) -> Iterator[TextEvaluator]:
    """A context in which the cut adapter is in the model, with its evaluator."""
    attach(evaluator.text.model, item.adapter, CUT)
    try:
        yield replace(evaluator, name=CUT)
    finally:
        eject(evaluator.text.model, CUT)


def show_curve(curve: RankCurve, console: Console) -> None:
    """Prints every size with its gain and what it loses against the uncut adapter, and which one is as good."""
    table = WholeTable("adapter", f"gain, {curve.unit}", title="The rank curve", title_justify="left")
    for found in curve.points[1].against_full:
        table.add_column(f"{metric_words(found.metric).title.lower()} − uncut")
    table.add_column("as good")
    for point in curve.points:
        cells = [f"{point.gain.value:.4f} [{span(point.gain, 4, between=', ')}]", *map(_change, point.against_full)]
        if point.against_full:
            cells.append(f"no: {point.why_not}" if point.why_not else "yes")
        table.add_row(point.name, *(Text(cell) for cell in cells), style="bold" if point.name == curve.marked else "")
    console.print(table)
    said = f"Smallest, from the largest down, that {curve.rule}: {curve.marked}" if curve.marked else f"No cut {curve.rule}."
    console.print(said, markup=False, soft_wrap=True)
CHOSEN_HERE = "There are no test rows: the size was chosen on the same held-out rows that it is evaluated on."


def report_of_cut(evaluator: TextEvaluator, item: RankedCut, curve: RankCurve, about: tuple[str, Opened, Dataset]) -> Report:
    """Evaluates the cut adapter against the uncut one first, then against its base; with the rank curve."""
    part, opened, dataset = about
    rows, spec = evaluator.fitting(), evaluator.config.evaluate
    known = (*dataset.train, *(dataset.held_out if part == "test" else ()))
    prompts = None if dataset.labels else evaluator.replier().prompts(rows, known)
    full = measured_by(evaluator, rows, prompts, FULL)
    with in_model(evaluator, item) as measuring:
        against = measured_by(measuring, rows, prompts, ADAPTER).against(full, spec)
        report = measuring.report(f"Compressing {opened.folder.parent.name}", baseline_rows=known)
    adapter, *others = report.systems
    measured = measure_scores(full.scores, spec)
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
            f"Against the uncut adapter, on {part} rows": "; ".join(f"{change_in_words(one)}: {one.verdict}" for one in against),
            "Versions": versions(),
            "Machine": machine(evaluator.text.device),
        },
    )

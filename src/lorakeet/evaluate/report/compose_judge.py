"""Adds a judge model's preference to a report: a metric of both systems and their comparison, or why there is none."""

from __future__ import annotations

from dataclasses import replace

from lorakeet.evaluate.compare import compare_values
from lorakeet.evaluate.intervals import mean
from lorakeet.evaluate.judge import JudgeVotes
from lorakeet.evaluate.report.report import Report
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.wording import metric_words

JUDGE_WINS = "judge_wins"
LEAST_SHARE = 0.5  # of the pairs that need a vote in both orders; with fewer there is no result


def with_judge(report: Report, found: JudgeVotes, systems: tuple[str, str], spec: EvaluateSpec) -> Report:
    """The report with the judge's preference between two systems, the left one first, after all other comparisons."""
    complete, total, name = int(found.complete.sum()), len(found.votes), found.judge
    why = f" It gave no further answer: {found.failed}" if found.failed else ""
    different = total - found.equal
    if complete - found.equal < max(1, LEAST_SHARE * different):
        voted = complete - found.equal
        few = f"The judge {name} gave a vote in both orders for {voted} of {different} prompts with other replies"
        return replace(report, warnings=(*report.warnings, f"{few}, too few for a result.{why or ' Take a larger model.'}"))
    wins, bias = found.wins, found.position_bias
    groups = None
    if found.groups is not None:
        groups = tuple(group for group, one in zip(found.groups, found.complete, strict=True) if one)
    shares = dict(zip(systems, (mean(each, spec=spec, groups=groups) for each in (wins, 1 - wins)), strict=True))
    known = tuple(
        replace(system, metrics={**system.metrics, JUDGE_WINS: shares[system.name]}) if system.name in shares else system
        for system in report.systems
    )
    said = [f"The judge {name} gave no vote in both orders for {total - complete} of {total} prompts; they are left out.{why}"]
    said, effect, comparisons = said[: complete < total], float(wins.mean() - 0.5), report.comparisons
    words = metric_words(JUDGE_WINS)
    if abs(bias) >= abs(effect):
        said.append(
            f"The judge {name} prefers the reply that it reads first by {words.change(bias)}, no less than it prefers the "
            f"{systems[0]} ({words.change(effect)}): its preference is no verdict. Take another judge, or more prompts "
            "(evaluate.answers)."
        )
    else:
        compared = compare_values(systems, JUDGE_WINS, (wins, 1 - wins), spec, groups=groups)
        both = f"{compared.test}; the reply read first is preferred by {words.change(2 * bias)}"
        comparisons = (*comparisons, replace(compared, test=both))
    return replace(report, systems=known, comparisons=comparisons, warnings=(*report.warnings, *said))

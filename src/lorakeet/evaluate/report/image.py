"""A report on pictures: paired denoising losses of base and adapter, and how far samples are from prompts and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lorakeet.evaluate.compare import compare_losses
from lorakeet.evaluate.likelihood import RowLosses, measure_losses
from lorakeet.evaluate.report.report import Report, Role, ScoredAnswer, SideBySide, SystemResult
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.verdict import verdict_of

METRIC, PROMPT_DISTANCE, STYLE_DISTANCE = "denoising_loss", "prompt_distance", "style_distance"


def denoising_report(
    title: str, *, adapter: RowLosses, base: RowLosses, captions: Sequence[str], sources: Sequence[str], spec: EvaluateSpec
) -> Report:
    """Loss of each system with its interval, the paired difference and the verdict; a row is a picture.

    `losses` of a row are the squared errors added up over its fixed timesteps, `tokens` the number of these.
    """
    roles: tuple[tuple[RowLosses, Role], ...] = ((adapter, "adapter"), (base, "base"))
    systems = tuple(SystemResult(rows.system, role, {METRIC: measure_losses(rows, spec)["loss"]}) for rows, role in roles)
    comparison = replace(compare_losses(adapter, base, spec), metric=METRIC)
    mine, other = adapter.losses / adapter.tokens, base.losses / base.tokens
    order = np.argsort(mine - other, kind="stable")
    half = spec.show_rows // 2
    if len(order) > spec.show_rows:
        order = np.concatenate([order[: spec.show_rows - half], order[len(order) - half :]])
    return Report(
        title,
        task="image",
        systems=systems,
        comparisons=(comparison,),
        verdict=verdict_of((comparison,)),
        rows=tuple(
            SideBySide(
                captions[row], sources[row], ScoredAnswer(loss=float(other[row])), ScoredAnswer(loss=float(mine[row])),
                sources[row],
            )
            for row in order
        ),
        rows_of=len(captions),
        warnings=too_few(len(captions), independent(adapter)),
    )


def with_distances(report: Report, distances: Mapping[str, tuple[RowLosses, RowLosses]], spec: EvaluateSpec) -> Report:
    """`report` with further metrics by name, each of (adapter, base) on the same samples; less is better.

    The verdict stays that of the denoising loss: what an encoder likes is a second opinion, and samples are few.
    """
    adapter, base = report.systems
    comparisons = list(report.comparisons)
    for name, (mine, other) in distances.items():
        adapter = replace(adapter, metrics={**adapter.metrics, name: measure_losses(mine, spec)["loss"]})
        base = replace(base, metrics={**base.metrics, name: measure_losses(other, spec)["loss"]})
        comparisons.append(replace(compare_losses(mine, other, spec), metric=name))
    return replace(report, systems=(adapter, base), comparisons=tuple(comparisons))


def independent(rows: RowLosses) -> int:
    """How many pictures are no copies of each other."""
    return len(rows.losses) if rows.groups is None else len(set(rows.groups))


def too_few(pictures: int, groups: int | None = None) -> tuple[str, ...]:
    """What must be said where so few pictures are judged that nothing could be shown, whatever the adapter learnt.

    `groups` is how many they are without copies of each other.
    """
    count = pictures if groups is None else groups
    least = 2.0 ** (1 - count)
    if least <= 0.05:
        return ()
    held = f"Only {count} pictures are held out"
    if count < pictures:
        held = f"The {pictures} held-out pictures are {count} and copies of these"
    return (
        f"{held}: the paired test cannot give a p-value below {least:g}, so no difference can be shown. "
        "Hold out 6 or more (data.held_out_fraction, or a folder as data.held_out).",
    )

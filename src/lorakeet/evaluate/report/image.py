"""The report of an image run: paired denoising losses of base and adapter, and distances of samples."""

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
    """The loss of each system with its interval, the paired difference and the verdict; a row is a picture.

    `losses` are sums of squared errors over fixed timesteps, `tokens` the number of timesteps.
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
    """Adds metrics by name, each of (adapter, base) on the same samples; lower is better.

    The verdict stays that of the denoising loss: samples are few, and the encoder is only a second opinion.
    """
    adapter, base = report.systems
    comparisons = list(report.comparisons)
    for name, (mine, other) in distances.items():
        adapter = replace(adapter, metrics={**adapter.metrics, name: measure_losses(mine, spec)["loss"]})
        base = replace(base, metrics={**base.metrics, name: measure_losses(other, spec)["loss"]})
        comparisons.append(replace(compare_losses(mine, other, spec), metric=name))
    return replace(report, systems=(adapter, base), comparisons=tuple(comparisons))


def independent(rows: RowLosses) -> int:
    """The number of pictures that are not copies of each other."""
    return len(rows.losses) if rows.groups is None else len(set(rows.groups))


def too_few(pictures: int, groups: int | None = None) -> tuple[str, ...]:
    """A warning if there are too few evaluation pictures to show any difference.

    `groups` is the number of pictures without copies of each other.
    """
    count = pictures if groups is None else groups
    least = 2.0 ** (1 - count)
    if least <= 0.05:
        return ()
    said = f"Only {count} pictures are held out"
    if count < pictures:
        said = f"The {pictures} held-out pictures are {count} and copies of these"
    return (
        f"{said}: the paired test cannot give a p-value below {least:g}, so no difference can be shown. "
        "Hold out 6 or more (data.held_out_fraction, or a folder as data.held_out).",
    )

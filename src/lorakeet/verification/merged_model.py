"""The certificate of a merged model and of a combined adapter: what was compared with what, and by how much it differs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorakeet.core.adapter import Adapter
from lorakeet.core.layers.experts import stored_transposed
from lorakeet.core.tiled_product import RowSource, parts
from lorakeet.data.chat import Encoder, Example, encode_rows
from lorakeet.data.pack import micro_batches
from lorakeet.data.rows import Row
from lorakeet.data.spec import DataSpec
from lorakeet.errors import ConfigError
from lorakeet.evaluate.certificate import Certificate, Check, tolerance_check, worst_layer
from lorakeet.evaluate.parity import TOLERANCES, Parity, Precision
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.merging.checkpoint import Checkpoint, open_checkpoint
from lorakeet.merging.combine import Combination, Combined, dense_delta
from lorakeet.merging.edits import find_shared, fold_change
from lorakeet.models.generate.sample import sampled_texts
from lorakeet.models.modules import find, kind_of, unwrapped
from lorakeet.models.streaming.load import Changes
from lorakeet.models.text.compare import Side, compare_outputs, first_tokens
from lorakeet.models.text.folded_weights import folded_weights, frozen_weights
from lorakeet.models.text.model import TextModel
from lorakeet.planning.check import MERGE_TOKENS

CHECK_TOKENS = 8192  # at most so many tokens of rows go through both models
SAMPLED_TEXTS, SAMPLED_TOKENS = 32, 64  # where there are no rows, a model writes these itself
ROW_TOLERANCE = 1e-4  # of one row of a weight; a pair that matters moves it by 1e-3 and more
FLIPS = 3
COMBINED_TOLERANCE = 1e-4  # of a matrix's ΔW; fp32 sums differ by about 1e-6 of it
WEIGHT_TOLERANCE = 1e-5  # sums in another order differ by about 1e-7 of a weight; a pair that matters moves it by 1e-3 and more
PRECISIONS: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def rows_to_read(
    text: TextModel, rows: Sequence[Row] | None, data: DataSpec, labels: Sequence[str], *, seed: int
) -> Sequence[Example]:
    """What two models are compared on: the first tokens of `rows`, every one a target; without rows, texts that `text` writes."""
    if rows is None:
        return sampled_texts(text, SAMPLED_TEXTS, SAMPLED_TOKENS, seed=seed)
    encoder = Encoder(text.tokenizer, replace(data, supervise="all"), tuple(labels))
    return first_tokens(encode_rows(rows, encoder).examples, CHECK_TOKENS)


def certify_merge(
    live: Side, merged: TextModel, rows: Sequence[Example], *, out: Path, spec: EvaluateSpec, effect: Parity | None = None
) -> Certificate:
    """Two checks of base + adapter against the merged model, both computed in fp32 so that only stored rounding can differ.

    Their logits on `rows`; and every stored weight against the one it should be, rounded as it was stored, which shows a
    missed layer even where bf16's rounding hides it from the logits. Where they fail, the detail names the worst weight.
    `effect`, how far the adapter moves its base, is measured here unless it is given.
    """
    batches = micro_batches(rows, MERGE_TOKENS)
    text, name = live
    stored = StoredAs.of(merged)
    moved = effect or compare_outputs((text, name), (text, None), batches, spec=spec)
    parity = compare_outputs(live, (merged, None), batches, spec=spec)
    between = ("base + adapter", f"{out.name}/, loaded again")
    check = parity.check("merged model", TOLERANCES[PRECISIONS[stored.usual]], between=between, base=moved)
    weights = check_weights(weight_differences(text, name, merged), between=(between[0], f"{out.name}/"))
    if not check.passed and weights.passed:
        check = replace(
            check,
            detail=f"Every weight is what it should be, rounded to {stored.usual}; if that rounding is too coarse for "
            "this adapter, merge with --dtype float32. Otherwise the configuration or the tokenizer differs.",
        )
    facts = {"model": text.name, "compared in": "float32", "stored as": stored.usual, "rows": str(len(rows))}
    return Certificate(f"The merged model {out}", (check, weights), facts)


def certify_combined(plan: Combination, stated: Combined, written: Adapter, *, out: Path) -> Certificate:
    """One check of an adapter on disk, matrix by matrix: its ΔW is the combined one, up to the error that was stated for it."""
    beyond: dict[str, float] = {}
    for path in plan.paths:
        lost = whole = 0.0
        for expert in range(plan.experts(path)):
            wanted = plan.change(path, expert)
            given = dense_delta(written.pairs[path], expert) if path in written.pairs else torch.zeros_like(wanted)
            lost += float((given - wanted).double().square().sum())
            whole += float(wanted.double().square().sum())
        beyond[path] = max(0.0, math.sqrt(lost / whole) - stated.errors[path]) if whole > 0 else math.sqrt(lost)
    between = (f"{plan.method.name} of {len(plan.adapters)} adapters", f"{out.name}/, read again")
    found, allowed = {"error_beyond_stated": _worst(beyond)}, {"error_beyond_stated": COMBINED_TOLERANCE}
    check = tolerance_check("combined changes", found, tolerance=allowed, between=between, n=len(beyond))
    check = check if check.passed else replace(check, detail=worst_layer(beyond))
    facts = {"method": plan.method.name, "weights": ", ".join(map(str, plan.weights)), "stated error": f"{stated.error:.3g}"}
    return Certificate(f"The combined adapter {out}", (check,), facts)


def changes_of(model: torch.nn.Module, plan: Combination) -> Changes:
    """What the combined changes make of the weights of `model`, by name, a matrix at a time; ConfigError where one lacks."""
    found = {}
    for path in plan.paths:
        experts = plan.kind(path) == "experts"
        owner, leaf = path.rpartition(".")[::2] if experts else (path, "weight")
        module = find(model, owner)
        if module is None or not hasattr(module, leaf):
            raise ConfigError(f"The base has no {owner}.{leaf}, which the combined adapters change.")
        kind = "experts" if experts else kind_of(unwrapped(module)) or plan.kind(path)
        change = partial(plan.change, path)
        across = experts and stored_transposed(unwrapped(module))
        found[f"{owner}.{leaf}"] = partial(fold_change, kind=kind, change=partial(_across, change) if across else change)
    return found


def _across(change: Callable[[int], Tensor], expert: int) -> Tensor:
    return change(expert).t()


@dataclass(frozen=True)
class WeightDifference:
    """How far one stored weight is from the one it should be, as shares of its mean size: over all of it, and its worst row."""

    mean: float
    row: float = 0.0


def check_weights(differences: Mapping[str, WeightDifference], *, between: tuple[str, str]) -> Check:
    """The check that every weight of a merged model is the folded one; its detail names the worst one where it fails.

    The mean shows a wrong scale or a missed layer, the worst row a single output that went wrong in a large matrix.
    """
    means = {path: found.mean for path, found in differences.items()}
    rows = {path: found.row for path, found in differences.items()}
    found = {"mean_difference": _worst(means), "row_difference": _worst(rows)}
    allowed = {"mean_difference": WEIGHT_TOLERANCE, "row_difference": ROW_TOLERANCE}
    check = tolerance_check("merged weights", found, tolerance=allowed, between=between, n=len(differences))
    if check.passed:
        return check
    detail = worst_layer(means) if "mean_difference" in check.exceeded() else f"In one row of it: {worst_layer(rows)}"
    return replace(check, detail=detail)


def _worst(values: Mapping[str, float]) -> float:
    return max(values.values(), key=lambda found: (math.isnan(found), found), default=math.nan)


@dataclass(frozen=True)
class StoredAs:
    """In which dtypes the tensors of a model folder are stored."""

    checkpoint: Checkpoint
    usual: str  # that of most numbers: float32, bfloat16 or float16

    @staticmethod
    def of(merged: TextModel) -> StoredAs:
        checkpoint = open_checkpoint(merged.source)
        counts: Counter[str] = Counter()
        for file in checkpoint.shards.values():
            for stored in file.tensors.values():
                counts[str(stored.dtype).removeprefix("torch.")] += math.prod(stored.shape)
        return StoredAs(checkpoint, next((name for name, _ in counts.most_common() if name in PRECISIONS), "float32"))

    def dtype(self, path: str) -> torch.dtype:
        """That of the parameter that the model calls `path`; the usual one where it is made of several tensors."""
        name = find_shared(self.checkpoint, path)
        return self.checkpoint.stored(name).dtype if name else getattr(torch, self.usual)


def weight_differences(live: TextModel, name: str | None, merged: TextModel) -> dict[str, WeightDifference]:
    """For each weight, mean |merged − expected| / mean |expected|; expected is W, or W with the pair folded in.

    `expected` is rounded to the dtype in which the merged model stores that weight, so that a faithful merge gives 0 or nearly 0.
    Of streamed models one matrix is in memory at a time, of experts and of what the adapter leaves alone a part of one.
    """
    found: dict[str, WeightDifference] = {}
    stored = StoredAs.of(merged)
    theirs = dict(frozen_weights(merged.model, merged.store))
    for path, expected in folded_weights(live.model, name, live.store):
        given = theirs.get(path)
        if given is not None and tuple(given.shape) == tuple(expected.shape):
            found[path] = difference(given, expected, stored.dtype(path))
        else:
            found[path] = WeightDifference(math.inf, math.inf)
    return found


@torch.no_grad()
def difference(given: RowSource, wanted: RowSource, dtype: torch.dtype) -> WeightDifference:
    """How far `given` is from `wanted` as it is once it is stored as `dtype`; both are read in parts.

    Sums in another order fall on the other side of a rounding here and there, which a row of few numbers feels. So
    `FLIPS` roundings of its largest number are taken off each row. A row is compared with its own mean size, or a thousandth
    of the matrix's where it is nearly zero.
    """
    shape = tuple(wanted.shape)
    count, width = max(math.prod(shape), 1), shape[-1] if len(shape) > 1 else math.prod(shape)
    total_off = total_size = 0.0
    rows: list[Tensor] = []  # (2, rows): how far a row is off beyond its roundings, and its size
    for part in parts(shape) if len(shape) > 1 else [slice(None)]:
        right = wanted[part].to(dtype).float()
        off, size = (given[part].to(right.device).float() - right).abs_(), right.abs()
        total_off, total_size = total_off + float(off.sum(dtype=torch.float64)), total_size + float(size.sum(dtype=torch.float64))
        off, size = off.reshape(-1, width), size.reshape(-1, width)
        allowed = size.amax(1) * (FLIPS * torch.finfo(dtype).eps / width)
        rows.append(torch.stack([off.mean(1) - allowed, size.mean(1)]))
    whole = max(total_size / count, 1e-12)
    beyond, sizes = torch.cat(rows, dim=1)
    worst = float((beyond / sizes.clamp_min(whole * 1e-3)).max())
    return WeightDifference(total_off / count / whole, worst if math.isnan(worst) else max(worst, 0.0))

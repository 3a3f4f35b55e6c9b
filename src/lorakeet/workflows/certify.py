"""The certificate of a run and of a merged model: what was compared with what, and by how much it differs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lorakeet.data.chat import Example
from lorakeet.data.pack import micro_batches
from lorakeet.evaluate.certificate import Certificate, Check, judge, worst_layer
from lorakeet.evaluate.parity import TOLERANCES, Precision
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.formats.detect import read_adapter
from lorakeet.formats.safe import open_safetensors
from lorakeet.models.folded import folded_weights
from lorakeet.models.inject import activate, attach, eject, use_products
from lorakeet.models.score import row_losses
from lorakeet.models.text import TextModel
from lorakeet.workflows.compare_models import Side, compare, compare_on

REREAD = "reread"
MICRO_TOKENS = 2048
WEIGHT_TOLERANCE = 1e-5  # sums in another order differ by about 1e-7 of a weight; a pair that matters moves it by 1e-3 and more
PRECISIONS: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def precision_of(text: TextModel) -> Precision:
    """The row of TOLERANCES for a model held as `text` is."""
    return PRECISIONS[str(text.dtype).removeprefix("torch.")]


def certify_run(
    text: TextModel,
    adapter: Path,
    rows: Sequence[Example],
    *,
    base_loss: float | None,
    spec: EvaluateSpec,
    name: str = "default",
) -> Certificate:
    """Two checks: the adapter on disk is the live one, and the base without adapter is what it was before training.

    The first compares the same arithmetic, so fp32's tolerance holds whatever the model's dtype. The second allows the dtype's
    rounding, since an anchored start (PiSSA, OLoRA) is equal to the base to rounding only.
    """
    attach(text.model, read_adapter(adapter), REREAD)
    use_products(text.model, text.products)
    batches = micro_batches(rows, MICRO_TOKENS)
    try:
        parity = compare_on(text, batches, left=name, right=REREAD, spec=spec)
    finally:
        eject(text.model, REREAD)
    checks = [parity.check("adapter on disk", TOLERANCES["fp32"], between=("live adapter", str(adapter.name) + "/ read again"))]
    if base_loss is not None:
        checks.append(_base_untouched(text, rows, base_loss))
    activate(text.model, name)
    facts = {"model": text.name, "dtype": str(text.dtype).removeprefix("torch."), "rows": "held-out"}
    return Certificate(f"The adapter {adapter}", tuple(checks), facts)


def _base_untouched(text: TextModel, rows: Sequence[Example], base_loss: float) -> Check:
    activate(text.model, None)
    sums, weights = row_losses(text, rows, micro_tokens=MICRO_TOKENS)
    loss = float(sums.sum() / weights.sum())
    return judge(
        "base untouched",
        {"loss": abs(loss - base_loss)},
        tolerance={"loss": TOLERANCES[precision_of(text)].loss},
        between=("base before training", "base with the adapter off"),
        n=int(weights.sum()),
    )


def certify_merge(live: Side, merged: TextModel, rows: Sequence[Example], *, out: Path, spec: EvaluateSpec) -> Certificate:
    """Two checks of base + adapter against the merged model, both computed in fp32 so that only stored rounding can differ.

    Their logits on `rows`; and every stored weight against the one it should be, rounded as it was stored, which shows a
    missed layer even where bf16's rounding hides it from the logits. Where they fail, the detail names the worst weight.
    """
    batches = micro_batches(rows, MICRO_TOKENS)
    text, name = live
    precision = PRECISIONS[stored_dtype(merged)]
    effect = compare((text, name), (text, None), batches, spec=spec)
    parity = compare(live, (merged, None), batches, spec=spec)
    between = ("base + adapter", f"{out.name}/, loaded again")
    check = parity.check("merged model", TOLERANCES[precision], between=between, base=effect)
    weights = check_weights(weight_differences(text, name, merged), between=(between[0], f"{out.name}/"))
    if not check.passed and weights.passed:
        check = replace(
            check,
            detail=f"Every weight is what it should be, rounded to {stored_dtype(merged)}; if that rounding is too coarse for "
            "this adapter, merge with --dtype float32. Otherwise the configuration or the tokenizer differs.",
        )
    facts = {"model": text.name, "compared in": "float32", "stored as": stored_dtype(merged), "rows": str(len(rows))}
    return Certificate(f"The merged model {out}", (check, weights), facts)


def check_weights(differences: Mapping[str, float], *, between: tuple[str, str]) -> Check:
    """The check that every weight of a merged model is the folded one; its detail names the worst one where it fails."""
    worst = max(differences.values(), key=lambda found: (math.isnan(found), found), default=math.nan)
    found = {"mean_difference": worst}
    allowed = {"mean_difference": WEIGHT_TOLERANCE}
    check = judge("merged weights", found, tolerance=allowed, between=between, n=len(differences))
    return check if check.passed else replace(check, detail=worst_layer(differences))


def stored_dtypes(merged: TextModel) -> dict[str, torch.dtype]:
    """The dtype in which each tensor of a model folder is stored, by its name in the file."""
    files = [open_safetensors(file) for file in sorted(merged.source.glob("*.safetensors"))]
    return {name: stored.dtype for file in files for name, stored in file.tensors.items()}


def stored_dtype(merged: TextModel) -> str:
    """The dtype in which most numbers of a model folder are stored: float32, bfloat16 or float16."""
    counts: Counter[str] = Counter()
    for file in sorted(merged.source.glob("*.safetensors")):
        for stored in open_safetensors(file).tensors.values():
            counts[str(stored.dtype).removeprefix("torch.")] += math.prod(stored.shape)
    return next((name for name, _ in counts.most_common() if name in PRECISIONS), "float32")


def weight_differences(live: TextModel, name: str | None, merged: TextModel) -> dict[str, float]:
    """For each weight, mean |merged − expected| / mean |expected|; expected is W, or W with the pair folded in.

    `expected` is rounded to the dtype in which the merged model stores that weight, so that a faithful merge gives 0 or nearly 0.
    """
    found: dict[str, float] = {}
    usual, dtypes = getattr(torch, stored_dtype(merged)), stored_dtypes(merged)
    theirs = dict(merged.model.named_parameters(remove_duplicate=False))
    for path, expected in folded_weights(live.model, name):
        if path in theirs and theirs[path].shape == expected.shape:
            wanted = expected.to(dtypes.get(path, usual)).float()
            other = theirs[path].detach().float().to(expected.device)
            found[path] = float((other - wanted).abs().mean() / wanted.abs().mean().clamp_min(1e-12))
        else:
            found[path] = math.inf
    return found

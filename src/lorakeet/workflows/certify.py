"""The certificate of a run and of a merged model: what was compared with what, and by how much it differs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorakeet.data.chat import Example
from lorakeet.data.pack import micro_batches
from lorakeet.evaluate.certificate import Certificate, Check, judge
from lorakeet.evaluate.parity import TOLERANCES, Precision
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.formats.detect import read_adapter
from lorakeet.models.inject import activate, attach, eject, use_products
from lorakeet.models.score import row_losses
from lorakeet.models.text import TextModel
from lorakeet.workflows.compare_models import compare_on

REREAD = "reread"
MICRO_TOKENS = 2048
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

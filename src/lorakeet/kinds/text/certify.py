"""The certificate of a text run: the adapter on disk computes what was trained, and the base has not changed.

frozen weights   the digest of every frozen number, before training and after it
adapter on disk  the base loaded once more with the adapter read from disk, against the live model: logits, token by token
base untouched   the base loaded once more, against the live model with its adapter off: logits, token by token
trained = saved = loaded  the tensors of the adapter, by name and to the bit: live, in the file, and on the model that loaded it
in PEFT          the base loaded once more with the adapter loaded by the installed PEFT, against Lorakeet's pairs on it: logits
own code         before training, the gradients of the first rows against those of transformers' own modules
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lorakeet.core.adapter import Adapter
from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, micro_batches
from lorakeet.evaluate.certificate import Certificate, Check, Unchecked, tolerance_check
from lorakeet.evaluate.parity import TOLERANCES
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.formats.detect import read_adapter
from lorakeet.kinds.certify_pairs import check_by_peft, check_frozen, check_saved, unchecked_in_peft
from lorakeet.models.compare_saved import compare_saved
from lorakeet.models.inject import activate, attach, eject, use_products
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.adapters import add_adapter
from lorakeet.models.text.compare import compare_outputs, first_tokens
from lorakeet.models.text.digests import frozen_digests
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.serve.probe import FACT, record
from lorakeet.train.text.own_code import OwnCodeDifference

CHECK_TOKENS = 1024  # of held-out rows, every token a target; one micro-batch of them
REREAD = "reread"
OWN_CODE = "own code"


def certify_text(
    live: TextModel,
    adapter: Path,
    rows: Sequence[Example],
    *,
    before: Mapping[str, str],
    model: ModelSpec | None,
    spec: EvaluateSpec,
    name: str = "default",
) -> Certificate:
    """The checks of the table above but the last, on `rows`; `before` is `frozen_digests` before training.

    Both sides do the same arithmetic in the same dtype, so the tolerance of fp32 applies to every dtype. `model` says how to load
    the base again. If it is None, since memory is too small for a second base, the adapter from disk is added to the live base,
    and only the digests check the base; PEFT's reading is then not checked.
    """
    batches = micro_batches(rows_to_compare(rows), CHECK_TOKENS, padded=live.pads)
    checks = [check_frozen(before, frozen_digests(live.model))] if before else []
    unchecked: tuple[Unchecked, ...] = ()
    if model is None:
        unchecked = (unchecked_in_peft(adapter, "memory is for one base"),)
        same, on_disk = _within(live, adapter, batches, name=name, spec=spec)
        checks = [on_disk, *checks, same]
    else:
        held = read_adapter(adapter)
        fresh = _read_again(live, held, model, name)
        disk = compare_outputs((live, name), (fresh, name), batches, spec=spec)
        base = compare_outputs((live, None), (fresh, None), batches, spec=spec)
        sides = ("live adapter", f"{adapter.name}/ on the base, both read again")
        checks = [
            disk.check("adapter on disk", TOLERANCES["fp32"], between=sides),
            base.check("base untouched", TOLERANCES["fp32"], between=("base with the adapter off", "base read again")),
            *checks,
            check_saved(compare_saved((live.model, name), held, (fresh.model, name)), adapter.name),
        ]
        by_peft = check_by_peft(fresh, name, adapter, rows)
        checks, unchecked = ([*checks, by_peft], ()) if isinstance(by_peft, Check) else (checks, (by_peft,))
    activate(live.model, name)
    facts = {"model": live.name, "dtype": str(live.dtype).removeprefix("torch."), "rows": "held-out"}
    facts[FACT] = record(live, name).to_text()  # a server compares itself with it before it serves the adapter
    if not before or model is None:
        missing = ["frozen weights"] * (not before) + ["base untouched"] * (model is None)
        facts["not checked, for want of memory"] = ", ".join(missing)
    return Certificate(f"The adapter {adapter}", tuple(checks), facts, unchecked)


def with_own_code(certificate: Certificate, found: OwnCodeDifference | None) -> Certificate:
    """The certificate with the check of the first pass, which was made before training; None under a memory budget."""
    if found is None:
        return replace(certificate, facts={**certificate.facts, OWN_CODE: "not compared, for want of memory"})
    which = "median" if found.median else "largest"
    measured = {} if found.sure else {f"{which}_gradient_difference": found.gradient}
    if found.exact:
        measured["loss_difference"] = found.loss
    if not measured:
        return replace(certificate, facts={**certificate.facts, OWN_CODE: "not compared: the base predicts every token"})
    check = tolerance_check(
        OWN_CODE, measured, tolerance=dict.fromkeys(measured, found.allowed),
        between=("the first pass", "transformers' own modules"), n=found.tokens,
    )  # fmt: skip
    return replace(certificate, checks=(*certificate.checks, check))


def _read_again(live: TextModel, held: Adapter, model: ModelSpec, name: str) -> TextModel:
    fresh = load_text_model(replace(model, path=str(live.source)))
    fresh = replace(fresh, tokenizer=live.tokenizer) if held.token_rows else fresh
    for added in held.token_rows.values():
        fresh.add_tokens(added.tokens)
    add_adapter(fresh, held, name)
    return fresh


def _within(live: TextModel, adapter: Path, batches: Sequence[Batch], *, name: str, spec: EvaluateSpec) -> tuple[Check, Check]:
    held = read_adapter(adapter)
    attach(live.model, held, REREAD)
    same = check_saved(compare_saved((live.model, name), held, (live.model, REREAD)), adapter.name)
    del held
    use_products(live.model, live.products)
    try:
        parity = compare_outputs((live, name), (live, REREAD), batches, spec=spec)
    finally:
        eject(live.model, REREAD)
    return same, parity.check("adapter on disk", TOLERANCES["fp32"], between=("live adapter", f"{adapter.name}/ read again"))


def rows_to_compare(rows: Sequence[Example], tokens: int = CHECK_TOKENS) -> list[Example]:
    """The first rows, up to `tokens` tokens but at least one row; every token but the first of a row is a target."""
    return [replace(row, supervised=np.arange(len(row.ids)) > 0) for row in first_tokens(rows, tokens)]

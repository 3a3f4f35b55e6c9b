"""`lorakeet extract`: an adapter out of a fully tuned model, with how much of the tuning it holds, measured on tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakeet.data.chat import Example
from lorakeet.data.pack import micro_batches
from lorakeet.data.prepare import find_labels
from lorakeet.data.read import read_rows
from lorakeet.data.rows import Row
from lorakeet.data.spec import DataSpec
from lorakeet.errors import DataError, percent
from lorakeet.evaluate.certificate import CERTIFICATE, Certificate, tolerance_check
from lorakeet.evaluate.spec import EvaluateSpec
from lorakeet.evaluate.values import encode
from lorakeet.formats.peft import peft
from lorakeet.kinds.terminal import conclude, progress_line, show_matrices
from lorakeet.merging.checkpoint import open_checkpoint
from lorakeet.merging.extract import Extracted, extract_adapter
from lorakeet.models.files.quantized import skeleton
from lorakeet.models.files.source import find_source
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.adapters import add_adapter
from lorakeet.models.text.compare import compare_outputs
from lorakeet.models.text.load import load_text_model, read_config
from lorakeet.models.text.model import TextModel
from lorakeet.planning.check import MERGE_TOKENS, why_not_on_gpu
from lorakeet.runs.certified import certified_whole, identified
from lorakeet.runs.open_adapter import NAME
from lorakeet.runs.output_paths import require_new_place
from lorakeet.verbs.options import ExtractOptions
from lorakeet.verification.merged_model import rows_to_read


@dataclass(frozen=True)
class ExtractedAdapter:
    """What was written, how much of each change it holds, and how near it comes to the tuned model."""

    out: Path
    found: Extracted
    certificate: Certificate

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "out": str(self.out),
            "parameters": self.found.adapter.parameters,
            "energy": self.found.energy,
            "errors": {path: low.error for path, low in self.found.captured.items()},
            "unchanged": self.found.unchanged,
            "whole": sorted(self.found.adapter.extras),
            "left_out": list(self.found.left_out),
            "notes": list(self.found.notes),
            "passed": self.certificate.passed,
            "certificate": encode(self.certificate),
        }


def extract(options: ExtractOptions, *, console: Console) -> ExtractedAdapter:
    """Writes the adapter that takes `base` nearest to `tuned` to `out`, and compares base + adapter with the tuned model.

    They are compared on the rows of `data`, or on texts that the tuned model samples. Raises ConfigError listing what the two
    models do not share, VerificationFailed (exit code 3) where the adapter does not bring the base nearer to the tuned model.
    """
    out, tuned, base, data = options.out, options.tuned, options.base, options.data or ""
    require_new_place(out)
    rows = tuple(read_rows(data, DataSpec(train=data))) if data else ()
    folder, source = (find_source(ModelSpec(path=name), console.print) for name in (tuned, base))
    plain = skeleton(read_config(source))
    with progress_line(console, "comparing") as step:
        found = extract_adapter(
            open_checkpoint(folder), open_checkpoint(source), plain, rank=options.rank, whole=options.whole, on_progress=step
        )
    found = replace(found, adapter=replace(found.adapter, base=base))
    _show(found, console)
    if why_not := why_not_on_gpu("the comparison of both models", "auto", plain, copies=2):
        console.print(why_not, markup=False, soft_wrap=True)
    with certified_whole(out, "The adapter") as made:
        made.mkdir()
        peft.write(found.adapter, made)
        certificate = _certify((base, tuned), (made, out), (rows, data), console, why_not)
        certificate = identified(certificate, made, ModelSpec(path=base))
        certificate.write(made / CERTIFICATE)
    console.print(f"Wrote an adapter of {found.adapter.parameters:,} parameters to {out}", soft_wrap=True)
    conclude(certificate, console)
    return ExtractedAdapter(out, found, certificate)


def _show(found: Extracted, console: Console) -> None:
    pairs = found.adapter.pairs
    if pairs:
        show_matrices({path: (pairs[path].rank, low.error) for path, low in found.captured.items()}, console)
        console.print(f"Captured {percent(found.energy, 2)} of the energy of the change in {len(pairs)} matrices")
    if found.adapter.extras:
        console.print(f"Kept whole: {', '.join(found.adapter.extras)}", soft_wrap=True)
    if found.left_out:
        console.print(f"Left out, though changed: {', '.join(found.left_out)}", soft_wrap=True)
    for note in found.notes:
        console.print(note, soft_wrap=True)


def _examples(rows: Sequence[Row], data: str, text: TextModel) -> Sequence[Example]:
    """The rows with every token a target, or texts that `text` writes where there are none."""
    spec = DataSpec(train=data)
    found = rows_to_read(text, rows or None, spec, find_labels(rows, spec), seed=EvaluateSpec().seed)
    if rows and not found:
        raise DataError(f"{data} has no row that could be read as tokens; name a file with rows in --data.")
    return found


def _certify(
    models: tuple[str, str], places: tuple[Path, Path], data: tuple[Sequence[Row], str], console: Console, why_not: str = ""
) -> Certificate:
    """KL(tuned ‖ base + adapter), beside KL(tuned ‖ base): an approximation has no tolerance but to be nearer than nothing.

    `why_not` says why both are computed on the CPU though there is a GPU.
    """
    (base, tuned), (made, out), spec = models, places, EvaluateSpec()
    device = "cpu" if why_not else "auto"
    specs = (ModelSpec(path=name, dtype="float32", products="float32", device=device) for name in (tuned, base))
    theirs, mine = (load_text_model(model, say=console.print) for model in specs)
    batches = micro_batches(_examples(*data, theirs), MERGE_TOKENS)
    before = compare_outputs((theirs, None), (mine, None), batches, spec=spec)
    add_adapter(mine, peft.read(made), NAME)
    after = compare_outputs((theirs, None), (mine, NAME), batches, spec=spec)
    distance = before.mean_kl.value
    measured = {"mean_kl": after.mean_kl.value, "non_finite": float(after.non_finite)}
    allowed, between = {"mean_kl": distance, "non_finite": 0.0}, ("tuned model", "base + adapter")
    detail = f"The bare base is at {distance:.3g}: the adapter brings it no nearer. Raise --rank, or keep --whole all."
    check = tolerance_check("extracted adapter", measured, tolerance=allowed, between=between, n=after.tokens, detail=detail)
    check = replace(check, estimates={"mean_kl": after.mean_kl, "mean_kl of the base": before.mean_kl})
    where = data[1] or "texts that the tuned model samples"
    console.print(
        f"KL from the tuned model on {after.tokens:,} tokens of {where}: base {before.mean_kl}, base + adapter {after.mean_kl}; "
        f"top-1 agreement {percent(before.top1_agreement.value)} and {percent(after.top1_agreement.value)}",
        soft_wrap=True,
    )
    facts = {"tuned": tuned, "base": base, "rows": where}
    return Certificate(f"The extracted adapter {out}", (check if not check.passed else replace(check, detail=""),), facts)

"""`lorakeet merge`: folds an adapter into its base, on disk, and certifies that the merged model is the live one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar

from lorakeet.data.chat import Encoder, Example, encode_rows
from lorakeet.data.prepare import Dataset, load_dataset
from lorakeet.errors import ConfigError
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.values import encode
from lorakeet.merge.fold import Dtype, MergeResult, merge_into
from lorakeet.models.inject import activate
from lorakeet.models.load import load_text_model
from lorakeet.models.source import find_source
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text import TextModel
from lorakeet.workflows.certify import certify_merge
from lorakeet.workflows.judge import sampled_texts
from lorakeet.workflows.opened import NAME, Opened, open_adapter
from lorakeet.workflows.place import require_place
from lorakeet.workflows.show import show_certificate

CERTIFICATE = "certificate.json"
CHECK_TOKENS = 8192  # at most so many tokens of held-out rows go through both models
SAMPLED_TEXTS, SAMPLED_TOKENS = 32, 64  # where there are no held-out rows, the base writes these itself


@dataclass(frozen=True)
class Merged:
    """What was written and what the check found."""

    result: MergeResult
    certificate: Certificate
    notes: tuple[str, ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "out": str(self.result.folder),
            "tensors": self.result.tensors,
            "changed": self.result.changed,
            "bytes": self.result.bytes,
            "worst_rounding": {"tensor": self.result.worst[0], "difference": self.result.worst[1]},
            "notes": [*self.result.notes, *self.notes],
            "passed": self.certificate.passed,
            "certificate": encode(self.certificate),
        }


def merge(
    run_or_adapter: str, *, out: Path, base: str | None = None, dtype: Dtype = "same", console: Console
) -> Merged:
    """Writes the merged model to `out`, compares it with base + adapter in fp32, and writes its certificate beside it.

    Raises VerificationFailed (exit code 3) naming the worst layer when the two differ by more than rounding explains; what was
    written stays for inspection, with a certificate that says so.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already and is never overwritten. Choose another folder or remove that one.")
    require_place(out)
    opened = open_adapter(Path(run_or_adapter), base=base)
    dataset = load_dataset(opened.config.data) if opened.run else None  # missing rows are found before anything is written
    source = find_source(opened.dense_spec, console.print)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("folding")
        result = merge_into(
            source,
            opened.adapter,
            out,
            dtype=dtype,
            tokenizer=opened.tokenizer,
            on_progress=lambda done, total, name: bar.update(task, completed=done, total=total, description=f"folding {name}"),
        )
    console.print(f"Wrote {result.tensors} tensors ({result.changed} changed, {result.bytes:,} bytes) to {out}", soft_wrap=True)
    if result.worst[0]:
        console.print(f"Rounding moved {result.worst[0]} most, by {result.worst[1]:.2g}", soft_wrap=True)
    for note in (*result.notes, *_about_base(opened)):
        console.print(note, soft_wrap=True)
    certificate = _certify(opened, dataset, out, console)
    certificate.write(out / CERTIFICATE)
    show_certificate(certificate, console)
    certificate.raise_if_failed()
    return Merged(result, certificate, tuple(_about_base(opened)))


def _about_base(opened: Opened) -> list[str]:
    """What there is to say where the adapter was trained on another base than the one it is folded into."""
    if not opened.trained_on:
        return []
    return [
        f"The adapter was trained on a base in {opened.trained_on} and is folded into the unquantised weights: the merged model is "
        "not exactly the one that the run measured, and its own scores may differ a little."
    ]


def _certify(opened: Opened, dataset: Dataset | None, out: Path, console: Console) -> Certificate:
    live = opened.text_model(console, dtype="float32", dense=True)
    rows = _check_rows(opened, dataset, live, console)
    merged_spec = ModelSpec(path=str(out), dtype="float32", products="float32", device=opened.config.model.device)
    merged = load_text_model(merged_spec, say=console.print)
    activate(live.model, NAME)
    return certify_merge((live, NAME), merged, rows, out=out, spec=opened.config.evaluate)


def _check_rows(opened: Opened, dataset: Dataset | None, live: TextModel, console: Console) -> Sequence[Example]:
    """Held-out rows of the run with every token a target; for a bare adapter, texts that the base samples."""
    if dataset is None:
        console.print("No run, so no held-out rows: the two models are compared on texts that the base samples.", soft_wrap=True)
        return sampled_texts(live, SAMPLED_TEXTS, SAMPLED_TOKENS, seed=opened.config.evaluate.seed)
    encoder = Encoder(live.tokenizer, dataclasses.replace(opened.config.data, supervise="all"), dataset.labels)
    chosen: list[Example] = []
    tokens = 0
    for example in encode_rows(dataset.held_out, encoder).examples:
        if chosen and tokens + len(example.ids) > CHECK_TOKENS:
            break
        chosen.append(example)
        tokens += len(example.ids)
    return chosen

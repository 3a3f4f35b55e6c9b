"""One merge into a base: adapters, or what they were combined into, are folded into its files, and the result is certified."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from lorakeet.core.adapter import Adapter
from lorakeet.data.chat import Example
from lorakeet.data.pack import micro_batches
from lorakeet.data.prepare import Dataset
from lorakeet.errors import ConfigError
from lorakeet.evaluate.certificate import CERTIFICATE, Certificate
from lorakeet.evaluate.intervals import Estimate
from lorakeet.evaluate.parity import Parity
from lorakeet.evaluate.values import encode
from lorakeet.formats.identity import with_note
from lorakeet.kinds.terminal import conclude, progress_line, show_matrices
from lorakeet.merging.checkpoint import Checkpoint
from lorakeet.merging.combine import Combination, Combined
from lorakeet.merging.dequantise import open_dequantised, rounding_steps
from lorakeet.merging.edits import EMBEDDINGS, HEADS
from lorakeet.merging.merged_folder import Dtype, MergeResult, merge_into, needs_of
from lorakeet.models.files.source import find_source
from lorakeet.models.inject import activate
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.adapters import add_adapter
from lorakeet.models.text.compare import compare_outputs
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from lorakeet.planning.check import MERGE_TOKENS, CheckSize, fit_check, size_of_merge
from lorakeet.runs.certified import certified_whole, of_model
from lorakeet.runs.open_adapter import NAME, Opened
from lorakeet.runs.residency import peak_said, temporary_stores
from lorakeet.verbs.merges.base_choice import AT_LOAD, BaseChoice, both_bases, choose_base
from lorakeet.verbs.merges.base_choice import Into as DenseInto
from lorakeet.verification.merged_model import SAMPLED_TEXTS, SAMPLED_TOKENS, certify_merge, changes_of, rows_to_read

Roundings = Mapping[str, Callable[[Tensor], Tensor]]  # of packed weights, by their name on disk


@dataclass(frozen=True)
class Merged:
    """What was written and what the check found; `result` is None where an adapter was written."""

    out: Path
    certificate: Certificate
    result: MergeResult | None = None
    combined: Combined | None = None
    choice: BaseChoice | None = None
    notes: tuple[str, ...] = ()
    surviving: Mapping[str, Estimate] = field(default_factory=dict)  # share of the held-out gain, by way

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        found: dict[str, Any] = {"out": str(self.out), "notes": list(self.notes)}
        if self.result is not None:
            tensor, difference = self.result.worst
            found |= {"tensors": self.result.tensors, "changed": self.result.changed, "bytes": self.result.bytes}
            found["worst_rounding"] = {"tensor": tensor, "difference": difference}
        if self.combined is not None:
            found |= {"error": self.combined.error, "errors": dict(self.combined.errors)}
        if self.choice is not None:
            found["into"] = self.choice.to_mapping()
        if self.surviving:
            found["surviving_share"] = {way: encode(share) for way, share in self.surviving.items()}
        return found | {"passed": self.certificate.passed, "certificate": encode(self.certificate)}


@dataclass(frozen=True)
class ModelMerge:
    """One merge into a base: what goes in, and the steps that write and certify it."""

    opened: Sequence[Opened]
    plan: Combination | None  # None: the one adapter as it is
    out: Path
    dtype: Dtype
    into: DenseInto
    console: Console

    def run(self) -> Merged:
        first, plan, console = self.opened[0], self.plan, self.console
        evaluated = next((item for item in self.opened if item.run is not None), first)
        dataset = evaluated.dataset if evaluated.run else None  # missing rows are found before anything is written
        bases = both_bases(first)
        choice = choose_base(self.into, self.opened, bases, dataset, console)
        base = bases.of(choice.base)
        packed = choice.base == "dequantised" and bases.kind != "gguf"  # a .gguf file's numbers are had as a dense copy
        # ΔW is folded whole, as it is, where its method makes it dense and no rank was requested
        whole = plan if plan is not None and not plan.method.exact and plan.spec.rank is None else None
        combined = combined_with_progress(plan, console) if plan is not None and whole is None else None
        if whole is not None and packed:
            raise ConfigError("The dequantised base takes pairs only: give the changes a --rank, or merge --into original.")
        adapter = whole.outline() if whole else combined.adapter if combined else first.adapter
        said = dataclasses.replace(evaluated, adapter=adapter, folder=first.folder)
        said = said.over(base.config.model if packed else base.dense_spec)
        quantize, source = base.config.model.quantize, find_source(base.dense_spec, console.print)
        at_load = packed and quantize.method in AT_LOAD
        model = open_dequantised(source) if packed and not at_load else source
        said = fit_check(said, self._check(said, model, whole), self.out, console)
        ends = [] if whole is None else [path for path in whole.paths if path.rpartition(".")[2] in (*EMBEDDINGS, *HEADS)]
        if whole is not None and ends and said.residency.store is not None:  # which embedding and head may share
            raise ConfigError(
                f"{whole.method.name} changes {', '.join(ends)} by more than a pair, which is checked with models in memory: "
                "give the changes a --rank, or the check more --memory."
            )
        before = rounding_steps(source, quantize) if at_load else None
        spec = evaluated.config.evaluate
        with peak_said(said.residency, console), certified_whole(self.out, "The merged model") as made:
            result = self._write(model, adapter, whole, before, made)
            notes = tuple(note for note in (*result.notes, choice.why) if note)
            for note in notes:
                console.print(note, soft_wrap=True)
            with temporary_stores(said.residency):
                live, rows, effect, merged = self._sides(said, whole, dataset, made)
                certificate = certify_merge(live, merged, rows, out=self.out, spec=spec, effect=effect)
                certificate = with_note(of_model(certificate, made), *(item.note for item in self.opened))
            certificate.write(made / CERTIFICATE)
        conclude(certificate, console)
        return Merged(self.out, certificate, result, combined, choice, notes)

    def _check(self, opened: Opened, source: Path | Checkpoint, whole: Combination | None) -> CheckSize:
        """What the check of the merged model holds: two models, and a third one's store where the changes are no pairs."""
        longest = opened.config.data.max_tokens if opened.run else SAMPLED_TOKENS + 1
        texts = (0, 0) if opened.run else (SAMPLED_TEXTS, SAMPLED_TOKENS)
        needs = needs_of(source, opened.adapter, dtype=self.dtype, adapters=0 if whole is None else len(whole.adapters))
        size = size_of_merge(longest, needs.memory, texts)
        return replace(size, artefact=needs.disk, more_stores=0 if whole is None else 1)

    def _write(
        self, source: Path | Checkpoint, adapter: Adapter, whole: Combination | None, before: Roundings | None, made: Path
    ) -> MergeResult:
        console, first = self.console, self.opened[0]
        with progress_line(console, "folding") as step:
            result = merge_into(
                source, adapter, made, dtype=self.dtype, tokenizer=first.tokenizer, before=before, on_progress=step,
                change=whole.change if whole else None,
            )  # fmt: skip
        wrote = f"Wrote {result.tensors} tensors ({result.changed} changed, {result.bytes:,} bytes) to {self.out}"
        console.print(wrote, soft_wrap=True)
        if result.worst[0]:
            console.print(f"Rounding moved {result.worst[0]} most, by {result.worst[1]:.2g}", soft_wrap=True)
        return replace(result, folder=self.out)

    def _sides(
        self, opened: Opened, whole: Combination | None, dataset: Dataset | None, made: Path
    ) -> tuple[tuple[TextModel, str | None], Sequence[Example], Parity | None, TextModel]:
        """What should be, the rows to compare on, how far it is from the base where that is known, and what was written."""
        console, residency = self.console, opened.residency
        console.print("Comparing the written model with base and adapter.", soft_wrap=True)
        live = opened.text_model(console, dtype="float32", with_adapter=whole is None)
        if dataset is None:
            said = "No run, so no held-out rows: the two models are compared on texts that the base samples."
            console.print(said, soft_wrap=True)
        held_out, labels = (None, ()) if dataset is None else (dataset.held_out, dataset.labels)
        rows = rows_to_read(live, held_out, opened.config.data, labels, seed=opened.config.evaluate.seed)
        live.release()
        spec = ModelSpec(path=str(made), dtype="float32", products="float32", device=opened.config.model.device)
        merged = load_text_model(spec, say=console.print, store=residency.store, slots=residency.way.slots)
        merged.release()
        if whole is None:
            activate(live.model, NAME)
            return (live, NAME), rows, None, merged
        effect = compare_outputs((merged, None), (live, None), micro_batches(rows, MERGE_TOKENS), spec=opened.config.evaluate)
        live = _with_changes(live, whole, opened, console)
        rest = Adapter({}, whole.extras, whole.token_rows)
        if not rest.parameters:
            return (live, None), rows, effect, merged
        for token_rows in rest.token_rows.values():
            live.add_tokens(token_rows.tokens)
        add_adapter(live, rest, NAME)
        return (live, NAME), rows, effect, merged


def _with_changes(live: TextModel, whole: Combination, opened: Opened, console: Console) -> TextModel:
    """The dense base with the combined changes in its weights: in memory, or in a store that is made of it."""
    residency, changes = opened.residency, changes_of(live.model, whole)
    if residency.folder is None:
        for name, change in changes.items():  # a shared weight is split
            owner, _, leaf = name.rpartition(".")
            module = live.model.get_submodule(owner)
            setattr(module, leaf, nn.Parameter(change(module.get_parameter(leaf).detach()), requires_grad=False))
        return live
    apart = dataclasses.replace(residency, folder=residency.folder / "combined")
    return dataclasses.replace(opened, residency=apart).text_model(console, dtype="float32", with_adapter=False, changes=changes)


def combined_with_progress(plan: Combination, console: Console) -> Combined:
    """The combined adapter; prints how far each matrix is from the combined ΔW, where anything was compressed."""
    with progress_line(console, "combining") as step:
        combined = plan.combined(step)
    if not any(combined.errors.values()):
        console.print(f"{len(combined.errors)} matrices combined exactly")
        return combined
    show_matrices({path: (combined.adapter.pairs[path].rank, error) for path, error in combined.errors.items()}, console)
    console.print(f"Relative error over all matrices: {combined.error:.4f}")
    return combined


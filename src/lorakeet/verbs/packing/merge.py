"""`lorakeet merge --into packed`: an adapter into a quantised model that stays quantised, and how much of its gain survives.

Measured on the rows by which the run was evaluated: its test rows, or else its held-out ones. Nothing is chosen by them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from torch import nn

from lorakeet.data.chat import Encoder, Example
from lorakeet.data.prepare import Dataset
from lorakeet.errors import ConfigError, Problems, percent
from lorakeet.evaluate.certificate import Certificate, tolerance_check
from lorakeet.evaluate.compare import Scores, surviving_share
from lorakeet.evaluate.intervals import Estimate
from lorakeet.exporting.model_folder import write_repacked
from lorakeet.formats.identity import with_note
from lorakeet.kinds.terminal import show_certificate
from lorakeet.kinds.text.evaluate import TextEvaluator
from lorakeet.kinds.text.reply import ADAPTER, BASE
from lorakeet.merging.requantise import Requantised, round_to_nearest, round_with_feedback
from lorakeet.models.files.quantized import skeleton
from lorakeet.models.fuse import unfuse
from lorakeet.models.generate.score import row_losses
from lorakeet.models.inject import use_products
from lorakeet.models.modules import block_prefix, find, original_modules
from lorakeet.models.modules import replace as put
from lorakeet.models.placement import why_not_cuda
from lorakeet.models.spec import ModelSpec
from lorakeet.models.streaming.model import StreamedBlocks
from lorakeet.models.text.folded_weights import fold_layers
from lorakeet.models.text.gptq_blocks import LayerSource, check_tokens, inputs_of_widest, pack_blocks, weight_of
from lorakeet.models.text.load import read_config
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.packed_layout import PackedLayout, read_layout
from lorakeet.models.text.packed_store import StoredBases, open_packed, write_packed
from lorakeet.planning.fit import require_space_to_unpack
from lorakeet.planning.packed_merge import PackedMergeJob, calibration, fit_packed_merge, products_of, reloaded
from lorakeet.quant.construct import meta_base
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.certified import certified_whole, of_model
from lorakeet.runs.open_adapter import NAME, Opened
from lorakeet.runs.residency import peak_said, require_planned_attention, stream_closed, temporary_stores
from lorakeet.runs.terminal import WholeTable
from lorakeet.train.text.quantisation_aware import quantisation_aware_finish
from lorakeet.verbs.early.pushing_options import beside
from lorakeet.verbs.options import MergeOptions

CERTIFICATE = "certificate.json"
MICRO_TOKENS = 4096  # through the model at once, without gradients; every packed layer is unpacked once for them
NEAREST, FEEDBACK, FINISHED, WRITTEN = "rounded to the nearest", "error feedback", "error feedback, finished", "written"


def merge_packed(
    opened: Opened, dataset: Dataset | None, options: MergeOptions, console: Console
) -> tuple[Certificate, dict[str, Estimate]]:
    """Writes the quantised model with the adapter in it to `out`, loads it again and measures it on the held-out rows.

    Returns the certificate, which lies beside what was written, and the share of the gain that survives each way. The base is
    in memory as the run had it, and one block at a time in fp32; with a finish all of its layers are. Within the run's
    memory.budget the base is streamed if it does not fit, and so is what is made of it; the same bytes are written. Raises
    ConfigError, before anything is measured, for what cannot be merged so or does not fit, and DataError for too few calibration
    tokens; VerificationFailed if less than
    `options.keep` survives.
    """
    out, like = options.out, options.like or opened.config.model.path
    spec = ModelSpec(path=like, quantize=QuantSpec(method="gguf"))
    require_space_to_unpack(spec, opened.config.memory.limit, "--memory")  # a .gguf file whose layout is kept
    layout = read_layout(like, console.print)
    if dataset is None:
        raise ConfigError("--into packed needs a run: its training rows calibrate, its held-out rows measure. Name one.")
    if options.finish_steps and (why := why_not_cuda(opened.config.model.device)):  # a finish trains
        console.print(why, markup=False, soft_wrap=True)
    _check(opened, layout, options)
    job = PackedMergeJob(opened, dataset, layout, options.calibration_rows, options.finish_steps > 0, MICRO_TOKENS)
    plain = skeleton(read_config(layout.folder))
    check_tokens(job.rows, inputs_of_widest({path: cast(nn.Module, find(plain, path)) for path in layout.layers}))
    del plain
    opened = fit_packed_merge(job, out, console)
    residency = opened.residency
    with temporary_stores(residency), certified_whole(out, "The merged model") as made, peak_said(residency, console):
        solved, shares = _written(Merging(opened, dataset, layout, options, console), made)
        certificate = with_note(of_model(_certificate(layout, shares, options, solved), made), opened.note)
        certificate.write(beside(out, CERTIFICATE) if layout.file else made / CERTIFICATE)  # first: no file is without its own
    table = WholeTable("way", "share of the held-out gain", title="What survives of the adapter", title_justify="left")
    for system, share in shares.items():
        table.add_row(system, str(share))
    console.print(table)
    show_certificate(certificate, console)
    certificate.raise_if_failed()
    return certificate, shares


def _written(merge: Merging, out: Path) -> tuple[Mapping[str, Requantised], dict[str, Estimate]]:
    """Writes the model and measures every form of it; how each layer was packed, and the share that survives each way."""
    opened, layout, console = merge.opened, merge.layout, merge.console
    merge.measure_live()
    console.print("Rounding to the nearest, to compare with", soft_wrap=True)
    text = merge.rounded()
    with stream_closed(text):
        merge.measure(text, NEAREST)
    _drop(text)
    del text
    text, solved = merge.with_feedback()
    with stream_closed(text):
        merge.measure(text, FEEDBACK)
        text.release()
        bases: Mapping[str, PackedBase] = {path: found.base for path, found in solved.items()}
        if text.store is not None:  # of a streamed model each is read from its store when it is used
            bases = StoredBases(text.store, solved)
        if merge.options.finish_steps:
            bases = {**bases, **merge.finished(text, solved)}
        kept = sum(found.scales == "kept" for found in solved.values())
        scales = f"{kept} with the file's own scales, the others with fitted ones"
        console.print(f"{len(solved)} layers packed: {scales}.", soft_wrap=True)
        written = write_repacked(layout, bases, out, tokenizer=opened.tokenizer, waiting=opened.residency.waiting())
        console.print(f"Wrote {written:,} bytes", soft_wrap=True)
    outcome = {path: replace(found, base=meta_base(found.base), latent=None) for path, found in solved.items()}
    _drop(text)
    del text, solved, bases  # one model at a time
    gc.collect()
    with reloaded(out, layout, opened, console) as text:
        merge.measure(text, WRITTEN)
    return outcome, {system: merge.share(system) for system in merge.scores if system not in (BASE, ADAPTER)}


def _check(opened: Opened, layout: PackedLayout, options: MergeOptions) -> None:
    """Raises ConfigError with everything that keeps the adapter from being merged into that layout."""
    problems = Problems(f"The adapter cannot be merged into {layout.method} as it is")
    adapter, out = opened.adapter, options.out
    if layout.file is not None and out.suffix.lower() != ".gguf":
        problems.add(f"--out is {out.name}, but what is written is a .gguf file; give it a name that ends in .gguf.")
    if layout.file is None and out.suffix.lower() == ".gguf":
        problems.add(f"--out is {out.name}, but what is written is a folder; give it a name without .gguf.")
    elsewhere = [path for path in adapter.pairs if path not in layout.layers]
    if elsewhere:
        problems.add(f"It changes layers that are not packed there: {', '.join(elsewhere[:8])}. Merge --into original.")
    if adapter.extras or adapter.token_rows:
        problems.add("It has trained modules or token rows beside its pairs, which are not packed. Merge --into original.")
    biased = [path for path, pair in adapter.pairs.items() if pair.bias is not None and bool(pair.bias.any())]
    if biased:
        problems.add(f"Its pairs have biases, which packed layers have no place for: {', '.join(biased[:8])}.")
    if options.calibration_rows < 1 or options.finish_steps < 0 or not 0 < options.keep <= 1:
        problems.add("--calibration-rows is at least 1, --finish-steps at least 0, and --keep a share above 0, such as 0.95.")
    problems.raise_if_any()


@dataclass(frozen=True)
class Merging:
    """The steps of one merge into packed layers; models come and go with what each method returns."""

    opened: Opened
    dataset: Dataset
    layout: PackedLayout
    options: MergeOptions
    console: Console
    scores: dict[str, Scores] = field(default_factory=dict)  # of each system on the held-out rows

    def live(self) -> TextModel:
        gc.collect()  # a model before this one, whose parts know each other
        return self.opened.text_model(self.console, dtype="float32")

    def measure_live(self) -> None:
        """The run's base and its adapter, in fp32."""
        text = self.live()
        with stream_closed(text):
            require_planned_attention(self.opened.residency, text, self.opened.config.model.attention)
            for system in (BASE, ADAPTER):
                self.scores[system] = self._scores(text, system)

    def measure(self, text: TextModel, system: str) -> None:
        self.scores[system] = replace(self._scores(text, BASE), system=system)

    def share(self, system: str) -> Estimate:
        """The share of the held-out gain that a system keeps."""
        scores = self.scores
        return surviving_share(scores[BASE], scores[ADAPTER], scores[system], self.opened.config.evaluate)

    def _scores(self, text: TextModel, system: str) -> Scores:
        use_products(text.model, products_of(self.opened.config.model))
        encoder = Encoder(text.tokenizer, self.opened.config.data, self.dataset.labels)
        evaluated = self.dataset.test or self.dataset.held_out
        config = self.opened.config.changed(train={"micro_tokens": MICRO_TOKENS})
        evaluator = TextEvaluator(config, text, encoder, evaluated, self.console, NAME)
        return evaluator.scores(evaluator.fitting(), system)

    @staticmethod
    def _folded(text: TextModel, path: str) -> nn.Module:
        """That layer with the adapter folded in, plain numbers in fp32 in its place."""
        fold_layers(text.model, NAME, [path])
        return cast(nn.Module, find(text.model, path))

    def rounded(self) -> TextModel:
        """Every layer rounded to the nearest, with scales fitted to it; one at a time is plain numbers."""
        text = self.live()
        if text.streamed is not None:
            return self._repacked(text, self._nearest(text, text.streamed), "nearest")
        for path, read in self.layout.layers.items():
            layer = self._folded(text, path)
            put(text.model, path, PackedLinear(round_to_nearest(read(), weight_of(layer)), layer.bias))  # type: ignore[arg-type]
        return text

    def _nearest(self, text: TextModel, streamed: StreamedBlocks) -> Iterator[dict[str, PackedBase]]:
        """The layers of each block, rounded to the nearest while it is in memory."""
        _require_in_blocks(text, self.layout)
        prefix, count = block_prefix(text.model, text.family)
        for number in range(count):
            found: dict[str, PackedBase] = {}
            with torch.no_grad(), streamed.present(number, then=number):
                for path in self._of_block(f"{prefix}.{number}"):
                    standing = cast(nn.Module, find(text.model, path))
                    layer = self._folded(text, path)
                    found[path] = round_to_nearest(self.layout.layers[path](), weight_of(layer))
                    put(text.model, path, standing)
                    del layer
            text.release()
            yield found

    def _of_block(self, block: str) -> list[str]:
        return [path for path in self.layout.layers if path.startswith(f"{block}.")]

    def _repacked(self, text: TextModel, blocks: Iterator[Mapping[str, PackedBase]], name: str) -> TextModel:
        """The model that streams the packed `blocks` from a store of their own, in place of the streamed `text`."""
        path = cast(Path, self.opened.residency.store) / f"{name}.safetensors"
        with stream_closed(text):
            write_packed(text, blocks, path)
            return open_packed(text, path)

    def with_feedback(self) -> tuple[TextModel, dict[str, Requantised]]:
        """The model with every layer packed by error feedback on the calibration rows, and how each was.

        The packed weights are in the model; of one that streams they are in its store alone.
        """
        text = self.live()
        with stream_closed(text):
            return self._with_feedback(text)

    def _with_feedback(self, text: TextModel) -> tuple[TextModel, dict[str, Requantised]]:
        unfuse(text.model)
        _require_in_blocks(text, self.layout)
        rows, _ = calibration(self.opened, self.dataset, text.tokenizer, self.options.calibration_rows, self._finishes)
        solved: dict[str, Requantised] = {}

        def pack(path: str, *given: object) -> PackedBase:
            latent = self._finishes and path in self.opened.adapter.pairs
            found = round_with_feedback(self.layout.layers[path](), *given, latent=latent)  # type: ignore[arg-type]
            solved[path] = found if text.streamed is None else replace(found, base=meta_base(found.base))
            return found.base

        def layers_of(block: str) -> dict[str, nn.Module]:
            return {path: cast(nn.Module, find(text.model, path)) for path in self._of_block(block)}

        def packed() -> Iterator[dict[str, PackedBase]]:
            layers = LayerSource(layers_of, partial(self._folded, text))
            spill = partial(self.opened.residency.spilled_states, text)
            for block in pack_blocks(text, rows, pack, layers, keep=True, spill=spill):
                bar.update(task, total=block.count, completed=block.number + 1)
                yield block.layers

        with self._bar() as bar:
            task = bar.add_task(f"error feedback on {len(rows)} rows", total=None)
            if text.streamed is not None:
                return self._repacked(text, packed(), "packed"), solved
            for _ in packed():
                pass
        return text, solved

    @property
    def _finishes(self) -> bool:
        return self.options.finish_steps > 0

    def _bar(self) -> Bar:
        return Bar(console=self.console, transient=True, disable=not self.console.is_terminal)

    def finished(self, text: TextModel, solved: dict[str, Requantised]) -> Mapping[str, PackedBase]:
        """The layers after the finish where it lowers the loss on the calibration rows, which it does not train on; else none."""
        evaluated, rows = calibration(self.opened, self.dataset, text.tokenizer, self.options.calibration_rows, self._finishes)
        before = self._loss(text, evaluated)
        with self._bar() as bar:
            task = bar.add_task("finishing", total=self.options.finish_steps)
            bases = quantisation_aware_finish(
                text,
                solved,
                self.opened.adapter,
                rows,
                steps=self.options.finish_steps,
                spec=self.opened.config.train,
                products=products_of(self.opened.config.model),
                on_step=lambda step, loss: bar.update(task, completed=step, description=f"finishing, loss {loss:.4f}"),
            )
        after = self._loss(text, evaluated)
        self.measure(text, FINISHED)
        self.console.print(
            f"{self.options.finish_steps} steps through the quantiser moved the loss on {len(evaluated)} calibration rows from "
            f"{before:.4f} to {after:.4f}; {'they are kept' if after < before else 'error feedback alone is kept'}.",
            soft_wrap=True,
        )
        return bases if after < before else {}

    def _loss(self, text: TextModel, rows: Sequence[Example]) -> float:
        use_products(text.model, products_of(self.opened.config.model))  # layers that were packed since then are new
        losses, targets = row_losses(text, rows, micro_tokens=MICRO_TOKENS)
        return float(losses.sum() / targets.sum())


def _drop(text: TextModel) -> None:
    """Removes the store of a streamed model that was closed."""
    if text.store is not None:
        text.store.path.unlink()


def _require_in_blocks(text: TextModel, layout: PackedLayout) -> None:
    """Raises ConfigError for packed layers outside of the blocks, or where the model has none."""
    prefix, _ = block_prefix(text.model, text.family)
    known = {path for path, _ in original_modules(text.model)}
    outside = sorted(path for path in layout.layers if not path.startswith(f"{prefix}.") or path not in known)
    if outside:
        raise ConfigError(f"Packed layers outside of the blocks cannot be calibrated: {', '.join(outside[:8])}.")


def _certificate(
    layout: PackedLayout, shares: Mapping[str, Estimate], options: MergeOptions, solved: Mapping[str, Requantised]
) -> Certificate:
    """One check: the share of the held-out gain that the written model has, against the least that was requested."""
    out, written, nearest = options.out, shares[WRITTEN], shares[NEAREST]
    share = "surviving_share"
    detail = (
        f"{percent(written.value)} of the gain survives; rounding to the nearest would keep {percent(nearest.value)}. More "
        "calibration rows or --finish-steps 300 may keep more."
    )
    check = tolerance_check(
        "held-out gain in the quantised model", {share: written.value}, tolerance={share: options.keep}, floors=(share,),
        between=("base + adapter", f"{out.name}, loaded again"), n=written.n, detail=detail,
    )  # fmt: skip
    check = replace(check, estimates={"surviving_share": written})
    errors: dict[str, list[float]] = {}  # by which error feedback moved the outputs of the layers of each type
    for found in solved.values():
        settings = found.base.settings
        errors.setdefault(str(settings.get("type", settings["method"])), []).append(found.error)
    facts = {
        "layout": f"{layout.method} of {(layout.file or layout.folder).name}",
        "calibration rows": str(options.calibration_rows),
        "finish steps": str(options.finish_steps),
        **{f"share, {system}": str(share) for system, share in shares.items()},
        **{f"{len(own)} layers in {kind}": f"outputs moved by {percent(sum(own) / len(own), 2)}" for kind, own in errors.items()},
    }
    return Certificate(f"The merged {layout.method} model {out}", (check,), facts)

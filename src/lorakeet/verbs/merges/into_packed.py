"""`lorakeet merge --into packed`: an adapter into a quantised model that stays quantised, and how much of its gain survives.

Measured on the rows by which the run was evaluated: its test rows, or else its held-out ones. Nothing is chosen by them.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from rich.console import Console
from torch import nn

from lorakeet.data.prepare import Dataset
from lorakeet.errors import ConfigError, Problems, percent
from lorakeet.evaluate.certificate import CERTIFICATE, Certificate, tolerance_check
from lorakeet.evaluate.intervals import Estimate
from lorakeet.exporting.model_folder import write_repacked
from lorakeet.formats.identity import with_note
from lorakeet.kinds.terminal import conclude
from lorakeet.kinds.text.reply import ADAPTER, BASE
from lorakeet.merging.requantise import Requantised
from lorakeet.models.files.quantized import skeleton
from lorakeet.models.modules import find
from lorakeet.models.placement import why_not_cuda
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.gptq_blocks import check_tokens, inputs_of_widest
from lorakeet.models.text.load import read_config
from lorakeet.models.text.packed_layout import PackedLayout, read_layout
from lorakeet.models.text.packed_store import StoredBases
from lorakeet.planning.fit import require_space_to_unpack
from lorakeet.planning.packed_merge import PackedMergeJob, fit_packed_merge, reloaded
from lorakeet.quant.construct import meta_base
from lorakeet.quant.packed import PackedBase
from lorakeet.quant.spec import QuantSpec
from lorakeet.runs.certified import certified_whole, of_model
from lorakeet.runs.open_adapter import Opened
from lorakeet.runs.residency import peak_said, stream_closed, temporary_stores
from lorakeet.runs.terminal import WholeTable
from lorakeet.verbs.early.pushing_options import beside
from lorakeet.verbs.merges.packing_steps import FEEDBACK, MICRO_TOKENS, NEAREST, WRITTEN, Merging, drop_store
from lorakeet.verbs.options import MergeOptions


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
    conclude(certificate, console)
    return certificate, shares


def _written(merge: Merging, out: Path) -> tuple[Mapping[str, Requantised], dict[str, Estimate]]:
    """Writes the model and measures every form of it; how each layer was packed, and the share that survives each way."""
    opened, layout, console = merge.opened, merge.layout, merge.console
    merge.measure_live()
    console.print("Rounding to the nearest, to compare with", soft_wrap=True)
    text = merge.rounded()
    with stream_closed(text):
        merge.measure(text, NEAREST)
    drop_store(text)
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
    drop_store(text)
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

"""`lorakeet merge`: folds adapters into their base, or combines them into one, on disk, and certifies what was written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lorakeet.errors import ConfigError, Problems
from lorakeet.evaluate.certificate import CERTIFICATE
from lorakeet.formats.identity import with_note
from lorakeet.formats.peft import peft
from lorakeet.kinds.terminal import conclude
from lorakeet.merging.checkpoint import copy_along, tokenizer_files
from lorakeet.merging.combine import Combination, CombineSpec, combination
from lorakeet.runs.certified import identified
from lorakeet.runs.open_adapter import Opened, open_by_options
from lorakeet.runs.output_paths import require_new_place, writing
from lorakeet.train.durable import new_folder
from lorakeet.verbs.merges.into_model import Merged, ModelMerge, combined_with_progress
from lorakeet.verbs.merges.into_packed import merge_packed
from lorakeet.verbs.options import MergeOptions, non_default
from lorakeet.verification.merged_model import certify_combined

PACKED_ONLY = {"like", "calibration_rows", "finish_steps", "keep"}  # options of --into packed

def merge(options: MergeOptions, *, console: Console) -> Merged:
    """Writes the merged model, or the combined adapter, to `out`, checks it against what it should be, with a certificate beside.

    Raises VerificationFailed (exit code 3) naming the worst layer when the two differ by more than rounding explains; what was
    written stays for inspection, with a certificate that says so. ConfigError lists what keeps adapters from being combined.
    `memory`, or else the run's memory.budget, has to be enough for the check, or nothing is written (ConfigError).
    With `into` "packed" the model stays quantised (verbs/merges/into_packed); the options of PACKED_ONLY are for that.
    """
    paths, out, to = options.runs_or_adapters, options.out, options.to
    require_new_place(out)
    if out.suffix.lower() == ".gguf" and options.into != "packed":
        instead = f"For a GGUF file: lorakeet export {paths[0]} --out {out}"
        raise ConfigError(f"--out is {out.name}, but a folder is written. {instead}")
    opened = _opened(paths, options, console)
    density, seed = options.density, options.seed
    spec = CombineSpec(options.method, tuple(options.weights), options.rank, density, seed)
    alone = len(opened) == 1 and spec == CombineSpec(density=density, seed=seed)  # no option combines or compresses
    if options.into == "packed":
        if not alone or to == "adapter" or options.dtype != "same":
            raise ConfigError(
                "--into packed takes one run as it is: no --to adapter, --weights, --rank, --method or --dtype. Combine first "
                "(lorakeet merge A B --to adapter), then merge the result."
            )
        dataset = opened[0].dataset if opened[0].run else None
        certificate, surviving = merge_packed(opened[0], dataset, options, console)
        return Merged(out, certificate, surviving=surviving)
    if PACKED_ONLY & non_default(options).keys():
        raise ConfigError("--like, --calibration-rows, --finish-steps and --keep go with --into packed; add it or leave them.")
    if to == "auto":
        to = "model" if len(opened) == 1 else "adapter"
    adapters = {name: item.adapter for name, item in zip(paths, opened, strict=True)}
    plan = None if alone and to == "model" else combination(adapters, spec)
    if plan is not None:
        shares = ", ".join(f"{weight:g} · {name}" for name, weight in zip(adapters, plan.weights, strict=True))
        console.print(f"{plan.method.name}: {shares}", soft_wrap=True)
        for note in plan.notes:
            console.print(note, soft_wrap=True)
    if to == "adapter" and options.memory is not None:
        raise ConfigError(
            f"--memory is {options.memory}, but adapters are combined in the memory of their matrices, without any model. Leave "
            "it out, or merge --to model."
        )
    if to == "adapter" and plan is not None:
        return _into_adapter(plan, opened, out, console)
    return ModelMerge(opened, plan, out, options.dtype, options.into, console).run()


def _opened(paths: Sequence[str], options: MergeOptions, console: Console) -> list[Opened]:
    """Every adapter; ConfigError unless they name one base, where none is given."""
    problems = Problems("These adapters cannot be merged together")
    twice = sorted({path for path in paths if list(paths).count(path) > 1})
    if twice:
        problems.add(f"{', '.join(twice)} is named more than once; name each adapter once and give it a weight.")
    problems.raise_if_any()
    opened = [open_by_options(path, options, console) for path in paths]
    bases = {item.config.model.path for item in opened}
    if len(bases) > 1:
        named = "; ".join(f"{path} on {item.config.model.path}" for path, item in zip(paths, opened, strict=True))
        problems.add(f"The adapters were trained on different bases: {named}. If they are the same, name it with --base.")
    problems.raise_if_any()
    return opened


def _into_adapter(plan: Combination, opened: Sequence[Opened], out: Path, console: Console) -> Merged:
    """Writes the combined adapter in PEFT's layout, reads it again, and checks every matrix against the combined ΔW."""
    first, notes = opened[0], [item.note for item in opened]
    if budget := first.config.memory.budget:
        said = f"memory.budget {budget} does not apply here: no model is loaded, and adapters are in memory as they are."
        console.print(said, soft_wrap=True)
    combined = combined_with_progress(plan, console)
    with writing(f"The adapter {out}", "Free some space, or choose another --out."), new_folder(out) as folder:
        peft.write(combined.adapter, folder)
        if first.tokenizer is not None:
            copy_along(tokenizer_files(first.tokenizer), folder)
        certificate = identified(certify_combined(plan, combined, peft.read(folder), out=out), folder, first.trained_model)
        certificate = with_note(certificate, *notes)
        certificate.write(folder / CERTIFICATE)
    console.print(f"Wrote an adapter of {combined.adapter.parameters:,} parameters to {out}", soft_wrap=True)
    conclude(certificate, console)
    return Merged(out, certificate, combined=combined, notes=plan.notes)


"""`lorakeet convert`: an adapter in another program's format, checked by reading back what was written. Loads no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lorakeet.config import read_run
from lorakeet.core.adapter import Adapter
from lorakeet.disk import written_whole
from lorakeet.errors import ConfigError, VerificationFailed
from lorakeet.formats.compare import LIMIT, AdapterDifference, compare_adapters
from lorakeet.formats.components import with_components, without_component
from lorakeet.formats.compress import CompressionTarget, fold_dora
from lorakeet.formats.detect import FORMATS, Found, detect, format_of, read_certified, read_found
from lorakeet.formats.files.base_model import CONFIG, BaseModel, check_fits, open_base
from lorakeet.formats.files.whole_output import require_new
from lorakeet.formats.peft.renamed_targets import model_type_of
from lorakeet.models.files.source import find_source, on_this_machine
from lorakeet.runs.certified import require_own_base
from lorakeet.runs.output_paths import require_place, writing
from lorakeet.train.run import RunFolder
from lorakeet.verbs.options import ConvertOptions

Target = Literal["peft", "kohya", "diffusers", "gguf", "mlx"]
_SHOWN = 8  # pairs listed one by one


@dataclass(frozen=True)
class Converted:
    """What was read and written, and by how much the two differ."""

    source: Found
    target: Target
    out: Path
    adapter: Adapter
    difference: AdapterDifference
    notes: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "from": self.source.format,
            "evidence": self.source.evidence,
            "to": self.target,
            "out": str(self.out),
            "pairs": len(self.adapter.pairs),
            "parameters": self.adapter.parameters,
            "ranks": {str(rank): count for rank, count in sorted(_ranks(self.adapter).items())},
            "scales": {f"{scale:g}": count for scale, count in sorted(_scales(self.adapter).items())},
            "largest_relative_difference": self.difference.worst,
            "allowed": LIMIT,
            "notes": list(self.notes),
        }


def convert(options: ConvertOptions, *, console: Console) -> Converted:
    """Writes the adapter at `source` to `out` in the format `to`, reads it back, and compares every effective ΔW.

    Without `base` a GGUF adapter of a run takes that run's, if it is on this machine; which one is printed.
    `rank` and `error` allow what is not a pair (LoHa, LoKr, DoRA in GGUF) to be compressed to one. ConfigError: `out` exists,
    or the target cannot hold the adapter (tensors named). DataError: `source` is damaged. VerificationFailed: what was read back
    differs by more than 1e-6; nothing is then left at `out`.
    """
    source, out, to = options.source, options.out, options.to
    compression = CompressionTarget(options.rank, options.error)
    _check_out(out, to)
    notes: list[str] = []

    def say(text: str) -> None:
        notes.append(text)
        console.print(text, soft_wrap=True)

    if options.base is not None:
        known: BaseModel | None = open_base(options.base)
    else:
        known = _base_of_run(source, say) if to == "gguf" else None
    found = detect(source)
    say(f"{found.path} is {found.format}: {found.evidence}")
    adapter, _ = read_certified(source, base=known, compression=compression, uncertified=options.uncertified, say=say)
    require_own_base(source, options.base, uncertified=options.uncertified, say=say)
    adapter = with_components(adapter)
    if known is not None:
        check_fits(adapter, known)
        adapter = replace(adapter, metadata={**adapter.metadata, **model_type_of(known.config())})
    if to == "gguf" and compression.given and any(pair.magnitude is not None for pair in adapter.pairs.values()):
        adapter = fold_dora(adapter, known, compression, say)
    elif compression.given and found.format != "lycoris":
        raise ConfigError(
            f"--rank and --error say how what is no pair becomes one, but every change in {found.path} is a pair, which {to} "
            f"takes as it is. Leave them out; lorakeet merge {source} --to adapter --rank N --out OUT cuts pairs."
        )
    with writing(str(out), "Free some space or choose another place for OUT."), written_whole(out) as made:
        written = without_component(adapter) if to == "peft" else adapter
        format_of(to).write(written, made, base=known, say=say)
        read = detect(made)
        if read.format != to:
            raise VerificationFailed(f"What was written as {to} looks like {read.format} ({read.evidence}). Please report this.")
        back = with_components(read_found(read, base=known, say=lambda _: None))
        difference = compare_adapters(adapter, back)
        if not difference.equal:
            why = list(difference.problems[:5])
            if difference.worst > LIMIT:
                by = f"{difference.worst:.2g} relative (allowed {LIMIT:g})"
                why.append(f"the effective ΔW of {difference.path} differs by {by}")
            said = "; ".join(why)
            raise VerificationFailed(f"What was written is not the adapter that was read, so {out} was not kept: {said}.")
    if gone := sorted(adapter.pairs.keys() - back.pairs.keys()):
        say(f"{len(gone)} pairs that change nothing are not in {out}, where others share their matrices: {', '.join(gone[:3])}.")
    result = Converted(found, to, out, adapter, difference, tuple(notes))
    _show(result, console)
    return result


def _base_of_run(source: Path, say: Callable[[str], None]) -> BaseModel | None:
    """The base that the run of `source` was trained on; None if `source` belongs to no run, or the base is not on this machine.

    Of a quantised base only the configuration is read, since its weights have other names.
    """
    run = RunFolder.around(source)
    model = None if run is None else read_run(run.config).model
    local = None if model is None else on_this_machine(model)
    if run is None or model is None or local is None:
        return None
    folder = local if local.is_dir() else find_source(model, say)
    base = open_base(folder)
    if "quantization_config" in base.config():
        base = open_base(folder / CONFIG)
    say(f"The base is {model.path}, on which {run.path} was trained; --base would name another one.")
    return base


def _check_out(out: Path, to: Target) -> None:
    require_new(out)
    suffix = format_of(to).SUFFIX  # empty for a folder
    if suffix and out.suffix != suffix:
        raise ConfigError(f"OUT is {out}, but {to} is a single file; expected a name like {out.name}{suffix}.")
    if not suffix and out.suffix in {one.SUFFIX for one in FORMATS if one.SUFFIX}:
        raise ConfigError(f"OUT is {out}, but {to} is a folder; expected a name without {out.suffix}.")
    require_place(out)


def _ranks(adapter: Adapter) -> Counter[int]:
    return Counter(pair.rank for pair in adapter.pairs.values())


def _scales(adapter: Adapter) -> Counter[float]:
    return Counter(float(f"{pair.scale:.6g}") for pair in adapter.pairs.values())


def _show(result: Converted, console: Console) -> None:
    """What was written: tensors, ranks and scales, and the check."""
    pairs = result.adapter.pairs
    for path in list(pairs)[:_SHOWN]:
        pair = pairs[path]
        console.print(f"  {path}: rank {pair.rank}, scale {pair.scale:g}, {pair.kind}", soft_wrap=True)
    if len(pairs) > _SHOWN:
        console.print(f"  … and {len(pairs) - _SHOWN} more pairs", soft_wrap=True)
    ranks = ", ".join(f"{rank} ({count} pairs)" for rank, count in sorted(_ranks(result.adapter).items()))
    scales = ", ".join(f"{scale:g} ({count})" for scale, count in sorted(_scales(result.adapter).items()))
    console.print(f"Wrote {len(pairs)} pairs to {result.out} as {result.target}: rank {ranks}; scale {scales}", soft_wrap=True)
    console.print(
        f"Read back: the effective ΔW of all {len(pairs)} pairs equal to {result.difference.worst:.1e} relative "
        f"(allowed {LIMIT:g}; worst {result.difference.path or 'none'})",
        soft_wrap=True,
    )

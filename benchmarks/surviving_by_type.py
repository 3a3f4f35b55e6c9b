"""Claim: of what an adapter gained, 95 % and more survive in the tensors of each type that a K-quant mixes.

    python benchmarks/surviving_by_type.py RUN [--layout q4_k_m] [--calibration-rows 192] [--weights-only] [--work DIR]

A K-quant gives some tensors Q4_K, others Q6_K, and those whose rows are no multiple of 256 (most of SmolLM2's, 576 wide) fall
back to Q5_0 or Q8_0. For each type alone: the layers of that type as `lorakeet merge --into packed` writes them, all others as
they are in fp32 with the adapter, and the share of the gain that is left; rounded to the nearest, and by error feedback (solved
once, for the whole file). Beside it what the numbers themselves hold of ΔW: ⟨Q(W+ΔW) − Q(W), ΔW⟩ / ‖ΔW‖² over the layers of
the type, Q(W) being the file's own numbers; with --weights-only that alone, without a verdict. Shares are no timings: a busy
machine does not change them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness.machine import origin, write_result
from rich.console import Console
from surviving_gain import LAYOUTS, parser_for, part, shown, target
from torch import Tensor

from lorakeet.data.prepare import load_dataset
from lorakeet.evaluate.values import encode
from lorakeet.merging.requantise import Requantised, round_to_nearest
from lorakeet.models.modules import find, replace
from lorakeet.models.text.folded_weights import fold_layers
from lorakeet.models.text.gptq_blocks import weight_of
from lorakeet.models.text.packed_layout import PackedLayout, read_layout
from lorakeet.quant.packed import PackedBase, PackedLinear
from lorakeet.runs.open_adapter import NAME, open_adapter
from lorakeet.verbs.options import MergeOptions
from lorakeet.verbs.packing.merge import FEEDBACK, NEAREST, Merging

ASKED = 0.95
WHOLE = "all of them"


@dataclass
class _Kept:
    """What the numbers of some layers hold of ΔW, in sums over layers."""

    moved: float = 0.0  # ⟨Q(W+ΔW) − Q(W), ΔW⟩
    off: float = 0.0  # ‖Q(W+ΔW) − (W+ΔW)‖²
    change: float = 0.0  # ‖ΔW‖²

    def add(self, packed: Tensor, before: Tensor, wanted: Tensor, change: Tensor) -> None:
        self.moved += float(((packed - before).double() * change.double()).sum())
        self.off += float((packed - wanted).double().square().sum())
        self.change += float(change.double().square().sum())

    def to_mapping(self) -> dict[str, float]:
        return {"share_of_change": self.moved / self.change, "rounding_over_change": (self.off / self.change) ** 0.5}


def kind_of(base: PackedBase) -> str:
    return str(base.settings.get("type", base.settings["method"]))


def by_type(layout: PackedLayout) -> dict[str, list[str]]:
    """The paths of the packed layers of each type, most layers first."""
    found: dict[str, list[str]] = {}
    for path, read in layout.layers.items():
        found.setdefault(kind_of(read()), []).append(path)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


@torch.no_grad()
def measure(
    merging: Merging, solved: Mapping[str, Requantised], paths: Sequence[str], name: str, *, gain: bool
) -> dict[str, Any]:
    """The part of the change that the layers at `paths` keep, for each way of rounding; the share of the gain if requested."""
    found: dict[str, Any] = {"layers": len(paths), "numbers": 0, "surviving_share": {}}
    for way in (NEAREST, FEEDBACK):
        text, kept = merging.live(), _Kept()
        fold_layers(text.model, NAME, list(merging.layout.layers))
        pairs = merging.opened.adapter.pairs
        for path in paths:
            layer: Any = find(text.model, path)
            like, wanted = merging.layout.layers[path](), weight_of(layer).float()
            base = round_to_nearest(like, wanted) if way == NEAREST else solved[path].base
            if path in pairs:
                kept.add(base.dense(), like.dense(), wanted, pairs[path].delta())
            replace(text.model, path, PackedLinear(base, layer.bias))
            found["numbers"] += wanted.numel() if way == NEAREST else 0
        found[way] = kept.to_mapping()
        if gain:
            merging.measure(text, f"{name}, {way}")
            found["surviving_share"][way] = encode(merging.share(f"{name}, {way}"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_for((__doc__ or "").splitlines()[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="q4_k_m")
    parser.add_argument("--weights-only", action="store_true", help="what the numbers hold of ΔW, without the gain")
    given = parser.parse_args(arguments)
    about, console, opened = origin(), Console(), open_adapter(given.run)
    with TemporaryDirectory() as name:
        work = given.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        layout = read_layout(str(target(opened, given.layout, work, console)), console.print)
        options = MergeOptions((), out=work, into="packed", calibration_rows=given.calibration_rows)
        merging = Merging(opened, load_dataset(opened.config.data), layout, options, console)
        if not given.weights_only:
            merging.measure_live()
        text, solved = merging.with_feedback()
        del text
        kinds = {**by_type(layout), WHOLE: list(layout.layers)}
        note = work / "by_type.json"
        gain = not given.weights_only
        key = f"{given.layout}, {given.calibration_rows} rows, {'gain' if gain else 'weights'}, "
        found = {
            kind: part(note, key + kind, lambda kind=kind, paths=paths: measure(merging, solved, paths, kind, gain=gain))
            for kind, paths in kinds.items()
        }
    print(f"{'type':12} {'layers':>6} {'numbers':>12} {'nearest':>26} {'ΔW':>6} {'error feedback':>26} {'ΔW':>6}")
    for kind, values in found.items():
        gains = {way: shown(share) for way, share in values["surviving_share"].items()}
        shares = [f"{gains.get(way, ''):>26} {values[way]['share_of_change']:>6.2f}" for way in (NEAREST, FEEDBACK)]
        print(f"{kind:12} {values['layers']:>6} {values['numbers']:>12,} {' '.join(shares)}")
    kept = all(values["surviving_share"][FEEDBACK]["value"] >= ASKED for values in found.values()) if gain else None
    if gain:
        print(f"at least {ASKED:.0%} of the gain survives in every type: {'yes' if kept else 'NO'}")
    content = {"layout": given.layout, "calibration_rows": given.calibration_rows, "types": found, "claim_kept": kept}
    print(f"Written: {write_result(f'surviving_by_type_{given.layout}', content, seed=0, about=about, folder=given.results)}")
    return 1 if kept is False else 0


if __name__ == "__main__":
    sys.exit(main())

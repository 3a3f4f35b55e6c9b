"""Pairs with more rank than their matrix has directions: said once where an adapter is read, with what cuts them without loss."""

from __future__ import annotations

import math

from lorakeet.core.adapter import Adapter, Pair


def surplus_rank(adapter: Adapter, named: str) -> str:
    """One sentence on every pair whose rank is above min(in, out), by the shapes of its A and B; empty where there is none.

    Such a pair computes what it should, and PEFT and kohya write them for small layers, so it is read and converted as it is. A
    Plan is refused instead (models/targets), since there the parameters that do nothing are yet to be trained.
    """
    groups: dict[tuple[int, int, int], list[str]] = {}
    for path, pair in adapter.pairs.items():
        out, width = _sizes(pair)
        if pair.rank > min(out, width):
            groups.setdefault((pair.rank, out, width), []).append(path)
    if not groups:
        return ""
    parts = (f"{', '.join(paths)} (rank {rank}, {out} × {width})" for (rank, out, width), paths in groups.items())
    largest = max(pair.rank for pair in adapter.pairs.values())
    base = "" if adapter.base else " --base MODEL"
    return (
        f"{named} has a rank larger than the layer in {sum(map(len, groups.values()))} of {len(adapter.pairs)} pairs: "
        f"{'; '.join(parts)}. A matrix has no more directions than its shorter side, so a part of these numbers does nothing. "
        "What the pairs compute is right. Cut them without loss: "
        f"lorakeet merge {named} --to adapter --rank {largest}{base} --out OUT"
    )


def _sizes(pair: Pair) -> tuple[int, int]:
    """(out, in) of the matrix that the pair changes; kernels belong to in, and experts are matrices by themselves."""
    if pair.kind == "experts":
        return pair.B.shape[1], pair.A.shape[2]
    return pair.B.shape[0], math.prod(pair.A.shape[1:])

"""Why an artefact is not the trained adapter: the usual mistakes tried one by one, and the one that explains what was seen.

If stored weights can be read, they show it: every matrix with c times its change is a wrong scale, q and k alone a permutation
of the wrong factor, some matrices without any change names that were not found, all of them moved elsewhere another adapter.
Else the live model is made wrong on purpose, in one way after another, and the mistake whose logits are nearest is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lorakeet.core.lowrank import LoraPair
from lorakeet.evaluate.parity import kl_lower_bound
from lorakeet.exporting.merged_tensors import StoredTensor
from lorakeet.formats.gguf import permute, unpermute
from lorakeet.models.modules import adapted_layers
from lorakeet.verification.artefact import InTorch

_NEAR = 0.05  # shares that differ by less are one scale
_MOSTLY = 0.5  # of a change
LIKELY_CAUSE = "Likely cause"  # how a sentence on a found mistake begins
_EXPLAINED = 0.1  # a mistake explains the difference when it leaves at most this much of it
_Q_K = ("q_proj", "k_proj", "attn_q", "attn_k")


def cause_from_weights(stored: Mapping[str, StoredTensor], live: InTorch, *, few_bits: bool = False) -> str:
    """A sentence with the likely cause, or nothing where the changed matrices all hold their change.

    `few_bits`: the matrices are stored in so few that a change may be less than a step of them.
    """
    changed = {name: found for name, found in stored.items() if not math.isnan(found.share) and found.moved >= 0}
    shares = np.array([found.share for found in changed.values()])
    if not len(shares) or not np.isfinite(shares).all():
        return ""
    off = {name: found for name, found in changed.items() if abs(found.share - 1) > _NEAR}
    if not off:
        return ""
    middle = float(np.median(shares))
    if few_bits and max(middle, float(np.median([found.moved for found in changed.values()]))) < _MOSTLY:
        return (
            f"{LIKELY_CAUSE}: the change is rounded away; of it, the matrices hold {middle:.2g}. The base's weights already have "
            "few bits, and a change of less than a step of them ends where it began. Next step: export it with --quant f16."
        )
    absent = [name for name, found in off.items() if abs(found.share) <= _NEAR and found.moved <= _NEAR]
    if len(absent) == len(changed):
        return f"{LIKELY_CAUSE}: the adapter is not in it at all; these are the base's weights."
    if absent and len(absent) == len(off):
        return f"{LIKELY_CAUSE}: {len(absent)} matrices were not found and are the base's, such as {absent[0]}."
    together = float(np.abs(shares - middle).max()) <= _NEAR * max(1.0, abs(middle))
    if len(off) == len(changed) and together and abs(middle) > _NEAR:
        return f"{LIKELY_CAUSE}: the scale; every matrix holds {middle:.4g} times the change.{_scale_words(middle, live)}"
    if all(any(part in name for part in _Q_K) for name in off):
        cause = "the permutation of q and k; only their matrices are wrong (rows of B must be permuted, A must not)."
    else:
        cause = "another adapter, or an earlier state of this one; what is in the matrices is not this adapter's change."
    return f"{LIKELY_CAUSE}: {cause}"


def _scale_words(found: float, live: InTorch) -> str:
    pair = next((held for _, held in _pairs(live)), None)
    if pair is None:
        return ""
    rank = pair.A.shape[-2]
    meanings = {
        1 / pair.scale: "alpha was ignored",
        1 / rank: "alpha/rank was divided by the rank once more",
        math.sqrt(rank): "rsLoRA's √rank was used for alpha/rank",
        1 / math.sqrt(rank): "alpha/rank was used for rsLoRA's alpha/√rank",
        pair.scale: "the scale was applied twice",
    }
    near = [words for value, words in meanings.items() if math.isclose(value, found, rel_tol=_NEAR)]
    return f" That is what comes out when {' or '.join(near)}." if near else ""


def cause_from_logits(live: InTorch, ids: Sequence[int], theirs: Tensor) -> str:
    """A sentence with the mistake whose logits on `ids` are nearest to `theirs` (tokens, vocabulary); nothing if none is near."""

    def distance(ours: Tensor) -> float:
        width = min(ours.shape[1], theirs.shape[1])
        p, q = ours[:, :width].double().log_softmax(-1), theirs[:, :width].double().log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    return _likeliest(live, ids, distance)


def cause_from_reported(live: InTorch, ids: Sequence[int], reported: Mapping[int, Mapping[int, float]]) -> str:
    """As `cause_from_logits`, if `theirs` has only some log-probabilities: by place of `ids`, by token id."""

    def distance(ours: Tensor) -> float:
        return float(np.mean([kl_lower_bound(ours[place].log_softmax(-1), known) for place, known in reported.items()]))

    return _likeliest(live, ids, distance)


def _likeliest(live: InTorch, ids: Sequence[int], distance: Callable[[Tensor], float]) -> str:
    now = distance(live.logits(ids))
    tried: dict[str, float] = {}
    for words, logits in _mistakes(live, ids):
        tried[words] = min(distance(logits), tried.get(words, math.inf))
    words = min(tried, key=lambda one: tried[one], default="")
    if not words or not tried[words] <= _EXPLAINED * now:
        return "None of the usual mistakes (scale, missing layer, permutation, begin token, no adapter) explains it."
    return f"{LIKELY_CAUSE}: {words}; it leaves {tried[words]:.2g} of {now:.2g} nats of KL."


def _mistakes(live: InTorch, ids: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """(the mistake in words, the live model's logits with it)."""
    yield "the adapter is not applied", InTorch(live.text, None, "base").logits(ids)
    first = next((pair for _, pair in _pairs(live)), None)
    if first is not None:
        rank = first.A.shape[-2]
        factors = {1 / first.scale, math.sqrt(rank), 1 / math.sqrt(rank), first.scale, 0.5, 2.0} - {1.0}
        for factor in sorted(factors):
            with changed_pairs(live, lambda _, pair, factor=factor: pair.B.mul_(factor)):  # type: ignore[misc]
                yield f"the scale is {factor:.4g} times what it should be", live.logits(ids)
    bos = live.text.tokenizer.bos_token_id
    if bos is not None:
        yield "a begin token more stands before the prompt", live.logits([bos, *ids])[1:]
    config = live.text.model.config.get_text_config()
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    with changed_pairs(live, lambda path, pair: _permute_a(pair, heads.get(path.rpartition(".")[2], 0))):
        yield "A of q and k is permuted instead of B", live.logits(ids)
    for order in (permute, unpermute):
        with changed_pairs(live, lambda path, pair, order=order: _reorder_b(pair, heads.get(path.rpartition(".")[2], 0), order)):  # type: ignore[misc]
            yield "B of q and k has the row order of another format", live.logits(ids)
    with changed_pairs(live, lambda path, pair: _mix_up(pair, heads.get(path.rpartition(".")[2], 0))):
        yield "A of q and k is permuted instead of B", live.logits(ids)
    for block in sorted({numbered_part(path) for path, _ in _pairs(live)} - {""}):
        with changed_pairs(live, lambda path, pair, block=block: pair.B.mul_(0.0 if numbered_part(path) == block else 1.0)):  # type: ignore[misc]
            yield f"the pairs of {block} are missing", live.logits(ids)


def _pairs(live: InTorch) -> list[tuple[str, LoraPair]]:
    name = live.adapter or ""
    held = ((path, layer.adapters[name]) for path, layer in adapted_layers(live.text.model) if name in layer.adapters)
    return [(path, pair) for path, pair in held if isinstance(pair, LoraPair)]


def numbered_part(path: str) -> str:
    """The path of the numbered part that holds a module, such as model.layers.3; empty if there is none."""
    parts = path.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


@contextmanager
def changed_pairs(live: InTorch, change: Callable[[str, LoraPair], object]) -> Iterator[None]:
    """The live adapter with every pair changed in place; as it was afterwards."""
    kept = {path: (pair.A.detach().clone(), pair.B.detach().clone()) for path, pair in _pairs(live)}
    with torch.no_grad():
        try:
            for path, pair in _pairs(live):
                change(path, pair)
            yield
        finally:
            for path, pair in _pairs(live):
                pair.A.copy_(kept[path][0])
                pair.B.copy_(kept[path][1])


def _permute_a(pair: LoraPair, heads: int) -> None:
    """What an importer does that takes A for the factor with the rows: its columns move in the way of heads."""
    if heads and pair.A.shape[1] % (2 * heads) == 0:
        pair.A.copy_(permute(pair.A.t().contiguous(), heads).t())


def _reorder_b(pair: LoraPair, heads: int, order: Callable[[Tensor, int], Tensor]) -> None:
    if heads and pair.B.shape[0] % (2 * heads) == 0:
        pair.B.copy_(order(pair.B.detach().clone(), heads))


def _mix_up(pair: LoraPair, heads: int) -> None:
    """A permuted in a file whose reader expects it of B, which it then takes apart again: B's rows end up moved as well."""
    _permute_a(pair, heads)
    _reorder_b(pair, heads, unpermute)

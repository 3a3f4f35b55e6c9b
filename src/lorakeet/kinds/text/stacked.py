"""A new adapter on top of an earlier one (lora.on_top_of): the earlier one stays to the bit, and the result is the sum of both.

For a weight W with an earlier pair B₁·A₁ of scale s₁, the new pair B₂·A₂ of scale s₂ is trained as the last terms of one pair:

    s₁·B₁·A₁ + s₂·B₂·A₂ = s₂·[B₁·s₁/s₂, B₂]·[A₁; A₂]

So ranks add up, and every verb reads an adapter like any other. The gradients of the first terms are set to 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from re import escape

import torch

from lorakeet.config import RunConfig
from lorakeet.core.adapter import Adapter, Pair
from lorakeet.core.math import Kind, alpha_for, scale_of, term_dims
from lorakeet.core.plan import Plan
from lorakeet.core.spec import SUM, pattern_value
from lorakeet.errors import ConfigError, Problems
from lorakeet.evaluate.certificate import Check, tolerance_check
from lorakeet.formats.detect import read_certified
from lorakeet.kinds.text.continued import with_continued
from lorakeet.models.fits import plan_of
from lorakeet.models.inject import trained_parameters
from lorakeet.models.text.model import TextModel
from lorakeet.train.task import KeptTerms

ROUNDED = 1e-6  # by which share B₁ may change when its scale becomes that of the new pair


def with_earlier(config: RunConfig) -> RunConfig:
    """The settings with what an earlier adapter gives: targets and ranks if it is trained further, ranks if it stays below."""
    return with_stacked(with_continued(config))


def with_stacked(config: RunConfig) -> RunConfig:
    """The settings with the ranks and alphas of both adapters together, where lora.on_top_of names an earlier one.

    Settings that have them already, such as those of a resumed run, stay. Raises ConfigError for an adapter that has more than
    plain pairs; DataError if it cannot be read.
    """
    given, lora = config.lora.on_top_of, config.lora
    if given is None:
        return config
    own = replace(
        lora,
        rank_pattern={key: value for key, value in lora.rank_pattern.items() if not key.endswith(SUM)},
        alpha_pattern={key: value for key, value in lora.alpha_pattern.items() if not key.endswith(SUM)},
    )
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, (below, _) in earlier_facts(config).pairs.items():
        rank = int(pattern_value(own.rank_pattern, path) or own.rank)
        scale = scale_of(pattern_value(own.alpha_pattern, path) or own.alpha, rank, own.scale_rule)
        key = escape(path) + SUM
        ranks[key] = below + rank
        alphas[key] = alpha_for(scale, ranks[key], own.scale_rule)
    return replace(
        config,
        lora=replace(own, rank_pattern={**ranks, **own.rank_pattern}, alpha_pattern={**alphas, **own.alpha_pattern}),
    )


@dataclass(frozen=True)
class EarlierFacts:
    """What a run needs of an earlier adapter but its numbers: `pairs` is the rank and kind of each, `digest` the hash of all."""

    pairs: Mapping[str, tuple[int, Kind]]
    digest: str

    @property
    def kept_terms(self) -> KeptTerms:
        """The terms that stay as they are: those of the earlier adapter, which come first."""
        return {
            f"{path}.{which}": (dim, rank)
            for path, (rank, kind) in self.pairs.items() for which, dim in zip("AB", term_dims(kind), strict=True)
        }  # fmt: skip


def earlier_facts(config: RunConfig) -> EarlierFacts:
    """Of lora.on_top_of, read once for each state of its files. ConfigError where no adapter can be trained on top of it."""
    path = Path(str(config.lora.on_top_of))
    files = [path] if path.is_file() else sorted(file for place in (path, path / "adapter") for file in place.glob("*"))
    stats = [(file, file.stat()) for file in files]
    state = tuple((str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in stats)
    return _facts(path, state, config.uncertified)


@lru_cache(maxsize=2)
def _facts(path: Path, state: tuple[tuple[str, int, int, int], ...], uncertified: bool) -> EarlierFacts:
    adapter, _ = read_certified(path, uncertified=uncertified)
    pairs = {name: (pair.rank, pair.kind) for name, pair in earlier_pairs(path, adapter).items()}
    return EarlierFacts(pairs, adapter_digest(adapter))


def earlier_pairs(path: Path, adapter: Adapter) -> Mapping[str, Pair]:
    """The pairs of an adapter that can lie below another one. Raises ConfigError if it has more than plain pairs."""
    problems = Problems(f"No adapter can be trained on top of {path}")
    if adapter.extras or adapter.token_rows:
        problems.add("It has trained modules or token rows beside its pairs. Merge it, and train on the merged model.")
    if any(pair.magnitude is not None for pair in adapter.pairs.values()):
        problems.add("It is a DoRA adapter, which is no sum. Merge it, and train on the merged model.")
    if any(pair.bias is not None for pair in adapter.pairs.values()):
        problems.add("Its pairs have biases. Merge it, and train on the merged model.")
    problems.raise_if_any()
    return adapter.pairs


def start_on_top(text: TextModel, plan: Plan, adapter: Adapter, name: str) -> None:
    """Gives the first terms of the pairs of `plan`, on the model as `name`, the values of `adapter`.

    Raises ConfigError if the adapter does not fit the model, or a pair of it has none in the plan.
    """
    plan_of(text.model, adapter)  # raises where it does not fit
    entries = {entry.path: entry for entry in plan.entries}
    if missing := sorted(set(adapter.pairs) - set(entries)):
        raise ConfigError(
            f"The earlier adapter has pairs on {len(missing)} modules that lora's targets leave out, {missing[0]} among them. "
            "Name them in lora.target_modules too, so that each gets a new pair on top."
        )
    parameters = trained_parameters(text.model, name)
    with torch.no_grad():
        for path, pair in adapter.pairs.items():
            values = {"A": pair.A, "B": pair.B.float() * (pair.scale / entries[path].scale)}
            for (which, value), dim in zip(values.items(), term_dims(pair.kind), strict=True):
                parameters[f"{path}.{which}"].narrow(dim, 0, pair.rank).copy_(value)


def check_earlier(found: Adapter, earlier: Adapter) -> Check:
    """The check that the first terms of `found` are the pairs of `earlier`: A to the bit, B within rounding of its new scale."""
    changed, most = 0, 0.0
    for path, pair in earlier.pairs.items():
        now = found.pairs[path]
        a_dim, b_dim = term_dims(pair.kind)
        changed += not torch.equal(now.A.narrow(a_dim, 0, pair.rank), pair.A.float())
        before = pair.B.float() * pair.scale
        after = now.B.narrow(b_dim, 0, pair.rank) * now.scale
        most = max(most, float((after - before).abs().max() / before.abs().max().clamp_min(torch.finfo(torch.float32).tiny)))
    return tolerance_check(
        "earlier adapter", {"changed_A": float(changed), "share_of_B": most}, tolerance={"changed_A": 0.0, "share_of_B": ROUNDED},
        between=("the first terms of the adapter", "the adapter that it was trained on top of"), n=len(earlier.pairs),
    )  # fmt: skip


def adapter_digest(adapter: Adapter | None) -> str:
    """The SHA-256 of an adapter as a value: its pairs with paths, numbers, alphas and scale rules; empty for none."""
    if adapter is None:
        return ""
    found = hashlib.sha256()
    for path, pair in sorted(adapter.pairs.items()):
        found.update(f"{path} {pair.alpha!r} {pair.kind} {pair.scale_rule}\n".encode())
        for tensor in (pair.A, pair.B, pair.magnitude, pair.bias):
            found.update(b"-" if tensor is None else tensor.detach().float().cpu().contiguous().numpy().tobytes())
    for path, tensor in sorted(adapter.extras.items()):
        found.update(path.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    for path, rows in sorted(adapter.token_rows.items()):
        found.update(f"{path} {rows.ids}".encode() + rows.rows.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()

"""Refuses adapters with parts that a format cannot hold, with what to do instead."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lorakeet.core.adapter import Adapter
from lorakeet.errors import ConfigError, Problems

MERGE = "Merge the adapter into its base (lorakeet merge), or convert it --to peft, which holds everything."


PEFT_KEYS = ("task_type", "revision", "lora_dropout")  # of Adapter.metadata, from adapter_config.json


def metadata_without_peft(adapter: Adapter) -> dict[str, str]:
    """The adapter's metadata for formats other than PEFT's."""
    return {key: value for key, value in adapter.metadata.items() if key not in PEFT_KEYS}


def check_supported(adapter: Adapter, name: str, *, kinds: Collection[str], dora: bool, folds: bool = False) -> None:
    """Raises ConfigError naming every tensor that the format called `name` cannot hold.

    kinds: the kinds of pairs that it can hold; dora: it can hold magnitudes; folds: offer to fold them into plain pairs.
    """
    problems = Problems(f"The adapter cannot be written as {name}")
    if not adapter.pairs:
        raise ConfigError(f"The adapter has no pair that {name} could hold. {MERGE}")
    for kind in sorted({pair.kind for pair in adapter.pairs.values()} - set(kinds)):
        of_kind = (path for path, pair in adapter.pairs.items() if pair.kind == kind)
        problems.add(f"{name} cannot hold pairs of kind {kind}: {_listed(of_kind)}. {MERGE}")
    magnitudes = [path for path, pair in adapter.pairs.items() if pair.magnitude is not None]
    if magnitudes and not dora:
        fold = " Or fold them into plain pairs, at an error that is printed: --base FOLDER --rank N." if folds else ""
        problems.add(f"{name} cannot hold DoRA's magnitudes: {_listed(magnitudes)}. {MERGE}{fold}")
    for what, found in (
        ("a bias in the pairs (lora_bias)", [path for path, pair in adapter.pairs.items() if pair.bias is not None]),
        ("whole parameters (modules_to_save)", list(adapter.extras)),
        ("trained token rows", list(adapter.token_rows)),
    ):
        if found:
            problems.add(f"{name} cannot hold {what}: {_listed(found)}. {MERGE}")
    problems.raise_if_any()


def check_uniform_dora(adapter: Adapter, name: str) -> None:
    """Raises ConfigError if only some pairs are DoRA: the format has one switch for all."""
    dora = [path for path, pair in adapter.pairs.items() if pair.magnitude is not None]
    plain = [path for path, pair in adapter.pairs.items() if pair.magnitude is None]
    if dora and plain:
        raise ConfigError(
            f"{name} knows DoRA for the whole adapter only; here {_listed(dora)} are DoRA and {_listed(plain)} are not. {MERGE}"
        )


def _listed(paths: Iterable[str]) -> str:
    """At most three of the names, and how many there are."""
    names = sorted(paths)
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown}, … ({len(names)} in all)"

"""Parses the `model` of a request to adapters: one, none, or a weighted mix; and checks the names of adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from lorakeet.errors import ConfigError, LorakeetError, nearest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LONGEST = 1 << 14  # characters of `model`, which may mix some hundred adapters
LARGEST = 1e30  # weight of an adapter; fp32 ends at 3.4e38
_LATEST = ":latest"  # Ollama's clients add it


class UnknownModel(LorakeetError):
    """No model of that name is served."""


def check_name(name: str, base: str = "") -> None:
    """Raises ConfigError for a name that could be a path, a mix or a version, or is the `base`'s."""
    if name == base:
        raise ConfigError(f"The adapter cannot be called '{name}', since the base is: requests for it would get the adapter.")
    if not _NAME.fullmatch(name) or ".." in name:
        raise ConfigError(
            f"The adapter name {name!r} cannot be used; take letters, digits, '.', '-' and '_', at most 100, beginning with a "
            "letter or digit."
        )


def parse_model(model: str, *, base: Collection[str], known: Collection[str]) -> dict[str, float]:
    """The weights of adapters by name for `model`: "a", "base:a", "a*0.7+b*0.3"; {} for the base.

    `base`: names of the base; `known`: names of adapters. UnknownModel suggests the nearest name; ConfigError for a bad mix.
    """
    if len(model) > LONGEST:
        raise ConfigError(f"model has {len(model):,} characters; at most {LONGEST:,} are read. GET /v1/models lists all names.")
    model = model.removesuffix(_LATEST)
    if model in known:
        return {model: 1.0}
    if model in base:
        return {}
    prefix, colon, rest = model.partition(":")
    if colon and prefix in base:
        return parse_model(rest, base=(), known=known)
    if "+" not in model and "*" not in model:
        raise UnknownModel(f"No model '{model}' is served.{nearest(model, [*known, *base])} GET /v1/models lists all.")
    found: dict[str, float] = {}
    for part in model.split("+"):
        name, star, weight = (text.strip() for text in part.partition("*"))
        if name not in known:
            raise UnknownModel(f"No adapter '{name}' is served, which '{model}' mixes.{nearest(name, known)}")
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(f"The weight {weight!r} of '{name}' in '{model}' is no number; write it like a*0.7+b*0.3.")
        found[name] = found.get(name, 0.0) + value
        if abs(found[name]) > LARGEST:
            raise ConfigError(f"The weight {found[name]:g} of '{name}' in '{model}' is too large; at most {LARGEST:g} is taken.")
    return found

"""Module names of FLUX and SD3: those of the original checkpoints, from which kohya's keys are made, and diffusers'.

One matrix of the original may be several of diffusers': queries, keys and values, and in FLUX's single blocks the first layer of
the MLP too. The tables are names/flux.json and names/sd3.json; paths begin with `transformer.`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lorakeet.core.adapter import Pair
from lorakeet.errors import ConfigError, nearest
from lorakeet.formats.components import in_transformer, table
from lorakeet.formats.diffusion.kohya_keys import FAMILY_KEY, flat

TransformerFamily = Literal["flux", "sd3"]
FAMILIES: tuple[TransformerFamily, ...] = ("flux", "sd3")
_WIDTHS: dict[int, TransformerFamily] = {3072: "flux", 1536: "sd3", 2432: "sd3"}  # FLUX.1, SD3 and 3.5 medium, SD3.5 large


@functools.cache
def originals(family: TransformerFamily) -> dict[str, tuple[str, ...]]:
    """From each module of the original checkpoint to diffusers' modules, in the order of their rows in it."""
    names = table(family)
    found: dict[str, tuple[str, ...]] = {theirs: (f"transformer.{ours}",) for theirs, ours in names["modules"].items()}
    for block in names["blocks"]:
        for number in range(block["count"]):
            for theirs, ours in block["modules"].items():
                parts = (f"transformer.{block['ours']}.{number}.{one}" for one in ours)
                found[f"{block['theirs']}.{number}.{theirs}"] = tuple(parts)
    return found


@functools.cache
def transformer_modules(family: TransformerFamily) -> frozenset[str]:
    """diffusers' paths of all linear layers and convolutions."""
    return frozenset(path for parts in originals(family).values() for path in parts)


@functools.cache
def transformer_keys() -> dict[str, tuple[str, ...]]:
    """From kohya's flat keys of FLUX and SD3 to diffusers' paths.

    lora_unet_… is sd-scripts' spelling, of the original's modules; lora_transformer_… OneTrainer's, of diffusers' own.
    """
    found: dict[str, tuple[str, ...]] = {}
    for family in FAMILIES:
        for theirs, parts in originals(family).items():
            found[f"lora_unet_{flat(theirs)}"] = parts  # the two share final_layer's, which mean the same in both
            found |= {f"lora_{flat(path)}": (path,) for path in parts}
    return found


def written_keys(family: TransformerFamily) -> dict[str, tuple[str, ...]]:
    """From sd-scripts' keys of `family` to the paths of their parts."""
    return {f"lora_unet_{flat(theirs)}": parts for theirs, parts in originals(family).items()}


def of_keys(keys: Iterable[str]) -> TransformerFamily | None:
    """The family of a file's keys, if only one has them."""
    spelled = set(keys)
    fitting = [family for family in FAMILIES if spelled & _own_keys(family)]
    return fitting[0] if len(fitting) == 1 else None


@functools.cache
def _own_keys(family: TransformerFamily) -> frozenset[str]:
    """The keys that only `family` has."""
    [other] = set(FAMILIES) - {family}
    own = {*written_keys(family), *(f"lora_{flat(path)}" for path in transformer_modules(family))}
    theirs = {*written_keys(other), *(f"lora_{flat(path)}" for path in transformer_modules(other))}
    return frozenset(own - theirs)


def transformer_family(pairs: Mapping[str, Pair], metadata: Mapping[str, str], config: Mapping[str, Any]) -> TransformerFamily:
    """FLUX or SD3: by the base's `config`, else by the file's metadata, else by names and widths. ConfigError if none decides."""
    for family in FAMILIES:
        if config.get("_class_name") == table(family)["class"]:
            return family
    said = metadata.get("ss_base_model_version") or metadata.get(FAMILY_KEY, "")
    for family in FAMILIES:
        if said.startswith(family):
            return family
    own = {path: pair for path, pair in pairs.items() if in_transformer(path)}
    fitting = [family for family in FAMILIES if own.keys() <= transformer_modules(family)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        for path, pair in own.items():
            if ".attn." in path and pair.A.shape[1] in _WIDTHS:
                return _WIDTHS[pair.A.shape[1]]
        raise ConfigError(
            f"Nothing says whether the {len(own)} pairs of the transformer belong to FLUX or to SD3, whose keys differ in "
            "kohya's format. Name the base with --base (a folder, or the transformer's config.json)."
        )
    known = transformer_modules("flux") | transformer_modules("sd3")
    strange = sorted(own.keys() - known) or sorted(own)
    raise ConfigError(
        f"{len(strange)} modules belong neither to FLUX.1's transformer nor to SD3's, which have keys in kohya's format: "
        f"{', '.join(strange[:3])}.{nearest(strange[0], known)} Write the adapter --to diffusers."
    )

"""Module names of image models: diffusers' paths, those of the original checkpoints (for SDXL, LDM's), and kohya's flat keys.

Flattening (dots to underscores) loses information. A flat key is therefore looked up among the modules that exist (names/*.json,
or the base on disk), never parsed. Paths of FLUX and SD3 begin with `transformer.`. One of their original matrices may be several
of diffusers': queries, keys and values, and in FLUX's single blocks the first layer of the MLP too.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lorakeet.core.adapter import Pair
from lorakeet.errors import ConfigError, Problems, nearest
from lorakeet.formats.components import component_of, in_transformer, table

Family = Literal["sd1", "sdxl"]
TransformerFamily = Literal["flux", "sd3"]
FAMILIES: tuple[TransformerFamily, ...] = ("flux", "sd3")
_WIDTHS: dict[int, TransformerFamily] = {3072: "flux", 1536: "sd3", 2432: "sd3"}  # FLUX.1, SD3 and 3.5 medium, SD3.5 large
FAMILY_KEY = "sd_family"  # Adapter.metadata: SD 1.x or SDXL, as the spelling of a kohya file's keys says
_ENCODERS = ("text_encoder", "text_encoder_2")
_CONTEXT = {768: "sd1", 1024: "sd1", 2048: "sdxl"}  # width of the text states that a UNet attends to


def expand(template: str) -> list[str]:
    """Expands a template: `a.{0..2}.{x,y}` is six names."""
    choices = []
    for index, part in enumerate(re.split(r"\{([^}]*)\}", template)):  # every second part was in braces
        if index % 2 and (span := re.fullmatch(r"(\d+)\.\.(\d+)", part)):
            choices.append([str(number) for number in range(int(span[1]), int(span[2]) + 1)])
        else:
            choices.append(part.split(",") if index % 2 else [part])
    return ["".join(chosen) for chosen in itertools.product(*choices)]


@functools.cache
def unet_modules(family: Family) -> frozenset[str]:
    """diffusers' paths of all linear layers and convolutions in the UNet of SD 1.x or SDXL."""
    return frozenset(name for template in table(f"unet_{family}")["modules"] for name in expand(template))


@functools.cache
def clip_modules() -> frozenset[str]:
    """The paths of all linear layers of CLIP's text encoders, with as many layers as the larger one has."""
    return frozenset(name for template in table("clip")["modules"] for name in expand(template))


@functools.cache
def ldm_names(family: Family) -> dict[str, str]:
    """From diffusers' path of each UNet module to the one of Stability's code (LDM), which kohya uses for SDXL."""
    names = table(f"unet_{family}")
    blocks = sorted(((ours, theirs) for theirs, ours in names["ldm"].items()), key=lambda item: -len(item[0]))
    inner = {ours: theirs for theirs, ours in names["ldm_resnet"].items()}
    found: dict[str, str] = {}
    for path in unet_modules(family):
        for ours, theirs in blocks:
            if path == ours or path.startswith(ours + "."):
                rest = path[len(ours) + 1 :]
                found[path] = f"{theirs}.{inner.get(rest, rest) if '.resnets.' in path else rest}".rstrip(".")
                break
    return found


def flat(path: str) -> str:
    """Kohya's spelling of a module path: dots become underscores."""
    return path.replace(".", "_")


def flat_keys(extra: Iterable[str] = ()) -> dict[str, str]:
    """From kohya's flat keys to paths with components, for SD 1.x, SDXL (both spellings), and the modules in `extra`.

    ConfigError if two modules of `extra` share one flat key.
    """
    found = dict(_known_keys())
    problems = Problems("The base has modules whose flat keys coincide, so a kohya file cannot tell them apart")
    own: dict[str, str] = {}
    for path in extra:
        component, _, rest = path.partition(".")
        for prefix in _prefixes(component):
            key = f"{prefix}_{flat(rest)}"
            if own.setdefault(key, path) != path:
                problems.add(f"{own[key]} and {path} are both {key}.")
    problems.raise_if_any()
    return found | own


@functools.cache
def _known_keys() -> dict[str, str]:
    found: dict[str, str] = {}
    for family in ("sd1", "sdxl"):
        for ours, theirs in ldm_names(family).items():
            found.setdefault(f"lora_unet_{flat(theirs)}", f"unet.{ours}")
    for ours in unet_modules("sd1") | unet_modules("sdxl"):
        found[f"lora_unet_{flat(ours)}"] = f"unet.{ours}"
    for component in _ENCODERS:
        for path in clip_modules():
            found |= {f"{prefix}_{flat(path)}": f"{component}.{path}" for prefix in _prefixes(component)}
    return found


@functools.cache
def ldm_keys() -> frozenset[str]:
    """Kohya's keys of SDXL's UNet whose LDM name differs from diffusers'."""
    return frozenset(f"lora_unet_{flat(theirs)}" for ours, theirs in ldm_names("sdxl").items() if ours != theirs)


def _prefixes(component: str) -> tuple[str, ...]:
    known = {"unet": ("lora_unet",), "transformer": ("lora_transformer",), "text_encoder": ("lora_te", "lora_te1")}
    return {**known, "text_encoder_2": ("lora_te2",)}.get(component, ())


def diffusion_family(pairs: dict[str, Pair], metadata: Any = None, config: Any = None) -> Family:
    """SD 1.x or SDXL: by the base's UNet configuration, else by the file's metadata, else by names and widths.

    ConfigError if none of them decides.
    """
    if config and "cross_attention_dim" in config:
        return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd1"
    version = str((metadata or {}).get("ss_base_model_version") or (metadata or {}).get(FAMILY_KEY, ""))
    if version.startswith("sd"):
        return "sdxl" if version.startswith("sdxl") else "sd1"
    unet = {path.partition(".")[2]: pair for path, pair in pairs.items() if component_of(path) == "unet"}
    if any(component_of(path) == "text_encoder_2" for path in pairs):
        return "sdxl"
    fitting: list[Family] = [family for family in ("sd1", "sdxl") if unet.keys() <= unet_modules(family)]
    if not unet or len(fitting) == 1:
        return fitting[0]
    for path, pair in unet.items():
        if path.endswith(("attn2.to_k", "attn2.to_v")) and pair.A.shape[1] in _CONTEXT and fitting:
            return "sdxl" if _CONTEXT[pair.A.shape[1]] == "sdxl" else "sd1"
    if fitting:
        raise ConfigError(
            f"Nothing says whether the {len(unet)} pairs of the UNet belong to SD 1.x or to SDXL, whose keys differ in kohya's "
            "format. Name the base with --base (a folder, or the UNet's config.json)."
        )
    known = unet_modules("sd1") | unet_modules("sdxl")
    strange = sorted(unet.keys() - known) or sorted(unet)
    raise ConfigError(
        f"{len(strange)} modules belong neither to the UNet of SD 1.x nor to that of SDXL: {', '.join(strange[:3])}."
        f"{nearest(strange[0], known)} Name the base with --base, so that its own modules count."
    )


def kohya_key(path: str, family: Family, own: Iterable[str] = (), *, ldm: bool = True) -> str | None:
    """Kohya's key of the module at `path` (component first), or None if the family has no such module.

    SDXL's UNet uses LDM's names; `own`, the modules of a base of another shape, keep diffusers'. Without `ldm` all keep them: of
    a file with both spellings diffusers silently drops the modules in LDM's.
    """
    component, _, rest = path.partition(".")
    if component == "unet":
        if ldm and family == "sdxl" and rest in ldm_names("sdxl"):
            return f"lora_unet_{flat(ldm_names('sdxl')[rest])}"
        return f"lora_unet_{flat(rest)}" if rest in unet_modules(family) or path in own else None
    if component in _ENCODERS and (rest in clip_modules() or path in own):
        number = "1" if component == "text_encoder" else "2"
        return f"lora_te{number if family == 'sdxl' else ''}_{flat(rest)}" if (family, number) != ("sd1", "2") else None
    return None


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

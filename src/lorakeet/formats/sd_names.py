"""The modules of Stable Diffusion by name: the components of a pipeline, diffusers' and LDM's spellings, kohya's flat keys.

Flattening (dots to underscores) loses information, so a flat key is looked up among the modules that really exist
(names/*.json, or the base on disk) and is never taken apart by rules. Paths of image adapters begin with the component:
`unet.down_blocks.…`, `text_encoder.text_model.…`, `text_encoder_2.text_model.…`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterable
from importlib import resources
from typing import Any, Literal

from lorakeet.core.adapter import Adapter, Pair
from lorakeet.errors import ConfigError, Problems, nearest

Family = Literal["sd1", "sdxl"]
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "transformer")
COMPONENT_KEY = "component"  # Adapter.metadata of a PEFT folder that belongs to one component of a pipeline
FAMILY_KEY = "sd_family"  # Adapter.metadata: what a kohya file's spelling said, SD 1.x or SDXL
_ENCODERS = ("text_encoder", "text_encoder_2")
_UNET_PARTS = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding")
_TRANSFORMER_PARTS = ("transformer_blocks", "single_transformer_blocks", "pos_embed", "x_embedder", "context_embedder",
                      "time_text_embed", "norm_out", "proj_out")  # fmt: skip
_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
_CLIP_PARTS = ("encoder.layers.", "embeddings.", "final_layer_norm")
_CONTEXT = {768: "sd1", 1024: "sd1", 2048: "sdxl"}  # width of the text that a UNet attends to


def component_of(path: str) -> str:
    """The component that `path` begins with, or "" for the path of a model that is no pipeline."""
    head = path.partition(".")[0]
    return head if head in COMPONENTS else ""


def canonical(path: str) -> str:
    """`path` with its component, as every file on disk spells it: transformers 5 leaves out CLIP's `text_model`."""
    component = component_of(path)
    rest = path[len(component) + 1 :] if component else path
    if not component:
        if rest.partition(".")[0] in _UNET_PARTS:
            return f"unet.{rest}"
        if rest.startswith(_BLOCKS):
            return f"transformer.{rest}"
        if rest.startswith("text_model.encoder."):
            return f"text_encoder.{rest}"
    if component in _ENCODERS and rest.startswith(_CLIP_PARTS):
        return f"{component}.text_model.{rest}"
    return path


def with_components(adapter: Adapter) -> Adapter:
    """`adapter` with every path beginning with its component, if it is one of an image model; else as it is."""
    component = adapter.metadata.get(COMPONENT_KEY, "")

    def full(path: str) -> str:
        return canonical(f"{component}.{path}" if component and not component_of(path) else path)

    metadata = {key: value for key, value in adapter.metadata.items() if key != COMPONENT_KEY}
    return dataclasses.replace(
        adapter,
        pairs={full(path): pair for path, pair in adapter.pairs.items()},
        extras={full(path): tensor for path, tensor in adapter.extras.items()},
        metadata=metadata,
    )


def of_image_model(adapter: Adapter) -> bool:
    """Whether the adapter belongs to an image model: by its note of the component, or by its paths."""
    paths = [*adapter.pairs, *adapter.extras]
    return COMPONENT_KEY in adapter.metadata or any(
        in_transformer(path) or component_of(path) not in ("", "transformer") for path in paths
    )


def in_transformer(path: str) -> bool:
    """Whether `path` is in the transformer of SD3 or FLUX; some language models begin with `transformer` as well."""
    return component_of(path) == "transformer" and path.split(".")[1] in _TRANSFORMER_PARTS


def without_component(adapter: Adapter) -> Adapter:
    """The adapter of a UNet or diffusion transformer alone with its own paths, so that PEFT can load it; any other as it is."""
    paths = [*adapter.pairs, *adapter.extras]
    components = {component_of(path) for path in paths}
    if components != {"unet"} and not (paths and all(in_transformer(path) for path in paths)):
        return adapter
    [component] = components
    return dataclasses.replace(
        adapter,
        pairs={path.partition(".")[2]: pair for path, pair in adapter.pairs.items()},
        extras={path.partition(".")[2]: tensor for path, tensor in adapter.extras.items()},
        metadata={**adapter.metadata, COMPONENT_KEY: component},
    )


def expand(template: str) -> list[str]:
    """Every name that a template means: `a.{0..2}.{x,y}` is six names."""
    parts = re.split(r"\{([^}]*)\}", template)
    choices = [[part] if index % 2 == 0 else _choices(part) for index, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(text: str) -> list[str]:
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        return [str(number) for number in range(int(match[1]), int(match[2]) + 1)]
    return text.split(",")


@functools.cache
def table(name: str) -> Any:
    """The parsed table names/`name`.json."""
    return json.loads((resources.files("lorakeet.formats") / "names" / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def unet_modules(family: Family) -> frozenset[str]:
    """The paths of every linear layer and convolution of the UNet of SD 1.x or SDXL, in diffusers' spelling."""
    return frozenset(name for template in table(f"unet_{family}")["modules"] for name in expand(template))


@functools.cache
def clip_modules() -> frozenset[str]:
    """The paths of every linear layer of CLIP's text encoders, with as many layers as the larger one has."""
    return frozenset(name for template in table("clip")["modules"] for name in expand(template))


@functools.cache
def ldm_names(family: Family) -> dict[str, str]:
    """From diffusers' path of each UNet module to the one of Stability's own code (LDM), which kohya uses for SDXL."""
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

    ConfigError where two modules of `extra` share one flat key.
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
    """Kohya's keys of SDXL's UNet in the names of Stability's code, which differ from diffusers' there."""
    return frozenset(f"lora_unet_{flat(theirs)}" for ours, theirs in ldm_names("sdxl").items() if ours != theirs)


def _prefixes(component: str) -> tuple[str, ...]:
    known = {"unet": ("lora_unet",), "transformer": ("lora_transformer",), "text_encoder": ("lora_te", "lora_te1")}
    return {**known, "text_encoder_2": ("lora_te2",)}.get(component, ())


def diffusion_family(pairs: dict[str, Pair], metadata: Any = None, config: Any = None) -> Family:
    """SD 1.x or SDXL: what the base's UNet configuration says, else the file's own note, else names and widths.

    ConfigError where none of them tells.
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
    """Kohya's key of the module at `path` (component first), or None where the family has no such module.

    SDXL's UNet is spelled in LDM's names; `own`, the modules of a base of another shape, are spelled as they are. Without `ldm`
    all of them are: of a file that has both spellings diffusers drops the modules in LDM's without a word.
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

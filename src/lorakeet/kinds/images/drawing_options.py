"""The options of `lorakeet generate`, and what can be checked of them without a model: adapters by name, mixes, numbers.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorakeet.errors import ConfigError, Problems, nearest
from lorakeet.setting import setting

BASE = "base"
SEEDS = 2**64  # of torch's generators


@dataclass(frozen=True)
class GenerateOptions:
    """Options of `lorakeet generate`."""

    prompt: tuple[str, ...] = field(metadata={"help": "Prompt of a picture; may be repeated.", "whole": True})
    out: Path = field(metadata={"help": "Folder for the pictures; it must not exist yet."})
    model: str | None = setting(
        None, "A folder saved by diffusers, a .safetensors file, or a hub id; the default is the adapter's base."
    )
    config: str | None = setting(None, "For a single .safetensors file: the folder with its configurations and tokenizer.")
    adapter: tuple[str, ...] = field(
        default=(), metadata={"help": "NAME=PATH of a run folder or an adapter of any format; may be repeated.", "whole": True}
    )
    weights: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Adapter weights of all pictures, such as a=0.7,b=0.3; a single adapter has weight 1."},
    )
    each: tuple[str, ...] = setting(
        (), "Adapter weights of each prompt, in order: a name, base, or names with weights such as a=0.7+b=0.3."
    )
    count: int = setting(1, "Pictures per prompt.")
    seed: int = setting(0, "Seed of the first picture's noise; further pictures of a prompt count up from it.")
    steps: int = setting(30, "Number of sampling steps.")
    guidance: float | None = setting(
        None, "Classifier-free guidance scale; 1 turns it off; the default depends on the model family."
    )
    negative: str = setting("", "Negative prompt.")
    size: str | None = setting(None, "Width x height in pixels, such as 512x768; the default is the model's own.")
    prediction: Literal["auto", "epsilon", "v_prediction", "flow"] = setting(
        "auto", "Prediction type of the model; auto uses that of the adapter's run on it, else the scheduler's."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "Dtype of the model.")
    device: str = setting("auto", "Device: auto, cpu, cuda, cuda:1 or mps.")
    uncertified: bool = setting(False, "Use an adapter whose content is not that of its certificate; results say so.")


def adapters_and_mixes(options: GenerateOptions) -> tuple[dict[str, Path], list[dict[str, float]]]:
    """The paths of the adapters by name, and the mix of each prompt. Raises ConfigError for what cannot be drawn."""
    paths = _paths_by_name(options.adapter)
    _check_numbers(options)
    return paths, _mixes(options, list(paths))


def parse_mix(text: str) -> dict[str, float]:
    """The weights by adapter in `a`, `a=0.7+b=0.3` or `base`. Raises ConfigError for other text."""
    if text.strip() == BASE:
        return {}
    found: dict[str, float] = {}
    for part in text.split("+"):
        name, sign, number = part.strip().partition("=")
        try:
            weight = float(number) if sign else 1.0
        except ValueError:
            weight = float("nan")
        if not name or not math.isfinite(weight) or name in found:
            raise ConfigError(f"The mix '{text}' cannot be read; expected a name, {BASE}, or names with weights: a=0.7+b=0.3.")
        found[name.strip()] = weight
    return found


def _paths_by_name(given: Sequence[str]) -> dict[str, Path]:
    problems = Problems("These adapters cannot be used")
    found: dict[str, Path] = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not sign or "/" in name:
            name, path = ("adapter" if len(given) == 1 else Path(text).stem), text
        if name == BASE or name in found:
            why = "means no adapter" if name == BASE else "is given twice"
            problems.add(f"The adapter name '{name}' {why}; choose another: NAME={path}.")
        found[name] = Path(path).expanduser()
    problems.raise_if_any()
    return found


def _check_numbers(options: GenerateOptions) -> None:
    """Raises ConfigError that names every number out of range."""
    problems = Problems("These pictures cannot be drawn")
    count, seed = options.count, options.seed
    for name, value in (("count", count), ("steps", options.steps)):
        if value < 1:
            problems.add(f"--{name} is {value}; expected 1 or more.")
    if not -SEEDS // 2 <= seed <= SEEDS - max(count, 1):
        problems.add(f"--seed is {seed} and --count {count}; expected seeds up to {SEEDS - 1}, one more for each picture.")
    problems.raise_if_any()


def _mixes(options: GenerateOptions, names: list[str]) -> list[dict[str, float]]:
    """The mix of each prompt."""
    problems = Problems("These pictures cannot be drawn")
    prompts, weights, each = options.prompt, options.weights, options.each
    if not prompts:
        problems.add("No prompt is given; add --prompt 'a red box'.")
    if weights and each:
        problems.add("--weights is a mix for all pictures, and --each one for each prompt; give one of them.")
    if len(each) > 1 and len(each) != len(prompts):
        problems.add(f"--each has {len(each)} mixes for {len(prompts)} prompts; give one for each prompt.")
    if len(names) > 1 and not weights and not each:
        example = f"--weights {names[0]}=1,{names[1]}=0.5"
        problems.add(f"Several adapters are given ({', '.join(names)}); give their weights: {example}.")
    mixes: list[dict[str, float]] = [parse_mix(text) for text in each] if each else [dict(weights) or dict.fromkeys(names, 1.0)]
    for name in sorted({name for mix in mixes for name in mix} - set(names)):
        problems.add(f"No adapter is called '{name}' (given are {', '.join(names) or 'none'}).{nearest(name, names)}")
    problems.raise_if_any()
    return mixes if len(mixes) == len(prompts) else mixes * len(prompts)

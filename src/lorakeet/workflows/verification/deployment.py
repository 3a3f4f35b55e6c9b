"""Will this adapter load where it is meant to run? Answered from its settings before training, or from a finished one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorakeet.config import RunConfig, read_run
from lorakeet.errors import VerificationFailed
from lorakeet.export.runtime_support import Feature, Limit, Runtime, features_of_adapter, features_of_plan, has_head, limits_of
from lorakeet.formats.detect import read_adapter
from lorakeet.memory.ledger import Ledger
from lorakeet.models.image.from_config import image_model_from_config, shapes_of_images
from lorakeet.models.image.model import image_plan
from lorakeet.models.targets import plan_for
from lorakeet.models.text.from_config import config_of, local_files, model_from_config
from lorakeet.workflows.runs.open_adapter import open_adapter

Say = Callable[[str], None]


@dataclass(frozen=True)
class Deployable:
    """Nothing stands in the way; `notes` are what the runtime needs."""

    runtime: str
    features: tuple[str, ...]
    notes: tuple[Limit, ...]

    @property
    def exit_code(self) -> int:
        return 0

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for --json."""
        notes = [{"feature": limit.feature, "what": limit.what, "remedy": limit.remedy} for limit in self.notes]
        return {"runtime": self.runtime, "loads": True, "features": list(self.features), "notes": notes}


def check_deployment(config_or_run: Path, runtime: Runtime, console: Console, *, base: str | None = None) -> Deployable:
    """What `runtime` will do with the adapter of a run file, a run or an adapter folder; `base` wins over the model named there.

    Raises VerificationFailed (exit code 3) listing every feature that it refuses or computes wrongly, with what helps.
    ConfigError where settings do not fit the model, or where its configuration is needed and cannot be had.
    """
    say, planned = partial(console.print, markup=False, soft_wrap=True), config_or_run.is_file()
    features = _planned(config_or_run, base, say) if planned else _finished(config_or_run, base, runtime, say)
    limits = limits_of(runtime, features)
    bad = [limit for limit in limits if limit.effect != "note"]
    if bad:
        what = "would not load" if planned else "does not load"
        lines = [f"The adapter of {config_or_run} {what} rightly in {runtime}:"]
        words = {"refused": "is refused", "wrong": "is computed wrongly, without a word"}
        lines += [f"  - {limit.feature} {words[limit.effect]}: {limit.what} ({limit.source}). {limit.remedy}" for limit in bad]
        raise VerificationFailed("\n".join(lines))
    for limit in limits:
        console.print(f"{runtime}: {limit.feature}: {limit.what}. {limit.remedy}", soft_wrap=True)
    listed = ", ".join(sorted(features)) or "plain pairs of one rank and scale"
    console.print(f"The adapter of {config_or_run} ({listed}) loads in {runtime}.", soft_wrap=True)
    return Deployable(runtime, tuple(sorted(features)), limits)


def _planned(run_file: Path, base: str | None, say: Say) -> frozenset[Feature]:
    """Of the plan that the run will have, made on the model's shapes alone."""
    config = read_run(run_file)
    if base is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=base))
    first = max([config.lora.rank, *config.lora.rank_pattern.values()])
    auto = {"auto": config.ranks.max_rank, "prune": first}.get(config.ranks.choose, 0)
    if config.kind == "image":
        return _planned_image(config, auto, say)
    model_config = config_of(config.model, say)
    with torch.random.fork_rng(devices=[]), Ledger():
        text = model_from_config(
            model_config, name=config.model.path, dtype=torch.float32, products=torch.float32, attention=config.model.attention,
            quantize=config.model.quantize, files=local_files(config.model.path),
        )  # fmt: skip
        plan = plan_for(text.model, config.lora, text.family)
    return features_of_plan(plan, tied=_ties(model_config), auto=auto)


def _planned_image(config: RunConfig, auto: int, say: Say) -> frozenset[Feature]:
    shapes = shapes_of_images(config.model, say)
    with torch.random.fork_rng(devices=[]), Ledger():
        model = image_model_from_config(shapes, name=config.model.path, dtype=torch.float32, quantize=config.model.quantize)
        plan = image_plan(model, config.lora, text_encoder=config.diffusion.text_encoder)
    return features_of_plan(plan, tied=False, auto=auto)


def _finished(folder: Path, base: str | None, runtime: Runtime, say: Say) -> frozenset[Feature]:
    """Of an adapter as it is; its base is read only if a pair is on the head and `runtime` minds a tied one."""
    adapter = read_adapter(folder, say=say)
    asks = has_head(adapter.pairs) and bool(limits_of(runtime, ("tied head pairs",)))
    if not asks:
        return features_of_adapter(adapter, tied=False)
    opened = open_adapter(folder, base=base, say=lambda _: None)  # what is odd about it was said
    return features_of_adapter(adapter, tied=_ties(config_of(opened.config.model, say)))


def _ties(model_config: Any) -> bool:
    """Whether the head shares the embedding's weight."""
    return bool(getattr(model_config.get_text_config(), "tie_word_embeddings", False))

"""`train.cuda_graphs`: whether a run's passes can be recorded, and its task with passes that are, proved before it begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from lorakeet.config import RunConfig
from lorakeet.data.chat import Example
from lorakeet.data.pack import Batch, pack_examples
from lorakeet.errors import EnvironmentProblem, Problems
from lorakeet.models.placement import device_for
from lorakeet.models.text.adapters import drop_rates
from lorakeet.models.text.cuda_graphs import SETTING, TURN_OFF, BatchShape, CudaGraphs, GraphedModel, Recorder
from lorakeet.models.text.model import TextModel
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.task import TextTask

ROPES = ("dynamic", "longrope")  # whose angles depend on the longest position, which the host may read
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # in config.json: how many there are
DRAWN = "what is drawn anew in each pass can be compared with nothing"
OF_OTHERS = ("classifier", "summary")  # what names of chances begin with where they are of heads that write no text


def require_graphable(config: RunConfig, processes: int = 1) -> None:
    """ConfigError that names every setting with which no passes are recorded; EnvironmentProblem without a CUDA card."""
    if not config.train.cuda_graphs:
        return
    problems = Problems(f"{SETTING} cannot be used")
    leave = f"Leave it, or {SETTING}, out."
    if processes > 1:
        problems.add(f"{processes} processes train together. Leave it out, or start one.")
    if config.memory.budget:
        problems.add(f"memory.budget is {config.memory.budget}, and what a CUDA driver keeps of a graph is not known. {leave}")
    if config.train.keep_prefix_states:
        problems.add(f"train.keep_prefix_states is on, which hands on other states in every pass. {leave}")
    if config.ranks.choose == "prune":
        problems.add(f"ranks.choose is prune, after whose cuts the adapter's numbers lie elsewhere. {leave}")
    if config.lora.dropout:
        problems.add(f"lora.dropout is {config.lora.dropout:g}: {DRAWN}. {leave}")
    problems.raise_if_any()
    if why := _no_card(config.model.device):
        raise EnvironmentProblem(f"{SETTING} is true, and {why}: CUDA graphs want an NVIDIA card that torch sees. {TURN_OFF}.")


def _no_card(asked: str) -> str:
    """In words, why the device that `model.device` names is none for CUDA graphs; empty where it is. Raises where it is none."""
    if torch.version.hip:
        return "this torch is built for ROCm"
    if asked.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        return f"model.device is {asked}, of which torch {torch.__version__} sees none here"
    device = device_for(asked)
    if device.type == "cuda":
        return ""
    return f"model.device is {asked}" + (f", which is {device} here" if asked == "auto" else "")


def record_graphs(text: TextModel, task: TextTask, console: Console, recorder: Recorder | None = None) -> None:
    """Lets the passes of `task` be recorded where the settings ask for it, beginning with its largest micro-batch.

    Raises EnvironmentProblem where the model does what cannot be recorded, or what was recorded is not what its decoder computes.
    The output head is not recorded.
    """
    spec = task.spec
    if not spec.cuda_graphs:
        return
    if why := next(_why_not(text), ""):
        raise EnvironmentProblem(f"{SETTING} is true, but {why}. {TURN_OFF}.")
    room = BatchShape.largest(max(len(row.ids) for row in task.train), spec.micro_tokens, min(spec.batch_size, len(task.train)))
    passes = GraphedModel(text, task.parameters(), recorder or CudaGraphs(text.device), room)
    largest = largest_micro_batch(task.train, spec)
    console.print(f"Recording the passes of a micro-batch of {largest.tokens} tokens, and comparing them with the model's.")
    passes.record_first(largest)
    text.model.eval()
    task.replayed = passes


def largest_micro_batch(rows: Sequence[Example], spec: TrainSpec) -> Batch:
    """A micro-batch of as many tokens as any of a run over `rows` may have, made up of theirs: rows of the longest's length, and
    one that fills up. Everything but first tokens is learnt."""
    longest = max(len(row.ids) for row in rows)
    count, rest = divmod(max(longest, spec.micro_tokens), longest)
    lengths = [*[longest] * count, rest][: min(spec.batch_size, len(rows))]
    ids = np.resize(np.concatenate([row.ids for row in rows[: spec.batch_size]]), sum(lengths))
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    filled = [part for part in parts if len(part)]
    return pack_examples([Example(part, np.arange(len(part)) > 0, f"made up {n}", None, False) for n, part in enumerate(filled)])


def _why_not(text: TextModel) -> Iterator[str]:
    """What the model does that cannot be recorded, in words."""
    if text.streamed is not None:
        yield "the model's blocks are streamed, and lie elsewhere in every pass"
    if text.attention != "varlen":
        yield f"model.attention is {text.attention}, and only varlen is told by tensors where rows are"
    config = text.model.config.get_text_config()
    if any((getattr(config, name, 0) or 0) > 1 for name in EXPERTS):
        yield "the model chooses experts by the numbers, which the host has to read"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in text.model.modules()):
        yield f"the model has dropout: {DRAWN}"
    for name, rate in sorted(drop_rates(text).items()):
        if not name.startswith(OF_OTHERS):
            yield f"{name} is {rate:g} in the model's config.json: {DRAWN}"
    for rope in ROPES:
        if rope in _rope_types(getattr(config, "rope_parameters", None)):
            yield f"rope_type is {rope} in the model's config.json, whose angles depend on how long rows of a micro-batch are"


def _rope_types(settings: Any) -> set[str]:
    """Those of a model's rotary positions, which may differ by the kind of a layer."""
    if not isinstance(settings, Mapping):
        return set()
    within = [kind for value in settings.values() for kind in _rope_types(value)]
    return {str(settings.get("rope_type")), *within}

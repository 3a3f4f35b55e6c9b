"""`train.cuda_graphs`: checks that a run can be recorded as CUDA graphs, records them, and compares them with the model."""

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

ROPES = ("dynamic", "longrope")  # their angles depend on the longest position, which the host may read
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # keys of their number in config.json
DRAWN = "random numbers differ in each pass, so a graph cannot be compared with the model"
OF_OTHERS = ("classifier", "summary")  # prefixes of drop rates of heads that are not used for text


def require_graphable(config: RunConfig, processes: int = 1) -> None:
    """Raises ConfigError that names every setting that cannot be recorded, and EnvironmentProblem without a CUDA device."""
    if not config.train.cuda_graphs:
        return
    problems = Problems(f"{SETTING} cannot be used")
    leave = f"Leave it, or {SETTING}, out."
    if processes > 1:
        problems.add(f"{processes} processes train together. Leave it out, or start one.")
    if config.memory.budget:
        problems.add(f"memory.budget is {config.memory.budget}, and the memory of a CUDA graph cannot be planned. {leave}")
    if config.train.keep_prefix_states:
        problems.add(f"train.keep_prefix_states is on, whose inputs are at another address in every pass. {leave}")
    if config.ranks.choose == "prune":
        problems.add(f"ranks.choose is prune, and a cut moves the adapter's tensors to other addresses. {leave}")
    if config.lora.dropout:
        problems.add(f"lora.dropout is {config.lora.dropout:g}: {DRAWN}. {leave}")
    problems.raise_if_any()
    if why := _why_no_gpu(config.model.device):
        raise EnvironmentProblem(f"{SETTING} is true, but {why}. CUDA graphs need an NVIDIA GPU that torch can use. {TURN_OFF}.")


def _why_no_gpu(requested: str) -> str:
    """Why the device of model.device has no CUDA graphs; empty if it has."""
    if torch.version.hip:
        return "this torch is built for ROCm"
    if requested.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        return f"model.device is {requested}, but torch {torch.__version__} finds no CUDA device here"
    device = device_for(requested)
    if device.type == "cuda":
        return ""
    return f"model.device is {requested}" + (f", which is {device} here" if requested == "auto" else "")


def record_graphs(text: TextModel, task: TextTask, console: Console, recorder: Recorder | None = None) -> None:
    """With train.cuda_graphs, records the decoder on the largest micro-batch of `task`; the output head is not recorded.

    Raises EnvironmentProblem if the model cannot be recorded, or if the graph computes something else than the decoder.
    """
    spec = task.spec
    if not spec.cuda_graphs:
        return
    if why := next(_why_not(text), ""):
        raise EnvironmentProblem(f"{SETTING} is true, but {why}. {TURN_OFF}.")
    largest_shape = BatchShape.largest(
        max(len(row.ids) for row in task.train), spec.micro_tokens, min(spec.batch_size, len(task.train))
    )
    passes = GraphedModel(text, task.parameters(), recorder or CudaGraphs(text.device), largest_shape)
    largest = largest_micro_batch(task.train, spec)
    console.print(f"Recording a micro-batch of {largest.tokens} tokens as CUDA graphs, and comparing it with the model.")
    passes.record_first(largest)
    text.model.eval()
    task.replayed = passes


def largest_micro_batch(rows: Sequence[Example], spec: TrainSpec) -> Batch:
    """A micro-batch as large as any of a run over `rows`: rows as long as the longest, and one that fills it up.

    Its tokens are those of `rows`; every token but the first of a row is a target.
    """
    longest = max(len(row.ids) for row in rows)
    count, rest = divmod(max(longest, spec.micro_tokens), longest)
    lengths = [*[longest] * count, rest][: min(spec.batch_size, len(rows))]
    ids = np.resize(np.concatenate([row.ids for row in rows[: spec.batch_size]]), sum(lengths))
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    filled = [part for part in parts if len(part)]
    return pack_examples([Example(part, np.arange(len(part)) > 0, f"made up {n}", None, False) for n, part in enumerate(filled)])


def _why_not(text: TextModel) -> Iterator[str]:
    """Yields the reasons why the model cannot be recorded."""
    if text.streamed is not None:
        yield "the model's blocks are streamed, so they are at another address in every pass"
    if text.attention != "varlen":
        yield f"model.attention is {text.attention}, and only varlen takes the row boundaries as tensors"
    config = text.model.config.get_text_config()
    if any((getattr(config, name, 0) or 0) > 1 for name in EXPERTS):
        yield "the model chooses experts by values that the host must read"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in text.model.modules()):
        yield f"the model has dropout: {DRAWN}"
    for name, rate in sorted(drop_rates(text).items()):
        if not name.startswith(OF_OTHERS):
            yield f"{name} is {rate:g} in the model's config.json: {DRAWN}"
    for rope in ROPES:
        if rope in _rope_types(getattr(config, "rope_parameters", None)):
            yield f"rope_type is {rope} in the model's config.json, whose angles depend on the lengths of the rows"


def _rope_types(settings: Any) -> set[str]:
    """The rope types in a model's settings, which may differ by layer type."""
    if not isinstance(settings, Mapping):
        return set()
    within = [kind for value in settings.values() for kind in _rope_types(value)]
    return {str(settings.get("rope_type")), *within}

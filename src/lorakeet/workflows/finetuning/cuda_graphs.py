"""`train.cuda_graphs`: checks that a run can be recorded as CUDA graphs, records them, and compares them with the model.

true     requested: what keeps the run from it is refused before it starts
false    never
unset    tried by models of up to 3.5 billion weights on one GPU, if they fit by the plan (workflows/planning/graphs);
         used if they give the model's own numbers on the first micro-batches of this run; else the run goes on without, and says
         why
"""

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
from lorakeet.memory.allocator import release_free_memory
from lorakeet.models.placement import device_for
from lorakeet.models.text.adapters import drop_rates
from lorakeet.models.text.cuda_graphs import (
    SETTING,
    TURN_OFF,
    BatchShape,
    CudaGraphs,
    GraphedModel,
    NotRecorded,
    Recorder,
    free_failed_recording,
    recording_errors,
)
from lorakeet.models.text.model import TextModel
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.task import TextTask
from lorakeet.workflows.finetuning.assemble_text import TextAssembly
from lorakeet.workflows.planning.graphs import DRAWN, settings_in_the_way, why_not_by_itself

ROPES = ("dynamic", "longrope")  # their angles depend on the longest position, which the host may read
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # keys of their number in config.json
FIRST = 4  # micro-batches of the run on which graphs are proved where nothing requests them
MORE = 1.1  # times as many tokens: so much more than a step computes where rows share beginnings, which graphs do not share
OF_OTHERS = ("classifier", "summary")  # prefixes of drop rates of heads that are not used for text


def require_graphable(config: RunConfig, processes: int = 1) -> None:
    """Raises ConfigError that names every setting that cannot be recorded, and EnvironmentProblem without a CUDA device."""
    if not config.train.cuda_graphs:
        return
    problems = Problems(f"{SETTING} cannot be used")
    leave = f"Leave it, or {SETTING}, out."
    for found in settings_in_the_way(config, processes):
        problems.add(f"{found}. {leave}")
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


def use_graphs(setup: TextAssembly, task: TextTask, console: Console, recorder: Recorder | None = None) -> None:
    """Records the decoder's passes if the settings say so, or by itself; `task.graphs` says in words what came of it.

    Raises EnvironmentProblem as `record_graphs`, where they are requested.
    """
    config, text = setup.config, task.text
    if config.train.cuda_graphs:
        record_graphs(text, task, console, recorder)
        task.graphs = "both passes of the decoder, as train.cuda_graphs asks"
        return
    if setup.device.type != "cuda":
        return
    weights = setup.plan.frozen_parameters
    why = why_not_by_itself(config, setup.device, text.dtype, weights, setup.processes.count)
    if not why and not setup.residency.way.graphs:
        why = "they do not fit beside the run by its plan"
    tried = not why
    if tried:
        why = try_graphs(text, task, console, recorder)
    task.graphs = f"none: {why}" if why else f"both passes of the decoder, proved on {FIRST} micro-batches of the run or fewer"
    if tried:
        said = "Not used: " + why if why else "Used: they give the model's own numbers on the first micro-batches"
        console.print(f"CUDA graphs of the decoder's passes. {said}.", markup=False, soft_wrap=True)


def try_graphs(text: TextModel, task: TextTask, console: Console, recorder: Recorder | None = None) -> str:
    """Records passes and proves them on the first micro-batches of `task`. Returns why they are not used; empty if they are."""
    try:
        with recording_errors(required=False):
            if why := next(_why_not(text), "") or _why_not_shared(text, task):
                return why
            task.replayed = _recorded(text, task, console, recorder or CudaGraphs(text.device), required=False)
            for batch in task.batches(0)[:FIRST]:
                task.replayed.prove_on(batch)
    except NotRecorded as error:
        task.replayed, why = None, error.reason
    finally:
        text.model.eval()
    if why:
        free_failed_recording()
        release_free_memory()
    return why


def _why_not_shared(text: TextModel, task: TextTask) -> str:
    """Says how many tokens a step computes, if graphs compute many more: what rows begin with alike is computed in every row."""
    batches = task.batches(0)
    shared, whole = sum(text.layout(batch).tokens for batch in batches), sum(batch.tokens for batch in batches)
    if whole <= MORE * shared:
        return ""
    return f"rows begin alike, so that a step computes {shared:,} tokens, and CUDA graphs would compute {whole:,}"


def record_graphs(text: TextModel, task: TextTask, console: Console, recorder: Recorder | None = None) -> None:
    """With train.cuda_graphs, records the decoder on the largest micro-batch of `task`; the output head is not recorded.

    Raises EnvironmentProblem if the model cannot be recorded, or if the graph computes something else than the decoder.
    """
    spec = task.spec
    if not spec.cuda_graphs:
        return
    if why := next(_why_not(text), ""):
        raise EnvironmentProblem(f"{SETTING} is true, but {why}. {TURN_OFF}.")
    passes = _recorded(text, task, console, recorder or CudaGraphs(text.device), required=True)
    text.model.eval()
    task.replayed = passes


def _recorded(text: TextModel, task: TextTask, console: Console, recorder: Recorder, *, required: bool) -> GraphedModel:
    """The decoder with its passes over the largest micro-batch recorded and compared. Raises EnvironmentProblem."""
    spec = task.spec
    largest_shape = BatchShape.largest(
        max(len(row.ids) for row in task.train), spec.micro_tokens, min(spec.batch_size, len(task.train))
    )
    passes = GraphedModel(text, task.parameters(), recorder, largest_shape, required=required)
    largest = largest_micro_batch(task.train, spec)
    console.print(f"Recording a micro-batch of {largest.tokens} tokens as CUDA graphs, and comparing it with the model.")
    passes.record_first(largest)
    return passes


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
    if _most_experts(config) > 1:
        yield "the model chooses experts by values that the host must read"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in text.model.modules()):
        yield f"the model has dropout: {DRAWN}"
    for name, rate in sorted(drop_rates(text).items()):
        if not name.startswith(OF_OTHERS):
            yield f"{name} is {rate:g} in the model's config.json: {DRAWN}"
    for rope in ROPES:
        if rope in _rope_types(getattr(config, "rope_parameters", None)):
            yield f"rope_type is {rope} in the model's config.json, whose angles depend on the lengths of the rows"


def _most_experts(settings: Any) -> int:
    """The largest number of experts in a model's settings: a number, or one for each layer (HunYuan), or nested (DBRX)."""
    found = [settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None) for name in EXPERTS]
    counts = [count for each in found for count in (each if isinstance(each, list | tuple) else [each])]
    values = (settings if isinstance(settings, Mapping) else vars(settings)).values()
    within = [_most_experts(value) for value in values if isinstance(value, Mapping) or hasattr(value, "to_dict")]
    return max([0, *within, *(count for count in counts if isinstance(count, int))])


def _rope_types(settings: Any) -> set[str]:
    """The rope types in a model's settings, which may differ by layer type."""
    if not isinstance(settings, Mapping):
        return set()
    within = [kind for value in settings.values() for kind in _rope_types(value)]
    return {str(settings.get("rope_type")), *within}

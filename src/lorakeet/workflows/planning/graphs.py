"""CUDA graphs of a run: the settings that rule them out, whether a run tries them by itself, and the memory that they take.

    pool       what both passes of the largest micro-batch hold at their peak, for as long as the run trains
    proof      the model's own passes beside it, and COPIES tensors as large as the adapter
    buffers    last hidden states and their gradients
    driver     DRIVER_BYTES for each shape of micro-batch, of which there are at most MOST_SHAPES

DRIVER_BYTES is an allowance: nothing here was run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorakeet.config import RunConfig
from lorakeet.kernels.choose import records_passes
from lorakeet.kernels.cuda_graphs import LARGEST
from lorakeet.memory.cuda import TEMPORARY_SHARE
from lorakeet.memory.usage import PERSISTENT
from lorakeet.models.text.cuda_graphs import MOST_SHAPES
from lorakeet.train.preference_spec import SFT
from lorakeet.workflows.planning.forecast_text_run import VALUE, TextRunPlan
from lorakeet.workflows.planning.rehearse_text import CHECKPOINT, EVALUATE, STEP
from lorakeet.workflows.runs.residency import with_more

KIND = "CUDA graphs"  # of bytes
COPIES = 4  # the adapter before noise; gradients of the step so far, of the model, and of the graphs
DRIVER_BYTES = 8 << 20  # of the two graphs of a shape, some thousand operations
BESIDE = ("runtime", "allocator")  # kinds of bytes that are no tensors
DRAWN = "random numbers differ in each pass, so a graph cannot be compared with the model"


def settings_in_the_way(config: RunConfig, processes: int = 1) -> Iterator[str]:
    """Yields each setting with which passes cannot be recorded, and why, without a full stop."""
    if processes > 1:
        yield f"{processes} processes train together"
    if config.memory.budget:
        yield f"memory.budget is {config.memory.budget}, which may stream blocks to other addresses in every pass"
    if config.train.keep_prefix_states:
        yield "train.keep_prefix_states is on, whose inputs are at another address in every pass"
    if config.ranks.choose == "prune":
        yield "ranks.choose is prune, and a cut moves the adapter's tensors to other addresses"
    if config.lora.dropout:
        yield f"lora.dropout is {config.lora.dropout:g}: {DRAWN}"


def why_not_by_itself(config: RunConfig, device: torch.device, dtype: torch.dtype, weights: int, processes: int = 1) -> str:
    """Why a run in which nothing is said of CUDA graphs does not try them; empty if it does."""
    if config.train.cuda_graphs is False:
        return "train.cuda_graphs is false"
    if config.train.objective != SFT:
        return f"train.objective is {config.train.objective}"
    if found := next(settings_in_the_way(config, processes), ""):
        return found
    if records_passes(device, dtype, weights):
        return ""
    if weights > LARGEST:
        return f"the model has {weights / 1e9:.1f} billion weights, for which a GPU computes longer than the host launches"
    return f"passes in {str(dtype).removeprefix('torch.')} on {device.type} are not recorded (lorakeet doctor says why)"


def graph_bytes(plan: TextRunPlan, state_bytes: int) -> int:
    """Bytes of the graphs of a run while it trains, beside what `plan` holds; `state_bytes` are those of a micro-batch's hidden
    states.
    """
    kinds = plan.forecast.phase(STEP).kinds
    passing = sum(size for kind, size in kinds.items() if kind not in PERSISTENT and kind not in BESIDE)
    temporary = passing + COPIES * VALUE * plan.plan.parameters + 2 * state_bytes
    return int((1 + TEMPORARY_SHARE) * temporary) + MOST_SHAPES * DRIVER_BYTES


def with_graphs(plan: TextRunPlan, state_bytes: int) -> TextRunPlan:
    """The same with graphs, which are there until training ends."""
    return with_more(plan, graph_bytes(plan, state_bytes), KIND, (STEP, EVALUATE, CHECKPOINT))

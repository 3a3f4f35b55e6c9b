"""What the reference that a run is compared with adds to a plan: copies of its adapter, as values and on the model."""

from __future__ import annotations

from collections.abc import Mapping

from lorakeet.config import RunConfig
from lorakeet.memory.usage import Usage, add_usage
from lorakeet.planning.rehearse_text import FINAL, STEP
from lorakeet.registry import BASE


def reference_bytes(config: RunConfig, adapter: int) -> int:
    """Bytes of one copy of the reference, which is counted as large as the run's own `adapter`; 0 where it is the base with the
    adapter off, or there is none.
    """
    return 0 if config.train.registered.compared_with(config.train) in ("", BASE) else adapter


def evaluated_copies(config: RunConfig, adapter: int, *, on_gpu: bool) -> int:
    """Bytes of the reference while it computes: on the model, and its values, which are in host memory."""
    return (1 if on_gpu else 2) * reference_bytes(config, adapter)


def with_reference(config: RunConfig, peaks: Mapping[str, Usage], adapter: int, *, on_gpu: bool) -> dict[str, Usage]:
    """The peaks of a run by phase, in order, with the reference: its values from the first step on, and what evaluates it.

    The certificate computes it once what it read has gone, so that only the values are beside that.
    """
    found, later, values = dict(peaks), list(peaks), 0 if on_gpu else reference_bytes(config, adapter)
    for name in later[later.index(STEP) :]:
        copies = evaluated_copies(config, adapter, on_gpu=on_gpu) if name == FINAL else values
        found[name] = add_usage(peaks[name], adapter=copies) if copies else peaks[name]
    return found

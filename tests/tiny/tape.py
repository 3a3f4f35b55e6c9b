"""Records what torch computes on a CPU, operation by operation, and computes it again at the same addresses: a CUDA graph's
stand-in for tests of models/text/cuda_graphs.

What is computed again knows nothing but tensors: a number that was read back to the host would be that of the recording, so
reading one is refused, as a card refuses it. It does not look into operators that Lorakeet defines, nor at copies from the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ResultT = TypeVar("ResultT")
READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Tape(TorchDispatchMode):
    """A models/text/cuda_graphs.Recorder. `recordings` and `replays` count; `broken` makes replays compute something else,
    `spoils` those of the recording of that number alone (each shape has two: forward, backward)."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.recordings = self.replays = self.warmed = 0
        self.broken = False
        self.spoils: int | None = None

    def warm(self, passes: Callable[[], ResultT]) -> ResultT:
        self.warmed += 1
        return passes()

    def record(self, passes: Callable[[], ResultT]) -> tuple[Callable[[], None], ResultT]:
        self.operations = operations = []
        number, self.recordings = self.recordings, self.recordings + 1
        with self:
            result = passes()

        def replay() -> None:
            self.replays += 1
            spoilt = self.broken or self.spoils == number
            with torch.no_grad():
                for func, args, kwargs, made in operations:
                    again = tree_leaves(func(*args, **kwargs))
                    for into, found in zip(tree_leaves(made), again, strict=True):
                        if isinstance(into, Tensor) and into.data_ptr() != found.data_ptr():
                            into.copy_(-found if spoilt and found.is_floating_point() else found)

        return replay, result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if name in READS:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        made = func(*args, **(kwargs or {}))
        held = tree_map(lambda each: each.detach() if isinstance(each, Tensor) else each, (args, kwargs or {}, made))
        self.operations.append((func, *held))
        return made

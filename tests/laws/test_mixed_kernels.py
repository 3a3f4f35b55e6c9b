"""Law: how many kernels a decode step of a mixed batch calls does not depend on how many adapters its rows use."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from lorakeet.core.layers.linear import LoraLinear
from lorakeet.models.generate.kv_cache import CacheRow, KeyValues, step
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.serving import ServingModel
from tiny.adapters import random_adapter
from tiny.models import tiny_model

ROWS = 16


class Counting(TorchDispatchMode):
    """Counts every operator that reaches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def live(tiny_llama_folder: Path) -> ServingModel:
    found = ServingModel(load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32")))
    bare = tiny_model("llama", vocab_size=found.text.model.config.vocab_size)
    for number in range(ROWS):
        found.attach(f"a{number}", random_adapter(bare, seed=number))
    return found


def calls(live: ServingModel, adapters: int) -> Counter[str]:
    """The operators of a decode step, after one that made what lasts as long as the rows do."""
    cache = KeyValues(slots=ROWS, capacity=8)
    wanted = [{f"a{row % adapters}": 1.0} if adapters else {} for row in range(ROWS)]
    for start in range(2):
        step(live.text, cache, [CacheRow(row, start, (5 + row,), wanted[row]) for row in range(ROWS)], live.selection)
    with Counting() as counting:
        step(live.text, cache, [CacheRow(row, 2, (7 + row,), wanted[row]) for row in range(ROWS)], live.selection)
    return counting.calls


def test_sixteen_adapters_call_as_many_kernels_as_one(live: ServingModel) -> None:
    one, sixteen, none = calls(live, 1), calls(live, ROWS), calls(live, 0)
    for other in (one, calls(live, 3)):
        assert sum(sixteen.values()) <= sum(other.values()), sixteen - other
    matrices = [path for path, module in live.text.model.named_modules() if isinstance(module, LoraLinear)]
    products = sum(count for name, count in sixteen.items() if "mm" in name) - sum(c for n, c in none.items() if "mm" in n)
    blocks = len({path.rpartition(".")[0] for path in matrices})  # attention and MLP of each layer
    inputs = blocks * 2  # q, k, v and o; gate, up and down
    widths = blocks // 2 * 5  # q; k and v; o; gate and up; down
    shrinks, grows = (sum(count for name, count in sixteen.items() if part in name) for part in ("per_sample_weights", "forward"))
    assert (shrinks, grows, products) == (inputs, widths, 0), "a shrink for each input, an expand for neighbours of one width"
    extra = sum(sixteen.values()) - sum(none.values())
    assert extra <= 12 * len(matrices), sixteen - none

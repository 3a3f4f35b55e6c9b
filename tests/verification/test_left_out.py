"""`left_out`: passes without some pairs begin at the first block that computes otherwise, and end as whole ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorakeet.core.spec import LoraSpec
from lorakeet.models.inject import trained_parameters
from lorakeet.models.modules import adapted_layers
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model
from lorakeet.verification.artefact import InTorch
from lorakeet.verification.left_out import KeptOutputs, left_out
from lorakeet.verification.modules import ProbedValues
from lorakeet.verification.rounding import Reported
from tiny.models import save_tiny_llama

ROWS = [Reported([5, 9, 70, 33, 12], {}), Reported([5, 9, 8, 41], {})]
BLOCKS = 4


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> InTorch:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder, num_hidden_layers=BLOCKS)
    text = load_text_model(ModelSpec(path=str(folder), dtype="float32"))
    initialise_adapter(text, plan_for(text.model, LoraSpec(rank=4, alpha=12), text.family), seed=0)
    with torch.no_grad():
        for parameter in trained_parameters(text.model, "default").values():
            parameter.add_(0.05)
    return InTorch(text, "default", "live")


def test_a_pass_from_the_lowest_changed_block_gives_the_same_numbers_for_less(live: InTorch) -> None:
    """Of each block alone, and of a kind, which is in every block; the adapter is as it was afterwards."""
    computed: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: computed.append(number))
        for number, block in enumerate(live.text.model.model.layers)
    ]
    kept = KeptOutputs(live)
    with kept.in_place():
        with kept.recording() as outputs:
            values = ProbedValues.of(live, ROWS, everywhere=True)
        kept.require_same(outputs, values.ours, lambda: values.seen_by(live))
        assert kept.able and len(outputs) == BLOCKS
        parts = {f"layers.{number}.": number for number in range(BLOCKS)} | {"up_proj": 0}
        layers = [path for path, _ in adapted_layers(live.text.model)]
        for part, first in parts.items():
            left = frozenset(path for path in layers if part in path)
            computed.clear()
            with left_out(live, left), kept.beginning(outputs, left):
                found = values.seen_by(live)
            assert computed == list(range(first, BLOCKS))
            with left_out(live, left):
                assert np.array_equal(found, values.seen_by(live)) and not np.array_equal(found, values.ours)
    for hook in hooks:
        hook.remove()
    assert np.array_equal(values.seen_by(live), values.ours)
    assert all(type(block).__name__ != "KeptBlock" for block in live.text.model.model.layers)


def test_nothing_is_kept_where_a_pass_from_the_middle_ends_otherwise(live: InTorch) -> None:
    kept = KeptOutputs(live)
    with kept.in_place():
        with kept.recording() as outputs:
            values = ProbedValues.of(live, ROWS, everywhere=True)
        kept.require_same(outputs, values.ours, lambda: values.ours + 0.01)
        assert not outputs and not kept.able
        with kept.recording() as later:
            ProbedValues.of(live, ROWS, everywhere=True)
        assert not later

"""`verification.diagnose`: from logits alone, the mistake that was made is the one that is named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.exporting.merged_tensors import StoredTensor
from lorakeet.formats.gguf import permute
from lorakeet.runs.open_adapter import NAME, open_adapter
from lorakeet.verification.artefact import InTorch, live_side
from lorakeet.verification.diagnose import cause_from_logits, cause_from_weights
from tiny.exports import loud_run
from tiny.runs import quiet

IDS = [5, 9, 70, 33, 12, 40, 90, 31]


@pytest.fixture(scope="module")
def live(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> InTorch:
    run: Path = loud_run(finished.path, tmp_path_factory.mktemp("causes") / "run")
    return live_side(open_adapter(run), quiet())


def mistaken(live: InTorch, change: Callable[[str, Any], Any]) -> torch.Tensor:
    """The logits of the live model with its pairs changed by `change`."""
    from lorakeet.verification.diagnose import changed_pairs

    with changed_pairs(live, change):
        return live.logits(IDS)


def test_scale_layer_and_absence_are_distinguished(live: InTorch) -> None:
    before = live.logits(IDS)
    third = mistaken(live, lambda _, pair: pair.B.div_(3))
    assert "the scale is 0.3333 times what it should be" in cause_from_logits(live, IDS, third)
    block = mistaken(live, lambda path, pair: pair.B.mul_(0 if ".layers.1." in path else 1))
    assert "the pairs of model.layers.1 are missing" in cause_from_logits(live, IDS, block)
    base = InTorch(live.text, None, "base").logits(IDS)
    assert "the adapter is not applied" in cause_from_logits(live, IDS, base)
    begun = live.logits([live.text.tokenizer.bos_token_id, *IDS])[1:]
    assert "a begin token more" in cause_from_logits(live, IDS, begun)
    assert "None of the usual mistakes" in cause_from_logits(live, IDS, torch.randn(before.shape))
    assert torch.equal(live.logits(IDS), before)  # nothing of it stays


def test_the_permuted_factor_is_reported(live: InTorch) -> None:
    heads = {"q_proj": 4, "k_proj": 2}

    def mix_up(path: str, pair: Any) -> None:
        count = heads.get(path.rpartition(".")[2], 0)
        if count:
            pair.A.copy_(permute(pair.A.t().contiguous(), count).t())

    assert "A of q and k is permuted instead of B" in cause_from_logits(live, IDS, mistaken(live, mix_up))
    assert live.adapter == NAME


def shares(**values: float) -> dict[str, StoredTensor]:
    return {name: StoredTensor(share, 0.0, 0.1, abs(share)) for name, share in values.items()}


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (shares(attn_q=1.0, ffn_up=1.0), ""),
        (shares(attn_q=0.0, ffn_up=0.0), "not in it at all"),
        (shares(attn_q=1.0, ffn_up=0.0), "1 matrices were not found and are the base's, such as ffn_up"),
        (shares(attn_q=3.0, ffn_up=3.0), "the scale was applied twice"),
        (shares(attn_q=1.7, ffn_up=1.7), "every matrix holds 1.7 times the change."),
        (shares(attn_q=0.1, attn_k=0.2, ffn_up=1.0), "the permutation of q and k"),
        (shares(attn_q=0.4, ffn_up=-0.2), "another adapter"),
        ({"norm": StoredTensor(math.nan, 0.0, 0.1, 0.0)}, ""),
    ],
)
def test_causes_from_weights(live: InTorch, stored: dict[str, StoredTensor], words: str) -> None:
    found = cause_from_weights(stored, live)
    assert words in found and bool(found) is bool(words)


def test_a_matrix_moved_without_any_of_the_change_is_no_missing_one(live: InTorch) -> None:
    stored = shares(attn_v=0.0, ffn_up=0.0)
    stored = {name: dataclasses.replace(found, moved=1.2) for name, found in stored.items()}
    assert "another adapter" in cause_from_weights(stored, live)


@pytest.mark.parametrize(
    ("moved", "few_bits", "words"),
    [(0.3, True, "the change is rounded away"), (0.3, False, "another adapter"), (4.0, True, "another adapter")],
)
def test_a_change_of_less_than_a_step_of_few_bits_is_rounded_away(
    live: InTorch, moved: float, few_bits: bool, words: str
) -> None:
    """Of a base with many bits, rounding to few moves a matrix by more than the change; of a base on their grid, by less."""
    stored = {name: StoredTensor(share, 0.0, 0.1, moved) for name, share in {"attn_q": 0.01, "ffn_up": 0.2}.items()}
    assert words in cause_from_weights(stored, live, few_bits=few_bits)

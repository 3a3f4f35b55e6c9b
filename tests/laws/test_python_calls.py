"""What a block costs the host in Python: calls of the package's functions in both passes, counted on the simulated card."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tiny.card_steps import rows_behind, training_on_card
from tiny.models import save_tiny_llama
from tiny.simulated_card import PACKAGE, simulated_card

MOST = {"none": 440, "nf4": 830}  # by base; NF4 unpacked by torch, for a simulated card has no library of kernels
INLINED = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")  # calls by the version of Python


def calls_of(folder: Path, quantize: str) -> Counter[str]:
    """The calls of the package's functions in a later micro-batch, by name."""
    found: Counter[str] = Counter()

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "call" and PACKAGE in frame.f_code.co_filename and frame.f_code.co_name not in INLINED:
            found[frame.f_code.co_name] += 1

    with simulated_card():
        training = training_on_card(folder, rows_behind(0, 6), quantize=quantize)
        batches = training.task.batches(0)[:1]
        training.task.gradients(batches, 1.0)  # copies of A and B, proofs, caches
        threading.setprofile(watch)
        sys.setprofile(watch)
        try:
            training.task.gradients(batches, 1.0)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("quantize", MOST)
def test_a_block_calls_at_most_so_many_functions(quantize: str, tmp_path: Path) -> None:
    few, more = (calls_of(save_tiny_llama(tmp_path / str(blocks), num_hidden_layers=blocks), quantize) for blocks in (1, 2))
    a_block = {name: count - few[name] for name, count in more.items() if count != few[name]}
    assert MOST[quantize] / 2 < sum(a_block.values()) <= MOST[quantize], a_block

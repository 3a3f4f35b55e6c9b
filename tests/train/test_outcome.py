"""What a run returns, as programs get it."""

from __future__ import annotations

from pathlib import Path

from lorakeet.evaluate.values import decode, encode
from lorakeet.train.outcome import Outcome, kept_text


def test_an_outcome_is_read_back_as_it_was_written() -> None:
    """That of an earlier version, which knew no loss scale, too."""
    ended = Outcome(8, 9, "no improvement", 0.3, 0.2, 6, 1e-4, 32, 1.5, 10**9, skipped_steps=2, loss_scale=2.0**14)
    written = encode(ended)
    assert decode(Outcome, written) == ended
    older = decode(Outcome, {key: value for key, value in written.items() if key not in ("skipped_steps", "loss_scale")})
    assert (older.steps, older.skipped_steps, older.loss_scale) == (8, 0, None)


def test_what_is_left_is_named_as_far_as_it_is_there() -> None:
    last, adapter = Path("run/checkpoints/step-000004"), Path("run/adapter")
    assert kept_text(None, adapter, None, None) == "No checkpoint was written before."
    assert kept_text(last, adapter, None, None) == f"Kept: the checkpoint {last}."
    assert kept_text(last, adapter, 1.5, 2) == f"Kept: the checkpoint {last} and {adapter} (held-out loss 1.5000 at step 2)."

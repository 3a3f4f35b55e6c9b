"""What a run returns, as programs get it."""

from __future__ import annotations

from lorakeet.evaluate.values import decode, encode
from lorakeet.train.outcome import Outcome


def test_an_outcome_is_read_back_as_it_was_written() -> None:
    """That of an earlier version, which knew no loss scale, too."""
    ended = Outcome(8, 9, "no improvement", 0.3, 0.2, 6, 1e-4, 32, 1.5, 10**9, skipped_steps=2, loss_scale=2.0**14)
    written = encode(ended)
    assert decode(Outcome, written) == ended
    older = decode(Outcome, {key: value for key, value in written.items() if key not in ("skipped_steps", "loss_scale")})
    assert (older.steps, older.skipped_steps, older.loss_scale) == (8, 0, None)

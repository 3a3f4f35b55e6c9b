"""transformers without its progress bars and notices, for the length of a block; its settings are then as they were."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

from lorakeet.quant.nf4 import quiet_bitsandbytes


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' log lines below an error, its progress bars and Python warnings inside the block.

    And what bitsandbytes says of a missing kernel when transformers, diffusers or PEFT import it there.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), quiet_bitsandbytes():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

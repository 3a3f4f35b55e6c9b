"""A context in which transformers shows no progress bars and notices."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

from lorakeet.quant.nf4 import quiet_bitsandbytes


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context without transformers' log lines below errors, progress bars and Python warnings; restores its settings.

    It also silences bitsandbytes' message on a missing kernel when transformers, diffusers or PEFT import it.
    """
    with errors_only(logging), warnings.catch_warnings(), quiet_bitsandbytes():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def errors_only(logging: Any) -> Iterator[None]:
    """A context in which a Hugging Face library, by its module `logging`, reports errors only; restores its settings."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

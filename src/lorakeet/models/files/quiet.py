"""A context in which transformers shows no progress bars and notices, and the lock of what it changes for a whole process."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from transformers.utils import logging

from lorakeet.data.locate import quiet_hub
from lorakeet.quant.nf4 import quiet_bitsandbytes

LOADING = threading.RLock()  # transformers patches torch, its own classes and the default dtype while it builds or reads a model

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def one_at_a_time(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function, with calls of several threads one after the other, and beside no `quiet_transformers` of another thread."""

    @wraps(function)
    def alone(*arguments: _Arguments.args, **more: _Arguments.kwargs) -> _Result:
        with LOADING:
            return function(*arguments, **more)

    return alone


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context without transformers' log lines below errors, progress bars and Python warnings, and without
    the hub's lines of retries; restores its settings.

    It also silences bitsandbytes' message on a missing kernel when transformers, diffusers or PEFT import it. One thread at a
    time may be within.
    """
    with LOADING, errors_only(logging), quiet_hub(), warnings.catch_warnings(), quiet_bitsandbytes():
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

"""Silence ends with its block, whatever happens in it."""

from __future__ import annotations

import logging as standard
import warnings

import pytest
from transformers.utils import logging

from lorakeet.models.quiet import quiet_transformers


@pytest.mark.parametrize("bars", [True, False])
def test_settings_come_back_after_an_error(bars: bool) -> None:
    was = logging.get_verbosity(), logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    logging.set_verbosity_info()
    try:
        with pytest.raises(KeyError), quiet_transformers():
            assert logging.get_verbosity() == logging.ERROR
            assert not logging.is_progress_bar_enabled()
            warnings.warn("not shown", stacklevel=1)
            raise KeyError
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled() == bars
    finally:
        logging.set_verbosity(was[0])
        (logging.enable_progress_bar if was[1] else logging.disable_progress_bar)()


def test_a_kernel_that_bitsandbytes_misses_is_not_told_of() -> None:
    log = standard.getLogger("bitsandbytes.backends.cpu.ops")
    log.setLevel(standard.WARNING)
    with quiet_transformers():
        assert not log.isEnabledFor(standard.WARNING) and log.isEnabledFor(standard.ERROR)
    assert log.level == standard.WARNING

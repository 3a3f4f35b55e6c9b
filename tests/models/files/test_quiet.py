"""Silence ends with its block, whatever happens in it."""

from __future__ import annotations

import logging as standard
import os
import warnings

import pytest
from transformers.utils import logging

from lorakeet.models.files.quiet import quiet_transformers
from lorakeet.quant.nf4 import quiet_bitsandbytes


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


@pytest.mark.parametrize("before", [None, "0"])
def test_blocks_of_two_threads_that_overlap_leave_everything_as_it_was(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, log = "TORCHDYNAMO_DISABLE", standard.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    log.setLevel(standard.WARNING)
    one, other = quiet_bitsandbytes(), quiet_bitsandbytes()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)  # the first one to come is the first one to go
    assert os.environ[name] == "1" and log.level == standard.ERROR
    other.__exit__(None, None, None)
    assert os.environ.get(name) == before and log.level == standard.WARNING

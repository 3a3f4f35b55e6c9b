"""Errors of a device, which code that tries a model passes on: they say nothing of the model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lorakeet.models.generate import kv_cache
from lorakeet.models.text import load
from lorakeet.models.text.model import TextModel
from lorakeet.train.text import own_code
from tiny.streams import rows


def require_passed_on(text: TextModel, said: str) -> None:
    """Each trial of the model, where its computation raises RuntimeError(`said`), raises just that."""

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError(said)

    (row,) = rows(1)
    for places, used in (
        ((load, "set_attention"), lambda: load._try_attention(text, "sdpa", torch.ones(1))),
        ((text.model, "forward"), lambda: load._own_logits(text)),
        ((own_code, "head_losses"), lambda: own_code.compare_with_own_code(text, {}, [row])),
        ((kv_cache, "step"), lambda: kv_cache.check_cached(text)),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match=re.escape(said)):
            patch.setattr(*places, fails)
            used()

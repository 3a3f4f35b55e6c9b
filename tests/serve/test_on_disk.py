"""An adapter's files: what their headers say, and whether they are still what they were."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakeet.errors import ConfigError, DataError
from lorakeet.formats import peft
from lorakeet.models.active import LiveModel
from lorakeet.serve import on_disk
from lorakeet.serve.on_disk import inspect, read


def test_headers_say_ranks_scales_and_size(live: LiveModel, saved: Callable[..., Path]) -> None:
    folder = saved("a", rank=2)
    source = inspect(folder, live)
    assert (source.ranks, source.scales, source.digest) == ((2,), (3.0,), "")
    assert source.bytes == 4 * peft.read(folder).parameters


def test_content_is_known_again(live: LiveModel, saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("a", seed=1)
    adapter, source = read(inspect(folder, live), "a", live)
    assert adapter.parameters == peft.read(folder).parameters and len(source.digest) == 64
    os.utime(folder / peft.MODEL_NAME)
    touched = read(source, "a", live)[1]
    assert touched.digest == source.digest and touched.stamp != source.stamp, "touched, with the same content"
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert read(inspect(copy, live), "a", live)[1].digest == source.digest
    shutil.copy(saved("b", seed=2) / peft.MODEL_NAME, folder / peft.MODEL_NAME)
    with pytest.raises(DataError, match=r"'a' at .* have changed since they were checked"):
        read(source, "a", live)


def test_what_does_not_fit_is_refused_by_its_header(live: LiveModel, saved: Callable[..., Path]) -> None:
    folder = saved("a", "embed_tokens", "q_proj")
    with pytest.raises(ConfigError, match=r"'model\.embed_tokens': no pair can be served there"):
        inspect(folder, live)


def test_a_rank_larger_than_the_layer_is_served_and_logged(
    live: LiveModel, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(on_disk.log, "warning", lambda form, *given: heard.append(form % given))
    inspect(saved("fits", rank=4), live)
    assert not heard
    assert inspect(saved("wide", "k_proj", rank=20), live).ranks == (20,)
    assert len(heard) == 1 and "rank larger than the layer in 2 of 2 pairs" in heard[0] and "--to adapter --rank 20" in heard[0]

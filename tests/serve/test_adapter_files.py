"""An adapter's files: what their headers say, and whether they are still what they were."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorakeet.errors import ConfigError, DataError
from lorakeet.formats.files import loaded_file
from lorakeet.formats.peft import peft, peft_config
from lorakeet.models.text.serving import ServingModel
from lorakeet.serve.adapter_files import inspect_adapter, read_stored_adapter


def test_content_is_known_again(live: ServingModel, saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("a", seed=1)
    adapter, source = read_stored_adapter(inspect_adapter(folder, live), "a", live)
    assert adapter.parameters == peft.read(folder).parameters and len(source.digest) == 64
    os.utime(folder / peft.MODEL_NAME)
    touched = read_stored_adapter(source, "a", live)[1]
    assert touched.digest == source.digest and touched.stamp != source.stamp, "touched, with the same content"
    early = inspect_adapter(folder, live)
    config = folder / "adapter_config.json"
    kept = config.read_text()
    config.write_text(json.dumps({**json.loads(kept), "lora_alpha": 2 * json.loads(kept)["lora_alpha"]}))
    assert read_stored_adapter(early, "a", live)[1].scales == (2 * early.scales[0],), "what is said is what was read"
    config.write_text(kept)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert read_stored_adapter(inspect_adapter(copy, live), "a", live)[1].digest == source.digest
    shutil.copy(saved("b", seed=2) / peft.MODEL_NAME, folder / peft.MODEL_NAME)
    with pytest.raises(DataError, match=r"'a' at .* have changed since they were checked"):
        read_stored_adapter(source, "a", live)


def test_what_does_not_fit_is_refused_by_its_header(live: ServingModel, saved: Callable[..., Path]) -> None:
    folder = saved("a", "embed_tokens", "q_proj")
    with pytest.raises(ConfigError, match=r"'model\.embed_tokens': a pair on it cannot be served"):
        inspect_adapter(folder, live)


@pytest.mark.parametrize("private", [False, True])
def test_a_second_adapter_of_a_recipe_is_not_parsed(
    live: ServingModel, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    folders = [saved(name, seed=seed) for seed, name in enumerate("abc")]
    first = read_stored_adapter(inspect_adapter(folders[0], live, private=private), "a", live)

    def parsed(*_: object) -> None:
        raise AssertionError("it was parsed")

    with monkeypatch.context() as patched:
        for place, name in ((loaded_file, "check_header"), (peft_config, "parse_config"), (peft, "_read"), (live, "_entry")):
            patched.setattr(place, name, parsed)
        others = [
            read_stored_adapter(inspect_adapter(folder, live, private=private), folder.name, live) for folder in folders[1:]
        ]
        for folder, (adapter, _) in zip(folders[1:], others, strict=True):
            live.attach(folder.name, adapter)
    for folder, (adapter, source) in zip(folders, (first, *others), strict=True):
        plain = peft.read(folder)
        assert all(torch.equal(adapter.pairs[path].A, pair.A) for path, pair in plain.pairs.items())
        assert all(torch.equal(adapter.pairs[path].B, pair.B) for path, pair in plain.pairs.items())
        assert source.bytes == 4 * plain.parameters and (source.ranks, source.scales) == ((4,), (3.0,))
    assert len({source.digest for _, source in (first, *others)}) == 3


def test_what_is_wrong_with_a_second_adapter_of_a_recipe_is_said(live: ServingModel, saved: Callable[..., Path]) -> None:
    read_stored_adapter(inspect_adapter(saved("a"), live), "a", live)
    source = inspect_adapter(saved("b", seed=1), live)
    file = source.path / peft.MODEL_NAME
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\x00\x00\xc0\x7f")  # NaN, in the file's last number
    with pytest.raises(DataError, match=r"lora_B\.weight has NaN or infinite values"):
        read_stored_adapter(source, "b", live)
    file.write_bytes(whole[:-4])
    with pytest.raises(DataError, match="it was cut off"):
        read_stored_adapter(source, "b", live)
    file.write_bytes(whole)
    assert len(read_stored_adapter(source, "b", live)[1].digest) == 64

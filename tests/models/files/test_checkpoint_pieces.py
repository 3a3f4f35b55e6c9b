"""Every parameter is what its pieces in the files make, family by family, for each kind of conversion that transformers has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakeet.models.files.checkpoint_pieces import Piece, pieces_of
from lorakeet.models.files.quantized import skeleton
from lorakeet.models.files.stored_tensors import tensor_files
from lorakeet.models.text.load import read_config
from tiny.family_columns import saved

# renamed; experts in one tensor, or matrix by matrix; matrices that files join; those that files keep apart
FAMILIES = ("granitemoe", "lfm3", "nemotron_h", "qwen3_moe", "hrm_text", "kimi_linear", "mistral3", "lara_mini")


def put(into: Tensor, piece: Piece, stored: Tensor) -> None:
    held = stored.transpose(-1, -2) if piece.across else stored
    held = held if piece.rows is None else held[piece.rows]
    part = into if piece.expert is None else into[piece.expert]
    part[slice(None) if piece.own is None else piece.own].copy_(held)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_make_the_parameters(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from lorakeet.models.files.validate import auto_class_of

    folder = saved(family, tmp_path)
    files = tensor_files(folder)
    found = pieces_of(skeleton(read_config(folder)), {name: file.tensors[name].shape for name, file in files.items()})
    config = AutoConfig.from_pretrained(folder)
    model = auto_class_of(config).from_pretrained(folder, dtype=torch.float32)
    tied = set(model.all_tied_weights_keys)
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        made = torch.full_like(parameter, torch.nan)
        for piece in found[name]:
            put(made, piece, files[piece.name].read(piece.name))
        assert torch.equal(made, parameter), name


def test_tensors_that_the_model_lacks_have_no_pieces(tmp_path: Path) -> None:
    folder = saved("lfm3", tmp_path)
    found = pieces_of(skeleton(read_config(folder)), {"model.layers.0.strange.weight": (2, 2)})
    assert found == {}

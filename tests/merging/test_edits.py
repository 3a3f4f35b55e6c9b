"""Which tensors an adapter changes, planned before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorakeet.core.adapter import Adapter, TokenRows
from lorakeet.errors import ConfigError
from lorakeet.merging.checkpoint import Checkpoint, open_checkpoint
from lorakeet.merging.edits import edits_for
from tiny.adapters import random_pair

SHAPES = {
    "model.embed_tokens.weight": (10, 8), "lm_head.weight": (10, 8), "model.q.weight": (8, 8), "model.c.weight": (8, 24),
    "model.packed.weight": (8, 8), "model.mlp.experts.down_proj": (3, 8, 6),
}  # fmt: skip


def checkpoint(folder: Path, *, head: bool = True, **config: Any) -> Checkpoint:
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items() if head or name != "lm_head.weight"}
    tensors["model.packed.weight"] = torch.zeros(8, 8, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "across"),
    [({"model_type": "gpt_oss"}, True), ({"model_type": "aria", "text_config": {"model_type": "aria_text"}}, True), ({}, False)],
)
def test_experts_are_folded_as_the_text_part_stores_them(config: dict[str, Any], across: bool, tmp_path: Path) -> None:
    pair = random_pair("experts", torch.zeros(3, 6, 8) if across else torch.zeros(3, 8, 6))
    base, name = checkpoint(tmp_path, **config), "model.mlp.experts.down_proj"
    changed = edits_for(base, Adapter({name: pair})).by_name[name]
    wanted = pair.delta().transpose(1, 2) if across else pair.delta()
    weight = torch.randn(SHAPES[name])
    for step in changed.steps:
        found = step(weight)
    torch.testing.assert_close(found, weight + wanted)


LINEAR = random_pair("linear", torch.zeros(8, 8))
EMBEDDING = random_pair("embedding", torch.zeros(10, 8))
HEAD = random_pair("linear", torch.zeros(10, 8))


@pytest.mark.parametrize(
    ("head", "config", "path", "unties"),
    [
        (False, {}, "model.embed_tokens", True),
        (False, {}, "lm_head", True),
        (False, {}, "model.q", False),
        (True, {}, "model.embed_tokens", False),
        (True, {}, "lm_head", False),
        (True, {"tie_word_embeddings": True}, "model.embed_tokens", True),
        (True, {"tie_word_embeddings": True}, "lm_head", True),
        (True, {"tie_word_embeddings": False}, "lm_head", False),
    ],
)
def test_weights_part_where_one_of_two_changes(head: bool, config: Any, path: str, unties: bool, tmp_path: Path) -> None:
    pair = {"model.embed_tokens": EMBEDDING, "lm_head": HEAD, "model.q": LINEAR}[path]
    edits = edits_for(checkpoint(tmp_path, head=head, **config), Adapter({path: pair}))
    assert edits.config == ({"tie_word_embeddings": False} if unties else {})
    assert len(edits.notes) == unties
    assert set(edits.by_name) == {f"{path}.weight"} | ({"lm_head.weight"} if unties else set())
    if unties:
        assert edits.by_name["lm_head.weight"].source == "model.embed_tokens.weight"
        assert len(edits.by_name["lm_head.weight"].steps) == (path == "lm_head")


def test_a_conv1d_is_recognised_by_its_shape_and_a_square_one_by_the_model(tmp_path: Path) -> None:
    wide = random_pair("linear", torch.zeros(24, 8))
    edits = edits_for(checkpoint(tmp_path), Adapter({"model.c": wide}))
    assert torch.allclose(edits.by_name["model.c.weight"].steps[0](torch.zeros(8, 24)), wide.delta().t())
    for model, turned in (("gpt2", True), ("llama", False)):
        edits = edits_for(checkpoint(tmp_path, model_type=model), Adapter({"model.q": LINEAR}))
        step = edits.by_name["model.q.weight"].steps[0]
        assert torch.allclose(step(torch.zeros(8, 8)), LINEAR.delta().t() if turned else LINEAR.delta())


def test_rows_of_both_ends_of_a_tied_base_and_ids_of_no_row_are_refused(tmp_path: Path) -> None:
    both = {path: TokenRows((3,), torch.zeros(1, 8)) for path in ("model.embed_tokens", "lm_head")}
    tied = checkpoint(tmp_path, head=False)
    with pytest.raises(ConfigError, match=r"lm_head and model\.embed_tokens have trained token rows each, but the base has"):
        edits_for(tied, Adapter({}, token_rows=both))
    for ids, words in (((100_000_000,), "token id 100,000,000"), ((-1,), "token id -1"), ((3, 3), "two trained rows")):
        with pytest.raises(ConfigError, match=words):
            edits_for(tied, Adapter({}, token_rows={"model.embed_tokens": TokenRows(ids, torch.zeros(len(ids), 8))}))


def test_a_larger_vocabulary_is_noted(tmp_path: Path) -> None:
    adapter = Adapter({}, token_rows={"model.embed_tokens": TokenRows((12,), torch.randn(1, 8), ("<a>",))})
    edits = edits_for(checkpoint(tmp_path, head=False), adapter)
    assert edits.config == {"vocab_size": 13}
    assert edits.by_name["model.embed_tokens.weight"].shape == (13, 8)
    assert edits.notes == ("model.embed_tokens.weight grows from 10 to 13 rows for the new tokens (<a>).",)


def test_everything_wrong_is_listed(tmp_path: Path) -> None:
    pairs = {
        "model.none": LINEAR,
        "model.packed": LINEAR,
        "model.c": random_pair("linear", torch.zeros(9, 8)),
        "model.q": random_pair("linear", torch.zeros(8, 8), bias=torch.ones(8)),
        "model.mlp.experts.gate_up_proj": random_pair("experts", torch.zeros(3, 12, 8)),
        "model.mlp.experts.down_proj": random_pair("experts", torch.zeros(3, 8, 7)),
    }
    with pytest.raises(ConfigError, match="6 problems") as error:
        edits_for(checkpoint(tmp_path), Adapter(pairs))
    for part in (
        "model.none.weight: the checkpoint has no such tensor",
        "model.packed.weight is stored as torch.uint8",
        "model.c.weight is (8, 24) in the checkpoint; the pair is for (9, 8) (linear)",
        "model.q has no bias in the checkpoint",
        "tried model.mlp.experts.gate_up_proj, model.mlp.experts.0.w1.weight, model.mlp.experts.0.gate_proj.weight",
        "model.mlp.experts.down_proj is (3, 8, 6) in the checkpoint; the pair is for (3, 8, 7)",
    ):
        assert part in str(error.value)


def test_transposed_experts_are_changed_as_they_are_stored(tmp_path: Path) -> None:
    path, pair = "model.mlp.experts.down_proj", random_pair("experts", torch.zeros(3, 6, 8))
    held = checkpoint(tmp_path, model_type="gpt_oss")
    (step,) = edits_for(held, Adapter({path: pair})).by_name[path].steps
    change = pair.scale * torch.einsum("eor,eri->eio", pair.B, pair.A)
    torch.testing.assert_close(step(torch.zeros(3, 8, 6)), change)
    with pytest.raises(ConfigError, match="the pair is for \\(3, 8, 6\\), stored transposed"):
        edits_for(held, Adapter({path: random_pair("experts", torch.zeros(3, 8, 6))}))

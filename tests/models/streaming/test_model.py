"""Blocks that come and go: the model's own logits, no numbers left behind, and refusals of what would be silently wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakeet.core.adapter import Adapter
from lorakeet.core.spec import LoraSpec
from lorakeet.errors import ConfigError
from lorakeet.models import inject, modules
from lorakeet.models.fits import plan_of
from lorakeet.models.generate.sample import sample
from lorakeet.models.generate.score import row_losses
from lorakeet.models.streaming.model import (
    NotStreamed,
    StreamedEmbedding,
    StreamedHead,
    make_resident,
    plain_output,
)
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.model import TextModel
from tiny.adapters import random_adapter
from tiny.models import save_tiny_llama
from tiny.streams import loaded, rows


@pytest.fixture
def twins(tmp_path: Path) -> tuple[TextModel, TextModel]:
    """(resident, streamed)."""
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=3, tie_word_embeddings=False)
    return loaded(folder), loaded(folder, tmp_path / "store")


def numbers(text: TextModel) -> list[str]:
    """The frozen parameters of the blocks that have numbers now."""
    assert text.streamed is not None
    found = [(block.index, name, p) for block in text.streamed.blocks for name, p in block.named_parameters()]
    return [f"{index}.{name}" for index, name, p in found if not p.is_meta and not p.requires_grad]


def test_losses_and_samples_are_the_resident_models(twins: tuple[TextModel, TextModel]) -> None:
    resident, streamed = twins
    ours, theirs = (row_losses(text, rows(7), micro_tokens=30)[0] for text in (streamed, resident))
    assert (ours == theirs).all()
    written = [[ids.tolist() for ids in sample(text, [[5, 6, 7], [8]], max_tokens=5, seed=3)] for text in (streamed, resident)]
    assert written[0] == written[1]
    assert numbers(streamed) == []


def test_one_block_at_a_time_has_numbers(twins: tuple[TextModel, TextModel]) -> None:
    _, text = twins
    assert text.streamed is not None
    with text.streamed.present(1) as block:
        assert {name.partition(".")[0] for name in numbers(text)} == {"1"}
        assert not any(parameter.is_meta for parameter in block.parameters())
    with pytest.raises(KeyboardInterrupt), text.streamed.present(2):
        raise KeyboardInterrupt
    assert numbers(text) == []


def test_gradients_through_a_block_that_leaves_are_refused(twins: tuple[TextModel, TextModel]) -> None:
    _, text = twins
    with pytest.raises(RuntimeError, match="streamed_gradients"):
        text.model(input_ids=torch.arange(5, 9)[None])


def test_blocks_that_give_more_than_states_are_refused() -> None:
    with pytest.raises(NotStreamed, match=r"tuple.*cannot be streamed\. Leave the memory budget"):
        plain_output((torch.zeros(1), None))


def test_embedding_and_head_stay_out_until_something_is_put_on_them(twins: tuple[TextModel, TextModel]) -> None:
    resident, text = twins
    assert isinstance(text.model.get_input_embeddings(), StreamedEmbedding)
    assert isinstance(text.model.get_output_embeddings(), StreamedHead) and text.head_weight is not None
    make_resident(text.model, plan_for(text.model, LoraSpec(rank=4, alpha=12.0), text.family))
    assert isinstance(text.model.get_output_embeddings(), StreamedHead)
    make_resident(text.model, plan_for(text.model, LoraSpec(rank=4, alpha=12.0, target_modules=("lm_head",)), text.family))
    assert torch.equal(text.model.get_output_embeddings().weight, resident.model.get_output_embeddings().weight)
    assert isinstance(text.model.get_input_embeddings(), StreamedEmbedding)


@pytest.mark.parametrize("settings", [{"start": "pissa"}, {"variant": "dora"}, {}])
def test_adapters_begin_and_come_back_as_on_the_resident_model(
    settings: dict[str, str], twins: tuple[TextModel, TextModel]
) -> None:
    lora = LoraSpec(rank=4, alpha=12.0, **settings)  # type: ignore[arg-type]
    begun = []
    for text in twins:
        initialise_adapter(text, plan_for(text.model, lora, text.family), seed=0)
        inject.attach(text.model, inject.adapter_of(text.model), "again")
        begun.append(inject.trained_parameters(text.model, "again"))
        assert all(not layer.weight.is_meta for _, layer in modules.adapted_layers(text.model)) == (text is twins[0])
    assert begun[0].keys() == begun[1].keys()
    assert all(torch.equal(begun[0][name], begun[1][name]) and begun[1][name].device.type == "cpu" for name in begun[0])


def test_the_frozen_weight_that_peft_saves_beside_a_pair_is_compared_where_it_lies(twins: tuple[TextModel, TextModel]) -> None:
    resident, streamed = twins
    pairs = random_adapter(resident.model, "embed_tokens").pairs
    weight = resident.model.get_input_embeddings().weight.detach()
    saved = Adapter(pairs, {"model.embed_tokens.weight": weight.clone()}, base="tiny")
    other = Adapter(pairs, {"model.embed_tokens.weight": weight + 1}, base="tiny")
    assert plan_of(streamed.model, saved) == plan_of(resident.model, saved)
    assert isinstance(modules.find(streamed.model, "model.embed_tokens"), StreamedEmbedding)
    for text in twins:
        with pytest.raises(ConfigError, match="another weight than this base has"):
            plan_of(text.model, other)
    assert modules.input_layer(streamed.model).weight.is_meta  # type: ignore[union-attr]

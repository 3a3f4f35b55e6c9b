"""Blocks that are computed again: the bits of a run that keeps everything, for less memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet.core.spec import LoraSpec
from lorakeet.models import modules
from lorakeet.models.generate.sample import sample
from lorakeet.models.recomputed import RecomputedBlock, _drawing_from, _random_state, recompute_blocks
from lorakeet.models.streaming.model import NotStreamed
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.from_config import config_from_settings, model_from_config
from lorakeet.models.text.model import TextModel
from lorakeet.planning.rehearse_text import STEP, RowShape, rehearse
from lorakeet.train.spec import TrainSpec
from lorakeet.train.text.own_code import compare_with_own_code
from lorakeet.train.text.task import TextTask
from tiny.models import save_tiny_llama
from tiny.streams import loaded, rows, trained

BLOCKS = 4
LORA = LoraSpec(rank=4, alpha=12.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("again") / "model", num_hidden_layers=BLOCKS)


def recomputed(folder: Path, keep: int, **loading: Any) -> TextModel:
    text = loaded(folder, **loading)
    assert recompute_blocks(text.model, text.family, keep=keep) == BLOCKS - keep
    return text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keep", "lora", "loading"),
    [(1, replace(LORA, dropout=0.2), {}), (1, LORA, {"dtype": "bfloat16"}), (3, replace(LORA, layers="top:2"), {}),
     (2, LoraSpec(rank=2, variant="dora", new_tokens=("<new>",)), {"method": "nf4"})],
    ids=["dropout", "bfloat16", "upper blocks", "dora, new tokens, nf4"],
)  # fmt: skip
def test_training_ends_in_the_same_bits(
    keep: int, lora: LoraSpec, loading: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    plain = trained(loaded(folder, **loading), tmp_path / "plain", steps=2, lora=lora)
    again = trained(recomputed(folder, keep, **loading), tmp_path / "again", steps=2, lora=lora)
    assert again == plain


def adapted(text: TextModel) -> TextModel:
    return initialise_adapter(text, plan_for(text.model, LORA, text.family), seed=0)


@pytest.mark.slow
def test_a_block_keeps_its_input_alone(folder: Path) -> None:
    """What a pass saves for the backward pass, on shapes: of each block that is computed again one state, (tokens, hidden)."""
    wide = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    shape = RowShape(512)

    def saved(keep: int) -> int:
        def build(blocks: int | None = None) -> TextModel:
            config = config_from_settings({**wide, "num_hidden_layers": blocks or BLOCKS})
            text = model_from_config(config, name="m", dtype=torch.float32, products=torch.float32)
            if keep < BLOCKS:
                recompute_blocks(text.model, text.family, keep=keep)
            return text

        return rehearse(build, LORA, TrainSpec(), rows=shape).peaks[STEP].kinds["saved activations"]

    state = shape.tokens * 256 * 4
    whole, one, three = saved(BLOCKS), saved(1), saved(3)
    a_block = whole - three + state
    assert a_block > 8 * state
    assert one < whole - 2 * (a_block - state), "the blocks that are computed again are in memory one at a time"


def test_the_models_own_code_and_texts_are_what_they_were(folder: Path) -> None:
    again, plain = adapted(recomputed(folder, 1)), adapted(loaded(folder))
    parameters = [TextTask(text, rows(2), held_out=(), spec=TrainSpec()).parameters() for text in (again, plain)]
    found = [compare_with_own_code(text, own, rows(2)) for text, own in zip((again, plain), parameters, strict=True)]
    assert found[0] == found[1] and found[0].passed
    assert all(parameter.grad is None for parameter in parameters[0].values()), "gradients are returned, not added"
    prompts = [[5, 6, 7], [8, 9]]
    texts = [sample(text, prompts, max_tokens=5, temperature=0.0) for text in (again, plain)]
    assert [list(ids) for ids in texts[0]] == [list(ids) for ids in texts[1]]


def test_a_model_without_a_list_of_blocks_is_refused(folder: Path) -> None:
    text = loaded(folder)
    text.model.config.num_hidden_layers = BLOCKS + 1  # as of a model that runs its blocks several times
    with pytest.raises(NotStreamed, match="do not run one after another"):
        recompute_blocks(text.model, text.family, keep=1)


def test_random_numbers_of_a_device_are_drawn_again_too(second_generator: torch.Generator) -> None:
    card = torch.device("cuda", 0)
    state = _random_state(card)
    first = torch.rand(2), torch.rand(2, generator=second_generator)
    with _drawing_from(state, card):
        again = torch.rand(2), torch.rand(2, generator=second_generator)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_blocks_with_trained_inputs_of_their_own_are_refused(folder: Path) -> None:
    """What is made before the blocks and passed to each of them would get no gradient (Gemma 3n and 4)."""
    block = RecomputedBlock(torch.nn.Identity(), draws=True)
    states, other = torch.randn(1, 3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    for arguments, settings in (((other,), {}), ((), {"per_layer_input": other}), ((), {"shared": {"keys": (other,)}})):
        with pytest.raises(NotStreamed, match="trained inputs beside the hidden states"):
            block(states, *arguments, **settings)
    text = loaded(folder)
    text.model.config.num_kv_shared_layers = 2
    with pytest.raises(NotStreamed, match="use keys and values of earlier ones"):
        recompute_blocks(text.model, text.family, keep=1)


@pytest.mark.parametrize(("dropout", "kept"), [(0.0, 0), (0.2, BLOCKS - 1)])
def test_states_of_generators_are_kept_where_something_draws_alone(
    dropout: float, kept: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs that drop come after the blocks were wrapped."""
    seen: list[int] = []
    own = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: seen.append(1) or own())
    text = recomputed(folder, 1)
    initialise_adapter(text, plan_for(text.model, replace(LORA, dropout=dropout), text.family), seed=0)
    task = TextTask(text, rows(2), held_out=(), spec=TrainSpec(batch_size=2))
    task.gradients(task.batches(0), 1.0)
    assert len(seen) == 1 + 2 * kept, "of the micro-batch; of each block in its pass, and of what others drew when it comes again"
    seen.clear()
    text.model.config.attention_dropout = 0.1
    again = RecomputedBlock(torch.nn.Identity(), draws=modules.set_to_draw(text.model))
    again(torch.ones(1, 2, requires_grad=True))
    assert len(seen) == 1, "a model that is set to draw"

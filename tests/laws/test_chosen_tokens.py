"""Models that choose among the tokens of long rows by scores: such rows are computed alone, whatever batch they are in."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lorakeet.core.spec import LoraSpec
from lorakeet.data.chat import Example
from lorakeet.data.pack import pack_examples
from lorakeet.models.generate.sample import sample
from lorakeet.models.generate.score import row_losses
from lorakeet.models.streaming.model import NotStreamed
from lorakeet.models.text.model import TextModel, context_of
from tiny import family_columns, streams
from tiny.small_configs import small_config

CHOSEN = 8  # tokens, of small_configs
LENGTHS = (CHOSEN, 60, CHOSEN - 1, CHOSEN + 1, 250, 5)


@pytest.fixture(scope="module", params=["deepseek_v32", "doge", "glm_moe_dsa", "minimax_m3_vl"])
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    path = tmp_path_factory.mktemp("chosen")
    family_columns.saved(request.param, path)
    return family_columns.loaded(path)


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    found = [torch.randint(4, 40, (count,), generator=generator).numpy() for count in LENGTHS]  # tokens recur: equal scores
    return [Example(ids, ids != -1, str(number), None, False) for number, ids in enumerate(found)]


def targets_after_the_first() -> list[Example]:
    given = rows()
    for row in given:
        row.supervised[0] = False
    return given


def states(text: TextModel, given: list[Example]) -> torch.Tensor:
    with torch.no_grad():
        return text.hidden(pack_examples(given))


def test_long_rows_in_company_have_the_states_of_themselves_alone(text: TextModel) -> None:
    given, place = targets_after_the_first(), 0
    assert text.chooses_beyond == CHOSEN and text.pads
    found = states(text, given)
    for row in given:
        own = found[place : (place := place + len(row.ids) - 1)]
        allowed = 0.0 if len(row.ids) > CHOSEN else 1e-5  # padded ones are rounded otherwise
        torch.testing.assert_close(own, states(text, [row]), rtol=0, atol=allowed)


def test_steps_and_scores_take_them_alone(text: TextModel) -> None:
    given = targets_after_the_first()
    batches = text.micro_batches(given, 4096)
    assert sorted(batch.lengths for batch in batches) == [(8, 7, 5), (9,), (60,), (250,)]
    alone = np.concatenate([row_losses(text, [row], micro_tokens=1)[0] for row in given])
    np.testing.assert_allclose(row_losses(text, given, micro_tokens=4096)[0], alone, rtol=1e-5)


@pytest.mark.slow
def test_replies_to_long_texts_are_written_alone(text: TextModel) -> None:
    prompts = [row.ids[:-4] for row in rows()]
    together = sample(text, prompts, max_tokens=4, temperature=0)
    for prompt, reply in zip(prompts, together, strict=True):
        assert reply.tolist() == sample(text, [prompt], max_tokens=4, temperature=0)[0].tolist()


def test_a_plan_counts_them_together_which_holds_more(text: TextModel) -> None:
    planned = text.with_options(rows_apart=False)
    assert [batch.lengths for batch in planned.micro_batches(targets_after_the_first(), 4096)] == [LENGTHS]


@pytest.mark.slow
def test_streamed_blocks_train_as_resident_ones_and_refuse_such_rows_in_one_batch(tmp_path: Path) -> None:
    folder = family_columns.saved("deepseek_v32", tmp_path)
    lora = LoraSpec(rank=4, alpha=12.0, target_modules=("q_b_proj", "o_proj"))
    streamed = streams.loaded(folder, tmp_path / "store")
    found, wanted = (
        streams.trained(text, tmp_path / name, steps=3, lora=lora)
        for name, text in (("streamed", streamed), ("resident", streams.loaded(folder)))
    )
    assert found == wanted
    assert streamed.streamed is not None
    with pytest.raises(NotStreamed, match=f"more than {CHOSEN} tokens"), streamed.streamed.recording():
        states(streamed, targets_after_the_first())


def test_the_most_tokens_of_a_text_have_several_names() -> None:
    """Beyond, MPT's table of biases by distance ends."""
    assert [context_of(small_config(kind)) for kind in ("mpt", "gpt2", "dbrx", "bloom")] == [256, 256, 256, None]
    own = AutoModelForCausalLM.from_config(small_config("mpt")).eval()
    assert own(input_ids=torch.full((1, 256), 5)).logits.isfinite().all()
    with pytest.raises(RuntimeError, match="257"):
        own(input_ids=torch.full((1, 257), 5))

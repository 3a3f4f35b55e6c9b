"""A row has the rotary frequencies of its own length, in whatever batch: those of transformers on the row alone."""

from pathlib import Path

import pytest
import torch

from lorakeet.data.chat import Example
from lorakeet.data.pack import pack_examples
from lorakeet.errors import ConfigError
from lorakeet.models.generate.kv_cache import check_cached
from lorakeet.models.generate.sample import sample
from lorakeet.models.text.digests import frozen_digests
from lorakeet.models.text.model import TextModel, served_context_of
from tiny import family_columns
from tiny.small_configs import SWITCH

KINDS = ("phi3 (longrope)", "phimoe (longrope)")
LENGTHS = (SWITCH - 6, SWITCH + 14, SWITCH, SWITCH + 1, 3 * SWITCH)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("longrope")
    family_columns.saved(request.param, path)
    return path


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(4, 300, (length,), generator=generator).numpy()
        ids[:3] = 5  # what rows of other frequencies begin with alike is not shared
        found.append(Example(ids, ids != -1, str(number), None, False))
    for row in found:
        row.supervised[0] = False
    return found


def logits(text: TextModel, batch: list[Example]) -> torch.Tensor:
    with torch.no_grad():
        return text.head(text.hidden(pack_examples(batch)))


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_rows_of_both_kinds_in_one_batch_have_their_own_frequencies(folder: Path, attention: str) -> None:
    own = family_columns.in_transformers(folder / "model")
    with torch.no_grad():
        wanted = torch.cat([own(input_ids=torch.from_numpy(row.ids)[None], use_cache=False).logits[0, :-1] for row in rows()])
    text = family_columns.loaded(folder, attention=attention)
    assert text.switch_length == SWITCH
    torch.testing.assert_close(logits(text, rows()), wanted, rtol=1e-4, atol=1e-5)
    for long in (False, True):  # batches of one kind
        part = [row for row in rows() if (len(row.ids) > SWITCH) == long]
        alone = torch.cat([logits(text, [row]) for row in part])
        torch.testing.assert_close(logits(text, part), alone, rtol=1e-4, atol=1e-5)


def test_a_step_puts_them_into_other_batches(folder: Path) -> None:
    found = family_columns.loaded(folder).micro_batches(rows(), 4096)
    assert sorted(sorted(batch.lengths) for batch in found) == [sorted(LENGTHS[::2])[:2], sorted((*LENGTHS[1::2], LENGTHS[4]))]


def test_replies_in_company_are_those_of_transformers_alone(folder: Path) -> None:
    own = family_columns.in_transformers(folder / "model")
    text, count = family_columns.loaded(folder), 6
    found = sample(text, [row.ids for row in rows()], max_tokens=count, temperature=0)
    for row, reply in zip(rows(), found, strict=True):
        ids = torch.from_numpy(row.ids)[None]
        with torch.no_grad():
            for _ in range(len(reply)):
                ids = torch.cat([ids, own(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)[None]], 1)
        assert reply.tolist() == ids[0, len(row.ids) :].tolist()


def test_only_texts_with_one_kind_of_frequencies_are_served(folder: Path) -> None:
    text = family_columns.loaded(folder)
    assert served_context_of(text.model.config) == SWITCH
    check_cached(text, SWITCH)
    with pytest.raises(ConfigError, match=f"at most {SWITCH} tokens"):
        check_cached(text, SWITCH + 1)


def test_frequencies_that_transformers_computes_again_are_no_frozen_weights(folder: Path) -> None:
    text = family_columns.loaded(folder)
    before = frozen_digests(text.model)
    logits(text, [rows()[1]])
    assert frozen_digests(text.model) == before and before

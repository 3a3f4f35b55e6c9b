"""Llama 4 beyond a chunk of its attention, and where its temperature grows: rows of a batch are as alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from lorakeet.data.pack import pack_examples
from lorakeet.models.generate.sample import sample
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model
from lorakeet.models.text.model import TextModel
from tiny.family_columns import in_transformers, rows, saved
from tiny.runs import chats, run, write_rows

SIZE = 8  # tokens of a chunk in small_configs
LENGTHS = (SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, 2 * SIZE + 1, 23)


@pytest.fixture(scope="module", params=[8192, 12], ids=["chunks", "chunks and temperatures"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama4_text", tmp_path_factory.mktemp("chunks"), floor_scale=request.param)


def model(folder: Path, attention: Any) -> TextModel:
    return load_text_model(ModelSpec(path=str(folder), dtype="float32", device="cpu", attention=attention), say=lambda line: None)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_logits_of_rows_in_a_batch_are_those_of_transformers_alone(folder: Path, attention: str) -> None:
    text, own, longest = model(folder, attention), in_transformers(folder), rows()[0]
    given = [type(longest)(longest.ids[:count], longest.supervised[:count], str(count), None, False) for count in LENGTHS]
    assert text.attention == ("varlen" if attention == "auto" else "sdpa")
    seen = []
    for batch in text.micro_batches(given, 1 << 20):
        found = text.head(text.hidden(batch)).split([int(key) - 1 for key in batch.keys])  # type: ignore[no-untyped-call]
        for key, logits in zip(batch.keys, found, strict=True):
            ids = torch.from_numpy(longest.ids[: int(key)])
            assert_close(logits, own(input_ids=ids[None], use_cache=False).logits[0, :-1], rtol=1e-4, atol=1e-4)
        seen += batch.keys
    assert sorted(map(int, seen)) == sorted(LENGTHS)


def test_rows_that_begin_alike_share_no_prefix_beyond_a_chunk(folder: Path) -> None:
    text, longest = model(folder, "auto"), rows()[0]
    begin_alike = pack_examples([longest] * 20)
    assert text.layout(begin_alike).prefix == 0
    few = pack_examples([type(longest)(longest.ids[:SIZE], longest.supervised[:SIZE], "few", None, False)] * 40)
    assert text.layout(few).prefix > 0


def test_replies_in_company_are_those_of_transformers_alone(folder: Path) -> None:
    text, own, count = model(folder, "auto"), in_transformers(folder), 12
    prompts = [rows()[0].ids[:length] for length in LENGTHS]
    found = sample(text, prompts, max_tokens=count, temperature=0)
    for prompt, reply in zip(prompts, found, strict=True):
        wanted = own.generate(
            input_ids=torch.from_numpy(prompt)[None], max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        assert reply.tolist() == wanted[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_a_run_over_rows_beyond_a_chunk_stays_packed(tmp_path: Path) -> None:
    folder = saved("llama4_text", tmp_path)
    data = write_rows(tmp_path / "rows.jsonl", chats(12))
    few = {"train.steps": 2, "evaluate.answers": 1, "evaluate.answer_tokens": 4, "evaluate.drift_texts": 2}
    found = run(folder, data, tmp_path / "run", few)
    assert found.setup.text.attention == "varlen" and found.report is not None
    assert found.report.certificate is not None and found.report.certificate.passed

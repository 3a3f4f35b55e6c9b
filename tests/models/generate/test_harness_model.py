"""The harness's requests are answered as by its own model for transformers: scores, likeliest tokens, texts cut at their ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness, of the extra lorakeet[tasks], is not installed")

from lorakeet.errors import ConfigError
from lorakeet.models.generate.harness_model import harness_model
from lorakeet.models.spec import ModelSpec
from lorakeet.models.text.load import load_text_model

PAIRS = [("Is 3 even? Answer:", " no"), ("Is 3 even? Answer: ", "yes it is"), ("", "A text alone"), ("word " * 60, "end")]
LONGEST = 48


def requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in args]


@pytest.fixture(scope="module")
def both(tiny_llama_folder: Path) -> tuple[Any, Any]:
    """Lorakeet's model and the harness's own, of one folder."""
    from lm_eval.models.huggingface import HFLM

    text = load_text_model(ModelSpec(path=str(tiny_llama_folder), dtype="float32", device="cpu"))
    theirs = HFLM(pretrained=str(tiny_llama_folder), device="cpu", dtype="float32", max_length=LONGEST, batch_size=1)
    return harness_model(text, longest=LONGEST, micro_tokens=256), theirs


def test_log_likelihoods_are_those_of_the_harness(both: tuple[Any, Any]) -> None:
    from lm_eval.api.instance import Instance

    mine = both[0].loglikelihood(requests(*PAIRS))
    theirs = both[1].loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in PAIRS], disable_tqdm=True)
    assert [score for score, _ in mine] == pytest.approx([score for score, _ in theirs], abs=2e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]


def test_a_text_longer_than_the_context_is_read_in_windows(both: tuple[Any, Any]) -> None:
    from lm_eval.api.instance import Instance

    texts = [("a short text",), ("many words of a text " * 30,)]
    mine = both[0].loglikelihood_rolling(requests(*texts))
    theirs = both[1].loglikelihood_rolling([Instance("loglikelihood_rolling", {}, text, 0) for text in texts], disable_tqdm=True)
    assert mine == pytest.approx(theirs, abs=1e-3)


def test_continuations_are_cut_where_the_task_says(both: tuple[Any, Any]) -> None:
    from lm_eval.api.instance import Instance

    settings = {"until": ["e"], "max_gen_toks": 6, "do_sample": False}
    asked = [("Is 3 even? Answer:", settings), ("Is 14 even? And 15? Answer:", settings), ("x", {**settings, "max_gen_toks": 3})]
    theirs = both[1].generate_until([Instance("generate_until", {}, each, 0) for each in asked], disable_tqdm=True)
    mine = both[0].generate_until(requests(*asked))
    assert mine == theirs and not any("e" in reply for reply in mine)


def test_a_prompt_that_begins_with_bos_gets_no_second_one(both: tuple[Any, Any]) -> None:
    from lm_eval.api.instance import Instance

    bos = both[1].tokenizer.bos_token
    assert bos
    pair = (f"{bos}Is 3 even?", " no")
    mine, theirs = both[0].loglikelihood(requests(pair)), both[1].loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    assert mine[0][0] == pytest.approx(theirs[0][0], abs=2e-4)


def test_a_reply_that_leaves_nothing_for_the_prompt_is_refused_and_shortened_prompts_are_counted(both: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match=r"may have 48 tokens \(max_gen_toks\), and the model reads 48"):
        both[0].generate_until(requests(("Is 3 even?", {"max_gen_toks": LONGEST})))
    before = both[0].shortened
    both[0].generate_until(requests(("word " * 60, {"max_gen_toks": 4}), ("word", {"max_gen_toks": 4})))
    assert both[0].shortened == before + 1

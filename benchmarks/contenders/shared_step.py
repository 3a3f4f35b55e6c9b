"""Training steps over rows that share a prompt, computed once a micro-batch or in every row, alternately."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from contenders.planned_run import random_model, read_settings
from contenders.timed_step import UNTIMED, answer, made_up, step_of
from lorakeet.data.chat import Example, Ids
from lorakeet.memory.measure import peak_bytes
from lorakeet.models.targets import plan_for
from lorakeet.models.text.adapters import initialise_adapter

WAYS = ("once", "each")


def measured(asked: Mapping[str, Any]) -> dict[str, Any]:
    """`asked`: settings and shape as of planned_run, `count` rows of `prompt` tokens that are the same in all and `own` others,
    and how many `steps` are timed. Of both ways seconds of each step, FLOPs of one, passes and tokens that are computed in it."""
    config, precision = read_settings(asked)
    text = random_model(asked["shape"], config, precision)
    prompt = made_up(asked["prompt"] + 1, "label", 1000).ids[:-1]
    rows = [_behind(prompt, made_up(asked["own"], "label", number)) for number in range(asked["count"])]
    initialise_adapter(text, plan_for(text.model, config.lora, text.family), seed=0)
    texts = {way: text.with_options(share_prefix=way == "once") for way in WAYS}
    steps = {way: step_of(texts[way], config, rows) for way in WAYS}
    found: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(UNTIMED + asked["steps"]):
        for way in WAYS:
            counted: dict[str, int] = {}
            spent = sum(steps[way](counted if number == 0 else None).values())
            if number == 0:
                batches = texts[way].micro_batches(rows, config.train.micro_tokens)
                computed = sum(len(texts[way].layout(batch).ids) for batch in batches)
                found[way] = {"flops": sum(counted.values()), "passes": len(batches), "computed": computed}
            elif number >= UNTIMED:
                seconds[way].append(spent)
    return {**{way: {**found[way], "seconds": seconds[way]} for way in WAYS}, "peak_bytes": peak_bytes()}


def _behind(prompt: Ids, row: Example) -> Example:
    """The row with the prompt before it; the prompt has no targets."""
    supervised = np.concatenate([np.zeros(len(prompt), bool), row.supervised])
    return replace(row, ids=np.concatenate([prompt, row.ids]), supervised=supervised)


if __name__ == "__main__":
    answer(measured)

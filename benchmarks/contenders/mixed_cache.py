"""A faulty server, in this process: the first half of each prompt is in its prefix cache as another adapter left it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakeet.core.adapter import Adapter
from lorakeet.models.generate.kv_cache import CacheRow, KeyValues, step
from lorakeet.models.text.model import TextModel
from lorakeet.models.text.serving import ServingModel
from lorakeet.verification.server_apis import TOP, Api, Step, Token, Written


class MixedCacheApi(Api):
    """Answers by `right`, over keys and values of `other` for the first half of a prompt; with `other` None it is no fault."""

    def __init__(self, text: TextModel, right: Adapter, other: Adapter | None) -> None:
        super().__init__("http://mixed", "right")
        self.text, self.live = text, ServingModel(text)
        self.live.attach("right", right)
        self.other = "right" if other is None else "other"
        if other is not None:
            self.live.attach("other", other)

    def about(self) -> str:
        return "a prefix cache of another adapter"

    def number_format(self) -> str:
        return "float32"  # as lorakeet serve says of this base

    def tokenise(self, text: str) -> list[int] | None:
        return None

    def prompt(self, messages: Any) -> list[int] | None:
        return None

    def prompt_length(self, messages: Any) -> int | None:
        return None

    def along(self, ids: Sequence[int]) -> None:
        return None

    def write(self, prompt: Sequence[int], tokens: int) -> Written:
        cache = KeyValues(slots=1, capacity=len(prompt) + tokens)
        half = len(prompt) // 2
        if half:
            step(self.text, cache, [CacheRow(0, 0, tuple(prompt[:half]), {self.other: 1.0})], self.live.selection)
        row, steps, decode = CacheRow(0, half, tuple(prompt[half:]), {"right": 1.0}), list[Step](), self.text.tokenizer.decode
        for _ in range(tokens):
            after = step(self.text, cache, [row], self.live.selection)[0].log_softmax(-1).topk(TOP)
            pairs = zip(after.indices.tolist(), after.values.tolist(), strict=True)
            top = tuple(Token(decode([number]), number, value) for number, value in pairs)
            steps.append(Step(top[0], top))
            if top[0].number == self.text.tokenizer.eos_token_id:
                break
            row = CacheRow(0, row.start + len(row.ids), (int(top[0].number or 0),), {"right": 1.0})
        return Written(decode([one.token.number for one in steps], skip_special_tokens=True), tuple(steps))

    chat = None  # type: ignore[assignment]

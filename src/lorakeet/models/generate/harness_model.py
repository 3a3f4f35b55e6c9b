"""A text model as lm-evaluation-harness calls it: log-likelihoods of texts, and greedy or sampled continuations.

Texts become tokens as the harness's own model for transformers makes them: context and continuation together, white space at
the end of a context with the continuation, too long contexts without their beginning. The active adapter answers, or the base.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakeet.data.chat import Example, Ids
from lorakeet.data.template import decoded, encoded, templated
from lorakeet.errors import ConfigError
from lorakeet.models.generate.sample import sample
from lorakeet.models.generate.score import scored_rows
from lorakeet.models.text.model import TextModel

REPLY_TOKENS = 256  # where a task names no limit


def harness_model(text: TextModel, *, longest: int, micro_tokens: int) -> Any:
    """An `lm_eval.api.model.LM` of `text`. Its `shortened` counts contexts that lost their beginning.

    `longest` is the most tokens that the model reads: of a context and its continuation all but the last one. Raises ImportError
    without lm-evaluation-harness.
    """
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer = text.tokenizer
    start = next((int(one) for one in (tokenizer.bos_token_id, tokenizer.eos_token_id) if one is not None), 0)

    def scores(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        rows = [_example(context, continuation, longest) for context, continuation in pairs]
        model.shortened += sum(len(context) + len(continuation) > longest + 1 for context, continuation in pairs)
        sums, greedy = scored_rows(text, rows, micro_tokens=micro_tokens)
        return [(float(one), bool(likeliest)) for one, likeliest in zip(sums, greedy, strict=True)]

    class HarnessModel(LM):  # type: ignore[misc]  # the harness is not typed
        """Answers the harness's requests."""

        tokenizer_name = str(text.name)
        shortened = 0

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return scores([_tokens(tokenizer, request.args[0], request.args[1], start) for request in requests])

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            found = []
            for request in requests:
                ids = encoded(tokenizer, request.args[0], add_special_tokens=False)
                windows = get_rolling_token_windows(ids, prefix_token=start, max_seq_len=longest, context_len=1)
                found.append(sum(score for score, _ in scores([make_disjoint_window(window) for window in windows])))
            return found

        def generate_until(self, requests: Any) -> list[str]:
            alike: dict[str, list[int]] = defaultdict(list)
            for number, request in enumerate(requests):
                alike[repr(request.args[1])].append(number)
            found: dict[int, str] = {}
            for numbers in alike.values():
                contexts = [requests[number].args[0] for number in numbers]
                replies, shortened = _replies(text, contexts, requests[numbers[0]].args[1], longest)
                model.shortened += shortened
                found |= dict(zip(numbers, replies, strict=True))
            return [found[number] for number in range(len(requests))]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            more = {"continue_final_message": not add_generation_prompt}
            return templated(tokenizer, chat_history, add_generation_prompt=add_generation_prompt, **more)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return str(tokenizer.chat_template or "")

    model = HarnessModel()
    return model


def _without_second_bos(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text; one that begins with the BOS token, as chat templates write it, gets no second one."""
    own = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return encoded(tokenizer, text, **({"add_special_tokens": False} if own else {}))


def _tokens(tokenizer: Any, context: str, continuation: str, start: int) -> tuple[list[int], list[int]]:
    """A context and its continuation as tokens; `start` stands for a context that is empty."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        return [start], encoded(tokenizer, continuation, add_special_tokens=False)
    whole, first = _without_second_bos(tokenizer, context + continuation), _without_second_bos(tokenizer, context)
    return first, whole[len(first) :]


def _example(context: Sequence[int], continuation: Sequence[int], longest: int) -> Example:
    """The context's last tokens and the continuation, which is the target."""
    ids = np.array([*context, *continuation][-(longest + 1) :], np.int64)
    targets = np.arange(len(ids)) >= max(1, len(ids) - len(continuation))  # nothing predicts the first token
    return Example(ids, targets, "", None, False)


def _replies(text: TextModel, contexts: Sequence[str], settings: dict[str, Any], longest: int) -> tuple[list[str], int]:
    """The continuation of each context, cut at the first of the settings' `until`, and how many contexts were shortened.

    Raises ConfigError where the task's longest reply leaves nothing for a prompt.
    """
    until = settings.get("until") or []
    stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
    most = int(settings.get("max_gen_toks", REPLY_TOKENS))
    if most >= longest:
        raise ConfigError(
            f"The task's replies may have {most:,} tokens (max_gen_toks), and the model reads {longest:,}: nothing is left for a "
            "prompt. Raise the memory budget or data.max_tokens, take a model with a longer context, or another task."
        )
    sampled = bool(settings.get("do_sample", settings.get("temperature", 0) > 0))
    temperature = float(settings.get("temperature", 1.0)) if sampled else 0.0
    prompts = [_without_second_bos(text.tokenizer, context) for context in contexts]
    shortened = sum(len(prompt) > longest - most for prompt in prompts)

    def said_by(written: list[int] | Ids) -> str:
        return decoded(text.tokenizer, written, skip_special_tokens=True)

    def done(written: list[int]) -> bool:
        said = said_by(written)
        return any(stop in said for stop in stops)

    cut = [prompt[-(longest - most) :] for prompt in prompts]
    replies = [said_by(ids) for ids in sample(text, cut, max_tokens=most, temperature=temperature, done=done)]
    for stop in stops:
        replies = [reply.split(stop, 1)[0] for reply in replies]
    return replies, shortened

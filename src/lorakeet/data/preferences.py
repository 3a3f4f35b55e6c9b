"""Records of preferences as rows: two answers to one prompt, the chosen and the rejected one, or one answer with a verdict.

| record | example |
| --- | --- |
| prompt, chosen, rejected | texts, or lists of messages |
| chosen, rejected | lists of messages that begin alike, or dialogues "Human: … Assistant: …" |
| chosen, rejected | texts that begin with the same words, which are the prompt |
| instruction, input, chosen, rejected | Alpaca |
| prompt, completion, label | label true or false (KTO) |
| messages, label | the same |
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from lorakeet.data.rows import PROMPT_GROUP, Row, Turn
from lorakeet.data.tables import UnusableRow
from lorakeet.errors import DataError, spelt

CHOSEN, REJECTED, VERDICT = "chosen", "rejected", "label"
RATED = (("messages",), ("conversations",), ("prompt", "completion"), ("prompt", "response"))  # columns of one answer
PROMPTS = ("prompt", "question", "instruction")
_SPEAKERS = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_WORDS = {"true": True, "false": False, "1": True, "0": False, "good": True, "bad": False}


def is_preference(columns: Mapping[str, object]) -> bool:
    """Whether a record with these columns has two answers."""
    return CHOSEN in columns and REJECTED in columns


def is_rated(columns: Mapping[str, object], *, of_any_value: bool = False) -> bool:
    """Whether a record has one answer with a verdict: a label that is true or false, or one `of_any_value`."""
    answered = any(all(column in columns for column in some) for some in RATED)
    return answered and (VERDICT in columns if of_any_value else isinstance(columns.get(VERDICT), bool))


def dialogue(text: str) -> list[dict[str, str]] | None:
    """The messages of a dialogue "\\n\\nHuman: …\\n\\nAssistant: …" (Anthropic's HH); None if `text` is none."""
    start, *parts = _SPEAKERS.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if start.strip() or not parts:
        return None
    return [{"role": _ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def answers_of(values: Mapping[str, Any]) -> tuple[list[Any], list[Any]] | None:
    """The messages of the chosen and the rejected conversation, where a record has these as lists or dialogues; else None."""
    found = [values.get(column) for column in (CHOSEN, REJECTED)]
    lists = [dialogue(each) if isinstance(each, str) else each for each in found]
    if all(isinstance(each, list) and each for each in lists):
        return list(lists[0] or []), list(lists[1] or [])
    return None


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The words that both texts begin with, and what follows in each, with the space before it: TRL's implicit prompt.

    TRL cuts at the first letter that differs; here no word is cut. The prompt is empty where the first words differ.
    """
    common = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    ends = {text[common : common + 1] for text in (chosen, rejected)}
    if not all(end == "" or end.isspace() for end in ends):
        common = next((place for place in range(common, 0, -1) if chosen[place - 1].isspace()), 0)
    common = len(chosen[:common].rstrip())
    return chosen[:common], chosen[common:], rejected[common:]


def with_prompt(prompt: Sequence[Turn], answer: Sequence[Turn]) -> tuple[Turn, ...]:
    """The prompt and the answer after it, where the answer may be the whole conversation, which begins with the prompt.

    White space around texts, and a system turn that only one of them has, are no difference. Raises UnusableRow where the
    prompt would be followed by a second one.
    """
    own, said = _system(prompt), _system(answer)
    first, rest = prompt[len(own) :], answer[len(said) :]
    agree = not (own and said) or _alike(own[0], said[0])
    if agree and len(rest) >= len(first) and all(map(_alike, first, rest)):
        return (*(own or said), *first, *rest[len(first) :])
    if prompt and (said or (answer and answer[0].role == prompt[-1].role == "user")):
        raise UnusableRow(
            f"the prompt is {_shown(prompt)} and the answer begins with the {answer[0].role}'s {_shown(answer)}; expected an "
            "answer of the assistant, or the whole conversation with the same prompt. Remove one of the two prompts."
        )
    return (*prompt, *answer)


def preferred(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """Both conversations, of which only what follows their common first turns is trained.

    Raises UnusableRow if the conversations are equal, do not begin alike, or do not both end in an answer of the assistant.
    """
    if list(chosen) == list(rejected):
        raise UnusableRow("chosen and rejected are equal, so neither is preferred; remove the row or change one of them.")
    common = common_turns(chosen, rejected)
    prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    if not prompt or (chosen[0].role == "user" and len(_system(prompt)) == len(prompt)):
        raise UnusableRow(
            f"chosen begins with {_shown(chosen)} and rejected with {_shown(rejected)}; expected the same prompt in both. "
            "Give it in a column 'prompt', or make their first messages equal."
        )
    for name, answer in ((CHOSEN, chosen), (REJECTED, rejected)):
        if answer[-1].role != "assistant":
            raise UnusableRow(f"{name} does not end in an answer of the assistant after the prompt; add one.")
    before = tuple(replace(turn, supervised=False) for turn in prompt)
    return (*before, *chosen), (*before, *rejected)


def common_turns(one: Sequence[Turn], other: Sequence[Turn]) -> int:
    """How many turns both begin with; the last turn of each is an answer of its own."""
    both = zip(one[:-1], other[:-1], strict=False)
    return sum(1 for _ in takewhile(lambda turns: turns[0] == turns[1], both))


def _system(turns: Sequence[Turn]) -> Sequence[Turn]:
    return turns[:1] if turns and turns[0].role == "system" else ()


def _alike(one: Turn, other: Turn) -> bool:
    return (one.role, one.text.strip(), one.extra) == (other.role, other.text.strip(), other.extra)


def verdict(value: object) -> bool:
    """Whether an answer is wanted. Raises UnusableRow for anything but true and false, 1 and 0, good and bad."""
    if isinstance(value, bool):
        return value
    known = _WORDS.get(str(value).strip().lower()) if isinstance(value, (str, int)) else None
    if known is None:
        raise UnusableRow(f"column 'label' is {value!r:.60}; expected true for an answer that is wanted, or false.")
    return known


def with_mismatches(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rated rows with the answer of the row before in `rejected`, the first with that of the last: KTO's estimate of the KL."""
    answers = [row.turns[-1] for row in rows]
    return tuple(
        replace(row, rejected=(*row.turns[:-1], other)) for row, other in zip(rows, [*answers[-1:], *answers[:-1]], strict=True)
    )


def rows_for(rows: Sequence[Row], objective: str | None, part: str, *, trained: bool = True) -> tuple[Row, ...]:
    """The rows as `objective` takes them: for kto with the answer of another row to each prompt. None takes any.

    Raises DataError for rows of another shape, and where kto is `trained` with wanted or unwanted answers only.
    """
    if objective is None:
        return tuple(rows)
    rated = [row for row in rows if _is_rated(row)]
    pairs = [row for row in rows if row.rejected and not _is_rated(row)]
    if objective == "sft":
        if pairs or rated:
            shape, instead = ("two answers", "dpo") if pairs else ("a verdict on its answer", "kto")
            raise DataError(
                f"{(pairs or rated)[0].source} has {shape}, but train.objective is sft, which trains on every answer. Set "
                f"--train.objective {instead}, or give rows with a prompt and one good answer. If other columns "
                f"have these, choose {spelt('data.format')} chat|completion|alpaca|classification|text."
            )
        return tuple(rows)
    if objective != "kto":
        if len(pairs) < len(rows):
            other = next(row for row in rows if not row.rejected or row.desirable is not None)
            advice = "take kto, which has one answer and a label" if rated else "take sft, which has one answer"
            raise DataError(
                f"{other.source} has no two answers, but train.objective is {objective}. Give rows with prompt, chosen and "
                f"rejected, or {advice}."
            )
        return tuple(rows)
    if len(rated) < len(rows):
        other = next(row for row in rows if not _is_rated(row))
        raise DataError(
            f"{other.source} has no verdict on its answer, but train.objective is kto. Give rows with prompt, completion and "
            "label (true or false), or take dpo for rows with chosen and rejected."
        )
    if trained and (only := _only_verdict(rows)):
        advice = "add rows of the label false, or take sft" if only == "true" else "add rows of the label true"
        raise DataError(
            f"All {len(rows)} {part} rows have the label {only}; kto needs answers that are wanted and others: {advice}."
        )
    return with_mismatches(rows)


def with_prompt_groups(rows: list[Row]) -> list[Row]:
    """The rows with preferences on one prompt as a group: their answers depend on each other.

    Groups that were given stay, and a row without one joins the first of those that its prompt has. A prompt that all rows have
    tells none apart, and makes no group.
    """
    if not all(row.rejected or _is_rated(row) for row in rows):
        return rows
    prompts = [_prompt_digest(row) for row in rows]
    counts, given = Counter(prompts), dict[str, str]()
    if len(counts) == 1:
        return rows
    for row, key in zip(rows, prompts, strict=True):
        if row.group is not None:
            given.setdefault(key, row.group)
    return [
        row if row.group is not None or counts[key] == 1 else replace(row, group=given.get(key, f"{PROMPT_GROUP}{key}"))
        for row, key in zip(rows, prompts, strict=True)
    ]


def _prompt_digest(row: Row) -> str:
    """SHA-256 of the turns before the answers, of any speaker but the system."""
    common = len(row.turns) - 1 if row.desirable is not None else common_turns(row.turns, row.rejected)
    said = [[turn.role, turn.free_text.strip(), turn.extra] for turn in row.turns[:common] if turn.role != "system"]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def verdict_notes(parts: Mapping[str, Sequence[Row]]) -> list[str]:
    """A sentence for each of the named parts whose rows all have the same verdict; for rows without one, none."""
    found = {part: _only_verdict(rows) for part, rows in parts.items()}
    return [
        f"All {len(parts[part])} {part} rows have the label {only}. An evaluation compares answers of both labels, so it refuses "
        f"these rows alone; add some with the label {'false' if only == 'true' else 'true'}."
        for part, only in found.items() if only
    ]  # fmt: skip


def unread_verdict_note(name: str, records: Iterable[Mapping[str, object]]) -> str:
    """A sentence if records that sft reads have a verdict on their answers, which it does not read; else empty."""
    if not any(is_rated(columns) for columns in records):
        return ""
    return (
        f"{name} has a column '{VERDICT}' of true and false, which sft does not read: answers of false are trained too. If it "
        "says which answers are wanted, set --train.objective kto, or leave rows of false out."
    )


def common_words_note(name: str, record: Mapping[str, object]) -> str:
    """A sentence where the prompt of a record is what its two texts begin with, which is a guess; else empty."""
    texts = record.get(CHOSEN), record.get(REJECTED)
    if any(record.get(column) for column in PROMPTS) or answers_of(record) is not None:
        return ""
    if not (isinstance(texts[0], str) and isinstance(texts[1], str)):
        return ""
    return (
        f"{name} has no column 'prompt': the words that chosen and rejected begin with are taken for it, first "
        f"{split_texts(texts[0], texts[1])[0][-60:]!r}. Answers that begin alike lose those words; add the column if they do."
    )


def _only_verdict(rows: Sequence[Row]) -> str:
    """The label that all rows have, "true" or "false"; empty if they have both, or a row has none."""
    verdicts = {row.desirable for row in rows}
    return "" if len(verdicts) != 1 or None in verdicts else str(verdicts.pop()).lower()


def _is_rated(row: Row) -> bool:
    return row.desirable is not None


def _shown(turns: Sequence[Turn]) -> str:
    return repr(turns[0].text[:40]) if turns else "nothing"

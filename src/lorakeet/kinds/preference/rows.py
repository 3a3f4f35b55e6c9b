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

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, ClassVar

from lorakeet.data.rows import Row, Turn, common_turns
from lorakeet.data.shapes import CHAT_COLUMNS, COMPLETION_COLUMNS, AddedShape, answer_turns, column_text, message_turns
from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import UnusableRow
from lorakeet.errors import DataError
from lorakeet.kinds.preference.spec import KTO
from lorakeet.registry import Objective

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


def rows_for(rows: Sequence[Row], registered: Objective, part: str, *, trained: bool) -> tuple[Row, ...]:
    """The rows as an objective of this kind takes them: for kto with the answer of another row to each prompt.

    Raises DataError for rows of another shape, and where kto is `trained` with wanted or unwanted answers only.
    """
    rated = [row for row in rows if _is_rated(row)]
    pairs = [row for row in rows if row.rejected and not _is_rated(row)]
    if registered.name != KTO:
        if len(pairs) < len(rows):
            other = next(row for row in rows if not row.rejected or row.desirable is not None)
            advice = "take kto, which has one answer and a label" if rated else "take sft, which has one answer"
            raise DataError(
                f"{other.source} has no two answers, but {registered}. Give rows with prompt, chosen and "
                f"rejected, or {advice}."
            )
        return tuple(rows)
    if len(rated) < len(rows):
        other = next(row for row in rows if not _is_rated(row))
        raise DataError(
            f"{other.source} has no verdict on its answer, but {registered}. Give rows with prompt, completion and "
            "label (true or false), or take dpo for rows with chosen and rejected."
        )
    if trained and (only := _only_verdict(rows)):
        advice = "add rows of the label false, or take sft" if only == "true" else "add rows of the label true"
        raise DataError(
            f"All {len(rows)} {part} rows have the label {only}; kto needs answers that are wanted and others: {advice}."
        )
    return with_mismatches(rows)


class PairedShape(AddedShape):
    """A prompt with a chosen and a rejected answer."""

    columns: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(PROMPTS, "prompt"), CHOSEN: "better answer", REJECTED: "worse answer"
    }  # fmt: skip
    expected = f"or '{CHOSEN}' and '{REJECTED}', "
    has = "two answers"

    def fits(self, columns: Mapping[str, object], registered: Objective) -> bool:
        return is_preference(columns) and not (registered.name == KTO and is_rated(columns, of_any_value=True))

    def needed(self, columns: Mapping[str, object]) -> dict[str, str]:
        return dict.fromkeys((CHOSEN, REJECTED), "rename the columns of the two answers")

    def turns(self, values: dict[str, object], spec: DataSpec) -> tuple[tuple[Turn, ...], tuple[Turn, ...], bool | None]:
        column = next((column for column in PROMPTS if values.get(column)), None)
        given = None if column is None else values[column]
        prompt: tuple[Turn, ...] = ()
        if isinstance(given, list):
            prompt = message_turns(given, spec)
        elif column is not None:
            text = column_text(values, column, spec)
            extra = column_text(values, "input", spec, may_be_empty=True) if column == "instruction" else ""
            prompt = (Turn("user", f"{text}\n\n{extra}" if extra else text, supervised=False),)
        if isinstance(values.get("system"), str) and values["system"] and not (prompt and prompt[0].role == "system"):
            prompt = (Turn("system", column_text(values, "system", spec), supervised=False), *prompt)
        if (both := answers_of(values)) is not None and not (column is not None and isinstance(values[CHOSEN], str)):
            chosen, rejected = (message_turns(each, spec) for each in both)
        elif column is not None:
            texts = [column_text(values, name, spec) for name in (CHOSEN, REJECTED)]
            chosen, rejected = ((Turn("assistant", text, supervised=True),) for text in texts)
        else:
            texts = [column_text(values, name, spec) for name in (CHOSEN, REJECTED)]
            beginning, *ends = split_texts(*texts)
            if texts[0] != texts[1] and not all(part.strip() for part in (beginning, *ends)):
                raise UnusableRow(
                    "chosen and rejected are texts without common first words and different ends, and there is no column "
                    "'prompt'; add one, or give lists of messages."
                )
            prompt = (*prompt, Turn("user", beginning, supervised=False))
            chosen, rejected = ((Turn("assistant", end, supervised=True),) for end in ends)
        return *preferred(with_prompt(prompt, chosen), with_prompt(prompt, rejected)), None

    def is_of(self, row: Row) -> bool:
        return bool(row.rejected) and not _is_rated(row)

    def note(self, name: str, row: Row, records: Sequence[Mapping[str, object]], registered: Objective) -> str:
        """Where the prompt is what the two texts begin with, which is a guess."""
        texts = records[0].get(CHOSEN), records[0].get(REJECTED)
        if not row.rejected or any(records[0].get(column) for column in PROMPTS) or answers_of(records[0]) is not None:
            return ""
        if not (isinstance(texts[0], str) and isinstance(texts[1], str)):
            return ""
        return (
            f"{name} has no column 'prompt': the words that chosen and rejected begin with are taken for it, first "
            f"{split_texts(texts[0], texts[1])[0][-60:]!r}. Answers that begin alike lose those words; add the column if they do."
        )


class RatedShape(AddedShape):
    """A prompt with one answer, and whether it is wanted."""

    columns: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(CHAT_COLUMNS, "conversation"),
        **{prompt: "prompt" for prompt, _ in COMPLETION_COLUMNS}, **{answer: "answer" for _, answer in COMPLETION_COLUMNS},
        VERDICT: "whether the answer is wanted",
    }  # fmt: skip
    has = "a verdict on its answer"

    def fits(self, columns: Mapping[str, object], registered: Objective) -> bool:
        return is_rated(columns, of_any_value=registered.name == KTO)

    def needed(self, columns: Mapping[str, object]) -> dict[str, str]:
        answered = any(all(column in columns for column in some) for some in RATED)
        expected = {} if answered else dict.fromkeys(COMPLETION_COLUMNS[0], "rename the column")
        return {VERDICT: "rename the column that says whether an answer is wanted", **expected}

    def turns(self, values: dict[str, object], spec: DataSpec) -> tuple[tuple[Turn, ...], tuple[Turn, ...], bool | None]:
        if VERDICT not in values:
            raise UnusableRow("column 'label' is missing; expected true for an answer that is wanted, or false.")
        wanted, turns = verdict(values[VERDICT]), answer_turns(values, spec)
        if turns[-1].role != "assistant":
            raise UnusableRow("the last message is not of the assistant, so there is no answer that is wanted or not.")
        before = (replace(turn, supervised=False) for turn in turns[:-1])
        return (*before, replace(turns[-1], supervised=True)), (), wanted

    def is_of(self, row: Row) -> bool:
        return _is_rated(row)

    def note(self, name: str, row: Row, records: Sequence[Mapping[str, object]], registered: Objective) -> str:
        """Where records that are read as one answer have a verdict on it, which is not read."""
        if not registered.one_answer or row.label is not None or not any(is_rated(columns) for columns in records):
            return ""
        return (
            f"{name} has a column '{VERDICT}' of true and false, which {registered.name} does not read: answers of false are "
            "trained too. If it says which answers are wanted, set --train.objective kto, or leave rows of false out."
        )

    def part_notes(self, parts: Mapping[str, Sequence[Row]]) -> list[str]:
        """Which of the parts have the same verdict in all their rows."""
        found = {part: _only_verdict(rows) for part, rows in parts.items()}
        return [
            f"All {len(parts[part])} {part} rows have the label {only}. An evaluation compares answers of both labels, so it "
            f"refuses these rows alone; add some with the label {'false' if only == 'true' else 'true'}."
            for part, only in found.items() if only
        ]  # fmt: skip


PAIRED, RATED_ROWS = PairedShape(), RatedShape()


def _only_verdict(rows: Sequence[Row]) -> str:
    """The label that all rows have, "true" or "false"; empty if they have both, or a row has none."""
    verdicts = {row.desirable for row in rows}
    return "" if len(verdicts) != 1 or None in verdicts else str(verdicts.pop()).lower()


def _is_rated(row: Row) -> bool:
    return row.desirable is not None


def _shown(turns: Sequence[Turn]) -> str:
    return repr(turns[0].text[:40]) if turns else "nothing"

"""Finds all that is wrong with how a file is read: applies what each message proposes, and reads on to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lorakeet.data.spec import DataSpec
from lorakeet.data.tables import LEAVE_OUT
from lorakeet.errors import LONGEST_MESSAGE, DataError, Problems, Remedy, shortened, spelt

_PREFIX = "data."
_LIST = 150  # characters of a list's own, beside its heading, its messages and the last sentence


def mended(spec: DataSpec, remedies: Sequence[Remedy]) -> DataSpec:
    """The settings with these remedies applied, each of a text setting of `data`; the last one of a setting counts."""
    changes: dict[str, Any] = {one.setting.removeprefix(_PREFIX): one.value for one in remedies}
    return replace(spec, **changes)


def every_problem(first: DataError, name: str, spec: DataSpec, read: Callable[[DataSpec], object]) -> DataError:
    """The error for all problems of the file `name` that can be known at once; `first` itself if there is but one.

    `read` reads the file with other settings. It is called until it succeeds, until its error proposes nothing new, or until all
    that is left are single rows.
    """
    errors, remedies, error = [first], list(first.remedies), first
    while {one.setting for one in error.remedies} - {LEAVE_OUT.setting}:
        try:
            read(mended(spec, remedies))
            break
        except DataError as found:
            error = found
        known = {one.setting for one in remedies}
        new = [one for one in error.remedies if one.setting not in known]
        errors.append(error)
        if not new:
            break
        remedies += new
    if len(errors) == 1:
        return first
    flags = " ".join(one.flag for one in remedies)
    together = f"If all of that is right, set: {flags}"
    if any(one.values.get("candidates") for one in errors):
        together += f" and, if the texts are labelled, {spelt('data.label_column')}"
    problems = Problems(f"{name} cannot be read as it is", DataError, remedy=together, remedies=remedies)
    each = {str(one).replace("\n", "\n  "): one for one in errors}
    fitted = _fitted([*each], LONGEST_MESSAGE - len(problems.heading) - len(together) - _LIST)
    for message, one in zip(fitted, each.values(), strict=True):
        problems.add(one.worded(message))
    try:
        problems.raise_if_any()
    except DataError as combined:
        return combined
    return first


def _fitted(messages: Sequence[str], most: int) -> list[str]:
    """The messages with the longest ones shortened, so that all have at most `most` characters together: none hides another."""
    left, longest = most, most
    for place, length in enumerate(sorted(map(len, messages))):
        longest = left // (len(messages) - place)
        if length > longest:
            break
        left -= length
    return [shortened(message, longest) if len(message) > longest else message for message in messages]

"""Bounds the time that a regular expression from a file may take to match, before it is tried.

Python's matcher backtracks, so (a+)+$ on a path of 60 characters takes practically for ever. An adapter's file may have such a
key, by malice or by accident.
"""

from __future__ import annotations

import math
import re

MOST_STEPS = 1e8  # three repetitions, with some alternatives
_LONGEST_KEY = 1000
_STEPS_OF_A_REPETITION = 128.0
_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?P<\w+>|\(\?<?[:=!]|\(\?[aimsuL-]+[:)]|\(\??|(?P<repeat>(?:[*+?]|\{(?:\d+,?\d*|,\d*)\})[?+]?)|.",
    re.DOTALL,
)


def pattern_problem(key: str, used: str, *, most_steps: float = MOST_STEPS) -> str:
    """What is wrong with the regular expression `key`, which is matched as `used`; an empty string if it is safe.

    `most_steps`: infinity accepts all but repetitions within repetitions.
    """
    if len(key) > _LONGEST_KEY:
        return f"which is {len(key):,} characters long; expected at most {_LONGEST_KEY:,}. Split it into several."
    try:
        re.compile(key)
        re.compile(used)
    except (re.error, OverflowError, RecursionError) as error:
        return f"which is not a regular expression: {error}."
    if (steps := steps_of(key)) > most_steps or steps == math.inf:
        return (
            "which may take for ever to match: expected at most three repetitions in a row, no repetition of a group that holds "
            "repetitions or alternatives, and no rare kind of (?…). Use simpler keys, such as 'layers.0.q_proj' for one module."
        )
    return ""


def steps_of(key: str) -> float:
    """An upper bound of the ways to match the regular expression `key` on a long path; infinite for nested repetitions.

    Consecutive parts multiply, alternatives add, and a repetition counts as the length of a path.
    """
    groups = [(0.0, 1.0, 1.0)]  # by open group: finished alternatives, the present one without its last part, that part
    for match in _TOKEN.finditer(key):
        token, (done, before, last) = match[0], groups[-1]
        if match["repeat"]:
            low, high = _times(token)
            if high > 1 and last > 1:
                return math.inf
            last = last + 1 if (low, high) == (0, 1) else max(last, min(high - low + 1, _STEPS_OF_A_REPETITION))
            groups[-1] = (done, before, last)
        elif token == "|":
            groups[-1] = (done + before * last, 1.0, 1.0)
        elif token == ")":
            groups.pop()
            outer_done, outer_before, outer_last = groups[-1]
            groups[-1] = (outer_done, outer_before * outer_last, done + before * last)
        elif token == "(?":
            return math.inf
        elif token.startswith("(") and not token.endswith(")"):
            groups.append((0.0, 1.0, 1.0))
        else:
            groups[-1] = (done, before * last, 1.0)
    done, before, last = groups[0]
    return done + before * last


def _times(token: str) -> tuple[float, float]:
    """The least and the largest number of repetitions of the quantifier `token`."""
    if token[0] != "{":
        return {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}[token[0]]
    low, comma, high = token.rstrip("?+")[1:-1].partition(",")
    least = float(low or 0)
    return least, float(high or math.inf) if comma else least

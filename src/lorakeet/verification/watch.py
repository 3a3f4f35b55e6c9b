"""`lorakeet verify --watch URL --every 1h`: is a running server still the certified function? With a metric, and an exit code.

each round:  few held-out rows ──► the checks of a served model ──► the metric file ──► wait, or the end with exit code 3
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from lorakeet.disk import read_regular
from lorakeet.errors import ConfigError, EnvironmentProblem
from lorakeet.evaluate.certificate import Certificate
from lorakeet.evaluate.values import put_text

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LEAST = 1.0  # seconds between two rounds
_NAMES = {
    "up": "1 if the server answered every question of the last round.",
    "certified": "1 if it computed the certified adapter in the last complete round, 0 if it did not.",
    "checked_timestamp_seconds": "When the last complete round ended.",
    "mean_kl": "Mean KL divergence of its log-probabilities from the live adapter, in nats a token.",
}


def parse_duration(text: str) -> float:
    """Seconds of "90s", "30m", "1h" or "1d". ConfigError for anything else, and for less than LEAST."""
    number, unit = text[:-1], text[-1:]
    try:
        seconds = float(number) * UNITS[unit]
    except (KeyError, ValueError):
        raise ConfigError(f"--every is '{text}'; expected a number with s, m, h or d, such as 30m or 1h.") from None
    if not LEAST <= seconds < math.inf:
        raise ConfigError(f"--every is '{text}'; it must be {LEAST:g} s or more.")
    return seconds


def metric_text(target: str, certificate: Certificate | None, before: str = "", *, now: float) -> str:
    """The metrics of a round in Prometheus' text format; None: the server did not answer, and what was known `before` stays."""
    label = target.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    complete = certificate is not None and not certificate.incomplete
    values: dict[str, str] = {"up": str(int(complete))}
    if certificate is not None and complete:
        values |= {"certified": str(int(certificate.passed)), "checked_timestamp_seconds": f"{now:.0f}"}
        if kl := [check.measured["mean_kl"] for check in certificate.checks if "mean_kl" in check.measured]:
            values["mean_kl"] = f"{kl[0]:.9g}"
    else:
        old = dict(line.rpartition(" ")[::2] for line in before.splitlines() if not line.startswith("#"))
        kept = {name: old.get(f'lorakeet_watched_{name}{{target="{label}"}}') for name in _NAMES if name != "up"}
        values |= {name: value for name, value in kept.items() if value is not None}
    lines = []
    for name, value in values.items():
        lines += [f"# HELP lorakeet_watched_{name} {_NAMES[name]}", f"# TYPE lorakeet_watched_{name} gauge"]
        lines.append(f'lorakeet_watched_{name}{{target="{label}"}} {value}')
    return "\n".join(lines) + "\n"


def watch_server(
    compare: Callable[[], Certificate],
    target: str,
    every: float,
    *,
    rounds: int,
    metrics: Path | None,
    say: Callable[[str], None],
    pause: Callable[[float], object] = time.sleep,
) -> Certificate:
    """Compares again and again, every `every` seconds, and returns the last certificate after `rounds` (0: it never ends).

    Raises VerificationFailed as soon as a check fails. A server that does not answer is compared again in the next round, and is
    EnvironmentProblem in the last one.
    """
    number = 0
    while True:
        number += 1
        found, problem = _attempt(compare)
        if metrics is not None:
            before = read_regular(metrics).decode("utf-8", "replace") if metrics.is_file() else ""
            put_text(metrics, metric_text(target, found, before, now=time.time()))
        if found is not None and not all(check.passed for check in found.checks):
            found.raise_if_failed()
        if problem is not None:
            say(f"Round {number}: {problem}")
        else:
            say(f"Round {number}: {target} computes the certified adapter.")
        if rounds and number >= rounds:
            if found is None or problem is not None:
                raise problem or EnvironmentProblem(f"{target} could not be compared.")
            return found
        pause(every)


def _attempt(compare: Callable[[], Certificate]) -> tuple[Certificate | None, EnvironmentProblem | None]:
    """A certificate, and why it is incomplete or missing."""
    try:
        found = compare()
    except EnvironmentProblem as error:
        return None, error
    return found, next((EnvironmentProblem(why) for why in found.incomplete.values()), None)

"""A memory budget as a person writes it ("2GiB", "500 MB"), and how much memory this machine has."""

from __future__ import annotations

import os
import re
from decimal import Decimal
from pathlib import Path

from lorakeet.errors import ConfigError

UNITS = {"KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
BETWEEN_PROCESSES = 8 << 20  # bytes by which two processes differ that did the same before their models; 2 MiB were seen
_MOST = 1 << 63  # bytes: what a process can address and far more
_SHOWN = 40  # characters of such a text
_NUMBER = re.compile(r"([+-]?)(\d+(?:[.,]\d+)?|[.,]\d+)\s*([A-Za-z]*)")
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def parse_budget(text: str) -> int:
    """Bytes of "2GiB", "1.5 GB" or "500MB". Raises ConfigError without a unit, with an unknown one, and for zero or less."""
    example = f"expected a number and one of {', '.join(UNITS)}, such as 2GiB or 500MB"
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"memory is {text!r}; {example}.")
    sign, number, unit = match.groups()
    if not unit:
        raise ConfigError(f"memory is {text!r}, without a unit; {example}.")
    factor = {name.lower(): size for name, size in UNITS.items()}.get(unit.lower())
    if factor is None:
        raise ConfigError(f"memory is {text!r}, and {unit!r} is no unit of memory; {example}.")
    most = Decimal(number.replace(",", ".")) * factor
    if most > _MOST:
        shown = repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}…"
        raise ConfigError(f"memory is {shown}, more than any machine has; {example}.")
    size = int(most)
    if sign == "-" or size <= 0:
        raise ConfigError(f"memory is {text!r}; it must be above 0, such as 2GiB.")
    return size


def gib_text(count: int) -> str:
    """Bytes as text, in the unit in which budgets are given."""
    return f"{count / 2**30:.2f} GiB"


def enough_for(planned: int) -> str:
    """The budget that a refusal names where so many bytes are planned, in MiB: the next process, which plans anew, keeps it."""
    return f"{-(-(planned + BETWEEN_PROCESSES) >> 20)} MiB"


def machine_bytes() -> int:
    """The memory of this machine in bytes, or of the container that this process is kept in, whichever is less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in map(Path, _LIMITS):
        try:
            text = limit.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            found = min(found, int(text))
    return found


def larger_than_machine(budget: int) -> str:
    """A warning where the budget is more than this machine has; else empty."""
    have = machine_bytes()
    if budget <= have:
        return ""
    return f"The memory budget is {budget:,} bytes, but this machine has {have:,}: keeping the budget does not make the run fit."

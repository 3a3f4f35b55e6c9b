"""A memory budget as a person writes it ("2GiB", "500 MB"), and how much memory this machine has."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from lorakeet.errors import ConfigError
from lorakeet.evaluate.wording import bytes_text

UNITS = {"KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
BETWEEN_PROCESSES = 8 << 20  # bytes by which two processes differ that did the same before their models; 2 MiB were seen
_MOST = 1 << 63  # bytes: what a process can address and far more
_SHOWN = 40  # characters of such a text
_NUMBER = re.compile(r"([+-]?)(\d+(?:[.,]\d+)?|[.,]\d+)\s*([A-Za-z]*)")
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Budget:
    """The most bytes that may be in use, and the text that the user gave. `Budget()` is no limit, and false: everything fits.

    `free` names the device whose free memory this is, where the user gave none.
    """

    bytes: int = _MOST
    text: str = ""
    free: str = ""

    @classmethod
    def parse(cls, text: str | None) -> Budget:
        """The budget of "2GiB", "1.5 GB" or "500MB", no limit for None. Raises ConfigError as `parse_size` does."""
        return cls() if text is None else cls(parse_size(text), text.strip())

    def __bool__(self) -> bool:
        return bool(self.text)

    def __str__(self) -> str:
        return self.text or "no limit"

    @property
    def sentence(self) -> str:
        """What there is, as the first part of a sentence."""
        return f"{self.text} of memory are free on {self.free}" if self.free else f"The memory budget is {self}"

    @property
    def limit(self) -> int | None:
        """The bytes for JSON and reports; None without a limit."""
        return self.bytes if self else None


def parse_size(text: str) -> int:
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


def enough_for(planned: int) -> str:
    """The budget that a refusal suggests for `planned` bytes, in MiB, with a margin: the next process plans anew and differs."""
    return f"{-(-(planned + BETWEEN_PROCESSES) >> 20)} MiB"


def machine_bytes() -> int:
    """The memory of this machine in bytes, or the limit of the container of this process, whichever is less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in map(Path, _LIMITS):
        try:
            text = limit.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            found = min(found, int(text))
    return found


def available_memory(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes that can still be used, within the limit of a container, and a word for them."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # macOS reports only the total
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "in all"
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        limit = (root / "sys/fs/cgroup/memory.max").read_text().strip()
        used = int((root / "sys/fs/cgroup/memory.current").read_text()) - _reclaimable(root)
    except OSError:  # no control group of its own
        return free, "free"
    return (free, "free") if limit == "max" else (min(free, int(limit) - used), "free")


def _reclaimable(root: Path) -> int:
    """Bytes of files in a container's memory that the system frees when it needs them."""
    try:
        lines = (root / "sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def larger_than_machine(budget: Budget) -> str:
    """A warning if the budget is more than this machine has; else empty."""
    have = machine_bytes()
    if not budget or budget.bytes <= have:
        return ""
    return f"The memory budget is {budget}, but this machine has {bytes_text(have)}: keeping it does not make the run fit."

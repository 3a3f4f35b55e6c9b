"""Splits rows into training and held-out by content, independent of row order and file names."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorakeet.data.rows import PROMPT_GROUP, Row, common_turns
from lorakeet.data.spec import DataSpec
from lorakeet.disk import read_regular, write_whole
from lorakeet.errors import DataError, percent, spelt

SPLIT_FORMAT = 1
SHARED = "rows_of_shared_prompts"


@dataclass(frozen=True)
class Split:
    """Training and held-out rows, each in an order that depends on seed and content alone."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]


def split_rows(rows: Sequence[Row], spec: DataSpec) -> Split:
    """Holds out `spec.held_out_fraction` of the rows, chosen by a hash of seed and content.

    Rows of one group, and rows of equal content, stay on one side. Every label or verdict keeps its share on both
    sides as far as groups allow, and none is held out as a whole. Of both verdicts at least one row is held out, if that can be.
    Raises DataError for too few rows.
    """
    wanted = held_out_count(len(rows), spec)
    if wanted == 0:
        return Split(by_content(rows, spec.split_seed), ())
    strata: dict[str, list[list[Row]]] = defaultdict(list)
    for block in _blocks(rows):
        strata[_stratum(block)].append(block)
    quotas = _quotas({name: sum(map(len, blocks)) for name, blocks in strata.items()}, wanted, len(rows))
    if any(row.desirable is not None for row in rows):
        _with_each(quotas, strata)
    held_out: set[str] = set()
    for name, blocks in strata.items():
        held_out |= _choose(blocks, quotas[name], spec.split_seed)
    if not held_out:
        raise DataError(
            f"No row can be held out: {len(rows)} rows fall into {sum(map(len, strata.values()))} groups or sets of equal rows, "
            f"none small enough for {wanted} held-out rows. Give a file of held-out rows ({spelt('data.held_out', 'FILE')})."
        )
    train = [row for row in rows if row.key not in held_out]
    return Split(by_content(train, spec.split_seed), by_content([row for row in rows if row.key in held_out], spec.split_seed))


def held_out_count(rows: int, spec: DataSpec) -> int:
    """Number of rows to hold out of `rows`. Raises DataError if the fraction gives none."""
    if spec.held_out_fraction == 0:
        return 0
    needed = max(2, math.ceil(1 / spec.held_out_fraction))
    if rows < needed:
        raise DataError(
            f"{rows} rows are too few to hold out {percent(spec.held_out_fraction, 0)} of them; expected at least {needed}. "
            f"Add rows, give a file of held-out rows ({spelt('data.held_out', 'FILE')}), or raise "
            f"{spelt('data.held_out_fraction')}."
        )
    count = round(spec.held_out_fraction * rows)
    if rows >= 10 * spec.held_out_minimum:
        count = max(count, spec.held_out_minimum)
    return min(count, rows - 1)


def with_prompt_groups(rows: list[Row]) -> list[Row]:
    """The rows whose answers are compared, those on one prompt as a group: their answers depend on each other.

    Groups that were given stay, and a row without one joins the first of those that its prompt has. A prompt that all rows have
    tells none apart, and makes no group.
    """
    if not all(row.rejected or row.desirable is not None for row in rows):
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


def by_content(rows: Iterable[Row], seed: int) -> tuple[Row, ...]:
    """The rows in the order of their seeded content hash."""
    return tuple(sorted(rows, key=lambda row: (_rank(row.key, seed), row.source)))


def split_record(
    train: Sequence[Row], held_out: Sequence[Row], test: Sequence[Row] = (), *, labels: Sequence[str] = ()
) -> dict[str, object]:
    """The content of split.json: labels, the held-out rows' hashes, one hash for all training and all test rows, and how many
    rows with compared answers share their prompt with others, if any do.
    """
    shared = sum((row.group or "").startswith(PROMPT_GROUP) for row in (*train, *held_out))
    return {
        "format": SPLIT_FORMAT,
        "labels": list(labels),
        "train_rows": len(train),
        "train_sha256": _digest(train),
        "test_rows": len(test),
        "test_sha256": _digest(test),
        "held_out": sorted(row.key for row in held_out),
        **({SHARED: shared} if shared else {}),
    }


def write_split_record(path: Path, record: dict[str, object]) -> None:
    """Writes split.json, whole or not at all."""
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())


def read_split_record(path: Path) -> dict[str, object]:
    """Reads a split.json. Raises DataError if it is missing or invalid."""
    try:
        record = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); the split of this run cannot be checked without it.") from error
    if not isinstance(record, dict) or record.get("format") != SPLIT_FORMAT or not isinstance(record.get("held_out"), list):
        raise DataError(f"{path} is not a split record of format {SPLIT_FORMAT}; restore it from the original run.")
    return record


def check_split_record(record: dict[str, object], now: dict[str, object]) -> None:
    """Raises a DataError that names every difference between the rows of a run then and `now`."""
    changes = []
    before_keys, now_keys = (set(map(str, _listed(side["held_out"]))) for side in (record, now))
    if before_keys != now_keys:
        changes.append(f"{len(before_keys - now_keys)} held-out rows are gone and {len(now_keys - before_keys)} are new")
    for part, word in (("train", "training"), ("test", "test")):
        if record.get(f"{part}_sha256") != now[f"{part}_sha256"]:
            changes.append(f"the {word} rows changed ({record.get(f'{part}_rows')} before, {now[f'{part}_rows']} now)")
    if changes and now.get(SHARED) and SHARED not in record:
        raise DataError(
            f"This run has other rows than it would have now: {'; '.join(changes)}. {now[SHARED]} rows share their prompt with "
            "others, and an earlier version split such rows between training and held-out; now they stay on one side. If the "
            "files did not change, that is why. Start a new run; the adapter of this one stays usable and can be evaluated."
        )
    if changes:
        raise DataError(
            f"The data has changed since this run started: {'; '.join(changes)}. "
            "Restore the files and the data settings, or start a new run."
        )


def _blocks(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups rows that must stay on one side: connected by a common group or by equal content."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        root = name
        while parent.setdefault(root, root) != root:
            root = parent[root]
        while parent[name] != root:
            parent[name], name = root, parent[name]
        return root

    for row in rows:
        if row.group is not None:
            parent[find("key " + row.key)] = find("group " + row.group)
    blocks: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        blocks[find("key " + row.key)].append(row)
    return list(blocks.values())


def _stratum(block: list[Row]) -> str:
    labels = [row.label or "" if row.desirable is None else f"wanted: {row.desirable}" for row in block]
    return max(sorted(set(labels)), key=labels.count)


def _quotas(sizes: dict[str, int], wanted: int, total: int) -> dict[str, int]:
    """Distributes `wanted` in proportion to the sizes, largest remainders first (Hamilton's method)."""
    exact = {name: size * wanted / total for name, size in sizes.items()}
    quotas = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (quotas[name] - exact[name], name))
    for name in by_remainder[: wanted - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def _with_each(quotas: dict[str, int], strata: Mapping[str, Sequence[Sequence[Row]]]) -> None:
    """Raises a quota below the smallest of several blocks to its size, at the expense of the largest quota, if that keeps one."""
    for name, blocks in strata.items():
        most, missing = max(quotas, key=lambda each: (quotas[each], each)), min(map(len, blocks)) - quotas[name]
        left = quotas[most] - missing
        if len(blocks) > 1 and missing > 0 and most != name and left >= min(map(len, strata[most])):
            quotas[name], quotas[most] = quotas[name] + missing, left


def _choose(blocks: list[list[Row]], quota: int, seed: int) -> set[str]:
    """Keys of the held-out rows of one stratum: blocks in hash order while they fit; at least one block stays in training."""
    ordered = sorted(blocks, key=lambda block: min(_rank(row.key, seed) for row in block))
    chosen: set[str] = set()
    taken = 0
    for index, block in enumerate(ordered):
        left = len(ordered) - index
        if taken + len(block) <= quota and (left > 1 or taken < sum(map(len, ordered[:index]))):
            chosen.update(row.key for row in block)
            taken += len(block)
    return chosen


def _rank(key: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256("\n".join(sorted(row.key for row in rows)).encode()).hexdigest()


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []

"""Finds leaks: copies, near-copies and known questions within and across training, held-out and test rows.

Two rows are copies if their words are equal, whatever their case, punctuation and spacing, and near-copies as
`lorakeet.data.copies.near_copies` says. Prompts are compared, raw text as a whole, and answers where many rows have one prompt.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorakeet.data.copies.near_copies import fewest_words, find_near_copies
from lorakeet.data.copies.words import fields_sorted, letters, normal_words
from lorakeet.data.rows import Row
from lorakeet.data.spec import DataSpec
from lorakeet.errors import DataError, Remedy, percent, spelt

PARTS = ("test", "held-out", "training")  # a leaking row is dropped from the later part of this list
KINDS = {
    "copy": "exact copy",
    "prompt": "same prompt, other answer",
    "near": "near-copy",
    "group": "same group",
}
MANY = (20, 0.01)  # rows, and their share of all, from which one whole prompt is an instruction
RECALL, RECALL_LEFT_OUT = "97 %", "79 %"  # the least that was measured (docs/explain/held-out.md), of a word left out in labels
UNSEEN = "paraphrases, translations, changes within text that many rows share, and another word in the only slot of such text"
_SHOWN = 5
_MANY_NEAR = (5, 0.02)  # rows, and their share of the training rows
MUCH = 0.1  # of the training rows: more that are dropped are said in the verdict
_EXCERPT = 200  # characters
_BEFORE = 60  # of these, before the first difference


@dataclass(frozen=True)
class LeakPair:
    """Two rows of a kind in KINDS: `row` may be dropped, `twin` stays. `answers`: not prompts but answers were compared."""

    row: Row
    row_part: str
    twin: Row
    twin_part: str
    similarity: float
    kind: str
    answers: bool = False

    @property
    def exact(self) -> bool:
        """True if the words that were compared are equal."""
        return self.kind in ("copy", "prompt")

    def __str__(self) -> str:
        kind = KINDS[self.kind] + (f", similarity {self.similarity:.2f}" if self.kind == "near" else "")
        start = _one_line(_compared(self.row, self.answers))[:70]
        return f"{self.row_part} {self.row.source} and {self.twin_part} {self.twin.source} ({kind}): '{start}…'"

    def excerpts(self) -> tuple[str, str]:
        """Both texts in one line, around their first difference."""
        texts = [_one_line(_compared(row, self.answers)) for row in (self.row, self.twin)]
        if self.kind == "prompt":
            texts = [f"{text} → {_one_line(_answer(row))}" for text, row in zip(texts, (self.row, self.twin), strict=True)]
        same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), 0)
        start = max(0, same - _BEFORE) if max(map(len, texts)) > _EXCERPT else 0
        one, other = (("…" if start else "") + text[start : start + _EXCERPT] for text in texts)
        return one, other


@dataclass(frozen=True)
class LeakReport:
    """All duplicate pairs, the rows that the policy dropped, and how many rows of each part were searched, by which threshold."""

    pairs: tuple[LeakPair, ...]
    policy: str
    dropped: tuple[Row, ...] = ()
    searched: Mapping[str, int] = field(default_factory=dict)
    threshold: float = DataSpec.near_duplicates

    @property
    def across(self) -> tuple[LeakPair, ...]:
        """Pairs across training, held-out and test rows: the leaks."""
        return tuple(pair for pair in self.pairs if pair.row_part != pair.twin_part)

    @property
    def within(self) -> tuple[LeakPair, ...]:
        """Pairs within one part: no leak. They stay; as training rows they count twice."""
        return tuple(pair for pair in self.pairs if pair.row_part == pair.twin_part)

    def method(self) -> str:
        """What was searched, by which measure with which recall, and what it cannot find."""
        rows = ", ".join(f"{self.searched[part]:,} {part}" for part in reversed(PARTS) if self.searched.get(part))
        if not self.threshold:
            return f"Searched {rows} rows for equal words. Near-copies were not searched, as data.near_duplicates says."
        one = "" if self.threshold == 1 else f", or all but one from {fewest_words(self.threshold):g} words on"
        return (
            f"Searched {rows} rows for texts that share {percent(self.threshold, 0)} of their words{one}; text that many rows "
            "share does not count, and rows whose answers take up the words that differ are other rows. In tests it found at "
            f"least {RECALL} of the copies that were planted in sentences and labels: one word replaced, misspelt or added, two "
            f"replaced, clauses turned, or text around them. With a word left out it was {RECALL_LEFT_OUT}. "
            f"It cannot find {UNSEEN}."
        )

    def much_dropped(self) -> str:
        """A clause where more than a tenth of the training rows were dropped; else an empty string."""
        count, near = self._dropped_training()
        if count <= MUCH * self.searched.get("training", 0):
            return ""
        found = f"copies of held-out or test rows, {near:,} of them near-copies" if near else "copies of held-out or test rows"
        return f"{count:,} of {self.searched['training']:,} training rows were DROPPED as {found}"

    def warning(self) -> str:
        """What to know of dropped training rows where they are many, and what keeps them; else an empty string."""
        if not (clause := self.much_dropped()):
            return ""
        left = self.searched["training"] - self._dropped_training()[0]
        return (
            f"{clause}; {left:,} were trained. If near-copies are other rows of a short template, set "
            f"{spelt('data.near_duplicates', '0')}."
        )

    def _dropped_training(self) -> tuple[int, int]:
        """How many training rows were dropped, and how many of them for near-copies alone."""
        dropped = {(row.key, row.source) for row in self.dropped}
        kinds: dict[tuple[str, str], set[str]] = defaultdict(set)
        for pair in self.across:
            if pair.row_part == "training" and (place := (pair.row.key, pair.row.source)) in dropped:
                kinds[place].add(pair.kind)
        return len(kinds), sum(found == {"near"} for found in kinds.values())

    def _many_near_copies(self) -> str:
        """A sentence where near-copies are so many that they may be other rows of a short template; else an empty string."""
        dropped = {row.source for row in self.dropped}
        near = len({pair.row.source for pair in self.across if pair.kind == "near"} & dropped)
        least, share = _MANY_NEAR
        if near < max(least, share * self.searched.get("training", 0)):
            return ""
        return (
            f"{near:,} rows are left out because they differ from another in a word or two. If those are other rows of a short "
            f"template, set {spelt('data.near_duplicates', '0')} (exact copies only), or {spelt('data.on_leak', 'keep')}."
        )

    def lines(self) -> list[str]:
        """The report in sentences: the method, the counts of each kind, and some of each, side by side."""
        lines = [self.method()]
        if self.across:
            fate = f"{len(self.dropped)} dropped" if self.policy == "drop" else "kept, as data.on_leak says"
            rows = "1 row is" if len(self.across) == 1 else f"{len(self.across)} pairs of rows are"
            lines.append(f"{rows} on both sides of a split ({fate}): {_counted(self.across)}.")
            if near := self._many_near_copies():
                lines.append(near)
            for kind in KINDS:
                lines.extend(_shown([pair for pair in self.across if pair.kind == kind]))
        for part in reversed(PARTS):
            twice = [pair for pair in self.within if pair.row_part == part]
            if twice:
                repeat = "row repeats another" if len(twice) == 1 else "rows repeat others"
                lines.append(f"{len(twice)} {part} {repeat}: {_counted(twice)}. {_fate(part, twice)} First {twice[0]}")
        return lines if len(lines) > 1 else [*lines, "No duplicate rows found."]


@dataclass(frozen=True)
class CleanParts:
    """The rows after the leak policy, and the report."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    test: tuple[Row, ...]
    report: LeakReport


def check_leaks(train: Sequence[Row], held_out: Sequence[Row], test: Sequence[Row], spec: DataSpec) -> CleanParts:
    """Applies `spec.on_leak`: drops a leaking row from training (or from held-out, if its twin is a test row).

    Raises DataError if all held-out or test rows are training rows, if the policy is to refuse, or if no row is left.
    """
    for part, rows in (("held-out", held_out), ("test", test)):
        _refuse_equal(part, rows, train)
    _refuse_equal("test", test, held_out, among="held-out")
    parts = {"test": test, "held-out": held_out, "training": train}
    report = search_leaks(parts, spec)
    across = report.across
    if across and spec.on_leak == "refuse":
        more = f"\n  and {len(across) - _SHOWN} more" if len(across) > _SHOWN else ""
        shown = "".join(f"\n  {pair}" for pair in across[:_SHOWN])
        raise DataError(
            f"{len(across)} pairs of rows are on both sides of a split ({_counted(across)}), and data.on_leak is 'refuse':"
            f"{shown}{more}\n"
            f"Remove one of each pair, or set {spelt('data.on_leak', 'drop')} (from training) or keep.",
            code="rows-leak",
            remedies=[Remedy("data.on_leak", "drop", "Leave copies out of training")],
        )
    if not across or spec.on_leak == "keep":
        return CleanParts(tuple(train), tuple(held_out), tuple(test), report)
    gone = {(pair.row_part, pair.row.key, pair.row.source) for pair in across}

    def left(part: str, rows: Sequence[Row]) -> tuple[Row, ...]:
        kept = tuple(row for row in rows if (part, row.key, row.source) not in gone)
        if rows and not kept:
            raise DataError(
                f"Every {part} row has a copy or near-copy among the rows that evaluate it ({across[0]}). "
                f"Give other rows, or set {spelt('data.on_leak', 'keep')} if equal prompts are intended.",
                code="rows-leak",
                remedies=[Remedy("data.on_leak", "keep", "Keep equal prompts")],
            )
        return kept

    dropped = tuple(
        row for part, rows in (("held-out", held_out), ("training", train)) for row in rows if (part, row.key, row.source) in gone
    )
    return CleanParts(left("training", train), left("held-out", held_out), tuple(test), replace(report, dropped=dropped))


def counted_once(rows: Sequence[Row]) -> list[Row]:
    """The rows without those that equal an earlier one to the character, which are no new observations.

    All counts that a model reads or should write: every turn with its role, the system prompt and tools' results among them, the
    filled template, tools, label and answers. Case and signs count too: "3 + 5" is not "3 - 5".
    """
    first: dict[tuple[object, ...], Row] = {}
    for row in rows:
        turns, rejected = (
            tuple((turn.role, turn.text, turn.extra, turn.supervised) for turn in some) for some in (row.turns, row.rejected)
        )
        first.setdefault((turns, rejected, row.label, row.tools, row.desirable), row)
    return list(first.values())


def search_leaks(parts: Mapping[str, Sequence[Row]], spec: DataSpec) -> LeakReport:
    """The pairs of these parts, with what was searched; nothing is dropped."""
    searched = {part: len(rows) for part, rows in parts.items()}
    pairs = find_duplicates(parts, spec.near_duplicates)
    return LeakReport(pairs, spec.on_leak, searched=searched, threshold=spec.near_duplicates)


def find_duplicates(parts: Mapping[str, Sequence[Row]], threshold: float) -> tuple[LeakPair, ...]:
    """Finds pairs of rows with equal or similar texts: at most one twin per row in each earlier part and in its own.

    `parts`, with names of PARTS, are in the order of protection. The order of rows changes nothing. `threshold` 0 finds equal
    words and groups only.
    """
    documents = _documents(parts)
    order = {part: index for index, part in enumerate(parts)}
    pairs = [pair for document in documents for pair in _exact_pairs(document)]
    if threshold > 0:
        pairs.extend(_near_pairs(documents, list(parts), threshold, _with_twins(pairs)))
    pairs.extend(_group_pairs(parts, _with_twins(pairs)))
    kinds = list(KINDS)
    return tuple(
        sorted(
            pairs,
            key=lambda pair: (
                *(-order[pair.row_part], order[pair.twin_part], kinds.index(pair.kind), -pair.similarity),
                *(pair.row.key, pair.row.source, pair.twin.source),
            ),
        )
    )


@dataclass(frozen=True)
class _Document:
    """One text with all rows that have it, as (part, row), in an order that no file decides."""

    text: str
    members: tuple[tuple[str, Row], ...]
    answers: bool

    def first(self, part: str) -> Row | None:
        return next((row for name, row in self.members if name == part), None)


def _documents(parts: Mapping[str, Sequence[Row]]) -> list[_Document]:
    rows = [(part, row) for part, given in parts.items() for row in given]
    order = list(parts)
    prompts = [_digest(row.text) for _, row in rows]
    counts = Counter(prompt for prompt, (_, row) in zip(prompts, rows, strict=True) if _is_generative(row))
    many = max(MANY[0], MANY[1] * len(rows))
    members: dict[bytes, list[tuple[str, Row]]] = defaultdict(list)
    instructed: set[bytes] = set()
    for prompt, (part, row) in zip(prompts, rows, strict=True):
        digest = prompt
        if _is_generative(row) and counts[prompt] >= many:
            digest = prompt + _digest(_answer(row))
            instructed.add(digest)
        members[digest].append((part, row))
    found = []
    for digest, equal in sorted(members.items()):
        equal.sort(key=lambda member: (order.index(member[0]), member[1].key, member[1].source))
        answers = digest in instructed
        found.append(_Document(_compared(equal[0][1], answers), tuple(equal), answers))
    return found


def _digest(text: str) -> bytes:
    # A text without words (punctuation only) is compared verbatim.
    said = letters(normal_words(text)) or text.strip()
    return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _is_generative(row: Row) -> bool:
    return row.label is None and any(turn.role == "assistant" for turn in row.turns)


def _answer(row: Row) -> str:
    return row.label if row.label is not None else "\n".join(turn.text for turn in row.turns if turn.role == "assistant")


def _compared(row: Row, answers: bool) -> str:
    return _answer(row) if answers else row.text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _exact_pairs(document: _Document) -> Iterator[LeakPair]:
    if len(document.members) == 1:
        return
    first: dict[str, dict[bytes, Row]] = {}
    for part, row in document.members:
        answer = _digest(_answer(row))
        for twin_part, by_answer in first.items():
            kind = "copy" if answer in by_answer else "prompt"
            twin = by_answer.get(answer) or next(iter(by_answer.values()))
            yield LeakPair(row, part, twin, twin_part, 1.0, kind, document.answers)
        first.setdefault(part, {}).setdefault(answer, row)


def _near_pairs(
    documents: Sequence[_Document], parts: Sequence[str], threshold: float, done: set[tuple[int, str]]
) -> Iterator[LeakPair]:
    """Pairs each row with the most similar text that has a row in an earlier part, or that precedes its own in its own part."""
    alike: dict[int, list[tuple[float, int]]] = defaultdict(list)
    texts = [normal_words(fields_sorted(document.text)) for document in documents]
    copies = [(1.0, *pair) for pair in _reordered(documents, texts)]
    copies += [(copy.similarity, copy.first, copy.second) for copy in find_near_copies(texts, threshold)]
    for similarity, first, second in copies:
        alike[first].append((-similarity, second))
        alike[second].append((-similarity, first))
    for number in sorted(alike):
        nearest = sorted(alike[number])
        document = documents[number]
        for part, row in document.members:
            for twin_part in parts[: parts.index(part) + 1]:
                if (id(row), twin_part) in done:
                    continue
                for distance, other in nearest:
                    twin = documents[other].first(twin_part) if other < number or twin_part != part else None
                    if twin is not None and (document.answers or not _answers_follow(row, twin)):
                        yield LeakPair(row, part, twin, twin_part, -distance, "near", document.answers)
                        break


def _reordered(documents: Sequence[_Document], texts: Sequence[Sequence[str]]) -> Iterator[tuple[int, int]]:
    """Pairs of documents whose words are equal but for the order of fields: each with the first one that a part has."""
    firsts: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    for number, (document, words) in enumerate(zip(documents, texts, strict=True)):
        for part, _ in document.members if words else ():
            firsts[tuple(words)].setdefault(part, number)
    for number, words in enumerate(texts):
        for first in {*firsts.get(tuple(words), {}).values()}:
            if first != number:
                yield first, number


def _answers_follow(row: Row, twin: Row) -> bool:
    """True if each answer takes up what differs in its own prompt: another value of a slot, which makes another row.

    Such as "Will it rain in Oslo?" with the answer {"city": "Oslo"}, and the same with another city.
    """
    prompts, answers = ([set(normal_words(said)) for said in pair] for pair in ((row.text, twin.text), map(_said, (row, twin))))
    return all((prompts[i] - prompts[1 - i]) & (answers[i] - answers[1 - i]) for i in range(2))


def _said(row: Row) -> str:
    """The answer of a row, with its tool calls."""
    return " ".join([_answer(row), *(turn.extra for turn in row.turns if turn.role == "assistant")])


def _group_pairs(parts: Mapping[str, Sequence[Row]], done: set[tuple[int, str]]) -> Iterator[LeakPair]:
    """Pairs rows of a group that is in an earlier part too."""
    firsts: dict[str, dict[str, Row]] = {}
    for part, given in parts.items():
        rows = [row for row in given if row.group is not None]
        for row in rows:
            for twin_part, by_group in firsts.items():
                if row.group in by_group and (id(row), twin_part) not in done:
                    yield LeakPair(row, part, by_group[row.group], twin_part, 0.0, "group")
        firsts[part] = {str(row.group): row for row in sorted(rows, key=lambda row: (row.key, row.source), reverse=True)}


def _with_twins(pairs: Iterable[LeakPair]) -> set[tuple[int, str]]:
    """Each row that has a twin, by identity, with the twin's part."""
    return {(id(pair.row), pair.twin_part) for pair in pairs}


def _fate(part: str, repeats: Sequence[LeakPair]) -> str:
    """What happens to rows that repeat others of their part. Of preferences each row is measured."""
    stays = "It stays" if len(repeats) == 1 else "They stay"
    if part == "training":
        return f"{stays}, and count{'s' if len(repeats) == 1 else ''} twice."
    if any(pair.row.rejected or pair.row.desirable is not None for pair in repeats):
        return f"{stays}."
    return f"{stays}; the report measures rows that are equal to the character once."


def _counted(pairs: Sequence[LeakPair]) -> str:
    counts = Counter(pair.kind for pair in pairs)
    return ", ".join(f"{counts[kind]} × {words}" for kind, words in KINDS.items() if counts[kind])


def _shown(pairs: Sequence[LeakPair]) -> list[str]:
    lines = []
    for pair in pairs[:_SHOWN]:
        one, other = pair.excerpts()
        lines += [f"  {pair}"] if one == other else [f"  {pair}", f"    {pair.row_part}: {one}", f"    {pair.twin_part}: {other}"]
    if len(pairs) > _SHOWN:
        lines.append(f"  and {len(pairs) - _SHOWN} more of this kind, all in report.json")
    return lines


def _refuse_equal(part: str, rows: Sequence[Row], others: Sequence[Row], among: str = "training") -> None:
    keys = {row.key for row in others}
    if rows and all(row.key in keys for row in rows):
        raise DataError(
            f"All {len(rows)} {part} rows are {among} rows too ({rows[0].source} is the first); "
            f"they measure nothing. Give other {part} rows, or leave them out to split some off."
        )

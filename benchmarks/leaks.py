"""Claim: copies of rows with one word changed are found, and different rows of one template are not taken for copies.

    python benchmarks/leaks.py [--quick] [--seed 0]

Copies are planted in real sentences, in labels like ICD-10's, in filled templates, and in Chinese and Japanese sentences
(harness/planted.py). One word of each copy is replaced, misspelt, left out or added (one character where there are no spaces);
or case, punctuation or spacing is changed. Of sentences, text is added before, behind or around, to the copies alone or to
every other row too; or two words are replaced, or clauses change places (harness/contained.py). Rows made of few phrases, of
fields, and of 5,000 words of code have copies of their own, whose shares are printed (harness/phrases.py). Originals are
held-out rows, and copies training rows. Printed are the shares that are found by the search of a run and by the measure before
it (word triples, Jaccard similarity of 0.8), with Wilson's intervals; the pairs of different rows that are found too; and
seconds and peak memory for 100,000 rows, each in a fresh process on one core. Claimed: LEAST of the copies with a word (or
character) replaced, misspelt or added, and of other spellings, in each kind of text, and LEFT_OUT of those with one left out;
ADDED of those with text around them, ORDERED of those with two words replaced or clauses turned; at most FALSE of the pairs of
one template, and of those that differ in a number or a sign; and SECONDS. Where one or two words are all that a row of a
template has of its own, others make another row ("the capital of Oslo"). There the claim is of words changed outside of these,
with few copies at once; all other figures are printed beside it.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.contained import EDITS, different_rows, edited
from harness.contained import ORDERED as REARRANGED
from harness.machine import origin, warn_if_busy, write_result
from harness.phrases import COPIES, LANGUAGES, of_code, of_fields, of_phrases
from harness.planted import Change, Corpus, changes, corpora, letters_of, measured_length, of_file
from harness.processes import answered

from lorakeet.data.copies.near_copies import find_near_copies
from lorakeet.data.copies.words import normal_words
from lorakeet.data.leaks import find_duplicates
from lorakeet.data.rows import Row, Turn
from lorakeet.data.spec import DataSpec
from lorakeet.evaluate.intervals import proportion

LEAST = {"words": 0.95, "characters": 0.9}  # of the copies
LEFT_OUT = 0.75  # of those with a word or character left out: what stood around it often stands together in further rows
FALSE = 1e-3  # of the pairs
ADDED, ORDERED = 0.95, 0.8  # of the copies with text around them, and of those with two words replaced or clauses turned
SHORTEST = 4  # words (six characters) of a text of which one is changed: shorter ones are compared whole
SECONDS = 120.0
TRIES = 100  # of a change, for a copy that is no other text of the kind
PLANTED, ROUNDS = 60, 2  # copies of each change at once, and how often, with other originals
CHANGED = ("one replaced", "one misspelt")  # in place: what "one word changed" says
SCALE = ("reviews", "labels", "instructed")
FEW_PLANTED = 12  # of rows of one slot: 60 copies have the same changes of its dozen words, and hide each other
_OLD_PAIRS = 200_000
_LENGTHS = ((4, 4), (5, 8), (9, 16), (17, 40), (41, 10**9))


def old_similarity(first: str, second: str) -> float:
    """The measure before: the Jaccard similarity of word triples, words as Python's \\w+ sees them."""
    one, other = (_triples(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())) for text in (first, second))
    return len(one & other) / len(one | other)


def _triples(words: Sequence[str]) -> frozenset[tuple[str, ...]]:
    if len(words) <= 3:
        return frozenset((tuple(words),))
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def row_of(text: str, source: str, answer: str) -> Row:
    """A conversation of one question and one answer."""
    return Row((Turn("user", text, False), Turn("assistant", answer, True)), None, None, source)


def planted(corpus: Corpus, change: Change, seed: int, count: int) -> list[tuple[str, str]]:
    """Pairs (original, copy) of different originals."""
    chance = random.Random(f"{corpus.name} {seed}")
    if corpus.characters:
        words = [text[place] for text in corpus.texts for place in letters_of(text)]
    else:
        words = [word for text in corpus.texts for word in re.findall(r"[^\W\d_]+", text)]
    texts = [text for text in corpus.texts if measured_length(text) > SHORTEST - 0.01]
    chosen = chance.sample(texts, min(count, len(texts) // 4))
    pairs = []
    for text in chosen:
        copies = (change(text, chance, words) for _ in range(TRIES))
        copy = next((copy for copy in copies if copy not in corpus.possible), None)  # another label is no copy of this one
        if copy is not None:  # as of a text without case
            pairs.append((text, copy))
    return pairs


def recall(corpus: Corpus, change: Change, seed: int, count: int) -> list[dict[str, Any]]:
    """Of each copy: the words (or characters) of its original, and whether each measure finds it."""
    pairs = planted(corpus, change, seed, count)
    answers = ("positive", "negative", "neutral")
    originals = {text for text, _ in pairs}
    others = [text for text in corpus.texts if text not in originals]
    held_out = [row_of(corpus.whole(text), f"held-out:{i}", answers[i % 3]) for i, (text, _) in enumerate(pairs)]
    copies = [row_of(corpus.whole(copy), f"copy:{i}", answers[i % 3]) for i, (_, copy) in enumerate(pairs)]
    rest = [row_of(corpus.whole(text), f"other:{i}", answers[i % 3]) for i, text in enumerate(others)]
    found = find_duplicates({"held-out": held_out, "training": [*rest, *copies]}, DataSpec.near_duplicates)
    leaking = {pair.row.source for pair in found if pair.row_part != pair.twin_part}
    return [
        {
            "length": len(normal_words(text)),
            "same": corpus.same_row(text, copy),
            "new": f"copy:{i}" in leaking,
            "old": old_similarity(corpus.whole(text), corpus.whole(copy)) >= 0.8,
        }
        for i, (text, copy) in enumerate(pairs)
    ]


def false_positives(corpus: Corpus, seed: int) -> dict[str, Any]:
    """Pairs of different texts that are found, of all pairs; and the old measure on a sample of them."""
    whole = [corpus.whole(text) for text in corpus.texts]
    found = find_near_copies(map(normal_words, whole), DataSpec.near_duplicates)
    chance = random.Random(seed)
    sample = [chance.sample(whole, 2) for _ in range(_OLD_PAIRS // 10 if len(corpus.inside) > 2 else _OLD_PAIRS)]
    old = sum(old_similarity(one, other) >= 0.8 for one, other in sample)
    pairs = len(whole) * (len(whole) - 1) // 2
    examples = [(corpus.texts[copy.first], corpus.texts[copy.second]) for copy in found[:5]]
    rows = len({number for copy in found for number in (copy.first, copy.second)})
    return {
        "found": len(found), "pairs": pairs, "rows_found": rows, "rows": len(whole), "old_found": old, "old_pairs": len(sample),
        "examples": examples,
    }  # fmt: skip


def of_corpus(corpus: Corpus, seed: int, count: int) -> dict[str, Any]:
    """All numbers of one kind of text, printed line by line."""
    print(f"\n{corpus.name}: {len(corpus.texts):,} different texts, such as {corpus.texts[0][:90]!r}", flush=True)
    rounds, at_once = (ROUNDS, count) if corpus.slot is None else (ROUNDS * PLANTED // FEW_PLANTED, min(count, FEW_PLANTED))
    by_change = {
        name: [line for turn in range(rounds) for line in recall(corpus, change, 1000 * seed + turn, at_once)]
        for name, change in changes(corpus.characters).items()
    }
    for name, lines in by_change.items():
        print(f"  {name:14} found {shown(lines, 'new')}   before {shown(lines, 'old')}", flush=True)
    changed = [line for name, lines in by_change.items() if name.startswith("one ") for line in lines]
    lengths = {}
    for low, high in _LENGTHS:
        if chosen := [line for line in changed if low <= line["length"] <= high]:
            said = f"{low} to {high}" if high < 10**9 else f"{low} and more"
            lengths[said] = share(chosen, "new")
            print(f"  one word, of {said}: found {shown(chosen, 'new')}   before {shown(chosen, 'old')}")
    false = false_positives(corpus, seed)
    rate = proportion(false["found"], false["pairs"])
    old = proportion(false["old_found"], false["old_pairs"])
    kind = "of one template" if corpus.templated else "of different texts"
    interval = f"{rate.value:.1e} [{rate.low:.1e}, {rate.high:.1e}]"
    print(f"  pairs {kind} that are found: {false['found']:,} of {false['pairs']:,}, {interval}, ", end="")
    print(f"in {false['rows_found']} of {false['rows']} rows   before {old.value:.1e} (n={old.n:,})")
    for one, other in false["examples"][:3]:
        print(f"    {one[:110]!r}\n    {other[:110]!r}")
    least = LEAST["characters" if corpus.characters else "words"]
    shares = {name: {"new": share(lines, "new"), "old": share(lines, "old")} for name, lines in by_change.items()}
    same = [found["new"]["value"] for name, found in shares.items() if not name.startswith("one ")]
    result = {"corpus": corpus.name, "recall": shares, "by_length": lengths, "false_positives": false}
    one_word = {name: lines for name, lines in by_change.items() if name.startswith("one ")}
    if corpus.slot is not None:
        result |= of_slot(corpus, by_change, seed, count)
        one_word = {name: [line for line in by_change[name] if line["same"]] for name in CHANGED}
    each = [share(lines, "new")["value"] >= (LEFT_OUT if "left" in name else least) for name, lines in one_word.items()]
    reached = all(each) and min(same) >= LEAST["words"]
    return {**result, "kept": reached and (not corpus.templated or rate.value <= FALSE)}


def of_slot(corpus: Corpus, by_change: dict[str, list[dict[str, Any]]], seed: int, count: int) -> dict[str, Any]:
    """What is found where the slot is as it was, and both shares with `count` copies at once, printed line by line."""
    found: dict[str, dict[str, Any]] = {"same_row": {}, "crowded": {}, "crowded_same_row": {}}
    for name, change in changes(corpus.characters).items():
        if not name.startswith("one "):
            continue
        crowded = [line for turn in range(ROUNDS) for line in recall(corpus, change, 1000 * seed + turn, count)]
        few, many = ([line for line in lines if line["same"]] for lines in (by_change[name], crowded))
        parts = {"same_row": few, "crowded": crowded, "crowded_same_row": many}
        print(f"  {name:14}", "; ".join(f"{part.replace('_', ' ')} {shown(lines, 'new')}" for part, lines in parts.items()))
        for part, lines in parts.items():
            found[part][name] = share(lines, "new")
    return found


def of_contained(seed: int) -> dict[str, Any]:
    """Recall of each edit of sentences, with the other rows as they are and edited too, and the other pairs that are found."""
    sentences = next(corpus.texts for corpus in corpora(seed) if corpus.name == "sentences of reviews")
    recalls: dict[str, Any] = {}
    kept = True
    for name, every in product(EDITS, (False, True)):
        if every and name in REARRANGED:
            continue
        originals, others, copies = edited(sentences, name, every=every, seed=seed)
        numbers = found_of(f"{name:32} {'every row ' if every else 'copies'}", originals, others, copies)
        recalls[f"{name}, every row" if every else name] = numbers
        kept &= numbers["value"] >= (ORDERED if name in REARRANGED else ADDED)
    false: dict[str, Any] = {}
    for name, texts in different_rows().items():
        rows = [row_of(text, str(i), "a") for i, text in enumerate(texts)]
        kinds = Counter(pair.kind for pair in find_duplicates({"training": rows}, DataSpec.near_duplicates))
        pairs = len(rows) * (len(rows) - 1) // 2
        false[name] = {"found": dict(kinds), "pairs": pairs}
        kept &= sum(kinds.values()) <= FALSE * pairs
        print(f"  {name}: {sum(kinds.values())} of {pairs:,} pairs of different rows are found", flush=True)
    return {"recall": recalls, "false_positives": false, "kept": kept}


def of_planted(seed: int) -> dict[str, Any]:
    """Recall in rows made of few phrases, in rows of fields, and in long rows of code."""
    every = {f"{language}, {name}": made for language in LANGUAGES for name, made in of_phrases(language, seed).items()}
    every |= {"fields in another order": of_fields(seed), "code, one word in a hundred replaced": of_code(seed)}
    return {name: found_of(f"{name:44}", rows[:COPIES], rows[COPIES:], copies) for name, (rows, copies) in every.items()}


def found_of(name: str, originals: Sequence[str], others: Sequence[str], copies: Sequence[str]) -> dict[str, Any]:
    """The share of the copies that are found with their originals, and how many other rows are found with one."""
    held_out = [row_of(text, f"held-out:{i}", "a") for i, text in enumerate(originals)]
    rest = [row_of(text, f"other:{i}", "a") for i, text in enumerate(others)]
    made = [row_of(text, f"copy:{i}", "a") for i, text in enumerate(copies)]
    found = find_duplicates({"held-out": held_out, "training": [*rest, *made]}, DataSpec.near_duplicates)
    across = {(pair.row.source, pair.twin.source) for pair in found if pair.row_part != pair.twin_part}
    right = sum((f"copy:{i}", f"held-out:{i}") in across for i in range(len(copies)))
    line, wrong = proportion(right, len(copies)), sum(row.startswith("other") for row, _ in across)
    print(f"  {name}  found {line}, other rows {wrong} of {len(others)}", flush=True)
    return {"value": line.value, "low": line.low, "high": line.high, "n": line.n, "other_rows": wrong}


def share(lines: Sequence[dict[str, Any]], which: str) -> dict[str, float]:
    """The share that is found, with its interval."""
    found = proportion(sum(line[which] for line in lines), len(lines))
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n}


def shown(lines: Sequence[dict[str, Any]], which: str) -> str:
    """The share as text."""
    found = share(lines, which)
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] n={found['n']}"


def own_texts(text: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, _, path = text.partition("=")
    return name, Path(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few copies and 10,000 rows, to see whether everything runs")
    parser.add_argument("--only", default="", help="kinds of texts whose name has this in it; no result is written")
    parser.add_argument("--texts", type=own_texts, action="append", default=[], help="NAME=FILE, one text a line: measured first")
    parser.add_argument("--seed", type=int, default=0, help="of the texts and the copies")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="where the result is written")
    given = parser.parse_args(arguments)
    about = origin()
    print(warn_if_busy(about) or "The machine is idle.", file=sys.stderr)
    own = [of_file(name, path, given.seed) for name, path in given.texts]
    contained = of_contained(given.seed) if not given.only or given.only == "contained" else {}
    planted_rows = of_planted(given.seed) if not given.only or given.only == "planted" else {}
    chosen = [*own, *(corpus for corpus in corpora(given.seed) if given.only in corpus.name)]
    found = [of_corpus(corpus, given.seed, PLANTED // 10 if given.quick else PLANTED) for corpus in chosen]
    if given.only:
        return 0
    scale: dict[str, dict[str, Any]] = defaultdict(dict)
    rows = 10_000 if given.quick else 100_000
    with TemporaryDirectory(prefix="lorakeet-bench-") as folder:
        for kind in SCALE:
            asked = {"kind": kind, "rows": rows, "seed": given.seed}
            scale[kind] = answered("contenders.leak_search", asked, Path(folder))
            print(f"{rows:,} rows, {kind}: {scale[kind]}", flush=True)
    kept = (
        contained["kept"] and all(part["kept"] for part in found) and all(part["seconds"] <= SECONDS for part in scale.values())
    )
    content = {
        "contained": contained,
        "few phrases, fields, code": planted_rows,
        "corpora": found,
        "scale": scale,
        "rows": rows,
        "planted": PLANTED,
        "rounds": ROUNDS,
        "kept": kept,
    }
    claim = "leaks_quick" if given.quick else "leaks"
    print(f"Written: {write_result(claim, content, seed=given.seed, about=about, folder=given.results)}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

